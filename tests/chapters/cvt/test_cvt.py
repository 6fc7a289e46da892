"""backbones.cvt: what must hold of CvT's mechanisms, agreement with the official code and Hugging Face's version, sizes and costs of the paper's variants, bad input."""
import copy, math, pickle

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

from sheets import sheets
from vitbook import create_model, load_checkpoint
from vitbook.backbones import cvt as C
from vitbook.layers.attention import naive_attention
from vitbook.measure import flops

SMALL = dict(num_classes=5, embed_dims=(8, 16, 24), depths=(1, 1, 2), num_heads=(1, 2, 3))


def randomised(module, seed=0):
    "Weights and statistics that hide nothing: no zeros, no ones."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn(p.shape, generator=g) * (.2 if p.dim() < 2 else .1))
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * .3), m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + .5)
    return module


def small(**more): return randomised(C.CvT(**{**SMALL, **more})).eval()
def official_state(model): return {n.replace('stages.', 'stage'): v for n, v in model.state_dict().items()}


def by_hand(attn, x, grid):
    "The official computation, equation by equation: three convolutions, three norms, einsum, softmax."
    p = attn.num_prefix
    m = rearrange(x[:, p:], 'b (y x) c -> b c y x', y=grid[0]).contiguous()
    out = {}
    for r in 'qkv':
        conv = getattr(attn, f'conv_proj_{r}')
        u = m
        if conv.method == 'dw_bn': u = F.batch_norm(F.conv2d(m, conv.conv.weight, None, conv.conv.stride, conv.conv.padding, groups=m.shape[1]), conv.bn.running_mean, conv.bn.running_var, conv.bn.weight, conv.bn.bias, eps=1e-5)
        if conv.method == 'avg': u = F.avg_pool2d(m, *conv.shape, ceil_mode=True)
        t = getattr(attn, f'proj_{r}')(torch.cat([x[:, :p], u.flatten(2).mT], 1))
        out[r] = rearrange(t, 'b n (h d) -> b h n d', h=attn.num_heads)
    w = (torch.einsum('bhnd,bhmd->bhnm', out['q'], out['k']) * attn.scale).softmax(-1)
    return attn.proj(rearrange(torch.einsum('bhnm,bhmd->bhnd', w, out['v']), 'b h n d -> b n (h d)')), w


# ---- tokens from convolutions

def test_embedding_shapes():
    shape = lambda x, *a: tuple(C.ConvEmbed(x.shape[1], 4, *a)(x).shape[2:])
    assert shape(torch.rand(1, 3, 224, 224), 7, 4, 2) == (56, 56) and shape(torch.rand(1, 4, 56, 56), 3, 2, 1) == (28, 28) and shape(torch.rand(1, 4, 28, 28), 3, 2, 1) == (14, 14)
    assert shape(torch.rand(1, 3, 32, 45), 7, 4, 2) == (8, 11)
    with pytest.raises(ValueError, match='x must have at least 3x3 places.*got 2x9'): C.ConvEmbed(3, 4)(torch.rand(1, 3, 2, 9))


def test_embedding_without_overlap_is_patchify():
    from vitbook.layers.embed import patchify
    embed, x = C.ConvEmbed(3, 8, 4, 4, 0), torch.rand(2, 3, 16, 24)
    want = embed.norm(patchify(x, 4) @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    assert_close(embed(x).flatten(2).mT, want, atol=1e-5, rtol=1e-4)


def test_norm_is_computed_in_float32():
    norm, x = randomised(C.LayerNorm(16)), 60 * torch.randn(3, 16) + 300
    assert_close(norm.bfloat16()(x.bfloat16()), F.layer_norm(x.bfloat16().float(), (16,), norm.weight.float(), norm.bias.float()).bfloat16(), atol=0, rtol=0)
    assert C.LayerNorm(16).double()(x.double()).dtype == torch.float64


# ---- convolutional projection

@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4]), st.booleans())
def test_number_of_keys(rows, columns, stride, cls):
    attn, n = C.ConvAttention(6, 2, stride_kv=stride, num_prefix=int(cls)).eval(), rows * columns + cls
    q, k, v = attn.project(torch.randn(2, n, 6), (rows, columns))
    assert q.shape == (2, 2, n, 3) and k.shape == v.shape == (2, 2, math.ceil(rows / stride) * math.ceil(columns / stride) + cls, 3)
    assert attn(torch.randn(2, n, 6), (rows, columns)).shape == (2, n, 6)


