"""dynamics.information_pathways: the draws, the three forms of subsampled attention, the context manager on foreign models, ensembles, and what they answer to bad input."""
import copy, math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vitbook.dynamics import information_pathways as P
from vitbook.layers.attention import Attention, attention, naive_attention
from vitbook.layers.block import Block
from vitbook.layers.position import RelativePositionBias, rope_2d
from vitbook.registry import create_model
from vitbook.vit import VisionTransformer


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=rng(seed), dtype=torch.double)
def qkv(b=2, h=3, n=12, d=4, seed=0): return [normal(b, h, n, d, seed=seed + i).requires_grad_() for i in range(3)]
def vit(**more): return VisionTransformer(**dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=3) | more)
def kept(idx, b, n): return torch.zeros(b, n, dtype=torch.bool).scatter(1, idx.expand(b, -1), True)


# the draw

def test_every_key_is_as_likely_as_any_other():
    n, k, draws = 16, 4, 2000
    idx = P.sample_keys(n, k, draws, generator=rng(0))
    assert idx.shape == (draws, k) and (idx.diff(dim=-1) > 0).all()                                    # no repeats
    often = torch.bincount(idx.flatten(), minlength=n).double()
    assert ((often - draws * k / n).abs() < 4 * math.sqrt(draws * k / n * (1 - k / n))).all()
    together = kept(idx, draws, n).double()
    pair = (together.T @ together)[~torch.eye(n, dtype=torch.bool)] / draws                            # without replacement: k(k-1) / n(n-1), not (k/n)^2
    assert (pair - k * (k - 1) / n / (n - 1)).abs().max() < 4.5 * math.sqrt(.05 * .95 / draws)


def test_draws_differ_between_layers_samples_and_steps_and_repeat_with_the_generator():
    a, b = P.sample_keys(64, 8, 5, generator=rng(0)), P.sample_keys(64, 8, 5, generator=rng(0))
    assert torch.equal(a, b) and len({tuple(r.tolist()) for r in a}) == 5
    assert P.sample_keys(64, 8, 5, per_sample=False).shape == (1, 8)
    x, model = torch.rand(3, 1, 8, 8), vit(depth=3)
    seen = []
    def note(*args, **kw):
        seen.append(sample(*args, **kw))
        return seen[-1]
    sample, P.sample_keys = P.sample_keys, note
    try:
        for seed in (0, 0, 1):
            with P.subsampled(model, keys=4, generator=rng(seed)): model(x), model(x)
    finally: P.sample_keys = sample
    runs = [seen[i:i + 6] for i in (0, 6, 12)]                                                         # 2 steps x 3 layers
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert len({str(i.tolist()) for i in runs[0]}) == 6                                                # layers and steps
    assert all(len({tuple(r.tolist()) for r in i}) == 3 for i in runs[0])                              # samples
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2]))


def test_first_tokens_and_padding():
    idx = P.sample_keys(10, 4, 300, always=2)
    assert (idx[:, :2] == torch.tensor([0, 1])).all() and (idx[:, 2:] >= 2).all()
    valid = torch.arange(10) < torch.tensor([10, 6, 3])[:, None]
    idx = P.sample_keys(10, 4, 3, valid=valid)
    assert (idx[1] < 6).all() and set(idx[2].tolist()) > {0, 1, 2}                                     # padding only when nothing else is left


# unbiased SSA

@given(st.integers(1, 3), st.integers(2, 20), st.integers(0, 999))
def test_all_keys_in_any_order_are_dense_attention(b, n, seed):
    q, k, v = qkv(b, 2, n, seed=seed)
    idx = torch.stack([torch.randperm(n, generator=rng(seed + i)) for i in range(b)])
    bias = normal(1, 2, n, n, seed=seed)
    for one in (idx, idx[:1]):
        assert_close(P.subsampled_attention(q, k, v, one), naive_attention(q, k, v)[0], atol=1e-6, rtol=0)
        assert_close(P.subsampled_attention(q, k, v, one, bias=bias), naive_attention(q, k, v, bias=bias)[0], atol=1e-6, rtol=0)
    causal = naive_attention(q, k, v, causal=True)[0]
    assert_close(P.subsampled_attention(q, k, v, idx, causal=True), causal, atol=1e-6, rtol=0)
    assert_close(P.subsampled_attention(q, k, v, idx, mask=torch.ones(n, n, dtype=torch.bool).tril()), causal, atol=1e-6, rtol=0)


@given(st.integers(1, 3), st.integers(2, 20), st.integers(1, 20), st.booleans(), st.integers(0, 999))
def test_gathering_is_masking(b, n, k, per_sample, seed):
    k = min(k, n)
    q, K, v = qkv(b, 2, n, seed=seed)
    idx = P.sample_keys(n, k, b, per_sample=per_sample, generator=rng(seed))
    mask = kept(idx, b, n)[:, None, None]
    rel = RelativePositionBias((1, n), 2).double()
    for bias in (None, rel(), normal(b, 2, n, n, seed=seed), normal(b, 1, 1, n, seed=seed), normal(n, 1, seed=seed)):
        assert_close(P.subsampled_attention(q, K, v, idx, bias=bias), naive_attention(q, K, v, bias=bias, mask=mask)[0], atol=1e-5, rtol=0)
    grad = lambda out: torch.autograd.grad(out.square().sum(), [q, K, v, rel.relative_position_bias_table])
    for a, c in zip(grad(P.subsampled_attention(q, K, v, idx, bias=rel())), grad(naive_attention(q, K, v, bias=rel(), mask=mask)[0])): assert_close(a, c)


