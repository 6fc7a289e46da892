"""generation.fitv2: what the card says must hold, a plain reference on official names, sizes and shapes, and what it answers to bad input."""
import copy, math, pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook import flow, measure
from vitbook.data import pictures
from vitbook.generation import fitv2 as V
from vitbook.registry import create_model, example_inputs, list_models, model_info

SMALL = dict(patch_size=2, in_chans=4, num_classes=10, embed_dim=32, depth=3, num_heads=2)


def noisy(module, size=.1, seed=0):
    "Every parameter moved off its start: a new model answers 0 to everything."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn(p.shape, generator=g) * size)
    return module.eval()


def fit(**more):
    torch.manual_seed(0)
    return noisy(V.FiT(**{**SMALL, **more}))


def batch(h=3, w=4, b=2, model=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    dim = model.token_dim if model is not None else 16
    return torch.randn(b, h * w, dim, generator=g), torch.rand(b, generator=g), torch.randint(0, 10, (b,), generator=g), V.grid_of(h, w).expand(b, -1, -1)


# ---- start

def test_a_new_model_answers_zero_and_its_blocks_are_the_identity():
    for more in ({}, dict(adaln='full'), dict(adaln='swiglu'), dict(flow=False, learn_sigma=True)):
        torch.manual_seed(0)
        model = V.FiT(**{**SMALL, **more}).eval()
        x, t, y, grid = batch()
        with torch.no_grad():
            out = model(x, t, y, grid)
            assert out.shape == (2, 12, 32 if more.get('learn_sigma') else 16) and (out == 0).all()
            c, z = model.condition(t, y), torch.randn(2, 12, 32)
            shared = None if model.global_adaLN_modulation is None else model.global_adaLN_modulation(c)
            for block in model.blocks: assert torch.equal(block(z, c, shared, model.rope(grid)), z)
            assert c.std() > 0


def test_initial_sizes():
    torch.manual_seed(0)
    model = V.FiT(**{**SMALL, 'embed_dim': 128, 'num_classes': 500})
    assert abs(model.y_embedder.embedding_table.weight.std() - .02) < .002 and abs(model.t_embedder.mlp[0].weight.std() - .02) < .002
    w = model.blocks[0].attn.qkv.weight
    assert abs(w.abs().max() - math.sqrt(6 / sum(w.shape))) < 1e-3 and (model.blocks[0].attn.qkv.bias == 0).all()
    assert model.blocks[0].adaLN_modulation[1].weight.abs().max() > 0 and (model.blocks[0].adaLN_modulation[2].weight == 0).all()


# ---- padding, packing, positions

@given(pad=st.integers(1, 9), seed=st.integers(0, 5))
def test_padding_of_any_content_changes_nothing(pad, seed):
    model = fit()
    x, t, y, grid = batch(seed=seed)
    with torch.no_grad():
        want = model(x, t, y, grid)
        padded = torch.cat([x, 50 * torch.randn(2, pad, 16)], 1)
        got = model(padded, t, y, torch.cat([grid, torch.randint(0, 9, (2, 2, pad))], 2), torch.tensor([[1] * 12 + [0] * pad] * 2))
    assert_close(got[:, :12], want, atol=1e-5, rtol=1e-5)
    assert (got[:, 12:] == 0).all()


def test_padding_leaves_attention_as_zero():
    attn, mask = noisy(V.FlexAttention(32, 2)), torch.tensor([[1, 1, 1, 0, 0]])
    out = attn(torch.randn(1, 5, 32), None, mask[:, None, :, None] == mask[:, None, None, :], (mask != 0)[..., None])
    assert_close(out[0, 3:], attn.proj.bias.expand(2, -1))
    assert (out[0, :3] - attn.proj.bias).abs().max() > .01


def test_no_mask_is_a_mask_of_ones():
    model = fit()
    x, t, y, grid = batch()
    with torch.no_grad(): assert_close(model(x, t, y, grid), model(x, t, y, grid, torch.ones(2, 12, dtype=torch.uint8)))


def test_two_pictures_packed_in_one_row_are_two_rows():
    model = fit()
    (x1, t, y, g1), (x2, _, _, g2) = batch(b=1), batch(2, 5, b=1, seed=1)
    x, grid, ids = torch.cat([x1, x2, x1[:, :3]], 1), torch.cat([g1, g2, g1[..., :3]], 2), torch.tensor([[1] * 12 + [2] * 10 + [0] * 3])
    with torch.no_grad():
        got = model(x, t, y, grid, ids)
        assert_close(got[:, :12], model(x1, t, y, g1), atol=1e-5, rtol=1e-5)
        assert_close(got[:, 12:22], model(x2, t, y, g2), atol=1e-5, rtol=1e-5)
        assert (got[:, 22:] == 0).all()
        model.official = True                                           # the official code multiplies by the ids themselves
        assert_close(model(x, t, y, grid, ids)[:, 12:22], 2 * got[:, 12:22])


@pytest.mark.parametrize('more', [{}, dict(rope=False), dict(adaln='full', mlp='gelu'), dict(rope_scaling='ntk', train_len=2, decouple=True), dict(rope_scaling='yarn', train_len=2), dict(rope_scaling='ntk', train_len=2, rope_len=(4, 7))])
def test_packed_equals_padded(more):
    "Pictures of many sizes, each with its own time and class: without padding the same numbers and the same gradients."
    model, sizes = fit(**more), [(3, 4), (2, 2), (5, 1), (2, 2)]
    g = torch.Generator().manual_seed(0)
    tokens = V.to_tokens([torch.randn(4, 2 * h, 2 * w, generator=g) for h, w in sizes])
    t, y, keep = torch.rand(4, generator=g), torch.tensor([1, 2, 3, 10]), tokens.mask.bool()
    want = model(tokens.x, t, y, tokens.grid, tokens.mask, tokens.size)[keep]
    x, grid, told = tokens.flat()
    assert told == sizes and len(x) == 25
    got = model.forward_packed(x, t, y, grid, sizes)
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (want, got)]
    for a, b in zip(*grads): assert_close(a, b, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match='sizes'): model.forward_packed(x, t, y, grid, sizes[:3])


