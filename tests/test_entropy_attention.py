"""Attention with entropy: four forms that agree, in all they are asked for, and the choice between them."""
import itertools, math, os, re, subprocess, sys, warnings

import pytest, torch
from hypothesis import example, given, strategies as st
from torch.testing import assert_close

from tools import ROOT
from vitbook import measure
from vitbook.kernels import entropy_attention as E

triton = pytest.importorskip('triton')
INF = math.inf


def inputs(b=2, h=2, g=2, n=17, m=23, d=16, e=16, bias=None, mask=None, dtype=torch.float32, seed=0, device='cpu'):
    "q, k, v that want gradients, a bias that does, and a mask; a whole row of the mask is closed where there are rows."
    r = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, y, z, generator=r).to(device, dtype).requires_grad_() for x, y, z in ((h, n, d), (g, m, d), (g, m, e)))
    B = None if bias is None else torch.randn(bias, generator=r).to(device, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    M = None if mask is None else (torch.rand(mask, generator=r) > .4)
    if M is not None and M.shape[-2] > 1: M[..., M.shape[-2] // 2, :] = False
    return q, k, v, B, None if M is None else M.to(device)


def outcome(f, q, k, v, bias, mask, **rest):
    "Three outputs and all gradients of a sum of them with fixed random weights; -inf becomes 0 after it was checked to be where it belongs."
    got = f(q, k, v, **(dict(bias=bias) if bias is not None else {}), mask=mask, **rest)
    r = torch.Generator().manual_seed(1)
    loss = sum((x.masked_fill(x == -INF, 0).double() * torch.randn(x.shape, generator=r).to(x.device).double()).sum() for x in got)
    given = [x for x in (q, k, v, bias) if x is not None]
    return [*got, *torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)]


def reference(q, k, v, bias, mask, **rest):
    "The equation in float64, of the very numbers given."
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    return outcome(E.naive_entropy_attention, *wide, mask, **rest)


def agree(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and not x.isnan().any()
        assert torch.equal(x == -INF, y == -INF)
        x, y = x.double().masked_fill(x == -INF, 0), y.masked_fill(y == -INF, 0)
        assert_close(x, y, rtol=tolerance, atol=tolerance * max(1., float(y.detach().abs().max()) if y.numel() else 1.))


CASES = [dict(), dict(causal=True), dict(n=23, causal=True), dict(n=23, mask=(23, 23), causal=True, seed=1), dict(n=23, mask=(2, 1, 1, 23), causal=True, seed=1), dict(n=23, mask=(2, 1, 23, 1), causal=True), dict(n=40, causal=True), dict(n=5, m=70, causal=True), dict(h=4, g=2, d=20, e=33, n=70, m=65), dict(mask=(2, 1, 1, 23)), dict(mask=(17, 23)), dict(h=4, g=1, n=1, m=1),
         dict(bias=(1, 2, 17, 23), mask=(1, 1, 17, 23)), dict(bias=(23,), mask=(2, 1, 1, 23), causal=True), dict(bias=(2, 17, 1), g=1), dict(bias=(2, 1, 17, 23), causal=True), dict(n=1, m=90), dict(n=90, m=1)]


def ways(case):
    "The backends that serve a case on this machine."
    q, k, v, bias, _ = inputs(**{x: y for x, y in case.items() if x != 'causal'})
    given = E._given(q, k, v, bias, case.get('causal', False))
    return [name for name in ('naive', 'blockwise', 'twice', 'triton') if E.refusal(name, 'cpu', **given) is None]


@pytest.mark.parametrize('case', CASES, ids=lambda c: ' '.join(f'{k}={v}' for k, v in c.items()) or 'plain')
def test_forms_agree(case):
    "Output, entropy, log-sum-exp and every gradient, float32 to 1e-5."
    rest = dict(causal=case.get('causal', False), scale=.3)
    given = inputs(**{x: y for x, y in case.items() if x != 'causal'})
    want = reference(*given, **rest)
    for way in ways(case): agree(outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), *given, **rest), want, 1e-5)