@pytest.mark.parametrize('method', ['dw_bn', 'avg', 'linear'])
@pytest.mark.parametrize('cls', [0, 1])
@pytest.mark.parametrize('head_scale', [False, True])
def test_attention_is_the_equation(method, cls, head_scale):
    for kernel, stride, pad, grid in ((3, 2, 1, (5, 6)), (5, 3, 2, (7, 4)), ((1, 3), (2, 1), (0, 1), (4, 4)), (3, 2, 0, (6, 5))):
        pad_q = tuple(k // 2 for k in C.pair(kernel))
        attn = randomised(C.ConvAttention(12, 3, method=method, kernel_size=kernel, stride_kv=stride, padding_q=pad_q, padding_kv=pad, num_prefix=cls, head_scale=head_scale)).eval()
        x = torch.randn(2, cls + grid[0] * grid[1], 12)
        assert_close(attn(x, grid), by_hand(attn, x, grid)[0], atol=1e-5, rtol=1e-4)
        assert attn.scale == (4 if head_scale else 12) ** -.5


def test_delta_kernels_give_ordinary_attention():
    attn = randomised(C.ConvAttention(12, 3, stride_kv=1)).eval()
    for r in 'qkv':
        conv = getattr(attn, f'conv_proj_{r}')
        nn.init.zeros_(conv.conv.weight), conv.conv.weight.data[:, :, 1, 1].fill_(1), conv.bn.reset_parameters(), conv.bn.reset_running_stats()
    x = torch.randn(2, 20, 12)
    heads = lambda t: rearrange(t, 'b n (h d) -> b h n d', h=3)
    want = attn.proj(rearrange(naive_attention(heads(attn.proj_q(x)), heads(attn.proj_k(x)), heads(attn.proj_v(x)), scale=12 ** -.5)[0], 'b h n d -> b n (h d)'))
    assert_close(attn(x, (4, 5)), want, atol=2e-5, rtol=1e-4)                    # each norm divides by sqrt(1 + 1e-5)
    mha = nn.MultiheadAttention(12, 3, batch_first=True)                         # torch scales by the head's width: queries times sqrt(4 / 12)
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([attn.proj_q.weight * 3 ** -.5, attn.proj_k.weight, attn.proj_v.weight]))
        mha.in_proj_bias.copy_(torch.cat([attn.proj_q.bias * 3 ** -.5, attn.proj_k.bias, attn.proj_v.bias]))
        mha.out_proj.load_state_dict(attn.proj.state_dict())
        assert_close(attn(x, (4, 5)), mha(x, x, x)[0], atol=2e-5, rtol=1e-4)


def test_average_sees_a_row_more():
    "The official average rounds up: on even grids it leaves one row and column more than the convolution."
    attn = C.ConvAttention(6, 2, method='avg').eval()
    assert attn.project(torch.randn(1, 64, 6), (8, 8))[1].shape[2] == 25 and attn.project(torch.randn(1, 49, 6), (7, 7))[1].shape[2] == 16
    assert not any('conv_proj' in n for n in attn.state_dict())
    x = torch.randn(2, 30, 6)
    assert_close(rearrange(attn.project(x, (5, 6))[0], 'b h n d -> b n (h d)'), attn.proj_q(x))       # the queries are not averaged