@given(dy=st.integers(-9, 9), dx=st.integers(-9, 9))
def test_only_differences_of_positions_count(dy, dx):
    model = fit()
    x, t, y, grid = batch()
    with torch.no_grad(): assert_close(model(x, t, y, grid + torch.tensor([[dx], [dy]])), model(x, t, y, grid), atol=1e-5, rtol=1e-4)


def test_rows_and_columns_are_told_apart():
    model = fit()
    x, t, y, grid = batch(3, 3)
    with torch.no_grad(): assert (model(x, t, y, grid.flip(1)) - model(x, t, y, grid)).abs().max() > 1e-3
    rope = V.VisionRope(16)
    cos, sin = rope(torch.tensor([[[0, 5], [0, 0]]]))                   # column 5, row 0: only the second half turns
    assert (cos[0, 0, 1, :8] == 1).all() and (sin[0, 0, 1, :8] == 0).all() and (sin[0, 0, 1, 8:10] != 0).all()
    assert_close(sin[0, 0, 1, 8::2], torch.sin(5 * 10000. ** -(torch.arange(4) / 4)))
    q = torch.randn(2, 2, 12, 16)
    assert_close(V.apply_rope(q, *rope(grid[:, :, :9].repeat(1, 1, 2)[..., :12])).norm(dim=-1), q.norm(dim=-1))


def test_normalised_queries_and_keys():
    model = fit()
    attn, rope = model.blocks[0].attn, model.rope(V.grid_of(3, 4)[None])
    x = 30 * torch.randn(1, 12, 32)
    with torch.no_grad():
        q, k, _ = attn.heads(x, rope)
        scores = q @ k.mT / math.sqrt(attn.head_dim)
        assert scores.abs().max() <= math.sqrt(attn.head_dim) + 1e-4 and q.norm(dim=-1).max() <= math.sqrt(attn.head_dim) + 1e-4
        want, twin = attn(x, rope), copy.deepcopy(attn)
        twin.qkv.weight[:32] *= 7
        twin.qkv.bias[:32] *= 7
        assert_close(twin(x, rope), want, atol=1e-4, rtol=1e-4)
        plain = noisy(V.FlexAttention(32, 2, q_norm=None, k_norm=None))
        before, (q, k, _) = plain(x, rope), plain.heads(x, rope)
        assert (q @ k.mT / 4).abs().max() > 4                            # without norms the bound is broken …
        plain.qkv.weight.data[:32] *= 7
        assert (plain(x, rope) - before).abs().max() > 1e-2              # … and the size of the weights matters


# ---- larger pictures than in training