def test_rows_sum_to_one_dropped_keys_get_no_gradient_queries_do():
    q, k, v = qkv()
    idx = P.sample_keys(12, 5, 2, generator=rng(1))
    ones = P.subsampled_attention(q, k, torch.ones(2, 3, 12, 1, dtype=torch.double), idx)
    assert_close(ones, torch.ones_like(ones))
    P.subsampled_attention(q, k, v, idx).square().sum().backward()
    there = kept(idx, 2, 12)
    for t in (k, v):
        size = t.grad.abs().sum((1, 3))
        assert (size[~there] == 0).all() and (size[there] > 0).all()
    assert (q.grad.abs().sum((1, 3)) > 0).all()
    dropped = F.dropout(naive_attention(q, k, v)[1], .5).sum(-1)                                       # attention dropout is another thing: rows no longer sum to 1
    assert (dropped - 1).abs().max() > .2


def test_one_key_gives_everybody_its_value():
    attn, x = P.SubsampledAttention(24, 3, P.Sampling(keys=1)).double(), normal(4, 9, 24)
    torch.manual_seed(5)
    out = attn(x)
    torch.manual_seed(5)
    j = P.sample_keys(9, 1, 4)[:, 0]
    v = attn.qkv(x)[torch.arange(4), j, 48:]
    assert_close(out, attn.proj(v)[:, None].expand(-1, 9, -1))


def test_causal_queries_see_no_later_key_and_never_nothing():
    q, k, v = qkv(2, 2, 15)
    idx = P.sample_keys(15, 4, 2, generator=rng(3))
    seen = kept(idx, 2, 15)[:, None, None] & torch.ones(15, 15, dtype=torch.bool).tril() | torch.eye(15, dtype=torch.bool)
    bias = normal(1, 2, 15, 15)
    assert_close(P.subsampled_attention(q, k, v, idx, causal=True, bias=bias), naive_attention(q, k, v, mask=seen, bias=bias)[0])
    assert_close(P.subsampled_attention(q, k, v, idx, mask=torch.ones(15, 15, dtype=torch.bool).tril(), bias=bias), naive_attention(q, k, v, mask=seen, bias=bias)[0])
    pad = torch.arange(15) < torch.tensor([15, 7])[:, None]
    assert_close(P.subsampled_attention(q, k, v, idx, mask=pad[:, None, None], causal=True), naive_attention(q, k, v, mask=seen & pad[:, None, None])[0])


def test_grouped_keys_and_cross_attention():
    q, k, v = normal(2, 4, 6, 8), normal(2, 2, 11, 8, seed=1), normal(2, 2, 11, 8, seed=2)
    idx = P.sample_keys(11, 3, 2)
    assert_close(P.subsampled_attention(q, k, v, idx), attention(q, k, v, mask=kept(idx, 2, 11)[:, None, None]))
    assert_close(P.locally_biased_attention(*(t[:, :, :6] for t in (q, k, v)), window=6), attention(q, k[:, :, :6], v[:, :, :6]))


# source dropout

def test_source_dropout_is_never_nan_and_keeps_its_share():
    q, k, v = qkv()
    for p in (0., .3, 1.):
        out = P.source_dropout_attention(q, k, v, p)
        assert out.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
    assert_close(P.source_dropout_attention(q, k, v, 0.), naive_attention(q, k, v)[0])
    keep = P.source_keep(16, 1., 50)
    assert keep.shape == (50, 1, 1, 16) and (keep.sum(-1) == 1).all()                                  # where all would go, one stays
    keep = P.source_keep(16, .3, 4000, generator=rng(0)).double().mean(0).flatten()
    assert (keep - .7).abs().max() < 4 * math.sqrt(.21 / 4000)
    pairs = P.source_keep(16, .5, 2, pairs=(3, 16))
    assert pairs.shape == (2, 3, 16, 16) and pairs.any(-1).all() and not torch.equal(pairs[:, 0], pairs[:, 1])
    torch.manual_seed(1)
    out = P.source_dropout_attention(q, k, v, .5)
    torch.manual_seed(1)
    assert_close(out, naive_attention(q, k, v, mask=P.source_keep(12, .5, 2))[0])
    assert P.source_dropout_attention(q, k, v, 1., causal=True).isfinite().all()
    assert P.source_dropout_attention(q, k, v, .9, mask=torch.ones(12, 12, dtype=torch.bool).tril()).abs().sum(-1).min() > 0   # no empty rows
    assert (P.source_keep(9, 1., 5, always=2)[..., :2]).all()


# locally biased SSA

