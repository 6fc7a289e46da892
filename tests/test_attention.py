"""layers.attention: every backend against loops over queries and keys, over sizes that hypothesis chooses; limits, gradients, choice, and the module's options."""
import math, re, sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.kernels.entropy_attention import blockwise_attention
from vitbook.layers.attention import (BACKENDS, Attention, allowed_pairs, attention, attention_scores, backends, choose, entropy, explain,
                                      masked_softmax, naive_attention, refusal)
from vitbook.layers.norm import RMSNorm
from vitbook.layers.position import apply_rope, rope_1d
from tools import ROOT, run


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@st.composite
def problems(draw, masked=True):
    "Queries, keys, values of odd sizes; perhaps a bias, a mask (with rows that may look at nothing), causality, a scale."
    b, h, n, m, d, e = (draw(st.integers(1, top)) for top in (2, 3, 7, 7, 6, 6))
    seed = draw(st.integers(0, 99))
    given = {}
    pairs = (1, 1, n, m) if b == n else (n, m)                            # of two axes it would be read in two ways where b is n
    if draw(st.booleans()): given['bias'] = seeded(*draw(st.sampled_from([(b, h, n, m), (1, h, n, m), pairs, (b, 1, 1, m)])), seed=seed)
    if masked and draw(st.booleans()): given['mask'] = seeded(*draw(st.sampled_from([(b, h, n, m), (b, 1, 1, m), pairs])), seed=seed + 1) > -.3
    if draw(st.booleans()): given['causal'] = True
    if draw(st.booleans()): given['scale'] = .7
    return seeded(b, h, n, d, seed=seed), seeded(b, h, m, d, seed=seed + 2), seeded(b, h, m, e, seed=seed + 3), given


def by_hand(q, k, v, bias=None, mask=None, causal=False, scale=None):
    "Attention a query at a time, in Python's own loops: nothing shared with the library."
    (b, h, n, d), m = q.shape, k.shape[2]
    scale = d**-.5 if scale is None else scale
    bias = torch.zeros(b, h, n, m).double() if bias is None else bias.expand(b, h, n, m)
    mask = torch.ones(b, h, n, m, dtype=torch.bool) if mask is None else mask.expand(b, h, n, m)
    out, weights = torch.zeros(b, h, n, v.shape[-1]).double(), torch.zeros(b, h, n, m).double()
    for i in range(b):
        for j in range(h):
            for y in range(n):
                seen = [x for x in range(m) if mask[i, j, y, x] and (not causal or x <= y + m - n)]
                if not seen: continue
                scores = [float(q[i, j, y] @ k[i, j, x]) * scale + float(bias[i, j, y, x]) for x in seen]
                parts = [math.exp(s - max(scores)) for s in scores]
                for x, part in zip(seen, parts): weights[i, j, y, x] = part / sum(parts)
                out[i, j, y] = weights[i, j, y] @ v[i, j]
    return out, weights


@settings(max_examples=40)
@given(problems())
def test_naive_attention_is_the_equation(problem):
    q, k, v, given = problem
    out, weights = naive_attention(q, k, v, **given)
    want, probabilities = by_hand(q, k, v, **given)
    assert_close(out, want)
    assert_close(weights, probabilities)


def refused(backend, q, k, v, given):
    "Whether a backend has a reason not to serve a problem; if so the call says it."
    why = None if backend == 'auto' else refusal(backend, bias='bias' in given, uneven='causal' in given and q.shape[2] != k.shape[2], head_dim_differs=k.shape[3] != v.shape[3])
    if why:
        with pytest.raises(ValueError, match=re.escape(why)): attention(q, k, v, backend=backend, **given)
    return why


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name not in ('flex', 'triton')] + ['auto'])    # flex and triton: further down, and in test_entropy_attention.py
@settings(max_examples=40)
@given(problems())
def test_backends_agree(backend, problem):
    q, k, v, given = problem
    if refused(backend, q, k, v, given): return
    assert_close(attention(q, k, v, backend=backend, **given), naive_attention(q, k, v, **given)[0])


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name not in ('flex', 'triton', 'naive')])
@settings(max_examples=15)
@given(problems())
def test_gradients_agree(backend, problem):
    q, k, v, given = problem
    if refused(backend, q, k, v, given): return
    def gradients(call):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        extra = given | ({'bias': given['bias'].clone().requires_grad_()} if 'bias' in given else {})
        call(*leaves, **extra).square().sum().backward()
        return [x.grad for x in (*leaves, *([extra['bias']] if 'bias' in extra else []))]
    for got, want in zip(gradients(lambda *x, **o: attention(*x, backend=backend, **o)), gradients(lambda *x, **o: naive_attention(*x, **o)[0])):
        assert got.isfinite().all()
        assert_close(got, want)