def test_class_token_passes_the_convolutions_by():
    attn, x = randomised(C.ConvAttention(12, 3, num_prefix=1)).eval(), torch.randn(2, 17, 12)
    before = attn(x, (4, 4))
    attn(x, (4, 4))[:, 0].square().sum().backward()
    for p in attn.conv_proj_q.parameters(): assert p.grad.abs().max() == 0                   # the class token's query never met the convolution
    for p in (*attn.conv_proj_k.parameters(), *attn.conv_proj_v.parameters()): assert p.grad.abs().max() > 0
    with torch.no_grad():
        attn.conv_proj_q.conv.weight += 1
        after = attn(x, (4, 4))
        assert_close(after[:, 0], before[:, 0])
        assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-2
        attn.conv_proj_k.conv.weight += 1
        assert (attn(x, (4, 4))[:, 0] - before[:, 0]).abs().max() > 1e-3
        for r in 'qkv': assert_close(getattr(attn, f'proj_{r}')(x[:, 0]), rearrange(dict(zip('qkv', attn.project(x, (4, 4))))[r][:, :, 0], 'b h d -> b (h d)'))


def test_scale_is_of_the_whole_width():
    torch.manual_seed(1)
    wide, head = (C.ConvAttention(12, 2, head_scale=s).eval() for s in (False, True))
    head.load_state_dict(wide.state_dict())
    x = torch.randn(1, 16, 12)
    logits = lambda a: by_hand(a, x, (4, 4))[1].log()
    spread = lambda l: l - l.mean(-1, keepdim=True)                              # softmax forgets a constant of each row
    assert wide.scale / head.scale == pytest.approx(2 ** -.5)
    assert_close(spread(logits(wide)), spread(logits(head)) * 2 ** -.5, atol=1e-5, rtol=1e-4)


def test_stage_one_has_one_head_and_one_scale(): assert C.ConvAttention(8, 1).scale == C.ConvAttention(8, 1, head_scale=True).scale


def test_no_nonlinearity_in_the_projection():
    conv = randomised(C.ConvProjection(6)).eval()
    a, b, zero = torch.randn(1, 6, 5, 5), torch.randn(1, 6, 5, 5), torch.zeros(1, 6, 5, 5)
    assert_close(conv(2 * a - 3 * b) - conv(zero), 2 * (conv(a) - conv(zero)) - 3 * (conv(b) - conv(zero)), atol=1e-5, rtol=1e-4)


# ---- folding

def test_fold():
    conv, linear, m = randomised(C.ConvProjection(6, stride=2)).eval(), nn.Linear(6, 9), torch.randn(2, 6, 7, 8)
    fused = copy.deepcopy(conv)
    fused.fuse()
    assert_close(fused(m), conv(m), atol=1e-5, rtol=1e-5)
    assert isinstance(fused.bn, nn.Identity) and fused.conv.bias.abs().min() > 0
    dense = linear.weight[:, :, None, None] * fused.conv.weight[:, 0]            # P[o, c] * D[c, :, :]
    assert_close(F.conv2d(m, dense, linear.weight @ fused.conv.bias + linear.bias, 2, 1), linear(conv(m).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('join', [False, True])
@pytest.mark.parametrize('more', [{}, dict(cls_token=False), dict(qkv_method=('linear', 'avg', 'dw_bn')), dict(act_layer=nn.GELU), dict(kernel_qkv=5, padding_q=2, padding_kv=1, stride_kv=3)])
@torch.no_grad()
def test_fuse_changes_nothing(join, more):
    model, x = small(**more), torch.randn(2, 3, 48, 40)
    features, logits = model.forward_features(x), model(x)
    fused = copy.deepcopy(model).fuse(join_kv=join)
    assert_close(fused(x), logits, atol=1e-5, rtol=1e-4)
    assert_close(fused.forward_features(x), features, atol=2e-5, rtol=1e-4)      # all tokens are still there for those who want them
    for a, b in zip(fused.feature_maps(x), model.feature_maps(x)): assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) and fused.fuse() is fused
    assert_close(fused(x), logits, atol=1e-5, rtol=1e-4)                         # a second time does nothing
    with pytest.raises(ValueError, match='eval mode'): small().train().fuse()


def test_last_block_computes_the_class_token_alone():
    "After `fuse`, and in training; in evaluation all tokens are computed, as `forward_features` always does."
    x = torch.randn(2, 3, 32, 32)
    for model, last in ((small().fuse(), 1), (small().train(), 1), (small(), 5), (small(cls_token=False).train(), 4)):
        seen = []
        for stage in model.stages:
            for block in stage.blocks: block.mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
        model(x)
        assert seen == [64, 16, last if last != 1 else 5, last]
        model.forward_features(x)
        assert seen[4:] == [64, 16] + [4 if last == 4 else 5] * 2


@pytest.mark.parametrize('more', [{}, dict(depths=(1, 1, 1)), dict(qkv_method='avg'), dict(drop_path_rate=(0., .2, .4))])
def test_training_for_the_class_token_alone_changes_nothing(more):
    model, x = small(**more).train(), torch.randn(4, 3, 32, 48)
    whole = copy.deepcopy(model)
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    want = whole.forward_head(whole.forward_features(x))
    assert_close(out, want, atol=1e-5, rtol=1e-4)
    for a, b in zip(model.buffers(), whole.buffers()): assert_close(a, b)        # the norms' statistics, of the convolution that nobody uses too
    out.square().sum().backward(), want.square().sum().backward()
    for (n, a), b in zip(model.named_parameters(), whole.parameters()): assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=n)