SIZES = [(12, 4), (13, 4), (7, 10), ((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 3), 5), ((1, 9), 4), ((6, 2), (4, 1))]

@pytest.mark.parametrize('size,window', SIZES)
@pytest.mark.parametrize('sigma,shift,always', [(0., False, 0), (0., True, 2), (1.5, False, 2), (1.5, True, 0), (1e4, True, 2)])
def test_local_attention_is_dense_attention_under_its_mask(size, window, sigma, shift, always):
    (H, W), _ = P.grid_and_window(size, window)
    n = H * W
    q, k, v = qkv(2, 2, n + always)
    w = P.local_windows(size, window, sigma, 2, shift=shift, generator=rng(1))
    pairs = P.pair_matrix(w, n).expand(2, -1, -1)
    assert all(torch.equal(t.where(w.real, n).flatten(1).sort(-1).values[:, :n], torch.arange(n).expand(len(t), -1)) for t in w[:2])   # every token once
    mask = torch.ones(2, n + always, n + always, dtype=torch.bool)
    mask[:, always:, always:] = pairs
    for bias in (None, normal(1, 2, n + always, n + always)):
        out = P.locally_biased_attention(q, k, v, size=size, window=window, windows=w, always=always, bias=bias)
        assert_close(out, naive_attention(q, k, v, bias=bias, mask=mask[:, None])[0])
    pad = torch.rand(2, 1, 1, n + always, generator=rng(2)) < .8
    assert_close(P.locally_biased_attention(q, k, v, size=size, window=window, windows=w, always=always, mask=pad), naive_attention(q, k, v, mask=mask[:, None] & pad)[0])
    again = P.locally_biased_attention(q, k, v, size=size, window=window, sigma=sigma, shift=shift, always=always, generator=rng(1))
    assert_close(again, P.locally_biased_attention(q, k, v, size=size, window=window, windows=w, always=always))
    if isinstance(size, int):
        eye, seen = torch.eye(n + always, dtype=torch.bool), mask & torch.ones(n + always, n + always, dtype=torch.bool).tril()
        want = naive_attention(q, k, v, mask=(seen | eye)[:, None])[0]
        assert_close(P.locally_biased_attention(q, k, v, size=size, window=window, windows=w, always=always, causal=True), want)
        assert_close(P.locally_biased_attention(q, k, v, size=size, window=window, windows=w, always=always, mask=torch.ones_like(eye).tril()), want)