def test_the_cases_reach_every_backend():
    reached = {way for case in CASES for way in ways(case)}
    assert reached == {'naive', 'blockwise', 'twice', 'triton'}, reached


@pytest.mark.parametrize('d', [16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_triton_widths_and_dtypes(d, dtype, tolerance):
    given = inputs(b=1, n=67, m=71, d=d, e=d, mask=(1, 1, 67, 71), dtype=dtype)
    got = outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend='triton'), *given)
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == torch.float32
    agree(got, reference(*given), tolerance)


@pytest.mark.parametrize('way', ['blockwise', 'twice', 'triton'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(way, dtype):
    "Sums are in float32, so that only what goes in and out is rounded."
    given = inputs(b=1, n=33, m=40, dtype=dtype, mask=(1, 1, 1, 40))
    got = outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), *given)
    want = reference(*given)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    agree(got, want, 1e-2)
    agree(got[1:3], want[1:3], 1e-5 if way != 'triton' else 1e-4)


@given(st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]), st.integers(1, 70), st.one_of(st.none(), st.integers(1, 70)), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 40)), st.booleans(),
       st.sampled_from([None, 'keys', 'all', 'rows']), st.sampled_from([None, 'keys', 'all', 'heads']), st.integers(0, 9))
@example(1, (2, 1), 65, 64, 16, 16, True, 'all', 'all', 0)
@example(2, (2, 2), 9, None, 8, None, True, 'keys', None, 0)
def test_any_shape(b, heads, n, m, d, e, causal, mask, bias, seed):
    (h, g), m, e = heads, m or n, e or d                # None: as many keys as queries, values as wide as keys
    shapes = {None: None, 'keys': (b, 1, 1, m), 'all': (b, h, n, m), 'rows': (n, m), 'heads': (h, 1, 1)}
    given = inputs(b, h, g, n, m, d, e, shapes[bias], shapes[mask], seed=seed)
    want = reference(*given, causal=causal)
    sees = E._given(*given[:4], causal)
    for way in ('blockwise', 'twice', 'triton'):
        if E.refusal(way, 'cpu', **sees) is None: agree(outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), *given, causal=causal), want, 2e-5)


@pytest.mark.parametrize('way', ['naive', 'blockwise', 'twice'])
@pytest.mark.parametrize('causal', [False, True])
def test_gradcheck(way, causal):
    "By finite differences in float64, through all three outputs, with a closed row."
    q, k, v, bias, mask = inputs(b=1, n=5, m=5, d=3, e=3, bias=(2, 5, 5), mask=(5, 5), dtype=torch.float64)
    open_rows = lambda t: tuple(x.masked_fill(x == -INF, 0) for x in t)
    if way == 'twice': assert torch.autograd.gradcheck(lambda q, k, v: open_rows(E.twice_attention(q, k, v, mask=mask, causal=causal)), (q, k, v))
    else:
        f = E.naive_entropy_attention if way == 'naive' else lambda *a, **kw: E.blockwise_attention(*a, **kw, block_size=2)
        assert torch.autograd.gradcheck(lambda q, k, v, b: open_rows(f(q, k, v, bias=b, mask=mask, causal=causal)), (q, k, v, bias))


@pytest.mark.parametrize('way', ['naive', 'blockwise', 'twice', 'triton'])
def test_rows_that_see_nothing(way):
    "0, 0, -inf and gradients of 0, no nan; of one query, of all, and where there are no keys, queries or examples."
    q, k, v, _, _ = inputs(b=1, n=6, m=6)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    for closed in (mask, torch.zeros(6, 6, dtype=torch.bool)):
        out, H, lse, *grads = outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), q, k, v, None, closed)
        dead = ~closed.any(-1)
        assert not out[:, :, dead].any() and not H[:, :, dead].any() and (lse[:, :, dead] == -INF).all() and not grads[0][:, :, dead].any()
        assert all(x.isfinite().all() for x in (out, H, *grads)) and (dead.all() or lse[:, :, ~dead].isfinite().all())
    for n, m, b in ((0, 4, 1), (4, 0, 1), (0, 0, 1), (3, 3, 0)):
        q, k, v, _, _ = inputs(b=b, n=n, m=m)
        out, H, lse, *grads = outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), q, k, v, None, None)
        assert out.shape == (b, 2, n, 16) and H.shape == (b, 2, n) and (lse == -INF).all() and not out.any() and not H.any()