FLEX = """
import torch
from vitbook.layers.attention import attention, naive_attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 37, 16) for _ in range(3))
given = dict(bias=torch.randn(2, 37, 37), mask=torch.randn(37, 37) > -1, causal=True)
with torch.no_grad(): torch.testing.assert_close(attention(q, k, v, backend='flex', **given), naive_attention(q, k, v, **given)[0], atol=2e-5, rtol=1e-4)
print('agrees')
"""


def test_flex_agrees(tmp_path):
    "Bias, mask and causality together, at an odd size; in a process of its own, as the shape checks cannot be compiled."
    why = refusal('flex', bias=True, mask=True, causal=True)
    if why: pytest.skip(why)
    assert 'agrees' in run(sys.executable, '-c', FLEX, PYTHONPATH=str(ROOT)).stdout


def test_flex_is_refused_where_torch_cannot_compile_it(tmp_path):
    "An ARM processor, or one without AVX2: a sentence, not an error from the depth of a compilation."
    program = 'from vitbook.layers.attention import refusal\nfrom vitbook.kernels import packed_attention as p\n'
    program += "print(refusal('flex'), p.refusal('flex'), sep='; ')"
    said = run(sys.executable, '-c', program, PYTHONPATH=str(ROOT), ATEN_CPU_CAPABILITY='default').stdout
    if not torch.cuda.is_available(): assert said.count('AVX2 only') == 2, said


@settings(max_examples=40)
@given(problems())
def test_weights_and_entropy_on_request(problem):
    q, k, v, given = problem
    got = attention(q, k, v, return_weights=True, return_entropy=True, **given)
    _, p = by_hand(q, k, v, **given)
    assert_close(got.weights, p)
    assert_close(got.entropy, -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0).sum(-1))
    for backend in ('auto', 'blockwise', 'sdpa', 'twice'):
        if backend == 'twice' and refused(backend, q, k, v, given): continue
        other = attention(q, k, v, backend=backend, return_entropy=True, **given)
        assert other.weights is None
        assert_close(other.entropy, got.entropy)
        assert_close(other.out, got.out)


@settings(max_examples=15)
@given(problems())
def test_gradients_through_the_entropy_agree(problem):
    q, k, v, given = problem
    found = []
    for backend in ('naive', 'blockwise', 'sdpa'):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        attention(*leaves, v, backend=backend, return_entropy=True, **given).entropy.square().sum().backward()
        found.append([x.grad for x in leaves])
    for want, *others in zip(*found):
        for got in others: assert_close(got, want)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 23), st.integers(1, 9))
def test_the_size_of_a_block_changes_nothing(n, m, block):
    q, k, v = seeded(1, 2, n, 4), seeded(1, 2, m, 4, seed=1), seeded(1, 2, m, 3, seed=2)
    for causal in (False, True):
        for got, want in zip(blockwise_attention(q, k, v, causal=causal, block_size=block), blockwise_attention(q, k, v, causal=causal, block_size=m)): assert_close(got, want)


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name not in ('flex', 'triton')])
def test_a_query_that_sees_nothing_gives_zero(backend):
    q, k, v = (seeded(2, 2, 5, 4, seed=i).requires_grad_() for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = attention(q, k, v, mask=mask, backend=backend)
    out.sum().backward()
    assert out[:, :, 2].eq(0).all() and out.isfinite().all() and q.grad[:, :, 2].eq(0).all() and all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name not in ('flex', 'triton')])
