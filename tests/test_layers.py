"""Properties of the layers, over sizes that hypothesis chooses: inverses, agreement of every way to compute one thing, limits, bad input."""
import math, re, sys, warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.layers.attention import BACKENDS, Attention, attention, blockwise_attention, entropy, naive_attention, refusal
from vitbook.layers.block import Block, DropPath, GatedMlp, LayerScale, Mlp
from vitbook.layers.conv import DepthwiseConv2d, map_to_tokens, tokens_to_map
from vitbook.layers.embed import PatchEmbed, patchify, unpatchify
from vitbook.layers.norm import LayerNorm2d
from vitbook.layers.position import RelativePositionBias, apply_rope, resize_position, rope_2d, sincos_1d, sincos_2d
from vitbook.layers.window import window_partition, window_reverse

from tools import ROOT, run

small, side = st.integers(1, 4), st.integers(1, 5)


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


# ---- pictures, patches, windows

@given(small, small, side, side, side, side)
def test_unpatchify_is_the_inverse_of_patchify(b, c, rows, cols, p, q):
    x = seeded(b, c, rows * p, cols * q)
    t = patchify(x, (p, q))
    assert t.shape == (b, rows * cols, c * p * q)
    assert torch.equal(unpatchify(t, (p, q), (rows, cols), c), x)
    assert torch.equal(t[:, -1], x[:, :, -p:, -q:].flatten(1)), 'the last patch is the lower right corner'


@given(small, side, side, side, st.integers(1, 8))
def test_patch_embedding_is_patchify_and_one_product(c, rows, cols, p, dim):
    embed = PatchEmbed((rows * p, cols * p), p, c, dim).double()
    x = seeded(2, c, rows * p, cols * p)
    assert_close(embed(x), patchify(x, p) @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    assert embed.grid_size == (rows, cols) and embed.num_patches == rows * cols


@given(small, small, side, side, side, side)
def test_window_reverse_is_the_inverse_of_partition(b, c, rows, cols, p, q):
    x = seeded(b, rows * p, cols * q, c)
    windows = window_partition(x, (p, q))
    assert windows.shape == (b * rows * cols, p * q, c)
    assert torch.equal(window_reverse(windows, (p, q), (rows * p, cols * q)), x)
    assert torch.equal(windows[0].reshape(p, q, c), x[0, :p, :q]), 'the first window is the upper left corner of the first map'


@given(small, small, side, side)
def test_tokens_and_maps_are_inverse(b, c, y, x):
    image = seeded(b, c, y, x)
    assert torch.equal(tokens_to_map(map_to_tokens(image), (y, x)), image)
    assert map_to_tokens(image)[0, -1].equal(image[0, :, -1, -1])


@given(st.integers(1, 6), st.sampled_from([1, 3, 5, 7]), side, side)
def test_depthwise_convolution_keeps_channels_apart(c, k, y, x):
    conv, image = DepthwiseConv2d(c, k).double(), seeded(1, c, y, x)
    out, changed = conv(image), image.clone()
    changed[:, 0] += 1
    assert out.shape == image.shape and torch.equal(conv(changed)[:, 1:], out[:, 1:])


@given(st.integers(2, 6), side, side)
def test_layer_norm_2d_is_layer_norm_over_the_channels(c, y, x):
    norm, image = LayerNorm2d(c).double(), seeded(2, c, y, x)
    with torch.no_grad(): norm.weight.copy_(seeded(c)); norm.bias.copy_(seeded(c, seed=1))
    assert_close(norm(image), torch.nn.functional.layer_norm(image.permute(0, 2, 3, 1), (c,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2))


# ---- attention

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


# ---- positions

@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 8, 12]))
def test_rope_keeps_norms_and_sees_only_differences(rows, cols, d):
    cos, sin = rope_2d(rows, cols, d)
    q = seeded(1, 1, rows * cols, d, dtype=torch.float32)
    turned = apply_rope(q, cos, sin)
    assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert_close(turned[:, :, 0], q[:, :, 0])
    same = torch.ones(1, 1, rows * cols, d) * seeded(d, dtype=torch.float32)      # one content at every place: scores can only say where
    s = (apply_rope(same, cos, sin) @ apply_rope(same * .5, cos, sin).mT)[0, 0].reshape(rows, cols, rows, cols)
    if rows > 1 and cols > 1: assert_close(s[1:, 1:, 1:, 1:], s[:-1, :-1, :-1, :-1], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.sampled_from([2, 4, 10]))