@pytest.mark.parametrize('way', ['naive', 'blockwise', 'triton'])
def test_a_bias_of_minus_infinity_hides(way):
    q, k, v, bias, _ = inputs(bias=(2, 2, 17, 23))
    mask = torch.rand(2, 2, 17, 23, generator=torch.Generator().manual_seed(3)) > .5
    mask[:, :, 4] = False
    f = lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way)
    agree(outcome(f, q, k, v, bias.detach().masked_fill(~mask, -INF).requires_grad_(), None)[:6], reference(q, k, v, bias, mask)[:6], 1e-5)


@pytest.mark.parametrize('way', ['blockwise', 'twice', 'triton'])
def test_what_entropy_must_be(way):
    "log m for equal scores, 0 for one that towers, never negative; unchanged by what is added to all keys."
    f = lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way)
    q, k, v, _, _ = inputs(n=30, m=37)
    assert_close(f(q * 0, k, v).entropy, torch.full((2, 2, 30), math.log(37)))
    one = f(q * 0 + 50, torch.cat([k[:, :, :1] * 0 + 50, k[:, :, 1:] * 0], 2), v)
    assert (one.entropy >= 0).all() and one.entropy.max() < 2e-3
    shifted = f(q, k + 3, v)
    plain = f(q, k, v)
    assert_close(shifted.entropy, plain.entropy, rtol=1e-5, atol=2e-5)
    assert_close(shifted.lse, plain.lse + (q * 3).sum(-1) / 4, rtol=1e-5, atol=2e-5)


def test_huge_scores_stay_finite():
    q, k, v, _, _ = inputs()
    for way in ('naive', 'blockwise', 'twice', 'triton'):
        got = outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), q * 1e4, k, v, None, None)
        assert all(x.isfinite().all() for x in got), way
        assert_close(got[0], E.naive_entropy_attention(q * 1e4, k, v).out, rtol=1e-3, atol=1e-3)


def test_entropy_alone():
    for case in CASES:
        q, k, _, bias, mask = inputs(**{x: y for x, y in case.items() if x != 'causal'})
        rest = dict(bias=bias, mask=mask, causal=case.get('causal', False))
        want = E.naive_entropy_attention(q, k, k, **rest).entropy
        g = torch.randn_like(want)
        wanted = torch.autograd.grad((want * g).sum(), (q, k))
        for way in ('auto', 'naive', 'blockwise', 'triton'):
            H = E.query_entropy(q, k, **rest, backend=way)
            assert_close(H, want, rtol=1e-5, atol=1e-5)
            for a, b in zip(torch.autograd.grad((H * g).sum(), (q, k)), wanted): assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='mean of a bias'): E.query_entropy(q, k, bias=torch.zeros(()), backend='twice')


