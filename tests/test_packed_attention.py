"""Packed attention: every backend against the loop by the equation, over all kinds of packs; gradients, dtypes, bad input."""
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from vitbook.kernels import packed_attention as P
from vitbook.kernels.packed_attention import naive_packed_attention, packed_attention, plan, refusal, segment_ids

PLAIN = [name for name in P.BACKENDS if name not in ('flex', 'varlen')]     # these need a compiler and a GPU
PACKS = {'equal': [4, 4, 4], 'ragged': [5, 1, 7, 3], 'one': [9], 'singles': [1, 1, 1], 'with empty ones': [0, 4, 0, 0, 2, 0], 'windows': [6, 6, 4, 6, 6, 4, 3, 3, 2]}


def pack(lengths, heads=4, groups=4, dim=6, out=5, dtype=torch.float64, seed=0):
    g, n = torch.Generator().manual_seed(seed), sum(lengths)
    make = lambda h, d: torch.randn(n, h, d, generator=g, dtype=dtype)
    return make(heads, dim), make(groups, dim), make(groups, out), [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('kind', PACKS)
@pytest.mark.parametrize('backend', [*PLAIN, 'auto'])
def test_all_backends_equal_the_loop(backend, kind, causal):
    for groups in (4, 2, 1):
        q, k, v, ends = pack(PACKS[kind], groups=groups)
        want = naive_packed_attention(q, k, v, ends, causal=causal, scale=.7)
        assert_close(packed_attention(q, k, v, ends, causal=causal, scale=.7, backend=backend), want)
        assert_close(packed_attention(q, k, v, torch.tensor(ends, dtype=torch.int32), causal=causal, scale=.7, backend=backend), want)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.booleans())
def test_any_pack(lengths, causal):
    q, k, v, ends = pack(lengths)
    want = naive_packed_attention(q, k, v, ends, causal=causal)
    assert want.shape == (sum(lengths), 4, 5)
    for backend in PLAIN: assert_close(packed_attention(q, k, v, ends, causal=causal, backend=backend), want)


@pytest.mark.parametrize('backend', PLAIN)
def test_segments_do_not_see_each_other(backend):
    q, k, v, ends = pack([5, 3, 6])
    before = packed_attention(q, k, v, ends, backend=backend)
    for x in (q, k, v): x[5:8] += 100 * torch.randn_like(x[5:8])
    after = packed_attention(q, k, v, ends, backend=backend)
    keep = segment_ids(ends) != 1
    assert_close(after[keep], before[keep])
    assert (after[~keep] - before[~keep]).abs().max() > 1
    alone = packed_attention(*(x[8:] for x in (q, k, v)), [0, 6], backend=backend)
    assert_close(after[8:], alone)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('backend', PLAIN)
def test_gradients(backend, causal):
    q, k, v, ends = (x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in pack([2, 3, 2], heads=2, groups=1, dim=2, out=2))
    assert gradcheck(lambda q, k, v: packed_attention(q, k, v, ends, causal=causal, backend=backend), (q, k, v))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('backend', PLAIN)
def test_dtypes(backend, dtype):
    q, k, v, ends = pack(PACKS['windows'], dtype=torch.float32)
    out = packed_attention(*(x.to(dtype) for x in (q, k, v)), ends, backend=backend)
    assert out.dtype == dtype
    assert_close(out.float(), naive_packed_attention(q, k, v, ends), atol=1e-5 if dtype == torch.float32 else .03, rtol=1e-4 if dtype == torch.float32 else .05)


@pytest.mark.skipif(refusal('flex') is not None, reason=str(refusal('flex')))
def test_flex(unchecked):
    q, k, v, ends = pack([40, 24, 7], dim=16, out=16, dtype=torch.float32)
    with torch.no_grad():
        for causal in (False, True): assert_close(packed_attention(q, k, v, ends, causal=causal, backend='flex'), naive_packed_attention(q, k, v, ends, causal=causal), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA')
@pytest.mark.parametrize('backend', P.BACKENDS)
def test_on_cuda(backend, unchecked):
    q, k, v, ends = pack([40, 24, 7, 64], dim=32, out=32, dtype=torch.float32)
    for causal in (False, True):
        out = packed_attention(*(x.cuda().bfloat16() for x in (q, k, v)), ends, causal=causal, backend=backend)
        assert_close(out.float().cpu(), naive_packed_attention(q, k, v, ends, causal=causal), atol=.03, rtol=.05)


def test_what_is_refused_and_why(unchecked):
    q, k, v, ends = pack([5, 3])
    wrong = {'begin with 0': [1, 8], 'not fall': [0, 5, 3, 8], 'number of tokens, 8': [0, 5], 'tokens, 8': []}
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message): packed_attention(q, k, v, bad)
    with pytest.raises(ValueError, match='backend.*grouped.*fast'): packed_attention(q, k, v, ends, backend='fast')
    with pytest.raises(ValueError, match='heads of q'): packed_attention(q[:, :3], k[:, :2], v[:, :2], ends)
    with pytest.raises(ValueError, match=r'n h d'): packed_attention(q, k[:4], v, ends)
    with pytest.raises(ValueError, match='varlen.*CUDA|varlen.*torch'): packed_attention(q, k, v, ends, backend='varlen')
    with pytest.raises(ValueError, match='flex.*(gradient|compiler|FlexAttention|width)'): packed_attention(q.requires_grad_(), k, v, ends, backend='flex')
    for name in P.BACKENDS: assert refusal(name) is None or len(refusal(name)) > 10