def test_no_noise_is_block_attention():
    from vitbook.layers.window import window_partition, window_reverse
    q, k, v = qkv(2, 3, 24)
    blocks = [t.unflatten(2, (6, 4)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    want = naive_attention(*blocks)[0].unflatten(0, (2, 6)).transpose(1, 2).flatten(2, 3)
    assert_close(P.locally_biased_attention(q, k, v, window=4), want)
    cut = lambda t: window_partition(t.transpose(1, 2).flatten(2).unflatten(1, (4, 6)), (2, 3)).unflatten(-1, (3, 4)).transpose(1, 2)
    out = window_reverse(naive_attention(*map(cut, (q, k, v)))[0].transpose(1, 2).flatten(2), (2, 3), (4, 6)).flatten(1, 2).unflatten(-1, (3, 4)).transpose(1, 2)
    assert_close(P.locally_biased_attention(q, k, v, size=(4, 6), window=(2, 3)), out)


def test_keys_stray_further_with_sigma_until_all_are_alike():
    n, w = 60, 6
    for size, window in ((n, w), ((10, 6), (2, 3))):
        noisy, still = P.local_windows(size, window, 50., 3, generator=rng(0)), P.local_windows(size, window)
        assert torch.equal(noisy.queries, still.queries) and not torch.equal(noisy.keys[:1], still.keys)   # the source is shuffled, queries stay
    far = [(P.local_order(n, w, s, 50, generator=rng(0)) - torch.arange(n)).abs().double().mean().item() for s in (0., .5, 2., 8., 1e3)]
    assert far[0] == 0 and all(a < b for a, b in zip(far, far[1:])) and .5 < far[2] < 3
    for size, window in ((n, w), ((10, 6), (2, 3))):
        met = P.pair_matrix(P.local_windows(size, window, 10. * n, 2000, generator=rng(1)), n).double().mean(0)
        assert (met - w / n).abs().max() < 5 * math.sqrt(w / n * (1 - w / n) / 2000)                   # 3600 pairs looked at, so 5 sigma
    near = P.pair_matrix(P.local_windows(n, w, 3., 500, shift=True, generator=rng(2)), n).double().mean(0)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    assert near[distance == 1].mean() > 2 * near[distance == 6].mean() > 4 * near[(distance >= 12) & (distance < 48)].mean()
    assert near[0, -1] > 0.02                                                                          # the shift is cyclic


def test_shift_moves_the_borders():
    met = P.pair_matrix(P.local_windows(12, 4, 0., 64, shift=True, generator=rng(0)), 12)
    assert not P.pair_matrix(P.local_windows(12, 4), 12)[0, 3, 4] and met[:, 3, 4].any() and not met[:, 3, 4].all()
    assert P.pair_matrix(P.local_windows(12, 4, shift=(0, 1)), 12)[0, 2, 3] == 0                       # token 3 now opens a block
    assert len({str(m.tolist()) for m in met}) == 4


# the module

def test_module_is_dense_in_eval_and_shares_weights():
    attn, dense, x = P.SubsampledAttention(24, 3, P.Sampling(fraction=.5), qkv_bias=True, qk_norm=True), Attention(24, 3, qkv_bias=True, qk_norm=True), torch.rand(2, 10, 24)
    dense.load_state_dict(attn.state_dict())
    assert_close(attn.eval()(x), dense(x), atol=0, rtol=0)
    assert not torch.equal(attn.train()(x), attn(x))
    with torch.autocast('cpu', torch.bfloat16): assert attn(x).isfinite().all()
    assert attn.double()(x.double()).dtype == torch.double
    assert copy.deepcopy(attn).sampling == attn.sampling


@pytest.mark.parametrize('more', [dict(), dict(bias=True), dict(mask=True), dict(rope=True), dict(bias=True, mask=True, rope=True)])
@pytest.mark.parametrize('per_sample', [True, False])
def test_gathering_before_the_projection_changes_nothing(more, per_sample):
    attn, x = P.SubsampledAttention(24, 3, P.Sampling(keys=7, always=1, per_sample=per_sample), qkv_bias=True, qk_norm=True).double(), normal(2, 17, 24).requires_grad_()
    given = dict(bias=normal(1, 3, 17, 17) if 'bias' in more else None, mask=(torch.arange(17) < torch.tensor([17, 12])[:, None])[:, None, None] if 'mask' in more else None,
                 rope=tuple(t.double() for t in rope_2d(4, 4, 8)) if 'rope' in more else None)
    torch.manual_seed(3)
    out = attn(x, **given)
    torch.manual_seed(3)
    valid = given['mask'][:, 0, 0] if given['mask'] is not None and per_sample else None
    idx = P.sample_keys(17, 7, 2, always=1, per_sample=per_sample, valid=valid)
    keep = kept(idx, 2, 17)[:, None, None]
    want = Attention.forward(attn, x, mask=keep if given['mask'] is None else keep & given['mask'], bias=given['bias'], rope=given['rope'])
    assert_close(out, want)
    assert_close(*(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (out, want)))


def test_flops():
    from vitbook.measure import flops
    b, h, n, k, d = 2, 3, 64, 16, 8
    q, K, v = torch.rand(b, h, n, d), torch.rand(b, h, n, d), torch.rand(b, h, n, d)
    idx = P.sample_keys(n, k, b)
    assert flops(lambda: P.subsampled_attention(q, K, v, idx)) == 2 * (2 * b * h * n * k * d)          # two matrix products of b h n k d multiply-adds, each counted as two
    assert flops(lambda: P.locally_biased_attention(q, K, v, window=k, sigma=2.)) == 2 * (2 * b * h * n * k * d)
    c, attn, x = h * d, P.SubsampledAttention(h * d, h, P.Sampling(keys=k, during='always')), torch.rand(b, n, h * d)
    assert flops(attn, x) == 2 * b * (2 * n * c * c + 2 * k * c * c + 2 * h * n * k * d)                # q and out on n tokens, k and v on k


def test_compiles_in_training(unchecked):
    attn, x = P.SubsampledAttention(24, 3, P.Sampling(keys=4)), torch.rand(2, 12, 24)
    fast = torch.compile(attn, backend='aot_eager', fullgraph=True)
    out = fast(x)
    out.sum().backward()
    assert out.shape == x.shape and attn.qkv.weight.grad.isfinite().all()
    torch._dynamo.reset()


# the registered models

@pytest.mark.parametrize('more', [dict(fraction=.25), dict(keys=5), dict(form='local', keys=2, sigma=1.), dict(form='local', fraction=.25), dict(form='bernoulli', fraction=.7)])
def test_models_are_dense_in_eval_and_draw_in_training(more):
    small = dict(img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=2, num_heads=3)
    model, plain = create_model('ssa_vit_tiny_patch16_224', **small, **more), create_model('vit_tiny_patch16_224', **small)
    plain.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert_close(model.eval()(x), plain.eval()(x), atol=0, rtol=0)
    model.train()
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    a.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = copy.deepcopy(model)
    torch.manual_seed(0); a = model(x)
    torch.manual_seed(0); assert_close(twin(x), a, atol=0, rtol=0)


# the context manager

def test_context_on_vitbook_is_the_module(model=None):
    model, x = vit().double(), normal(2, 1, 8, 8)
    torch.manual_seed(2)
    with P.subsampled(model, keys=5, always=1): inside = model(x)
    for block in model.blocks: block.attn.__class__, block.attn.sampling = P.SubsampledAttention, P.Sampling(keys=5, always=1)
    torch.manual_seed(2)
    assert_close(model(x), inside, atol=1e-13, rtol=1e-12)


def state(model): return [(n, dict(m.__dict__), type(m)) for n, m in model.named_modules()]

def test_context_leaves_no_trace():
    model, x = vit(), torch.rand(2, 1, 8, 8)
    before, dense, weights = [set(d) for _, d, _ in state(model)], model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with P.subsampled(model, fraction=.25) as ctx:
        assert not torch.equal(model(x), dense) and list(model.state_dict()) == list(weights)
        assert_close(model.eval()(x), dense)
        model.train()
        twin = copy.deepcopy(model)
        assert not torch.equal(twin(x), dense)
    assert torch.equal(model(x), dense) and torch.equal(twin(x), dense) and not ctx.active
    with pytest.raises(ZeroDivisionError):
        with P.subsampled(model, keys=2), P.subsampled(model, keys=3): 1 / 0
    assert torch.equal(model(x), dense) and [set(d) for _, d, _ in state(model)] == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()) and not P._now.modules and not P._now.busy


def test_an_error_inside_the_model_leaves_the_thread_clean():
    model = vit()
    with P.subsampled(model, keys=2):
        with pytest.raises(Exception): model(torch.rand(2, 3, 8, 8))
        assert not P._now.modules and not P._now.busy
        model(torch.rand(2, 1, 8, 8))


def seen_keys(model, x):
    "How many keys the attention of each layer had."
    from vitbook.probe import recording
    with recording(model) as rec: model(x)
    return [w.shape[-1] for w in rec.weights]


def test_nested_contexts_and_layers():
    model, x = vit(depth=3), torch.rand(2, 1, 8, 8)
    layer = lambda i: lambda name: name.startswith(f'blocks.{i}')
    with P.subsampled(model, keys=8):
        with P.subsampled(model, keys=4): assert seen_keys(model, x) == [4, 4, 4]
        with P.subsampled(model, keys=4, layers=layer(1)): assert seen_keys(model, x) == [8, 4, 8]
        with P.subsampled(model, keys=4, during='never'): assert seen_keys(model, x) == [17, 17, 17]
        assert seen_keys(model, x) == [8, 8, 8]
    with P.subsampled(model, keys=4, layers=layer(0)), P.subsampled(model, keys=6, layers=layer(2)): assert seen_keys(model, x) == [4, 17, 6]
    outer = P.subsampled(model, keys=3)
    with outer, P.subsampled(model.blocks[1], keys=2): assert seen_keys(model, x) == [3, 2, 3]
    ssa = create_model('ssa_vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, keys=6)
    y = torch.rand(2, 3, 32, 32)
    assert seen_keys(ssa, y) == [6, 6]
    with P.subsampled(ssa, keys=3): assert seen_keys(ssa, y) == [3, 3]
    with P.subsampled(ssa, keys=3, during='never'): assert seen_keys(ssa, y) == [17, 17]
    with P.subsampled(ssa.eval(), keys=3, during='always'): assert seen_keys(ssa, y) == [3, 3]


@pytest.mark.parametrize('generator', [False, True])
@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('kind', ['vitbook', 'torch', 'local'])
def test_checkpointing_recomputes_the_same_draw(generator, reentrant, kind):
    class Checkpointed(nn.Module):
        def __init__(self, blocks, on): super().__init__(); self.blocks, self.on = blocks, on
        def forward(self, x):
            for b in self.blocks: x = checkpoint(b, x, use_reentrant=reentrant) if self.on else b(x)
            return x
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.qkv = nn.Linear(16, 48)
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    blocks = nn.ModuleList((Plain() if kind == 'torch' else Block(16, 2, proj_drop=.1)).double() for _ in range(3))
    grads, x = [], normal(2, 20, 16).requires_grad_()
    more = dict(form='local', sigma=2.) if kind == 'local' else {}
    for on in (False, True):
        model = Checkpointed(blocks, on)
        torch.manual_seed(7)
        with P.subsampled(model, keys=5, generator=rng(4) if generator else None, **more):
            for _ in range(2):                                             # two forward passes before the backward ones
                model.zero_grad()
                (model(x).square().sum() + model(x).square().sum()).backward()
        grads.append([p.grad.clone() for p in blocks.parameters() if p.grad is not None] + [x.grad.clone()])
        x.grad = None
    for a, b in zip(*grads): assert_close(a, b)


def test_generator_alone_decides_the_draws():
    model, x = vit(), torch.rand(2, 1, 8, 8)
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with P.subsampled(model, keys=4, generator=rng(9)): outs.append([model(x), model(x)])
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1]) and not torch.equal(*outs[0])
    with P.subsampled(model, keys=4, generator=rng(9)):
        torch.manual_seed(0); a = model(x)
        torch.manual_seed(0); assert not torch.equal(model(x), a)         # the same global numbers in another step are no recomputation