def test_quick_gelu():
    x = torch.linspace(-6, 6, 101, dtype=torch.double, requires_grad=True)
    want = x * torch.sigmoid(1.702 * x)
    assert_close(C.QuickGELU()(x), want)
    assert torch.autograd.gradcheck(C.QuickGELU(), x) and torch.autograd.gradgradcheck(C.QuickGELU(), x)
    assert_close(torch.autograd.grad(C.QuickGELU()(x).sum(), x), torch.autograd.grad(want.sum(), x))


@pytest.mark.parametrize('grad', [False, True])
def test_mlp_is_the_equation(grad):
    mlp, x = randomised(C.CvTMlp(6, 24, act_layer=C.QuickGELU)).double(), torch.randn(2, 5, 6, dtype=torch.double, requires_grad=grad)
    step_by_step = lambda x: mlp.fc2((lambda z: z * torch.sigmoid(1.702 * z))(mlp.fc1(x)))
    wanted = (x, *mlp.parameters()) if grad else tuple(mlp.parameters())
    assert_close(mlp(x), step_by_step(x))
    for a, b in zip(torch.autograd.grad(mlp(x).square().sum(), wanted), torch.autograd.grad(step_by_step(x).square().sum(), wanted)): assert_close(a, b)
    with torch.no_grad(): assert_close(mlp(x), step_by_step(x))
    assert set(mlp.state_dict()) == {'fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias'}


def test_mlp_steps_aside_for_replaced_and_watched_modules():
    mlp, x, seen = C.CvTMlp(6, 24, act_layer=C.QuickGELU), torch.randn(2, 5, 6), []
    want = mlp(x)
    handle = mlp.act.register_forward_hook(lambda m, i, o: seen.append((i[0].detach().clone(), o.detach().clone())))
    assert_close(mlp(x), want)
    assert_close(seen[0][0], mlp.fc1(x)), assert_close(seen[0][1], C.QuickGELU()(mlp.fc1(x)))
    handle.remove()
    class Twice(nn.Linear):                                                       # an adapter, say
        def forward(self, x): return 2 * super().forward(x)
    mlp.fc2.__class__ = Twice
    assert_close(mlp(x), 2 * want)
    relu = C.CvTMlp(6, 24, act_layer=nn.ReLU)
    assert_close(relu(x), relu.fc2(relu.fc1(x).relu()))