def test_huge_scores_stay_finite(backend):
    q, k, v = (seeded(1, 1, 6, 4, seed=i, dtype=torch.float32) for i in range(3))
    out = attention(q * 1e4, k * 1e4, v, backend=backend)
    assert out.isfinite().all() and out.abs().max() <= v.abs().max() + 1e-5, 'a weighted mean stays between its values'


@given(st.integers(1, 4), st.integers(1, 12), st.floats(-50, 50))
def test_entropy_is_its_definition(rows, m, shift):
    s = seeded(rows, m) * 3
    p = s.softmax(-1)
    assert_close(entropy(s), -(p * p.log()).sum(-1))
    assert_close(entropy(s + shift), entropy(s))
    assert (entropy(s) >= 0).all() and (entropy(s) <= math.log(m) + 1e-12).all()
    assert_close(entropy(torch.zeros(m).double()), torch.tensor(math.log(m)).double())
    assert_close(entropy(torch.cat([s, torch.full((rows, 2), -math.inf).double()], -1)), entropy(s))


def test_entropy_at_its_limits():
    s = torch.tensor([[1e4, 0., -1e4], [-math.inf] * 3, [0., 0., -math.inf]]).double().requires_grad_()
    H = entropy(s)
    H.sum().backward()
    assert_close(H, torch.tensor([0., 0., math.log(2)]).double())
    assert s.grad.isfinite().all()


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_the_module_is_its_parts(b, n, h, d):
    module, x = Attention(h * d, h, qkv_bias=True).double(), seeded(b, n, h * d)
    q, k, v = (t.unflatten(-1, (h, d)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    assert_close(module(x), module.proj(by_hand(q, k, v)[0].transpose(1, 2).flatten(2)))


@pytest.mark.parametrize('backend', ['auto', 'naive', 'sdpa', 'blockwise', 'twice'])
def test_under_autocast_all_backends_are_lowered_alike(backend, unchecked):
    "Normalised queries and keys leave a LayerNorm in float32, values stay in autocast's dtype: all three become that of autocast, as in torch's own attention."
    if backend not in ('auto', 'naive', 'sdpa') and refusal(backend): pytest.skip(refusal(backend))
    q, k, v = (seeded(2, 3, 9, 16, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    with torch.autocast('cpu', torch.bfloat16):
        want = F.scaled_dot_product_attention(q, k, v.bfloat16())
        out, _, H = attention(q, k, v.bfloat16(), backend=backend, return_entropy=True)
    assert out.dtype == want.dtype == torch.bfloat16 and H.dtype == torch.float32
    assert_close(out, want, atol=1e-2, rtol=2e-2)
    low = [x.detach().bfloat16().double() for x in (q, k)]
    assert_close(H.double(), entropy(low[0] @ low[1].mT / 4), atol=2e-2 if backend == 'naive' else 1e-5, rtol=0)    # of the numbers it computed with; the naive form's scores are rounded too
    grads = torch.autograd.grad(out.float().square().sum() + H.sum(), (q, k, v))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().max() > 0 for g in grads)
    wide = [x.detach().double() for x in (q, k, v)]
    with torch.autocast('cpu', torch.bfloat16): assert attention(*wide, backend=backend).dtype == torch.float64          # float64 stays

    vit_like = Attention(48, 3, qk_norm=True)
    vit_like.backend = backend
    torch._dynamo.reset()
    compiled = torch.compile(vit_like, backend='aot_eager', fullgraph=backend in ('auto', 'naive', 'sdpa'))                # no break of the graph, on or off (of the other two's, older torch cannot trace the test's import hook)
    for model in (vit_like, compiled):
        with torch.autocast('cpu', torch.bfloat16): assert model(seeded(2, 5, 48, dtype=torch.float32)).dtype == torch.bfloat16
        assert model(seeded(2, 5, 48, dtype=torch.float32)).dtype == torch.float32


def test_attention_does_not_know_the_order():
    "Tokens in another order give the same outputs in that order; a causal mask breaks it."
    module, x, order = Attention(12, 3).double(), seeded(2, 9, 12), torch.randperm(9)
    assert_close(module(x[:, order]), module(x)[:, order])
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert not torch.allclose(module(x[:, order], mask=causal), module(x, mask=causal)[:, order])
    later = x.clone()
    later[:, 5:] += 1
    assert_close(module(later, mask=causal)[:, :5], module(x, mask=causal)[:, :5])


# ---- the parts

def test_pairs_and_scores_by_hand():
    mask = torch.rand(3, 5) > .3
    for n, m in ((3, 5), (5, 3), (4, 4)):
        seen = allowed_pairs(n, m, None, True, torch.device('cpu'))
        assert [[seen[i, j].item() for j in range(m)] for i in range(n)] == [[j <= i + m - n for j in range(m)] for i in range(n)]
    assert allowed_pairs(3, 5, None, False, torch.device('cpu')) is None and allowed_pairs(3, 5, mask, False, torch.device('cpu')) is mask
    assert torch.equal(allowed_pairs(3, 5, mask, True, torch.device('cpu')), mask & torch.ones(3, 5, dtype=torch.bool).tril(2))
    q, k, bias = seeded(1, 1, 3, 4), seeded(1, 1, 5, 4), seeded(3, 5)
    assert_close(attention_scores(q, k, bias=bias, mask=mask, scale=.3), torch.where(mask, (q @ k.mT) * .3 + bias, -math.inf))
    assert_close(attention_scores(q, k, causal=True), torch.where(allowed_pairs(3, 5, None, True, torch.device('cpu')), (q @ k.mT) / 2, -math.inf))
    assert attention_scores(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_a_row_of_nothing_has_no_weights_and_no_gradient():
    s = torch.tensor([[0., math.log(3.), -math.inf], [-math.inf] * 3], requires_grad=True)
    p = masked_softmax(s)
    assert_close(p.detach(), torch.tensor([[.25, .75, 0.], [0., 0., 0.]]))
    (p * torch.arange(3.)).sum().backward()
    assert_close(s.grad, torch.tensor([[-.1875, .1875, 0.], [0., 0., 0.]]))


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name not in ('flex', 'triton')] + ['auto'])
@pytest.mark.parametrize('more', [{}, dict(causal=True), dict(mask=True), dict(scale=.2)])
def test_shared_key_heads_serve_neighbours(backend, more):
    "Heads 0 and 1 look into key head 0, 2 and 3 into 1 …"
    q, k, v = seeded(2, 6, 5, 4), seeded(2, 3, 5, 4, seed=1), seeded(2, 3, 5, 4, seed=2)
    more = more | ({'mask': seeded(2, 1, 1, 5) > -1} if 'mask' in more else {})
    got = attention(q, k, v, backend=backend, **more)
    for head in range(6): assert_close(got[:, [head]], by_hand(q[:, [head]], k[:, [head // 2]], v[:, [head // 2]], **more)[0])


@pytest.mark.parametrize('backend', ['naive', 'sdpa', 'auto'])
def test_dropout_takes_weights_and_keeps_the_mean(backend):
    q, k, v = seeded(1, 1, 2000, 4), torch.zeros(1, 1, 4, 4).double(), torch.eye(4).double()[None, None]     # every weight 1/4, told apart by v
    out = attention(q, k, v, dropout_p=.25, backend=backend)
    assert_close(out.unique(), torch.tensor([0., 1 / 3]).double())
    assert abs((out == 0).double().mean() - .25) < .03 and abs(out.sum(-1).mean() - 1) < .03
    full = attention(q, k, v, dropout_p=.25, return_weights=True, return_entropy=True)
    assert_close(full.weights, torch.full_like(full.weights, .25))                            # weights and entropy as before dropout
    assert_close(full.entropy, torch.full_like(full.entropy, math.log(4)))
    assert attention(q, k, v, backend=backend, dropout_p=0.).eq(.25).all()


# ---- the choice

def test_what_auto_takes():
    for wanted, name in (({}, 'sdpa'), (dict(mask=True, bias=True, causal=True), 'sdpa'), (dict(weights=True, entropy=True), 'naive'), (dict(dropout=True), 'sdpa'),
                         (dict(entropy=True, dropout=True), 'sdpa'), (dict(entropy=True, bias=True), 'blockwise')):
        assert choose(**wanted)[0] == name and choose(**wanted)[1], wanted
        if name not in ('blockwise',): assert refusal(name, **wanted) is None
    assert refusal('sdpa', weights=True) == 'sdpa gives no weights' and refusal('twice', bias=True) == 'twice has no bias' and refusal('flex', dropout=True) == 'flex has no dropout'
    with pytest.raises(ValueError, match='backend.*fastest'): refusal('fastest')
    with pytest.raises(ValueError, match='unknown demand.*speed'): refusal('naive', speed=True)


def test_the_choice_is_explained():
    x = [seeded(1, 2, 5, 4)] * 3
    said = explain(*x, return_weights=True).splitlines()
    assert said[0].startswith('naive: ') and len(said) == len(BACKENDS) and 'sdpa: sdpa gives no weights' in said and 'flex: flex gives no weights' in said
    assert explain(*x).startswith('sdpa: ') and 'naive: could serve it too' in explain(*x) and 'twice has no bias' in explain(*x, bias=seeded(5, 5))
    assert 'blockwise: blockwise has no dropout' in explain(*x, dropout_p=.1) and explain(*x, return_entropy=True).split(':')[0] == choose(entropy=True, dtype=torch.float64, width=4)[0]


def test_the_table_of_backends():
    rows = {row['backend']: row for row in backends()}
    assert [*rows] == [*BACKENDS]
    for name, row in rows.items():
        for what in ('bias', 'mask', 'causal', 'dropout', 'weights', 'entropy', 'grad'): assert row[what] == (refusal(name, **{what: True}) is None)
        assert bool(row['why']) >= (not row['available']) and row['memory'] and row['made_of']
    assert rows['naive']['available'] and rows['sdpa']['available'] and not rows['sdpa']['weights'] and rows['naive']['weights']


# ---- the module

@pytest.mark.parametrize('norm', [nn.LayerNorm, RMSNorm])
def test_norms_of_queries_and_keys(norm):
    "Over each head for itself, before they turn."
    module, x, rope = Attention(24, 3, qk_norm=True, norm_layer=norm, qkv_bias=True).double(), seeded(2, 5, 24), rope_1d(4, 8)
    assert type(module.q_norm) is type(module.k_norm) is norm and module.q_norm.weight.shape == (8,)
    with torch.no_grad(): module.q_norm.weight.copy_(seeded(8)); module.k_norm.weight.copy_(seeded(8, seed=1))
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    q, k = module.q_norm(q), module.k_norm(k)
    assert_close(module(x), module.proj(by_hand(q, k, v)[0].transpose(1, 2).flatten(2)))
    q, k = (torch.cat([t[:, :, :1], apply_rope(t[:, :, 1:], *rope)], 2) for t in (q, k))                   # the first token has no place
    assert_close(module(x, rope=rope), module.proj(by_hand(q, k, v)[0].transpose(1, 2).flatten(2)))


def test_options_of_the_module():
    x, bias, mask = seeded(2, 5, 12), seeded(3, 5, 5) * 3, torch.ones(5, 5, dtype=torch.bool).tril()
    module = Attention(12, 3, proj_bias=False).double()
    assert module.proj.bias is None and module.qkv.bias is None and Attention(12, 3).proj.bias is not None and Attention(12, 3, qkv_bias=True).qkv.bias is not None
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    for more in (dict(bias=bias), dict(mask=mask), dict(bias=bias, mask=mask)):
        assert_close(module(x, **more), module.proj(by_hand(q, k, v, **more)[0].transpose(1, 2).flatten(2)))
    for option in ('attn_drop', 'proj_drop'):
        dropping, plain = Attention(12, 3, **{option: .4}).double(), Attention(12, 3).double()
        plain.load_state_dict(dropping.state_dict())
        torch.manual_seed(1)
        out = dropping(x)
        assert not torch.allclose(out, plain(x)) and torch.equal(dropping.eval()(x), plain(x)), option
        if option == 'proj_drop': assert ((out == 0) | ((out - plain(x) / .6).abs() < 1e-9)).all()
        else: assert (out != 0).all(), 'the weights are dropped, not the output'
    for backend in ('naive', 'blockwise'):
        module.backend = backend
        assert_close(module(x), module.proj(by_hand(q, k, v)[0].transpose(1, 2).flatten(2)))


@pytest.mark.parametrize('what, call', [
    ('num_heads', lambda: Attention(10, 3)),
    ('mask', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, mask=torch.ones(4, 5, dtype=torch.bool))),
    ('mask', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, mask=torch.ones(5, 5))),
    ('bias', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, bias=torch.zeros(3, 5, 5))),
    ('backend', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, backend='fastest')),
    ('backend', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, backend='sdpa', return_weights=True)),
    ('q, k, v', lambda: attention(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 4))),
    ('q, k, v', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 2, torch.zeros(1, 2, 5, 4).bfloat16())),
    ('q, k, v', lambda: attention(*[torch.zeros(2, 5, 4)] * 3)), ('q, k, v', lambda: attention(*[torch.zeros(1, 2, 5, 4).int()] * 3)),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()


@pytest.mark.parametrize('backend', ['auto', 'naive', 'sdpa', 'blockwise'])
def test_a_row_of_the_smallest_number_is_one_thing_everywhere(backend):
    "Added to all scores of a row the smallest float drowns them: the mean of all values; -inf shuts the row."
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    for low, want in ((torch.finfo(torch.float32).min, v.mean(2, keepdim=True).expand(-1, -1, 2, -1)),
                      (-math.inf, torch.zeros(1, 2, 2, 8))):
        bias = torch.zeros(1, 1, 6, 6).index_fill(2, torch.tensor([4, 5]), low)
        outs = [attention(q, k, v, bias=bias, backend=backend)[:, :, 4:],
                naive_attention(q, k, v, bias=bias)[0][:, :, 4:]]
        if backend != 'sdpa':
            outs.append(attention(q, k, v, bias=bias, backend=backend, return_entropy=True).out[:, :, 4:])
        for out in outs: assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_a_mask_of_two_axes_says_one_thing():
    "Batch x keys and queries x keys: refused where both fit, or only the first, with the way to write it."
    q, k, v = (torch.randn(6, 2, 6, 8) for _ in range(3))
    pad = torch.arange(6) < torch.tensor([6, 6, 3, 6, 2, 6])[:, None]
    with pytest.raises(ValueError, match='mask must say whether its 6 rows'): attention(q, k, v, mask=pad)
    with pytest.raises(ValueError, match=r'mask\[:, None, None\]'): attention(q[:, :, :4], k, v, mask=pad)
    out = attention(q, k, v, mask=pad[:, None, None])
    for i, n in enumerate(pad.sum(1).tolist()):
        assert_close(out[i:i + 1], attention(q[i:i + 1], k[i:i + 1, :, :n], v[i:i + 1, :, :n]), atol=1e-6,
                     rtol=1e-5)
    assert_close(attention(q[:4, :, :5], k[:4], v[:4], mask=pad[:5]),
                 attention(q[:4, :, :5], k[:4], v[:4], mask=pad[None, None, :5]))


@pytest.mark.parametrize('p', [-.1, 1.5, math.nan])
def test_dropout_outside_0_to_1_is_refused(p):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match='dropout_p'): attention(x, x, x, dropout_p=p)
    with pytest.raises(ValueError, match='attn_drop'): Attention(8, 2, attn_drop=p)