class OwnViT(nn.Module):
    "A reader's model: F.scaled_dot_product_attention, with a class token."
    def __init__(self, causal=False, c=16):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(c, 3 * c), nn.Linear(c, c), causal
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('causal', [False, True])
def test_context_on_a_model_of_torchs_attention(causal):
    model, x = OwnViT(causal).double(), normal(2, 12, 16)
    torch.manual_seed(1)
    with P.subsampled(model, keys=4): out = model(x)
    torch.manual_seed(1)
    idx = P.sample_keys(12, 4, 2)
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    mask = kept(idx, 2, 12)[:, None, None]
    if causal: mask = mask & torch.ones(12, 12, dtype=torch.bool).tril() | torch.eye(12, dtype=torch.bool)
    assert_close(out, model.out(naive_attention(q, k, v, mask=mask)[0].transpose(1, 2).flatten(2)))
    for form in ('local', 'bernoulli'):
        with P.subsampled(model, fraction=.4, form=form, sigma=1.): assert not torch.equal(model(x), model(x))


def test_masks_of_numbers():
    q, k, v = (t.float() for t in qkv(2, 2, 10))
    for low in (-math.inf, torch.finfo(torch.float32).min):
        mask = torch.zeros(10, 10).masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), low)
        out = P._torch_call(P.Sampling(keys=10, during='always'), q, k, v, mask)
        assert_close(out, naive_attention(q, k, v, causal=True)[0])
        few = P._torch_call(P.Sampling(keys=2), q, k, v, mask)
        assert few.isfinite().all() and (few.abs().sum(-1) > 0).all()
        assert_close(few[:, :, 0], v[:, :, 0])                            # the first query has only itself
    flat = P._torch_call(P.Sampling(keys=10), q[:, 0], k[:, 0], v[:, 0])
    assert_close(flat, naive_attention(q[:, :1], k[:, :1], v[:, :1])[0][:, 0])