def test_under_autocast():
    "What comes in is lowered once, as by torch's own attention; inside, sums stay in float32."
    q, k, v, _, _ = inputs()
    want = E.naive_entropy_attention(*(x.detach().bfloat16().double() for x in (q, k, v)))
    for way in ('blockwise', 'twice'):
        with torch.autocast('cpu', torch.bfloat16): got = E.entropy_attention(q, k, v, backend=way)
        assert got.out.dtype == torch.bfloat16 and got.entropy.dtype == got.lse.dtype == torch.float32
        for x, y in zip(got[1:], want[1:]): assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
        assert_close(got.out.double(), want.out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('way', ['blockwise', 'twice'])
def test_memory_is_linear(way):
    "Forward and backward, through the entropy; the growth exponent of the peak from 512 to 2048 tokens, with a mask of keys."
    def at(n):
        q, k, v, _, mask = inputs(b=1, h=1, g=1, n=n, m=n, mask=(1, 1, 1, n))
        def call():
            got = E.entropy_attention(q, k, v, mask=mask, backend=way)
            torch.autograd.grad(got.out.sum() + got.entropy.sum(), (q, k, v))
        return call
    assert measure.growth(at, (512, 1024, 2048), what='memory') < 1.25


@pytest.mark.parametrize('way', ['blockwise', 'twice'])
def test_under_compile(way, unchecked):
    given = inputs(b=1, n=19, m=19, mask=(19, 19))
    torch._dynamo.reset()
    f = torch.compile(lambda q, k, v, mask: E.entropy_attention(q, k, v, mask=mask, causal=True, backend=way), backend='aot_eager')
    agree(outcome(lambda *a, mask: f(*a, mask), *given), reference(*given, causal=True), 1e-5)


def test_choice_is_explained():
    q, k, v, bias, mask = inputs(n=23, bias=(23, 23), mask=(23, 23))
    assert E.choose('cpu')[0] == 'blockwise' and E.choose('cpu', alone=True)[0] == 'twice' and E.choose('cpu', alone=True, bias=True)[0] == E.choose('cpu', alone=True, uneven=True)[0] == 'blockwise'
    assert re.match('blockwise: on a CPU', E.explain(q, k, v, mask=mask)) and 'twice: could serve it too' in E.explain(q, k, v, mask=mask)
    told = E.explain(q, k, v, bias=bias)
    assert told.startswith('blockwise') and 'twice: the mean of a bias' in told and 'naive: could serve it too' in told
    assert E.choose('cpu', alone=True, bias=True)[1] == 'twice cannot: the mean of a bias under the weights is no mean of keys'
    assert E.choose('cuda', torch.float64) == ('blockwise', 'triton cannot: it knows no float64')
    assert 'may be 256 wide' in E.choose('cuda', width=300)[1]
    for backend, kw, match in (('twice', dict(bias=bias), 'mean of a bias'), ('nope', {}, 'backend must be'), ('naïve', {}, "got 'naïve'")):
        with pytest.raises(ValueError, match=match): E.entropy_attention(q, k, v, backend=backend, **kw)
    with pytest.raises(ValueError, match='as many queries'): E.entropy_attention(q[:, :, :5], k, v, causal=True, backend='twice')
    with pytest.raises(ValueError, match='float64'): E.entropy_attention(q.double(), k.double(), v.double(), backend='triton')


def test_without_triton_a_gpu_user_is_told():
    "Where Triton is missing the choice says so; Triton without a GPU and without the interpreter refuses."
    program = ("import sys\nsys.modules['triton'] = None\nimport torch\nfrom vitbook.kernels import entropy_attention as E\n"
               "print(E.choose('cuda'))\nE._backend('auto', 'cuda', torch.float32, {})")
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert "('blockwise', 'triton cannot: Triton is not installed (vitbook[gpu] brings it)')" in done.stdout and 'several times slower' in done.stderr, done.stderr
    program = ("import sys\nsys.modules['triton'] = None\nimport torch\nfrom vitbook.kernels import entropy_triton as T\nprint(T.tiles(64, 64), T.INTERPRETED)\n"
               "for f in (lambda: T.triton_attention(*torch.zeros(3, 1, 1, 2, 16)), lambda: T.resources('forward')):\n    try: f()\n    except ImportError as e: print(e)")
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("pip install 'vitbook[gpu]'") == 2 and "'ROWS': 64" in done.stdout, (done.stdout, done.stderr)
    program = "from vitbook.kernels import entropy_attention as E\nprint(E.refusal('triton', 'cpu'))"
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, env={'PATH': '', 'PYTHONPATH': ':'.join(sys.path)})
    assert 'it runs on GPUs, not on cpu' in done.stdout, done.stderr