# ---- positions, shifts, sizes

@torch.no_grad()
def test_position_is_felt():
    model, x = small(), torch.randn(1, 3, 32, 32)
    rolled = torch.cat([x[:, :, 16:], x[:, :, :16]], 2)                          # the halves of the picture exchanged
    assert (model(rolled) - model(x)).abs().max() > 1e-3
    deep = torch.randn(1, 3, 32, 32)
    t = rearrange(deep, 'b c (y p) (x q) -> b c y x p q', p=16, q=16)            # patches of the last stage: 16 pixels
    swapped = rearrange(t.flip(2, 3), 'b c y x p q -> b c (y p) (x q)')
    only = small(embed_dims=(16,), depths=(2,), num_heads=(2,), patch_size=(16,), patch_stride=(16,), patch_padding=(0,), cls_token=False, qkv_method='linear')
    assert_close(only(swapped), only(deep), atol=1e-5, rtol=1e-4)                # without convolutions: a ViT without positions, blind to the order
    convs = small(embed_dims=(16,), depths=(2,), num_heads=(2,), patch_size=(16,), patch_stride=(16,), patch_padding=(0,), cls_token=False)
    assert (convs(swapped) - convs(deep)).abs().max() > 1e-3


@torch.no_grad()
def test_strided_keys_commute_with_shifts_of_two():
    attn = randomised(C.ConvAttention(8, 2)).eval()
    for r in 'qkv': getattr(attn, f'conv_proj_{r}').conv.padding_mode = 'circular'
    for r in 'qkv': getattr(attn, f'conv_proj_{r}').conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    m = torch.randn(1, 8, 8, 8)
    run = lambda m: attn(m.flatten(2).mT, (8, 8)).mT.unflatten(2, (8, 8))
    for shift, commutes in ((2, True), (4, True), (1, False), (3, False)):
        off = (run(m.roll(shift, 3)) - run(m).roll(shift, 3)).abs().max()
        assert (off < 1e-5) == commutes, (shift, off)
    one = randomised(C.ConvAttention(8, 2, stride_kv=1)).eval()
    for r in 'qkv': getattr(one, f'conv_proj_{r}').conv.padding_mode = 'circular'
    for r in 'qkv': getattr(one, f'conv_proj_{r}').conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    run = lambda m: one(m.flatten(2).mT, (8, 8)).mT.unflatten(2, (8, 8))
    assert_close(run(m.roll(1, 3)), run(m).roll(1, 3), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_any_size_with_the_same_weights():
    model = small()
    for size in ((224, 224), (256, 256), (224, 320), (33, 50), (7, 7)):
        maps = model.feature_maps(torch.randn(1, 3, *size))
        grid = C.conv_size(size, 7, 4, 2)
        assert tuple(maps[0].shape) == (1, 8, *grid) and tuple(maps[1].shape[2:]) == C.conv_size(grid, 3, 2, 1)
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


@torch.no_grad()
def test_batch_of_one_keeps_its_axis():
    for more in ({}, dict(cls_token=False), dict(cls_token=True)):
        model, x = small(**more), torch.randn(3, 3, 32, 40)
        assert model(x[:1]).shape == (1, 5)
        assert_close(model(x[:1]), model(x)[:1], atol=1e-5, rtol=1e-4)


# ---- the model

def test_parameters():
    with torch.device('meta'): models = {n: create_model(n) for n in ('cvt_13', 'cvt_21', 'cvt_w24')}
    count = lambda m: sum(p.numel() for p in m.parameters())
    m = models['cvt_13']
    assert count(m) == 19_997_480 and [count(s) for s in m.stages] == [61_696, 1_013_568, 18_536_448] and count(m.norm) + count(m.head) == 385_768
    assert count(models['cvt_21']) == pytest.approx(31.54e6, rel=.003) and count(models['cvt_w24']) == pytest.approx(276.7e6, rel=.003)
    assert not any('running' in n for n, _ in m.named_parameters())
    for name, rate in (('cvt_13', .1), ('cvt_21', .1), ('cvt_w24', .3)):
        rates = [[b.drop_path.p for b in s.blocks] for s in models[name].stages]
        assert set(rates[0] + rates[1]) == {0.} and rates[2][0] == 0 and rates[2][-1] == pytest.approx(rate) and rates[2] == sorted(rates[2])


@pytest.mark.parametrize('name, size, giga', [('cvt_13', 224, 4.53), ('cvt_13', 384, 16.3), ('cvt_21', 224, 7.13), ('cvt_21', 384, 24.9), ('cvt_w24', 384, 193.2)])
def test_flops(name, size, giga):
    with torch.device('meta'): assert flops(create_model(name).eval(), torch.empty(1, 3, size, size)) / 2e9 == pytest.approx(giga, rel=.02)


def test_searched_layouts():
    "Stride of keys and MLP ratio for each block, as CvT-13-NAS has them."
    strides, ratios = ((2,), (1, 2), (2, 1, 2)), ((4.,), (2., 4.), (2., 2., 4.))
    model = small(depths=(1, 2, 3), stride_kv=strides, mlp_ratio=ratios)
    for stage, s, r, c in zip(model.stages, strides, ratios, model.levels):
        assert [b.attn.conv_proj_k.conv.stride[0] for b in stage.blocks] == list(s) == [b.attn.conv_proj_v.conv.stride[0] for b in stage.blocks]
        assert [b.mlp.fc1.out_features / c.channels for b in stage.blocks] == list(r)
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 5)
    assert C.CvT.official_arguments(official_state(model))['mlp_ratio'] == [4., [2., 4.], [2., 2., 4.]]