def test_context_on_multihead_attention():
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=True), 2, enable_nested_tensor=False), torch.rand(3, 10, 16)
    dense = model(x)
    pad = torch.arange(10) >= torch.tensor([10, 7, 5])[:, None]
    for more in (dict(keys=4), dict(fraction=.5, form='bernoulli'), dict(keys=4, per_sample=False)):
        with P.subsampled(model, **more):
            assert not torch.equal(model(x), model(x)) and model(x, src_key_padding_mask=pad)[0].isfinite().all()
            assert_close(model.eval()(x), dense, atol=1e-5, rtol=1e-5)
            model.train()
    model.eval()
    with P.subsampled(model, keys=4, during='always'), torch.no_grad(): assert not torch.equal(model(x), model(x))    # not even torch's fast path escapes
    with P.subsampled(model, keys=10, during='always'): assert_close(model(x), dense, atol=1e-5, rtol=1e-5)
    mha = nn.MultiheadAttention(16, 2).double()
    y = normal(9, 2, 16)
    torch.manual_seed(0)
    with P.subsampled(mha, keys=3): out = mha(y, y, y, need_weights=False)[0]
    torch.manual_seed(0)
    idx = P.sample_keys(9, 3, 2)
    assert_close(out, mha(y, y, y, key_padding_mask=~kept(idx, 2, 9))[0])
    with P.subsampled(mha, keys=3, form='local'), pytest.raises(ValueError, match='local'): mha(y, y, y)
    with P.subsampled(mha, keys=3), pytest.raises(ValueError, match='attn_mask'): mha(y, y, y, attn_mask=torch.zeros(9, 9, dtype=torch.double))


def test_context_on_hugging_face():
    transformers = pytest.importorskip('transformers')
    from vitbook.vit import vit_from_state_dict
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8, num_labels=7)
    model, x = transformers.ViTForImageClassification(config), torch.randn(2, 3, 32, 32)
    ours = vit_from_state_dict(model.state_dict(), num_heads=4)
    for m in (model, ours):
        m.train()
        for d in m.modules():
            if isinstance(d, nn.Dropout): d.p = 0.
    outs = []
    for m in (model, ours):
        with P.subsampled(m, keys=5, always=1, generator=rng(3)) as ctx:
            y = m(x)
            y = getattr(y, 'logits', y)
            outs.append(y)
            y.square().sum().backward()
        assert ctx.seen == 3
    assert_close(*outs, atol=1e-5, rtol=1e-5)                             # the same draws in both
    assert not torch.allclose(outs[0], model(x).logits, atol=1e-4)
    with P.subsampled(model, keys=2, form='local', grid=(4, 4), sigma=1., always=1): assert model(x).logits.isfinite().all()
    model.eval()
    assert_close(P.ensemble(model, x, 3, P.Sampling(keys=4), generator=rng(0)), P.ensemble(ours.eval(), x, 3, P.Sampling(keys=4), generator=rng(0)), atol=1e-5, rtol=1e-5)
    eager = transformers.ViTForImageClassification(transformers.ViTConfig(**{**config.to_dict(), 'attn_implementation': 'eager'}))
    eager.config._attn_implementation = 'eager'
    with P.subsampled(eager, keys=2), pytest.raises(ValueError, match='sdpa'): eager(x)


def test_training_with_fit():
    from vitbook.train import batches, fit
    model = vit(embed_dim=12, num_heads=2)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))
    with P.subsampled(model, fraction=.25, always=1) as ctx: history = fit(model, batches(x, y, batch_size=16), steps=30, lr=3e-3, progress=False)
    assert ctx.seen == 60 and history['loss'][-1] < history['loss'][0] and 'forward' not in model.__dict__