def test_an_older_torch_is_told_what_it_lacks(monkeypatch):
    for module in ('flex_attention', 'varlen'): monkeypatch.setitem(sys.modules, f'torch.nn.attention.{module}', None)      # as if it were not there
    assert 'has no varlen_attn' in refusal('varlen', 'cuda', torch.bfloat16) and 'has no FlexAttention' in refusal('flex')
    q, k, v, ends = pack([5, 3])
    assert packed_attention(q, k, v, ends).shape == v.shape[:1] + (q.shape[1], v.shape[2])


def test_the_plan():
    p = plan([0, 4, 4, 6, 10], 10)
    assert p.groups == ((4, (0, 6)), (2, (4,))) and p.lengths == [4, 4, 2] and not p.equal and p.scores() == 36 and p.waste() == 48 / 36
    assert plan(torch.tensor([0, 3, 6]), 6).equal and plan([0], 0).groups == ()
    assert segment_ids([0, 2, 2, 3]).tolist() == [0, 0, 2]


def test_the_choice():
    "On a CPU a saved call must be worth the copy; on a GPU few calls count."
    of = lambda lengths: plan([0, *torch.tensor(lengths).cumsum(0).tolist()], sum(lengths))
    assert P.choose(of([500] * 3)) == P.choose(of([64])) == 'grouped'                   # a view: nothing moves
    short, long, ragged = of([9] * 40 + [5] * 4), of([400] * 40 + [300] * 4), of(list(range(40, 60)))
    assert P.choose(short) == 'grouped' and P.choose(long) == P.choose(ragged) == 'loop'
    assert P.choose(short, width=16) == 'grouped' and P.choose(short, width=5000) == 'loop'
    assert P.choose(short, 'cuda') == P.choose(long, 'cuda') == 'grouped' and P.choose(ragged, 'cuda') == 'padded' and P.choose(of([1, 39]), 'cuda') == 'grouped'


@pytest.mark.parametrize('backend', ['loop', 'grouped', 'padded'])
def test_backward_is_linear_in_the_segments(backend):
    "Slices of the pack would each have a gradient as long as the pack."
    def elements(n):
        q, k, v, ends = (x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in pack([3, 2] * n, dtype=torch.float32))
        out, total = packed_attention(q, k, v, ends, backend=backend), [0]
        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, f, types, args=(), kwargs=None):
                got = f(*args, **(kwargs or {}))
                total[0] += sum(x.numel() for x in (got if isinstance(got, (tuple, list)) else [got]) if isinstance(x, torch.Tensor))
                return got
        with Count(): out.sum().backward()
        return total[0]
    assert elements(32) < 5 * elements(8)


def test_indices_made_in_inference_mode_do_not_stay():
    "What is kept between calls must serve training after inference."
    q, k, v, ends = pack([3, 5, 4])
    with torch.inference_mode(): packed_attention(q, k, v, ends)
    packed_attention(q.requires_grad_(), k, v, ends).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize('kind', ['equal', 'windows'])
def test_it_compiles(kind, unchecked):
    q, k, v, ends = pack(PACKS[kind], dtype=torch.float32)
    torch._dynamo.reset()
    out = torch.compile(lambda q, k, v: packed_attention(q, k, v, ends), backend='aot_eager', fullgraph=True)(q, k, v)
    assert_close(out, naive_packed_attention(q, k, v, ends), atol=1e-5, rtol=1e-4)


def test_a_probe_sees_it():
    from vitbook.probe import recording
    q, k, v, ends = pack([4] * 8 + [2], dtype=torch.float32)
    with recording() as rec: packed_attention(q, k, v, ends)
    assert [tuple(w.shape) for w in rec.weights] == [(8, 4, 4, 4), (1, 4, 2, 2)]