def test_initial_weights():
    torch.manual_seed(0)
    model = C.CvT(embed_dims=(32, 64, 96), depths=(1, 1, 1), num_heads=1)
    model.requires_grad_(False)
    linear = [m for m in model.stages.modules() if isinstance(m, nn.Linear)]
    assert all(m.weight.std() == pytest.approx(.02, rel=.1) and m.bias.abs().max() == 0 for m in linear)
    assert model.head.weight.std() == pytest.approx(.02, rel=.1) and model.stages[2].cls_token.std() == pytest.approx(.02, rel=.3) and model.head.bias.abs().max() > 0
    x = C.CvT(embed_dims=(32, 64, 96), depths=(1, 1, 1), num_heads=1, init='xavier').requires_grad_(False).stages[2].blocks[0].mlp.fc1.weight
    assert x.abs().max() == pytest.approx((6 / (5 * 96)) ** .5, rel=.01) and model.no_weight_decay() == {'stages.2.cls_token'}


def test_head_width_scale_reaches_all_stages(): assert [s.blocks[0].attn.scale for s in small(head_scale=True).stages] == [8 ** -.5] * 3


def test_training_moves_the_running_statistics_and_only_then():
    model, x = small(), torch.randn(4, 3, 32, 32)
    bn = model.stages[0].blocks[0].attn.conv_proj_k.bn
    before = bn.running_mean.clone()
    model(x)
    assert torch.equal(bn.running_mean, before)
    model.train()(x)
    assert not torch.equal(bn.running_mean, before)


def test_last_queries_are_never_used():
    "With a class token the last block's query convolution has no influence on the classes: its gradient is zero, in the official code too."
    model = small().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    dead = {n for n, p in model.named_parameters() if p.grad.abs().max() == 0}
    assert dead == {f'stages.2.blocks.1.attn.conv_proj_q.{n}' for n in ('conv.weight', 'bn.weight', 'bn.bias')}


# ---- checkpoints