def test_somebody_elses_forward_is_kept():
    model, x = OwnViT(), torch.rand(2, 12, 16)
    theirs = lambda x: 2 * OwnViT.forward(model, x)
    model.forward = theirs
    dense = model(x)
    with P.subsampled(model, keys=3): assert not torch.equal(model(x), dense)
    assert model.forward is theirs and torch.equal(model(x), dense)


# ensembles

@pytest.mark.parametrize('sampling', [P.Sampling(keys=4), P.Sampling(keys=4, per_sample=False), P.Sampling('local', keys=(2, 2), grid=(4, 4), sigma=1., always=1), P.Sampling('bernoulli', fraction=.5)])
def test_folding_is_looping(sampling):
    model, x = vit(drop_rate=.5).double(), normal(3, 1, 8, 8)
    many = P.sub_networks(model, x, 5, sampling, generator=rng(2))
    assert many.shape == (5, 3, 10) and model.training
    for fold in (1, 2): assert_close(P.sub_networks(model, x, 5, sampling, generator=rng(2), fold=fold), many)
    assert all(not torch.equal(many[0], m) for m in many[1:])
    one = P.ensemble(model, x, 1, sampling, generator=rng(2))
    assert_close(one, P.sub_networks(model, x, 1, sampling, generator=rng(2))[0].log_softmax(-1))     # S = 1 is one draw
    assert_close(P.ensemble(model, x, 5, sampling, generator=rng(2)).exp(), many.softmax(-1).mean(0))


@given(st.integers(1, 9), st.integers(0, 999), st.floats(.1, 30.))
def test_jensen(S, seed, size):
    logits, y = size * normal(S, 6, 4, seed=seed), torch.randint(0, 4, (6,), generator=rng(seed))
    nll = F.nll_loss(P.log_mean_exp(logits), y)
    assert nll <= torch.stack([F.cross_entropy(l, y) for l in logits]).mean() + 1e-9
    assert_close(P.log_mean_exp(logits).exp().sum(-1), torch.ones(6).double())


def test_measures():
    w = torch.tensor([[.5, .3, .15, .05], [.25, .25, .25, .25], [1., 0, 0, 0]])
    assert P.keys_for_mass(w).tolist() == [3, 4, 1] and P.keys_for_mass(w, .6).tolist() == [2, 3, 1]
    logits = F.one_hot(torch.tensor([[0, 1, 2], [0, 1, 1], [0, 2, 0]]), 3).float()
    assert_close(P.agreement(logits), torch.tensor((1 + 1 / 3 + 0) / 3))


# bad input

def bad(call, *words):
    with pytest.raises(ValueError) as e: call()
    assert all(str(w) in str(e.value) for w in words), str(e.value)

def test_bad_input_is_named(unchecked):
    q, k, v = qkv()
    x, model = torch.rand(2, 1, 8, 8), vit()
    bad(lambda: P.sample_keys(5, 6), 'k', 5, 6)
    bad(lambda: P.sample_keys(5, 2, always=3), 'k', 3)
    bad(lambda: P.sample_keys(5, 2, 2, per_sample=False, valid=torch.ones(2, 5, dtype=torch.bool)), 'valid')
    bad(lambda: P.draw(5, 2, [rng(0), rng(1)]), 'generator', 5)
    bad(lambda: P.subsampled_attention(q, k, v), 'idx', 'keys')
    bad(lambda: P.subsampled_attention(q, k, v, torch.zeros(3, 2, dtype=torch.long)), 'idx', '(3, 2)')
    bad(lambda: P.subsampled_attention(q, k[:, :, :5], v[:, :, :5], keys=2, causal=True), 'causal', 12, 5)
    bad(lambda: P.source_keep(5, 1.5), 'p', 1.5)
    bad(lambda: P.locally_biased_attention(q, k, v, window=4, size=(3, 5)), 'size', 12)
    bad(lambda: P.locally_biased_attention(q, k, v, window=2, size=(3, 4), causal=True), 'causal')
    bad(lambda: P.locally_biased_attention(q, k, v, window=0), 'window', 0)
    bad(lambda: P.locally_biased_attention(q, k, v, window=4, sigma=-1.), 'sigma')
    bad(lambda: P.locally_biased_attention(q, k[:, :, :6], v[:, :, :6], window=4), 'keys', 6)
    bad(lambda: P.Sampling('random', keys=3), 'form', 'random', 'unbiased')
    bad(lambda: P.Sampling(), 'keys', 'fraction')
    bad(lambda: P.Sampling(keys=3, fraction=.5), 'keys', 'fraction')
    bad(lambda: P.Sampling(fraction=1.5), 'fraction', 1.5)
    bad(lambda: P.Sampling(keys=0), 'keys', 0)
    bad(lambda: P.Sampling(keys=(2, 2)), 'local')
    bad(lambda: P.Sampling('local', keys=(2, 2)), 'grid')
    bad(lambda: P.Sampling('bernoulli', keys=2), 'fraction')
    bad(lambda: P.Sampling(keys=2, during='test'), 'during', 'test')
    bad(lambda: P.Sampling(keys=2, always=-1), 'always')
    bad(lambda: P.Sampling(keys=2, sigma=-1.), 'sigma')
    bad(lambda: P.subsampled(model, keys=2, sampling=P.Sampling(keys=3)), 'sampling')
    bad(lambda: P.subsampled(torch.compile(model), keys=2), 'compiled')
    bad(lambda: P.sub_networks(model, x, 0, P.Sampling(keys=2)), 'members', 0)
    bad(lambda: P.keys_for_mass(torch.ones(3), 1.), 'mass')
    bad(lambda: P.agreement(torch.ones(1, 2, 3)), 'two')
    bad(lambda: P.SSAVisionTransformer(32, 8, form='local', keep_prefix=False), 'keep_prefix')
    bad(lambda: P.SSAVisionTransformer(32, 8, form='local', dynamic_img_size=True), 'dynamic_img_size')
    with P.subsampled(model, keys=2, form='local', grid=(4, 4)): bad(lambda: model(x), 'grid', 17, 'always=0')
    bad(lambda: P.subsampled(model, keys=2, layers=lambda name: False), 'layers')
    bad(lambda: P.subsampled(nn.Linear(3, 3), keys=2), 'no attention')
    class Blind(nn.Linear): pass
    with P.subsampled(Blind(3, 3), keys=2) as ctx: bad(lambda: ctx.model(torch.rand(2, 3)), 'no attention')
    with P.subsampled(model, keys=2) as ctx: bad(ctx.__enter__, 'open')
    class Weights(nn.Module):
        def forward(self, q): return attention(q, q, q, return_weights=True).out
    with P.subsampled(Weights(), keys=2) as ctx: bad(lambda: ctx.model(q), 'layers')