@pytest.mark.parametrize('scaling', ['linear', 'ntk', 'ntk_pro1', 'ntk_pro2', 'ntk_by_parts', 'yarn'])
@given(dim=st.sampled_from([4, 8, 36]), theta=st.sampled_from([100., 10000.]), train=st.integers(2, 32), more=st.floats(1., 6.))
def test_frequencies(scaling, dim, theta, train, more):
    plain, s = V.axis_frequencies(dim, theta), torch.tensor(max(1., int(train * more) / train))
    for short in (1, train): assert_close(V.axis_frequencies(dim, theta, scaling, short, train), plain)
    f = V.axis_frequencies(dim, theta, scaling, int(train * more), train)
    assert f.shape == (dim // 2,) and (f[1:] < f[:-1]).all()
    assert (f <= plain + 1e-6).all() and (f >= plain / s - 1e-6).all()   # between doing nothing and squeezing the positions
    if scaling in ('ntk', 'ntk_pro1', 'ntk_pro2'): assert_close(f[0], torch.tensor(1.)); assert_close(f[-1], plain[-1] / s)
    if scaling == 'linear': assert_close(f, plain / s)


def test_axes_are_stretched_apart_only_if_decoupled():
    size = torch.tensor([[[32, 8]], [[16, 20]]])
    plain = V.axis_frequencies(8)
    rows, columns = V.VisionRope(16, scaling='ntk', decouple=True).frequencies(size[:, 0])
    assert_close(columns[0], plain); assert_close(rows[1], plain)
    assert rows[0, -1] < plain[-1] and columns[1, -1] < plain[-1]
    rows, columns = V.VisionRope(16, scaling='ntk').frequencies(size[:, 0])
    assert_close(rows, columns)
    assert_close(rows[0, -1], plain[-1] / 2)
    one = V.VisionRope(16, scaling='ntk', length=(32, 8), decouple=True)
    grid = V.grid_of(4, 5).expand(1, -1, -1)
    for a, b in zip(one(grid), V.VisionRope(16, scaling='ntk', decouple=True)(grid, size[:1])): assert_close(a, b)


def test_factor_of_cosine_and_sine():
    lengths = torch.tensor([[16, 16], [32, 8], [8, 4]])
    f = lambda scaling, **more: V.VisionRope(16, scaling=scaling, **more).factor(lengths)
    assert_close(f('yarn'), torch.tensor([1, 1 + .1 * math.log(2), 1]))
    assert_close(f('ntk_pro1'), torch.tensor([1, math.sqrt(math.log(32) / math.log(16)), 1]))
    assert_close(f('ntk_pro2'), torch.tensor([1., 1, 1]))               # 32 x 8 has the area of 16 x 16
    assert_close(f('ntk_pro2', double_len=True), torch.tensor([math.sqrt(math.log(512) / math.log(256)), math.sqrt(math.log(512) / math.log(256)), 1.]))
    assert f('ntk').tolist() == [1, 1, 1]


def test_yarn_keeps_fast_frequencies_and_squeezes_slow_ones():
    f, plain = V.axis_frequencies(64, 10000., 'yarn', 4096, 1024), V.axis_frequencies(64)
    turns = plain * 1024 / (2 * math.pi)
    assert_close(f[turns > 40], plain[turns > 40]); assert_close(f[turns < .8], plain[turns < .8] / 4)
    between = (turns < 20) & (turns > 2)
    assert (f[between] < plain[between]).all() and (f[between] > plain[between] / 4).all()


# ---- condition

def test_lora_with_full_rank_and_no_shared_map_is_plain_adaln():
    lora, full = fit(adaln_rank=32), fit(adaln='full')
    state = full.state_dict()
    for k in list(state):
        if k.startswith('blocks') and 'adaLN_modulation.1' in k:
            state[k.replace('adaLN_modulation.1', 'adaLN_modulation.2')] = state[k]
            state[k] = torch.eye(32) if k.endswith('weight') else torch.zeros(32)
    lora.load_state_dict(state | {k: torch.zeros_like(v) for k, v in lora.state_dict().items() if k.startswith('global')})
    with torch.no_grad(): assert_close(lora(*batch()), full(*batch()), atol=1e-5, rtol=1e-4)


def test_without_lora_all_blocks_share_one_map():
    model = fit()
    with torch.no_grad():
        for block in model.blocks:
            for p in block.adaLN_modulation[2].parameters(): p.zero_()
        c = model.condition(*batch()[1:3])
        shared = model.global_adaLN_modulation(c)
        for block in model.blocks:
            for a, b in zip(block.modulation(c, shared), shared[:, None].chunk(6, -1)): assert torch.equal(a, b)
        assert shared.abs().max() > .01


def test_time_is_not_multiplied_and_cosines_come_first():
    embed = V.TimeEmbed(8)
    waves = embed.waves(torch.tensor([.3]))[0]
    assert waves.shape == (256,)
    assert_close(waves[:2], torch.cos(.3 * torch.tensor([1., 10000 ** (-1 / 128)])))
    assert_close(waves[128], torch.sin(torch.tensor(.3)))


def test_labels_are_dropped_in_training_only():
    embed = V.LabelEmbed(10, 4, .5)
    y = torch.arange(10).repeat(100)
    assert_close(embed.eval()(y), embed.embedding_table(y))
    dropped = (embed.train()(y) == embed.embedding_table.weight[10]).all(1).float().mean()
    assert abs(dropped - .5) < .06
    assert len(V.LabelEmbed(10, 4, 0.).embedding_table.weight) == 10


def test_time_shift():
    x, t, y, grid = batch()
    with torch.no_grad(): assert_close(fit(time_shift=3.)(x, t, y, grid), fit()(x, flow.shift(t, 3.), y, grid), atol=1e-5, rtol=1e-5)


def test_noise_models_take_times_up_to_999():
    model = fit(flow=False, learn_sigma=True)
    x, _, y, grid = batch()
    with torch.no_grad():
        assert (model(x, torch.tensor([5, 900]), y, grid) - model(x, torch.tensor([5, 100]), y, grid)).abs().max() > 1e-3
        model.official = True                                           # the official code cuts times off at 1
        assert torch.equal(model(x, torch.tensor([5, 900]), y, grid), model(x, torch.tensor([1, 1]), y, grid))


# ---- guidance and sampling

@pytest.mark.parametrize('power', [0., 2.])
def test_guidance_acts_on_the_first_three_channels(power):
    model = fit()
    x, t, y, grid = batch()
    with torch.no_grad():
        c, u = model(x, t, y, grid), model(x, t, torch.full_like(y, 10), grid)
        got = model.guided(x, t, y, grid, scale=4., power=power)
        w = flow.falling_scale(t, 4., power)[:, None, None]
        assert_close(got[..., :12], (u + w * (c - u))[..., :12], atol=1e-5, rtol=1e-5)
        assert_close(got[..., 12:], c[..., 12:], atol=1e-5, rtol=1e-5)
        assert_close(model.guided(x, t, y, grid, scale=4., channels=16), u + 4 * (c - u), atol=1e-4, rtol=1e-4)
        assert_close(model.guided(x, t, y, grid, scale=1.), c)
    with pytest.raises(ValueError, match='class_dropout'): fit(class_dropout=0.).guided(x, t, y, grid, scale=2.)


def test_samples_of_any_size():
    model = fit(in_chans=1, rope_scaling='ntk', train_len=2, decouple=True).train()
    g = torch.Generator().manual_seed(0)
    out = V.sample(model, torch.tensor([1, 2, 3]), 2, 5, steps=3, generator=g)
    assert out.shape == (3, 1, 4, 10) and out.isfinite().all() and model.training
    noise = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    assert_close(V.sample(model, torch.tensor([1, 2, 3]), 2, 5, steps=3, noise=noise), out)
    assert not out.requires_grad and all(p.grad is None for p in model.parameters()), 'no graph of the whole walk'
    still = V.sample(V.FiT(**{**SMALL, 'in_chans': 1}), torch.tensor([1]), 2, 5, steps=3, noise=noise[:1])       # velocity 0: the noise stays, as a picture
    assert_close(still, V.unpatchify(noise[:1], 2, (2, 5), 1))


def test_loss_does_not_see_padding():
    model, g = fit(), torch.Generator().manual_seed(0)
    pictures = [torch.randn(4, 6, 8, generator=g), torch.randn(4, 4, 4, generator=g)]
    t, y = torch.tensor([.3, .6]), torch.tensor([1, 2])
    def loss(pictures, t, y, n=None):
        tokens = V.to_tokens(pictures, max_tokens=n)
        noise = torch.cat([torch.zeros_like(tokens.x[:, :1]), tokens.x.roll(1, 2)[:, 1:]], 1) + .5
        return flow.flow_loss(lambda x, t: model(x, t, y, tokens.grid, tokens.mask), tokens.x, t, noise, mask=tokens.mask)
    both = loss(pictures, t, y, 30)
    assert_close(both, torch.cat([loss(pictures[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in (0, 1)]), atol=1e-5, rtol=1e-5)
    error = torch.randn(2, 5, 4)                                        # the ratio is that of the padded batch: mean over all, times n / valid
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    got = flow.flow_loss(lambda x, t: x * 0 + error + 1, torch.ones(2, 5, 4), t, torch.zeros(2, 5, 4), mask=mask)
    assert_close(got, (error.square() * mask[..., None]).mean((1, 2)) * 5 / mask.sum(1))


# ---- sizes and tokens

def test_budget():
    assert V.budget_size(256, 256, 256) == (256, 256) and V.budget_size(1000, 1000, 256) == (256, 256)
    assert V.budget_size(500, 1000, 256) == (176, 352)                  # sqrt(1/2) * 256 = 181.02, sqrt(2) * 256 = 362.04, floored to 16
    assert V.budget_size(100, 90, 256) == (96, 80) and V.budget_size(8, 40, 256) == (16, 80) and V.budget_size(40, 8, 256) == (80, 16)


@given(h=st.integers(20, 3000), w=st.integers(20, 3000), budget=st.sampled_from([256, 512]))
def test_budget_is_kept(h, w, budget):
    if max(h, w) / min(h, w) > 100: return
    H, W = V.budget_size(h, w, budget)
    assert H * W <= budget ** 2 and H % 16 == W % 16 == 0 and min(H, W) >= 16
    if h * w >= budget ** 2: assert abs(math.log(H / W) - math.log(h / w)) < 16 / min(H, W) + 1e-6
    assert V.budget_size(w, h, budget) == (W, H) or h * w >= budget ** 2   # rounding of square roots may differ by a token


def test_versions_of_a_picture():
    cat = next(iter(pictures().values()))[:, :300, :420]
    whole, crop = V.versions(cat, 256)
    assert whole.shape[1:] == V.budget_size(300, 420, 256) and crop.shape[1:] == (256, 256)
    assert len(V.versions(cat[:, :200], 256)) == 1 and len(V.versions(cat[:, :256], 256)) == 1
    assert_close(V.centre_crop(cat, 300), cat[:, :, 60:360])
    assert abs(V.centre_crop(cat, 100).mean() - cat[:, :, 60:360].mean()) < .01 and 0 <= whole.min() and whole.max() <= 1
    ramp = torch.arange(64.).expand(1, 32, 64) / 64
    assert V.centre_crop(ramp, 16)[0, 0, 0] > .2 and V.centre_crop(ramp, 16).shape == (1, 16, 16)


def test_tokens_and_back():
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 6, 8, generator=g), torch.randn(4, 4, 2, generator=g)]
    tokens = V.to_tokens(images, max_tokens=20)
    assert tokens.x.shape == (2, 20, 16) and tokens.mask.sum(1).tolist() == [12, 2] and tokens.size.tolist() == [[[3, 4]], [[2, 1]]]
    assert (tokens.x[1, 2:] == 0).all() and (tokens.grid[1, :, 2:] == 0).all()
    assert tokens.grid[0, 0, :5].tolist() == [0, 1, 2, 3, 0] and tokens.grid[0, 1, :5].tolist() == [0, 0, 0, 0, 1]        # columns first
    assert_close(tokens.x[0, 0].view(4, 2, 2), images[0][:, :2, :2])     # a channel's four numbers stand together
    for a, b in zip(V.to_pictures(tokens.x, tokens.size), images): assert torch.equal(a, b)
    short = tokens.trim()
    assert short.x.shape[1] == 12 == short.mask.shape[1] == short.grid.shape[2]
    with pytest.raises(ValueError, match='max_tokens=11.*3 x 4'): V.to_tokens(images, max_tokens=11)


# ---- sizes of the models, post-training, official names

SIZES = dict(fitv2_xl_2=671_045_776, fitv2_3b_2=2_971_928_080, fitv2_hr_xl_2=671_045_776, fitv2_hr_3b_2=2_971_928_080, fit_xl_2=823_599_392)


def test_all_sizes_are_registered():
    assert list_models(part='generation') and set(SIZES) <= set(list_models('fit*'))
    for name, count in SIZES.items(): assert model_info(name)['parameters'] == count


def test_post_training_share():
    with torch.device('meta'): model = create_model('fitv2_xl_2')
    share = V.unfreeze(model)
    assert round(share * 671_045_776) == 94_961_680 == measure.parameters(model, trainable=True)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert 'blocks.0.attn.qkv.weight' in frozen and 'blocks.0.adaLN_modulation.2.weight' not in frozen and 'blocks.0.attn.qkv.bias' not in frozen
    with pytest.raises(ValueError, match='parts'): V.unfreeze(model, ())


def reference(w, heads, x, t, y, grid, mask):
    "The official names, written out for FiTv2 without options."
    lin = lambda x, k: x @ w[f'{k}.weight'].T + w[f'{k}.bias']
    def ln(x): return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    waves = t[:, None] * 10000. ** (-torch.arange(128) / 128)
    c = F.silu(lin(F.silu(lin(torch.cat([waves.cos(), waves.sin()], 1), 't_embedder.mlp.0')), 't_embedder.mlp.2') + w['y_embedder.embedding_table.weight'][y])
    x, d = lin(x, 'x_embedder.proj'), w['x_embedder.proj.weight'].shape[0] // heads
    f = 10000. ** (-torch.arange(0, d // 2, 2) / (d // 2))
    angle = torch.cat([grid[:, 1, :, None] * f, grid[:, 0, :, None] * f], -1)[:, None]
    def turn(z):
        a, b = z[..., ::2], z[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)
    i = 0
    while f'blocks.{i}.attn.qkv.weight' in w:
        at = f'blocks.{i}.'
        m = (lin(c, 'global_adaLN_modulation.1') + lin(lin(c, at + 'adaLN_modulation.1'), at + 'adaLN_modulation.2'))[:, None].chunk(6, -1)
        q, k, v = (z.unflatten(-1, (heads, d)).transpose(1, 2) for z in lin(ln(x) * (1 + m[1]) + m[0], at + 'attn.qkv').chunk(3, -1))
        s = turn(ln(q)) @ turn(ln(k)).mT / math.sqrt(d)
        s = s.masked_fill((mask[:, :, None] != mask[:, None])[:, None], -math.inf)
        x = x + m[2] * lin((s.softmax(-1) @ v).transpose(1, 2).flatten(2) * (mask > 0)[..., None], at + 'attn.proj')
        h = ln(x) * (1 + m[4]) + m[3]
        x = x + m[5] * lin(F.silu(lin(h, at + 'mlp.fc1_g')) * lin(h, at + 'mlp.fc1_x'), at + 'mlp.fc2')
        i += 1
    shift, scale = lin(c, 'final_layer.adaLN_modulation.1')[:, None].chunk(2, -1)
    return lin(ln(x) * (1 + scale) + shift, 'final_layer.linear') * (mask > 0)[..., None]


def official_names(state):
    "Ours -> the official code's."
    return {k.replace('.gate.', '.fc1_g.').replace('.value.', '.fc1_x.').replace('mlp.out.', 'mlp.fc2.'): v for k, v in state.items()}


def test_official_names_and_a_reference():
    model = fit()
    x, t, y, grid = batch(3, 5)
    names, mask = official_names(model.state_dict()), torch.tensor([[1] * 15, [1] * 10 + [0] * 5])
    with torch.no_grad(): assert_close(model(x, t, y, grid, mask), reference(names, 2, x, t, y, grid, mask), atol=2e-5, rtol=1e-4)
    for more in ({}, dict(adaln='swiglu'), dict(mlp='gelu'), dict(adaln='full', mlp='swiglu_large')):
        a = fit(**more)
        state = {k.replace('.gate.', '.fc1_g.').replace('.value.', '.fc1_x.').replace('.out.', '.fc2.'): v for k, v in a.state_dict().items()}
        b = V.FiT(**{**SMALL, **more}).from_official(state).eval()
        with torch.no_grad(): assert torch.equal(a(*batch()), b(*batch()))
    with pytest.raises(ValueError, match='missing'): V.FiT(**SMALL).from_official({k: v for k, v in names.items() if 'qkv' not in k})


# ---- a library's manners

def test_copies_pickles_and_other_dtypes():
    model = fit(rope_scaling='yarn', train_len=2)
    args = (*batch(), None, torch.tensor([[[3, 4]]] * 2))
    with torch.no_grad():
        want = model(*args)
        assert torch.equal(pickle.loads(pickle.dumps(model))(*args), want) and torch.equal(copy.deepcopy(model)(*args), want)
        double = copy.deepcopy(model).double()(args[0].double(), args[1].double(), *args[2:])
        assert double.dtype == torch.double
        assert_close(double.float(), want, atol=1e-4, rtol=1e-3)
        half = copy.deepcopy(model).bfloat16()(args[0].bfloat16(), args[1].bfloat16(), *args[2:])
        assert half.dtype == torch.bfloat16 and (half.float() - want).square().mean().sqrt() < .1 * want.square().mean().sqrt() + .02


@pytest.mark.parametrize('call, words', [
    (lambda: V.FiT(**{**SMALL, 'embed_dim': 36, 'num_heads': 2}), 'head_dim.*18'),
    (lambda: V.FiT(**SMALL, learn_sigma=True), 'learn_sigma'),
    (lambda: V.FiT(**{**SMALL, 'num_heads': 5}), 'num_heads.*5'),
    (lambda: V.FiT(**SMALL, adaln='LoRA'), "adaln.*'LoRA'"),
    (lambda: V.FiT(**SMALL, adaln_rank=0), 'adaln_rank'),
    (lambda: V.FiT(**SMALL, mlp='relu'), 'mlp'),
    (lambda: V.FiT(**SMALL, norm='batchnorm'), 'batchnorm'),
    (lambda: V.FiT(**SMALL, rope_scaling='ntk-aware'), 'scaling'),
    (lambda: V.FiT(**SMALL, time_shift=0.), 'time_shift'),
    (lambda: V.FiT(**SMALL, class_dropout=1.5), 'class_dropout'),
    (lambda: V.axis_frequencies(3), 'dim.*3'),
    (lambda: V.axis_frequencies(2, scaling='ntk'), 'dim=2'),
    (lambda: V.budget_size(20, 9000, 256), '20x9000'),
    (lambda: V.budget_size(50, 50, 8), 'budget'),
    (lambda: fit()(torch.randn(2, 12, 15), *batch()[1:]), '16.*15'),
    (lambda: fit()(batch()[0], *batch(2, 4)[1:]), 'grid.*12.*8'),
    (lambda: fit(rope_scaling='ntk')(*batch()), 'size'),
    (lambda: V.sample(fit(flow=False), torch.tensor([1]), 2, 2), 'flow=False'),
    (lambda: V.sample(fit(), torch.tensor([1]), 2, 2, noise=torch.randn(1, 5, 16)), 'noise'),
    (lambda: V.sample(fit(), torch.tensor([1]), 0, 2), 'rows'),
])
def test_bad_input_is_named(call, words, unchecked):
    with pytest.raises(ValueError, match=words): call()


def test_parts_that_no_parameter_has_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'x_embeder'"): V.unfreeze(model, ('bias', 'x_embeder'))
    assert model.weight.requires_grad, 'nothing is frozen by a mistake'
    assert V.unfreeze(model, ('bias',)) == pytest.approx(1 / 3)


@pytest.mark.parametrize('wrong', [-1, 11, 999])
def test_a_class_that_there_is_none_of(wrong, unchecked):
    model = create_model('fit_xl_2', **model_info('fit_xl_2')['example']).eval()
    given = [*example_inputs('fit_xl_2')]
    given[2] = torch.tensor([3, wrong])
    with pytest.raises(ValueError, match=f'num_classes - 1 = 9.*{wrong}'): model(*given)
    given[2] = torch.tensor([3, 10])                                     # any class
    assert model(*given).isfinite().all()


@pytest.mark.parametrize('change', [torch.Tensor.bool, torch.Tensor.float, lambda mask: mask * 3],
                         ids=['bool', 'float', 'times 3'])
def test_a_mask_says_only_which_tokens_are_real(change, unchecked):
    model = create_model('fit_xl_2', **model_info('fit_xl_2')['example']).eval()
    given = [*example_inputs('fit_xl_2')]
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .05)
    want, real = model(*given), given[4].bool()
    given[4] = change(given[4])
    assert_close(model(*given), want)
    # padding in front
    front = [given[0].flip(1), *given[1:3], given[3].flip(2), given[4].flip(1), given[5]]
    assert_close(model(*front).flip(1)[real], want[real], atol=1e-6, rtol=1e-5)