def build_sheet(config, weights):
    "A model from the names that the official settings have."
    c = {k.upper(): v for k, v in config.items()}
    act = dict(QuickGELU=C.QuickGELU, GELU=nn.GELU, ReLU=nn.ReLU, SiLU=nn.SiLU)[c.get('ACT_LAYER', 'GELU')]
    eps = c.get('NORM_EPS', 1e-5)
    return C.CvT(in_chans=c.get('IN_CHANS', 3), num_classes=c.get('NUM_CLASSES', 1000), embed_dims=c['DIM_EMBED'], depths=c['DEPTH'], num_heads=c['NUM_HEADS'], mlp_ratio=c['MLP_RATIO'], patch_size=c['PATCH_SIZE'],
                 patch_stride=c['PATCH_STRIDE'], patch_padding=c['PATCH_PADDING'], qkv_bias=c['QKV_BIAS'], cls_token=c['CLS_TOKEN'], qkv_method=c['QKV_PROJ_METHOD'], kernel_qkv=c['KERNEL_QKV'], stride_q=c['STRIDE_Q'],
                 stride_kv=c['STRIDE_KV'], padding_q=c['PADDING_Q'], padding_kv=c['PADDING_KV'], act_layer=act, norm_layer=lambda dim: C.LayerNorm(dim, eps=eps)).from_official(weights)


@pytest.mark.parametrize('sheet', sheets('cvt'), ids=lambda s: s.name)
@torch.no_grad()
def test_sheets(sheet):
    model, x = build_sheet(sheet.config, sheet.weights()), sheet.inputs()['x']
    sheet.check(dict(logits=model(x)))
    sheet.check(dict(logits=model.fuse()(x)))
    by_class = C.CvT.from_official(sheet.weights(), num_heads=sheet.config['NUM_HEADS'])
    sheet.check(dict(logits=by_class(x)))
    wrong = C.CvT.from_official(sheet.weights(), num_heads=sheet.config['NUM_HEADS'], head_scale=True)
    with pytest.raises(AssertionError, match='is off by'): sheet.check(dict(logits=wrong(x)))


@torch.no_grad()
def test_from_official_on_class_and_instance(tmp_path):
    model = small(embed_dims=(64, 64, 128), num_heads=(1, 1, 2), kernel_qkv=(3, 5, 3), padding_q=(1, 2, 1), padding_kv=(1, 2, 1), qkv_bias=(True, False, True), mlp_ratio=(4., 2., 3.))
    state, x = official_state(model), torch.randn(1, 3, 40, 32)
    assert set(C.CvT.official_names(state)) == set(model.state_dict())
    twin = C.CvT.from_official(state)
    assert not twin.training and torch.equal(twin(x), model(x))
    untracked = {n: v for n, v in state.items() if 'num_batches_tracked' not in n}       # written by old torch
    assert torch.equal(C.CvT.from_official(untracked)(x), model(x))
    torch.save({'state_dict': {f'module.{n}': v for n, v in state.items()}}, tmp_path/'cvt.pth')
    loaded = load_checkpoint(copy.deepcopy(twin).train(), tmp_path/'cvt.pth')
    assert torch.equal(loaded.eval()(x), model(x))
    bad = dict(state)
    del bad['stage1.blocks.0.attn.proj_q.weight']
    with pytest.raises(ValueError, match='1 missing .stages.1.blocks.0.attn.proj_q.weight'): C.CvT.from_official(bad)
    with pytest.raises(ValueError, match='num_heads'): C.CvT.from_official(official_state(small(embed_dims=(16, 32, 64), num_heads=(1, 2, 4))))
    with pytest.raises(ValueError, match='no CvT'): C.CvT.from_official({'a': torch.zeros(1)})