def test_sines_and_cosines(n, dim):
    p = sincos_1d(n, dim)
    assert p.shape == (n, dim)
    assert_close(p.square().sum(-1), torch.full((n,), dim / 2)), 'sin² + cos² of every frequency'
    assert len({tuple(row) for row in p.tolist()}) == n, 'every place has its own code'


@given(side, side, st.sampled_from([4, 8]))
def test_sincos_2d_tells_rows_from_columns(h, w, dim):
    p = sincos_2d(h, w, dim).reshape(h, w, dim)
    halves = p[..., :dim // 2], p[..., dim // 2:]
    along = [(half == half[:1]).all().item() for half in halves], [(half == half[:, :1]).all().item() for half in halves]
    assert any(along[0]) and any(along[1]), 'one half does not change with the row, the other not with the column'


@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2))
def test_resizing_positions(h, w, c, prefix):
    pos = seeded(1, prefix + h * w, c, dtype=torch.float32)
    assert torch.equal(resize_position(pos, (h, w), (h, w), prefix), pos), 'the same grid changes nothing'
    larger = resize_position(pos, (h, w), (2 * h, 2 * w + 1), prefix)
    assert larger.shape == (1, prefix + 2 * h * (2 * w + 1), c) and torch.equal(larger[:, :prefix], pos[:, :prefix])
    flat = torch.ones(1, prefix + h * w, c)
    assert_close(resize_position(flat, (h, w), (h + 3, w + 2), prefix), torch.ones(1, prefix + (h + 3) * (w + 2), c))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_relative_bias_depends_on_the_offset_only(h, w, heads):
    bias = RelativePositionBias((h, w), heads)()
    assert bias.shape[-2:] == (h * w, h * w)
    values = bias.reshape(heads, h, w, h, w)
    if h > 1: assert torch.equal(values[:, 1:, :, 1:], values[:, :-1, :, :-1])
    if w > 1: assert torch.equal(values[:, :, 1:, :, 1:], values[:, :, :-1, :, :-1])
    assert values[0].unique().numel() == (2 * h - 1) * (2 * w - 1), 'and differs between any two offsets'


# ---- blocks

def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    drop, x = DropPath(.3), torch.ones(4000, 3, 2)
    out = drop(x)
    kept = out.flatten(1).amax(1)
    assert set(kept.unique().tolist()) == {0., torch.tensor(1 / .7).item()} and abs(out.mean() - 1) < .05
    assert (out == kept[:, None, None]).all() and torch.equal(drop.eval()(x), x)


def test_layer_scale_and_mlps():
    x = seeded(2, 5, 8, dtype=torch.float32)
    assert_close(LayerScale(8, 1e-3)(x), x * 1e-3)
    for mlp in (Mlp(8, 16), Mlp(8, 16, 4), GatedMlp(8, 16)):
        out = mlp(x)
        assert out.shape[:2] == (2, 5) and torch.allclose(mlp(x[:, [3, 1]]), out[:, [3, 1]], atol=1e-6), 'each token for itself'


@pytest.mark.parametrize('position', ['pre', 'post'])
def test_block(position):
    block, x = Block(12, 3, qkv_bias=True, norm_position=position).double(), seeded(2, 7, 12)
    if position == 'pre': want = x + block.attn(block.norm1(x)); want = want + block.mlp(block.norm2(want))
    else: want = block.norm1(x + block.attn(x)); want = block.norm2(want + block.mlp(want))
    assert_close(block(x), want)


# ---- bad input: a ValueError that names the argument, where the mistake can first be seen