def test_slow_on_a_gpu_is_said():
    "Whoever asks: attention with its entropy, the entropy alone, the attention of the layers; not where a fast path serves, nor on a CPU."
    for kind, given, warned in (('cuda', dict(width=300), True), ('cuda', dict(bias=True, width=300), True), ('cuda', {}, False), ('cpu', dict(bias=True), False), ('mps', {}, False)):
        E._warn_slow.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            E._backend('auto', kind, torch.float32, given)
        assert [str(w.message) for w in said] == (['entropy on a GPU without the Triton kernel is several times slower: triton cannot: keys and values may be 256 wide, not 300'] if warned else [])


def test_gpus_it_was_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert E.choose('cuda') == ('blockwise', "triton cannot: it is built and tested for NVIDIA's GPUs; AMD's have not been tried")


def test_every_way_in_goes_by_the_same_choice(monkeypatch):
    from vitbook.layers.attention import attention
    q, k, v, _, _ = inputs(n=23)
    asked, choice = [], E._backend
    monkeypatch.setattr(E, '_backend', lambda *a, **kw: asked.append(a[0]) or choice(*a, **kw))
    E.entropy_attention(q, k, v)
    E.query_entropy(q, k)
    attention(q, k, v, return_entropy=True)
    assert asked == ['auto'] * 3


def test_no_module_brings_triton_along():
    done = subprocess.run([sys.executable, '-c', 'import sys, vitbook, vitbook.layers.attention, vitbook.kernels.entropy_attention\nprint("triton" in sys.modules)'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == 'False', done.stderr


@pytest.mark.parametrize('change, match', [
    (dict(q=torch.zeros(2, 17, 16)), 'q, k, v must be'), (dict(k=torch.zeros(2, 2, 23, 8)), 'q, k, v must be'), (dict(v=torch.zeros(2, 2, 22, 16)), 'q, k, v must be'),
    (dict(k=torch.zeros(2, 3, 23, 16), v=torch.zeros(2, 3, 23, 16)), 'multiple of the 3 heads'), (dict(v=torch.zeros(2, 2, 23, 16).double()), 'one floating dtype'),
    (dict(mask=torch.zeros(17, 22, dtype=torch.bool)), 'mask must broadcast'), (dict(mask=torch.zeros(17, 23)), 'dtype bool'), (dict(bias=torch.zeros(3, 2, 17, 23)), 'bias must broadcast')])
def test_bad_arguments(change, match, unchecked):
    q, k, v, _, _ = inputs()
    for way in ('auto', 'naive', 'triton'):
        with pytest.raises(ValueError, match=match): E.entropy_attention(**(dict(q=q, k=k, v=v) | change), backend=way)
    with pytest.raises(ValueError, match='block_size'): E.blockwise_attention(q, k, v, block_size=0)


@pytest.mark.parametrize('bias', [(2, 2, 67, 71), (2, 1, 67, 71), (1, 2, 67, 71), (67, 71), (2, 2, 1, 71), (71,), (2, 2, 67, 1), (2, 1, 1), ()], ids=str)
def test_gradient_of_a_shared_bias(bias):
    "Entries that pictures, heads, queries or keys share get the sum, whichever way they share them."
    given = inputs(n=67, m=71, bias=bias)
    for way in ('blockwise', 'triton'): agree(outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend=way), *given, causal=True), reference(*given, causal=True), 1e-5)
    agree(outcome(lambda *a, **kw: E.blockwise_attention(*a, **kw, block_size=16), *given, causal=True), reference(*given, causal=True), 1e-5)      # several blocks meet in one entry