@pytest.mark.parametrize('name', ['cvt_13', 'cvt_21', 'cvt_w24'])
def test_full_size_checkpoints_load(name):
    with torch.device('meta'): model = create_model(name)
    arguments = C.CvT.official_arguments(official_state(model))
    with torch.device('meta'): twin = C.CvT(**arguments)
    assert {n: v.shape for n, v in twin.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert [[b.attn.num_heads for b in s.blocks] for s in twin.stages] == [[b.attn.num_heads for b in s.blocks] for s in model.stages]
    if name == 'cvt_13': C.CvT.from_official(official_state(create_model(name)))


def test_hugging_faces_weights():
    "Their version computes the MLP with GELU; the official code, with which the weights were trained, with QuickGELU."
    transformers = pytest.importorskip('transformers')
    hf = randomised(transformers.CvtForImageClassification(transformers.CvtConfig(embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4], num_labels=5))).eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        ours = C.CvT.from_official(hf.state_dict(), num_heads=(1, 2, 4), act_layer=nn.GELU)
        assert_close(ours(x), hf(x).logits, atol=1e-5, rtol=1e-4)
        assert (C.CvT.from_official(hf.state_dict(), num_heads=(1, 2, 4))(x) - hf(x).logits).abs().max() > 1e-4


# ---- as a module among others

def test_copies_pickles_and_state():
    model, x = small(), torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.fuse())): assert_close(twin(x), model(x), atol=1e-6, rtol=1e-5)


def test_feature_maps_by_name():
    only = create_model('cvt_13', features_only=True, out_indices=(1, 2), **SMALL).eval()
    assert only.channels == [16, 24] and only.strides == [8, 16]
    assert [tuple(m.shape) for m in only(torch.randn(1, 3, 64, 96))] == [(1, 16, 8, 12), (1, 24, 4, 6)]


def test_gradients_are_right():
    attn, x = randomised(C.ConvAttention(4, 2, num_prefix=1)).double().eval(), torch.randn(1, 7, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attn(x, (2, 3)), x)


def test_half_precision_and_recording():
    from vitbook.probe import recording
    model, x = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert_close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), model(x), atol=.15, rtol=.1)
    with recording(model) as rec: model(x)
    assert [tuple(w.shape) for w in rec.weights] == [(2, 1, 64, 16), (2, 2, 16, 4), (2, 3, 5, 2), (2, 3, 5, 2)]


# ---- bad input

@pytest.mark.parametrize('more, words', [
    (dict(num_heads=(1, 3, 3)), 'num_heads must divide dim=16, got 3'), (dict(depths=(1, 1)), 'depths must be one for each stage, 3, got 2'), (dict(mlp_ratio=(4., 4.)), 'mlp_ratio .* 3, got 2'),
    (dict(stride_kv=((1, 2), 2, 2)), 'stride_kv must be one value or one for each block, 1, got 2'), (dict(qkv_method='conv'), "method must be 'dw_bn', 'avg' or 'linear', got 'conv'"), (dict(init='he'), "init must be .* got 'he'"),
    (dict(stride_q=2), 'stride_q must be 1'), (dict(kernel_qkv=5), 'padding_q half of kernel_size'), (dict(qkv_method='avg', padding_kv=2), 'padding must be at most half')])
def test_bad_arguments(more, words):
    with pytest.raises(ValueError, match=words): C.CvT(**{**SMALL, **more})


def test_bad_input(unchecked):
    with pytest.raises(ValueError, match=r'x must hold 1 \+ 4x4 tokens, got 16'): C.ConvAttention(8, 2, num_prefix=1)(torch.randn(1, 16, 8), (4, 4))
    with pytest.raises(ValueError, match='x must have in_chans=3 channels, got 1'): small()(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match='x must be larger than 2x40 pixels: in stage 0'): small()(torch.randn(1, 3, 2, 40))
    with pytest.raises(ValueError, match='in stage 1'): small(patch_padding=(2, 0, 1))(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match='at least 3x3 places'): small(padding_kv=0)(torch.randn(1, 3, 16, 16))


def test_one_value_a_channel_is_named_before_batchnorm_does(unchecked):
    model = create_model('cvt_13', num_classes=10, depths=(1, 1, 1)).train()
    with pytest.raises(ValueError, match='BatchNorm.*batch of 1.*1x1'): model(torch.rand(1, 3, 32, 32))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 10)