@pytest.mark.parametrize('what, call', [
    ('patch_size', lambda: patchify(torch.zeros(1, 3, 10, 8), 4)),
    ('patch_size', lambda: PatchEmbed(30, 8)),
    ('in_chans', lambda: PatchEmbed(8, 4, 3, 5)(torch.zeros(1, 4, 8, 8))),
    ('img_size', lambda: PatchEmbed(8, 4, 3, 5)(torch.zeros(1, 3, 12, 8))),
    ('grid', lambda: unpatchify(torch.zeros(1, 5, 12), 2, (2, 2))),
    ('window', lambda: window_partition(torch.zeros(1, 5, 6, 2), 3)),
    ('num_heads', lambda: Attention(10, 3)),
    ('num_heads', lambda: Block(10, 3)),
    ('mask', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, mask=torch.ones(4, 5, dtype=torch.bool))),
    ('mask', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, mask=torch.ones(5, 5))),
    ('bias', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, bias=torch.zeros(3, 5, 5))),
    ('backend', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, backend='fastest')),
    ('backend', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 3, backend='sdpa', return_weights=True)),
    ('q, k, v', lambda: attention(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 4))),
    ('q, k, v', lambda: attention(*[torch.zeros(1, 2, 5, 4)] * 2, torch.zeros(1, 2, 5, 4).bfloat16())), ('q, k, v', lambda: attention(*[torch.zeros(2, 5, 4)] * 3)), ('q, k, v', lambda: attention(*[torch.zeros(1, 2, 5, 4).int()] * 3)),
    ('head_dim', lambda: rope_2d(2, 2, 6)), ('dim', lambda: sincos_2d(2, 2, 6)), ('dim', lambda: sincos_1d(2, 3)),
    ('pos', lambda: resize_position(torch.zeros(1, 6, 4), 2, 3)),
    ('kernel_size', lambda: DepthwiseConv2d(3, 4)),
    ('t', lambda: tokens_to_map(torch.zeros(1, 5, 2), (2, 2))),
    ('norm_position', lambda: Block(8, 2, norm_position='middle')),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()


def test_signatures_are_checked_in_this_run():
    "The import hook is on: a wrong rank is refused by the signature, an int where a float is named is not."
    from jaxtyping import TypeCheckError
    from vitbook.layers.block import LayerScale
    from vitbook.layers.window import window_partition
    with pytest.raises(TypeCheckError): window_partition(torch.zeros(2, 4, 4), 2)
    assert LayerScale(3, 1).gamma.tolist() == [1, 1, 1]


def test_mlp_in_place_under_transforms():
    "Without gradients GELU overwrites its input: derivatives by torch.func, vmap and inference mode see the same function, and no caller's tensor changes."
    from vitbook.layers.block import Mlp
    torch.manual_seed(0)
    mlp, x = Mlp(6, 10, 4).double().requires_grad_(False), torch.randn(5, 6, dtype=torch.double)
    plain, total = lambda x: mlp.fc2(F.gelu(mlp.fc1(x))), lambda f: lambda x: f(x).square().sum()
    same, before = torch.testing.assert_close, x.clone()
    same(torch.func.jacrev(mlp)(x), torch.func.jacrev(plain)(x))
    same(torch.func.jacfwd(mlp)(x), torch.func.jacfwd(plain)(x))
    same(torch.func.hessian(total(mlp))(x), torch.func.hessian(total(plain))(x))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                  # vmap says that it loops
        same(torch.vmap(mlp)(x), plain(x))
    with torch.inference_mode(): same(mlp(x), plain(x))
    with torch.no_grad(): same(torch.func.grad(total(mlp))(x), torch.func.grad(total(plain))(x))
    assert torch.equal(x, before)
    tanh = Mlp(6, act_layer=lambda: nn.GELU('tanh')).double().requires_grad_(False)
    same(tanh(x), tanh.fc2(F.gelu(tanh.fc1(x), approximate='tanh')))
    identity = Mlp(6, 6).double().requires_grad_(False)
    identity.fc1 = nn.Identity()                                          # its output is the caller's tensor
    same(identity(x), identity.fc2(F.gelu(x)))
    assert torch.equal(x, before)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'hornet_tiny_7x7', 'crossformer_tiny', 'cvt_13', 'tnt_small_patch16_224', 'pvt_v2_b0'])
def test_a_forgotten_batch_is_named(name, unchecked):
    from vitbook.registry import create_model, model_info
    with pytest.raises(ValueError, match=r'x must be a batch.*\(3, 64, 64\); x\[None\]'): create_model(name, **model_info(name)['example'])(torch.rand(3, 64, 64))