def test_a_model_without_attention_is_refused():
    "Where it can be known before a call, and else at the first one; also if modules are called one by one."
    with pytest.raises(ValueError, match='no attention'): P.subsampled(nn.Sequential(nn.Linear(4, 4)), keys=2)
    vit = VisionTransformer(16, 8, num_classes=3, embed_dim=12, depth=2, num_heads=3).train()
    with pytest.raises(ValueError, match='chose none of'): P.subsampled(vit, keys=2, layers=lambda name: name == 'encoder')
    with pytest.raises(ValueError, match='made no attention call'), P.subsampled(vit, keys=2): vit.blocks[0].mlp(torch.rand(1, 4, 12))
    assert 'forward' not in vit.__dict__, 'and everything is as before'
    with P.subsampled(vit, keys=2) as context: vit.blocks[0](torch.rand(1, 5, 12))
    assert context.seen


ALL_KEYS = dict(unbiased=lambda *a, **k: P.subsampled_attention(*a, keys=4, **k),
                local=lambda *a, **k: P.locally_biased_attention(*a, window=4, **k),
                bernoulli=lambda *a, **k: P.source_dropout_attention(*a, 0., **k))


@pytest.mark.parametrize('attend', ALL_KEYS.values(), ids=ALL_KEYS)
def test_masks_without_their_axes_are_refused(attend):
    "Batch x keys and queries x keys, batch and heads; with the axes written and all keys it is attention."
    q, k, v = (torch.randn(4, 4, 4, 8) for _ in range(3))
    pad = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:, None]
    for name, words, wrong in (('mask', 'rows', pad), ('bias', 'rows', torch.rand(4, 4)),
                               ('mask', 'parts', pad[:, None])):
        with pytest.raises(ValueError, match=f'{name} must say whether its 4 {words}'):
            attend(q, k, v, **{name: wrong})
    assert_close(attend(q, k, v, mask=pad[:, None, None]), attention(q, k, v, mask=pad[:, None, None]),
                 atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('form',
                         [dict(keys=3), dict(form='bernoulli', fraction=.7), dict(form='local', keys=2)])
def test_torchs_masks_of_two_axes_are_queries_and_keys(form):
    "As torch has it, also where batch and queries are as many."
    class Attends(nn.Module):
        def forward(self, x, mask): return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(4, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool).tril()
    outs = []
    for given in (mask, mask[None, None].expand(4, 2, 4, 4)):
        model = Attends().train()
        torch.manual_seed(0)
        with P.subsampled(model, **form): outs.append(model(x, given))
    assert_close(*outs)


def test_own_keys_in_half_do_not_overflow():
    "Scores of hundreds times hundreds are scaled before they are rounded to half."
    q, k, v = (torch.randn(1, 2, 8, 64) * s for s in (60, 60, 1))
    idx = torch.arange(8)[None]
    for dtype in (torch.float16, torch.bfloat16):
        low = [t.to(dtype) for t in (q, k, v)]
        out = P.subsampled_attention(*low, idx, causal=True)
        assert out.dtype == dtype and out.isfinite().all()
        assert_close(out.float(), attention(*(t.float() for t in low), causal=True), atol=.02, rtol=.02)