def test_more_heads_than_a_grid_is_high():
    "Windows times heads pass the 65,535 blocks that a GPU takes along its second and third axis; all of ours lie along the first."
    seen = []
    class Spy:
        def __init__(self, f): self.f = f
        def __getitem__(self, grid): return seen.append(grid) or self.f[grid]
    from vitbook.kernels import entropy_triton as T
    q, k, v, _, _ = inputs(b=3, h=4, g=2, n=70)
    names = ('_forward', '_to_queries', '_to_keys')
    kept = {n: getattr(T, n) for n in names}
    try:
        for n in names: setattr(T, n, Spy(kept[n]))
        outcome(lambda *a, **kw: E.entropy_attention(*a, **kw, backend='triton'), q, k, v, None, None)
    finally:
        for n in names: setattr(T, n, kept[n])
    go, back = T.tiles(16, 16, torch.float32), T.tiles(16, 16, torch.float32, backward=True)
    assert seen == [(12 * -(-70 // go['ROWS']),), (12 * -(-70 // back['ROWS']),), (6 * -(-23 // back['COLS']),)]


def test_tf32_only_where_torch_allows_it():
    from vitbook.kernels import entropy_triton as T
    before = torch.get_float32_matmul_precision()
    try:
        for setting, want in (('highest', 'ieee'), ('high', 'tf32'), ('highest', 'ieee')):
            torch.set_float32_matmul_precision(setting)
            assert T._precision(torch.float32) == want
    finally: torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('backend', ['auto', *E.BACKENDS])
def test_autocast_lowers_what_comes_in(backend):
    if backend != 'auto' and E.refusal(backend): pytest.skip(E.refusal(backend))
    q, k, v, _, M = inputs(n=9, m=13, g=1, mask=(1, 1, 9, 13))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    want, alone = E.entropy_attention(*low, mask=M, backend=backend), E.query_entropy(*low[:2], mask=M, backend=backend)
    with torch.autocast('cpu', torch.bfloat16):
        got = E.entropy_attention(q, k, low[2], mask=M, backend=backend)
        assert_close(E.query_entropy(q, low[1], mask=M, backend=backend), alone)
        assert E.explain(q, k, low[2], mask=M) == E.explain(*low, mask=M)
    assert got.out.dtype == torch.bfloat16
    for x, y in zip(got, want): assert_close(x.to(y.dtype), y, **(dict(rtol=2e-2, atol=1e-2) if backend == 'naive' else dict(rtol=0, atol=0)))      # the equation's own steps are autocast's
    with pytest.raises(ValueError, match='one floating dtype'): E.entropy_attention(q, k, low[2], backend=backend)


ahead_of_time = pytest.mark.skipif(not hasattr(triton, 'knobs'), reason='compiling for a GPU that is not there needs Triton 3.4')

@ahead_of_time
def test_kernels_compile_for_gpus_and_fit():
    "Built for GPUs that need not be there: shared memory within what the smallest of them has, and next to nothing spilled."
    program = ("import itertools, torch\nfrom vitbook.kernels.entropy_triton import resources\n"
               "for arch, dtype, d, masked in [(80, torch.bfloat16, 64, False), *itertools.product((80,), (torch.bfloat16, torch.float32), (64, 128, 256), (True,)), (86, torch.float16, 40, True), (90, torch.bfloat16, 64, True), (90, torch.float32, 64, True)]:\n"
               "    for kernel in ('forward', 'to_queries', 'to_keys'): print(arch, kernel, *resources(kernel, d, dtype, masked=masked, arch=arch).values())")
    done = subprocess.run([sys.executable, '-Wignore', '-c', program], cwd=ROOT, capture_output=True, text=True, env={n: x for n, x in os.environ.items() if n != 'TRITON_INTERPRET'})
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 30, done.stderr[-3000:]
    for arch, kernel, registers, spilled, shared in rows: assert int(registers) <= 255 and int(spilled) <= 256 and 0 < int(shared) <= 99 * 1024, (arch, kernel, registers, spilled, shared)


SPECIAL = """
import torch, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from vitbook.kernels import entropy_triton as T
for f in (T._forward, T._to_queries, T._to_keys):
    go = T.tiles(20, 33, torch.bfloat16, f is not T._forward)
    flags = dict.fromkeys(('BIAS', 'MASK', 'CAUSAL', 'BIAS_GRADIENT', 'ONE_ROW', 'ONE_COLUMN', 'SHARED'), True)
    kinds = dict.fromkeys(('H', 'L', 'DELTA', 'GH', 'GB', 'B'), '*fp32') | {'M': '*u8', 'scale': 'fp32'} | dict.fromkeys(('n', 'm', 'heads', 'group'), 'i32')
    for ones in ((), ('n',), ('m',), ('n', 'm', 'heads', 'group'), ('heads', 'group', 'q_n', 'k_n', 'b_n', 'm_m', 'gb_n', 'gb_m', 'g_d', 'g_n', 'q_b')):
        fixed = flags | dict(D=20, E=33, WIDE_D=32, WIDE_E=64, PRECISION='tf32', ROWS=go['ROWS'], COLS=go['COLS']) | dict.fromkeys(ones, 1)
        signature = {n: 'constexpr' if n in fixed else kinds.get(n) or ('*bf16' if n.isupper() else 'i32') for n in f.arg_names}
        constants = {(f.arg_names.index(n),): x for n, x in fixed.items() if n in f.arg_names}
        triton.compile(ASTSource(f, signature, constants), target=GPUTarget('cuda', 80, 32), options=dict(num_warps=go['num_warps'], num_stages=2))
        print(f.__name__, *ones)
"""

@ahead_of_time
def test_kernels_compile_where_an_argument_is_one():
    "Triton compiles an argument that is 1 (one query, one key, one head, a stride) as a constant: a kernel of its own, which the interpreter never sees."
    done = subprocess.run([sys.executable, '-Wignore', '-c', SPECIAL], cwd=ROOT, capture_output=True, text=True, env={n: x for n, x in os.environ.items() if n != 'TRITON_INTERPRET'})
    assert len(done.stdout.splitlines()) == 15, done.stderr[-3000:]


def test_resources_say_why_not():
    from vitbook.kernels import entropy_triton as T
    with pytest.raises(ValueError, match="kernel must be one of forward, to_queries, to_keys, got 'backward'"): T.resources('backward')
    if T.INTERPRETED:
        with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1'): T.resources('forward')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize('n, d', [(17, 16), (300, 40), (1000, 64), (517, 128), (200, 256)])
def test_on_a_gpu(dtype, tolerance, n, d):
    for causal, bias, mask in itertools.product((False, True), (None, (2, n, n)), (None, (2, 1, 1, n))):
        given = inputs(h=4, g=2, n=n, m=n, d=d, e=d, bias=None if bias is None else (4, n, n), mask=mask, dtype=dtype, device='cuda')
        assert E.choose('cuda', dtype, bias=bias is not None, width=d)[0] == 'triton'
        agree(outcome(E.entropy_attention, *given, causal=causal), reference(*given, causal=causal), tolerance)


@pytest.mark.parametrize('size', [1, 2, 5, 9])
def test_the_softmax_of_blocks_is_the_softmax(size):
    "Also with scores too large for an exponential, and queries that see nothing, at first or at all."
    g = torch.Generator().manual_seed(size)
    s = 400 * torch.randn(3, 6, 9, generator=g, dtype=torch.double)
    v = torch.randn(3, 9, 4, generator=g, dtype=torch.double)
    s[:, 1], s[:, 2, :5] = -math.inf, -math.inf
    top = s.new_full(s.shape[:-1], torch.finfo(s.dtype).min)
    total, out = torch.zeros_like(top), s.new_zeros(3, 6, 4)
    for at in range(0, 9, size):
        e, top, total, fell, shrink = E.softmax_step(s[..., at:at + size].clone(), top, total)
        assert torch.equal(shrink, fell.exp()) and (fell <= 0).all() and (e <= 1).all()
        out = shrink[..., None] * out + e @ v[:, at:at + size]
    mean, lse, some, safe = E.softmax_end(top, total, out)
    sees = [0, 2, 3, 4, 5]
    torch.testing.assert_close(mean[:, sees], (s.softmax(-1) @ v)[:, sees])
    torch.testing.assert_close(lse[:, sees], s.logsumexp(-1)[:, sees])
    assert some[:, sees].all() and not some[:, 1].any()
    assert (mean[:, 1] == 0).all() and (lse[:, 1] == -math.inf).all() and (safe[:, 1] == 1).all()
