"""backbones.crossformer: the mechanisms' properties, the official behaviour by a plain rewriting of it, checkpoints, the cache, and what it answers to bad input."""
import copy, pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.testing import assert_close

from sheets import weight
from vitbook import measure
from vitbook.weights import load_checkpoint
from vitbook.backbones import crossformer as C
from vitbook.registry import create_model, model_info

SMALL = dict(img_size=64, num_classes=7, embed_dim=32, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), group_size=(4, 4, 4, 4), crs_interval=(4, 2, 1, 1))


def filled(module):
    "The module with weights that follow from their names: no zeros, no ones."
    module.load_state_dict({k: weight(k, list(v.shape)) for k, v in module.state_dict().items() if k != 'pos_grid'})
    return module.eval()


def small(**more): return filled(C.CrossFormer(**{**SMALL, **more}))


# ---- the official computation, written plainly: names as in its checkpoints, masks added as -1e6, groups cut by reshape, nothing fused

def official_names_of(model):
    "Our weights under the official names."
    rules = [('patch_norm.', 'patch_embed.norm.'), ('pos_embed', 'absolute_pos_embed'), ('stages.', 'layers.'), ('.embed.projs.', '.reductions.'), ('.pos.proj.', '.pos.pos_proj.'),
             ('.pos.layers.0.', '.pos.pos1.'), ('.pos.layers.1.', '.pos.pos2.'), ('.pos.layers.2.', '.pos.pos3.'), ('.cool.conv.', '.ex_conv.'), ('.cool.norm.', '.ex_ln.'),
             ('.cpe.norm.', '.norm_cpe.'), ('.cpe.conv.', '.cpe.')]
    out = {}
    for k, v in model.state_dict().items():
        for a, b in rules: k = k.replace(a, b)
        if k.startswith('layers.'):
            stage, rest = k.split('.', 2)[1:]
            k = f'layers.{stage}.blocks.{rest}'
        if k.startswith('merges.'): k = k.replace('merges.', 'layers.', 1).replace('.reductions.', '.downsample.reductions.').replace('.norm.', '.downsample.norm.')
        out[k] = v
    return out


def norm(x, sd, at): return F.layer_norm(x, x.shape[-1:], sd[at + '.weight'], sd[at + '.bias'])
def linear(x, sd, at): return F.linear(x, sd[at + '.weight'], sd.get(at + '.bias'))


def reference_block(x, sd, at, heads, G, I, long, pad_type=0, no_mask=False, scale=None, adaptive=False, dense=False):
    b, H, W, c = x.shape
    if min(H, W) <= G: long, G = False, max(H, W) if dense else min(H, W)
    if adaptive: I = -(-(max(H, W) if dense else H) // G)
    y = norm(x, sd, at + 'norm1')
    if at + 'cpe.weight' in sd: y = y + norm(F.conv2d(y, sd[at + 'cpe.weight'], sd[at + 'cpe.bias'], padding=1, groups=H), sd, at + 'norm_cpe')
    unit = G * I if long else G
    ph, pw = (unit - H % unit) % unit, (unit - W % unit) % unit
    t, l = (ph // 2, pw // 2) if pad_type else (0, 0)
    y, gone = F.pad(y, (0, 0, l, pw - l, t, ph - t)), F.pad(torch.zeros(1, H, W, 1), (0, 0, l, pw - l, t, ph - t), value=1.)
    Hp, Wp = y.shape[1:3]
    def cut(z):
        if long: return z.reshape(-1, Hp // unit, G, I, Wp // unit, G, I, z.shape[-1]).permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, G * G, z.shape[-1])
        return z.reshape(-1, Hp // G, G, Wp // G, G, z.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, G * G, z.shape[-1])
    g = cut(y)
    q, k, v = linear(g, sd, at + 'attn.qkv').reshape(len(g), G * G, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    s = q * (scale or (c // heads) ** -.5) @ k.transpose(-1, -2)
    if at + 'attn.pos.pos_proj.weight' in sd:
        at_ = torch.stack(torch.meshgrid(torch.arange(G), torch.arange(G), indexing='ij'), -1).reshape(-1, 2)
        p = linear((at_[:, None] - at_[None]).float(), sd, at + 'attn.pos.pos_proj')                # every pair of tokens, not every offset
        for i in '123': p = linear(norm(p, sd, f'{at}attn.pos.pos{i}.0').relu(), sd, f'{at}attn.pos.pos{i}.2')
        s = s + p.permute(2, 0, 1)
    if not no_mask and (ph or pw): s = s + -1e6 * cut(gone)[..., 0].repeat(b, 1)[:, None, None]
    g = linear((s.softmax(-1) @ v).transpose(1, 2).reshape(len(g), G * G, c), sd, at + 'attn.proj')
    if long: y = g.reshape(b, Hp // unit, Wp // unit, I, I, G, G, c).permute(0, 1, 5, 3, 2, 6, 4, 7)
    else: y = g.reshape(b, Hp // G, Wp // G, G, G, c).permute(0, 1, 3, 2, 4, 5)
    x = x + y.reshape(b, Hp, Wp, c)[:, t:t + H, l:l + W]
    x = x + linear(F.gelu(linear(norm(x, sd, at + 'norm2'), sd, at + 'mlp.fc1')), sd, at + 'mlp.fc2')
    if at + 'ex_conv.weight' in sd: x = norm(F.conv2d(x.permute(0, 3, 1, 2), sd[at + 'ex_conv.weight'], sd[at + 'ex_conv.bias'], padding=1, groups=c).permute(0, 2, 3, 1), sd, at + 'ex_ln')
    return x


def squares(x, sd, at, stride):
    found = []
    while f'{at}.{len(found)}.weight' in sd:
        w = sd[f'{at}.{len(found)}.weight']
        found.append(F.conv2d(x, w, sd[f'{at}.{len(found)}.bias'], stride, (w.shape[-1] - stride) // 2))
    return torch.cat(found, 1).permute(0, 2, 3, 1)


def reference(sd, x, depths, num_heads, sizes, crs_interval, pad_type=0, no_mask=False, adaptive=False, scale=None, dense=False):
    "Maps of all stages, and the logits (None for the dense-prediction backbone)."
    x = squares(x, sd, 'patch_embed.projs', sd['patch_embed.projs.0.weight'].shape[-1])
    if 'patch_embed.norm.weight' in sd: x = norm(x, sd, 'patch_embed.norm')
    if 'absolute_pos_embed' in sd: x = x + sd['absolute_pos_embed'].reshape(1, *x.shape[1:])
    maps = []
    for i, depth in enumerate(depths):
        for j in range(depth): x = reference_block(x, sd, f'layers.{i}.blocks.{j}.', num_heads[i], sizes[i][j], crs_interval[i], j % 2 == 1, pad_type, no_mask, scale, adaptive, dense)
        maps.append(x.permute(0, 3, 1, 2))
        if i < len(depths) - 1: x = squares(norm(x, sd, f'layers.{i}.downsample.norm').permute(0, 3, 1, 2), sd, f'layers.{i}.downsample.reductions', 2)
    return maps, None if dense else linear(norm(x, sd, 'norm').mean((1, 2)), sd, 'head')


CASES = {
    'plain': {}, 'padded': dict(group_size=(5, 3, 3, 2), crs_interval=(2, 3, 2, 1)), 'padded on all sides': dict(group_size=(5, 3, 3, 2), crs_interval=(2, 3, 2, 1), pad_type=1),
    'no mask': dict(group_size=(5, 3, 3, 2), crs_interval=(2, 3, 2, 1), no_mask=True), 'no mask, all sides': dict(group_size=(5, 3, 3, 2), no_mask=True, pad_type=1),
    'empty groups': dict(group_size=(3, 3, 3, 3), crs_interval=(4, 4, 2, 2), img_size=32), 'adaptive': dict(group_size=(5, 3, 3, 2), adaptive_interval=True), 'larger than the map': dict(group_size=16),
    'ape': dict(ape=True), 'no patch norm': dict(patch_norm=False), 'mlp ratios': dict(mlp_ratio=(2., 3., 4., 1.5)), 'acl': dict(use_acl=True, depths=(4, 1, 7, 4)),
    'cpe': dict(use_cpe=True, group_size=(5, 4, 3, 2)), 'one kernel': dict(patch_kernels=(4,), merge_kernels=((2,), (2,), (2,))), 'other kernels': dict(patch_kernels=(4, 16), merge_kernels=((2,), (2, 4, 6), (2, 4))),
    'patch 2': dict(img_size=32, patch_size=2, patch_kernels=(2, 4, 8)), 'no qkv bias': dict(qkv_bias=False, qk_scale=.3), 'scale 0 is none': dict(qk_scale=0.), 'three stages': dict(depths=(1, 2, 3)),
    'not whole patches': dict(img_size=66), 'linear': dict(group_type='linear'), 'linear_div': dict(group_type='linear_div', depths=(2, 2, 6, 2)), 'alter': dict(group_type='alter', depths=(2, 2, 6, 2)),
    '7_14': dict(group_type='7_14', depths=(1, 1, 6, 1)), 'size of every block': dict(group_size=((4, 5), (3, 4), (2, 4, 3), (2, 2)))}


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_official_behaviour(case):
    config = {**SMALL, **CASES[case]}
    model = small(**CASES[case])
    sd, x = official_names_of(model), torch.rand(2, 3, config['img_size'], config['img_size'])
    sizes = C.group_sizes(config['group_size'], config['depths'], config['img_size'] // config.get('patch_size', 4), config.get('group_type', 'constant'))
    maps, logits = reference(sd, x, config['depths'], config['num_heads'], sizes, config['crs_interval'], config.get('pad_type', 0), config.get('no_mask', False), config.get('adaptive_interval', False), config.get('qk_scale'))
    assert_close(model(x), logits, atol=2e-5, rtol=1e-4)
    for a, b in zip(model.feature_maps(x), maps): assert_close(a, b, atol=2e-5, rtol=1e-4)
    told = {k: config[k] for k in ('group_size', 'crs_interval', 'group_type', 'pad_type', 'no_mask', 'adaptive_interval', 'qk_scale', 'num_heads', 'img_size') if k in config}
    again = C.CrossFormer.from_official(sd, **told)                    # everything else is read off the weights
    assert_close(again(x), logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('size', [(64, 64), (64, 96), (96, 64), (32, 96), (99, 66), (32, 128)])
@pytest.mark.parametrize('more', [{}, dict(group_size=(7, 7, 7, 7), crs_interval=(8, 4, 2, 1)), dict(group_size=(3, 5, 3, 2), adaptive_interval=True, use_acl=True, depths=(2, 1, 4, 1))])
@torch.no_grad()
def test_dense_prediction_backbone(size, more):
    "Maps of rectangles: the official backbone pads the smaller side of a small map up to the longer, which changes nothing but the cost."
    config = {**SMALL, **more}
    model = small(**more, head_norm=False, num_classes=0)
    sd, x = official_names_of(model), torch.rand(2, 3, *size)
    maps, _ = reference(sd, x, config['depths'], config['num_heads'], C.group_sizes(config['group_size'], config['depths'], 16), config['crs_interval'], adaptive='adaptive_interval' in config, dense=True)
    detector = {f'backbone.{k}': v for k, v in sd.items()} | {'neck.lateral_convs.0.conv.weight': torch.zeros(1)}
    again = C.CrossFormer.from_official(detector, **{k: config[k] for k in ('group_size', 'crs_interval', 'adaptive_interval') if k in config})
    for a, b, c in zip(model.feature_maps(x), maps, again.feature_maps(x)):
        assert_close(a, b, atol=2e-5, rtol=1e-4)
        assert_close(c, a)


@torch.no_grad()
def test_the_kind_of_attention_is_chosen_anew_for_every_picture():
    "The official dense-prediction code forgets long-distance attention for good once it has met a small map."
    model, x = small(), torch.rand(1, 3, 128, 128)
    before = model(x)
    model(torch.rand(1, 3, 32, 32))
    assert torch.equal(model(x), before)


# ---- cross-scale embedding

def test_embedding_shapes():
    embed = C.CrossScaleEmbed(3, 96)
    assert embed(torch.rand(1, 3, 224, 224)).shape == (1, 56, 56, 96)
    assert [p.out_channels for p in embed.projs] == [48, 24, 12, 12] and [p.padding[0] for p in embed.projs] == [0, 2, 6, 14]
    merge = C.PatchMerging(96, 192)
    assert merge(torch.rand(1, 56, 56, 96)).shape == (1, 28, 28, 192) and [p.out_channels for p in merge.embed.projs] == [96, 96]
    counted = [measure.parameters(m) for m in (embed, C.PatchMerging(96, 192).embed, C.PatchMerging(192, 384).embed, C.PatchMerging(384, 768).embed)]
    assert counted == [53_280 - 192, 184_512, 737_664, 2_949_888]      # without the norms: the card's 53,280 has one


@given(st.integers(1, 6), st.integers(1, 8))
def test_widths_sum_up(parts, times):
    dim = times * 2 ** (parts - 1)
    widths = C.split_widths(dim, parts)
    assert sum(widths) == dim and len(widths) == parts and widths == sorted(widths, reverse=True)
    assert parts == 1 or widths[0] == dim // 2 and widths[-1] == widths[-2]


@given(st.sampled_from([(1, 5), (2, 3), (4, 1), (4, 2), (3, 3)]), st.integers(4, 7), st.integers(0, 40), st.integers(0, 40), st.integers(1, 4))
def test_cells_are_the_strided_convolution(kind, cells, height, width, chans):
    "The large kernels are computed on cells; also where sides are no multiples of the stride."
    stride, _ = kind
    k = stride * cells
    if (k - stride) % 2: k += stride
    if (k - stride) % 2: return
    embed = C.CrossScaleEmbed(chans, 2, (k,), stride).double()
    x = torch.randn(2, chans, stride + height, stride + width, dtype=torch.double)
    proj = embed.projs[0]
    assert stride == 1 or embed.in_cells(proj)
    assert_close(embed(x), F.conv2d(x, proj.weight, proj.bias, stride, (k - stride) // 2).permute(0, 2, 3, 1))


def test_embedding_gradients_are_those_of_the_convolutions():
    embed, x = C.CrossScaleEmbed(3, 32).double(), torch.randn(2, 3, 37, 48, dtype=torch.double, requires_grad=True)
    plain = torch.cat([p(x) for p in embed.projs], 1).permute(0, 2, 3, 1)
    up = torch.randn_like(plain)
    want = torch.autograd.grad(plain, [x, *embed.parameters()], up)
    for a, b in zip(torch.autograd.grad(embed(x), [x, *embed.parameters()], up), want): assert_close(a, b)


@torch.no_grad()
def test_impulse():
    "One bright pixel: the small squares of one token see it, the largest of 8 x 8."
    embed, dark = filled(C.CrossScaleEmbed(3, 32)), torch.zeros(1, 3, 128, 128)
    bright = dark.clone()
    bright[0, :, 66, 66] = 1.
    moved = (embed(bright) - embed(dark))[0].abs() > 1e-9
    edges = torch.tensor([0, 16, 24, 28, 32])
    assert [int(moved[..., a:b].any(-1).sum()) for a, b in zip(edges, edges[1:])] == [1, 4, 16, 64]


@pytest.mark.parametrize('kernels, stride', [((4, 7), 4), ((3,), 2), ((2,), 4), ((4, 8, 9), 4)])
def test_squares_that_share_no_centre_are_refused(kernels, stride):
    with pytest.raises(ValueError, match='kernels.*stride'): C.CrossScaleEmbed(3, 32, kernels, stride)


# ---- groups

def test_first_long_distance_group():
    at = torch.arange(144).view(1, 12, 12, 1)
    assert C.to_groups(at, 3, 2)[0, :, 0].tolist() == [0, 2, 4, 24, 26, 28, 48, 50, 52]
    assert C.to_groups(at, 3)[0, :, 0].tolist() == [0, 1, 2, 12, 13, 14, 24, 25, 26]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_groups_are_undone(g, h, i, rows, cols, b):
    for interval in (None, i):
        x = torch.randn(b, g * (interval or 1) * rows, h * (interval or 1) * cols, 2)
        cut = C.to_groups(x, (g, h), interval)
        assert cut.shape == (x.numel() // 2 // g // h, g * h, 2)
        assert torch.equal(C.from_groups(cut, x.shape[1:3], (g, h), interval), x)
        if interval == 1: assert torch.equal(cut, C.to_groups(x, (g, h)))


@given(st.integers(1, 4), st.integers(1, 4))
def test_members_agree_modulo_the_interval(g, i):
    "A long-distance group: rows and columns equal modulo I, within one super-block of G * I."
    at = torch.stack(torch.meshgrid(torch.arange(2 * g * i), torch.arange(g * i), indexing='ij'), -1)[None]
    cut = C.to_groups(at, g, i)
    assert (cut % i == cut[:, :1] % i).all() and (cut // (g * i) == cut[:, :1] // (g * i)).all()


def test_bad_groups():
    with pytest.raises(ValueError, match='12x12'): C.to_groups(torch.zeros(1, 18, 12, 1), 4, 3)
    with pytest.raises(ValueError, match='5x5'): C.from_groups(torch.zeros(3, 25, 1), (12, 12), 5)
    with pytest.raises(ValueError, match='3x3'): C.from_groups(torch.zeros(15, 9, 1), (12, 12), 3, 2)


# ---- who sees whom

def jacobian(blocks, size, dim=16):
    "Whether output token i depends on input token j, for all pairs."
    x = torch.randn(1, *size, dim, dtype=torch.double)
    def run(x):
        for b in blocks: x = b(x)
        return x
    J = torch.autograd.functional.jacobian(lambda x: run(x).sum(-1).flatten(), x)
    return J.reshape(size[0] * size[1], size[0] * size[1], dim).abs().amax(-1) > 1e-12


def places(size): return torch.stack(torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing='ij'), -1).reshape(-1, 2)
def same(labels): return (labels[:, None] == labels[None]).all(-1)
def block(G, I, **more): return filled(C.CrossFormerBlock(16, 2, G, I, 2., **more)).double()


def test_locality():
    at = places((6, 6))
    assert torch.equal(jacobian([block(3, None)], (6, 6)), same(at // 3))                      # windows
    assert torch.equal(jacobian([block(3, 2)], (6, 6)), same(at % 2))                          # residues
    at = places((8, 8))
    assert torch.equal(jacobian([block(2, 2)], (8, 8)), same(torch.cat([at % 2, at // 4], 1)))  # residues within super-blocks


def test_two_blocks_reach_everything_if_G_is_at_least_I():
    assert jacobian([block(3, None), block(3, 2)], (6, 6)).all()
    assert jacobian([block(2, None), block(2, 2)], (4, 4)).all()


def test_two_blocks_leave_the_predicted_holes_if_G_is_less_than_I():
    "G = 2, I = 3: the long-distance step from j lands on j modulo 3 in each axis; only windows that hold such a token are reached."
    size, G, I = (6, 6), 2, 3
    seen, at = jacobian([block(G, None), block(G, I)], size), places(size)
    window, residue = same(at // G), same(at % I)
    assert torch.equal(seen, (residue.double() @ window.double()) > 0) and not seen.all()
    per_axis = torch.tensor([len({y // G for y in range(6) if y % I == r}) for r in range(I)])
    assert torch.equal(seen.sum(1).reshape(6, 6), (per_axis[torch.arange(6) % I][:, None] * per_axis[torch.arange(6) % I]) * G * G)


@torch.no_grad()
def test_interval_one_is_the_window_and_a_window_of_everything_is_global():
    x = torch.randn(2, 6, 6, 16, dtype=torch.double)
    near, far = block(3, None), block(3, 1)
    assert_close(near(x), far(x))
    one, other = block(6, None), block(6, 1)
    attn = one.attn
    tokens = one.norm1(x).flatten(1, 2)
    q, k, v = attn.qkv(tokens).view(2, 36, 3, 2, 8).permute(2, 0, 3, 1, 4)
    s = q @ k.transpose(-1, -2) * 8 ** -.5 + attn.pos(places((6, 6))[:, None].double() - places((6, 6))[None]).permute(2, 0, 1)
    y = x + attn.proj((s.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 6, 16))
    want = y + one.mlp(one.norm2(y))
    assert_close(one(x), want)
    assert_close(other(x), want)


def test_stages_of_one_block_have_no_long_distance():
    with torch.device('meta'): tiny = create_model('crossformer_tiny')
    assert [[b.interval for b in s] for s in tiny.stages][:2] == [[None], [None]]
    assert [b.groups((7, 7)) for b in tiny.stages[3]] == [((7, 7), None)] * 6                  # 7 x 7: full attention in every block
    assert [b.groups((14, 14))[1] for b in tiny.stages[2]] == [None, 2] * 4
    assert C.CrossFormerBlock(16, 1, 7, 'adaptive').groups((200, 334)) == ((7, 7), 48)
    assert C.CrossFormerBlock(16, 1, 7, 2).groups((5, 20)) == ((5, 20), None)


# ---- position bias

def test_bias_depends_on_the_offset_alone():
    pos = filled(C.DynamicPositionBias(6, 3)).double()
    B = pos.bias((5, 4)).reshape(3, 5, 4, 5, 4)
    assert_close(B[:, 1:, :, 1:], B[:, :-1, :, :-1])
    assert_close(B[:, :, 1:, :, 1:], B[:, :, :-1, :, :-1])
    assert (B.flatten(1).std(1) > 1e-3).all() and not torch.allclose(B, B.permute(0, 3, 4, 1, 2))  # an offset and its opposite differ


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('group', [(7, 7), (9, 9), (2, 5), (1, 1), (1, 6)])
def test_bias_of_offsets_is_that_of_pairs(group, residual):
    pos = filled(C.DynamicPositionBias(6, 3, residual)).double()
    at = places(group).double()
    slow = pos(at[:, None] - at[None]).permute(2, 0, 1)
    assert_close(pos.bias(group), slow)
    up = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(pos.bias(group), list(pos.parameters()), up), torch.autograd.grad(pos(at[:, None] - at[None]).permute(2, 0, 1), list(pos.parameters()), up)):
        assert_close(a, b)


@torch.no_grad()
def test_residual_network():
    plain, residual = filled(C.DynamicPositionBias(6, 3)), filled(C.DynamicPositionBias(6, 3, residual=True))
    x = torch.tensor([[1., -2.], [0., 3.]])
    a = residual.proj(x)
    b = a + residual.layers[0](a)
    assert_close(residual(x), residual.layers[2](b + residual.layers[1](b)))
    assert_close(plain(x), plain.layers[2](plain.layers[1](plain.layers[0](plain.proj(x)))))


def test_a_larger_group_extends_the_bias():
    pos = filled(C.DynamicPositionBias(6, 3)).double()
    assert_close(pos.table(9)[2:-2, 2:-2], pos.table(7))
    assert_close(pos.bias((9, 9)).reshape(3, 9, 9, 9, 9)[:, 1:8, 1:8, 1:8, 1:8].reshape(3, 49, 49), pos.bias((7, 7)))


@torch.no_grad()
def test_kept_bias_follows_the_weights():
    "However a parameter gets another value, the next bias is that of the new value."
    pos = filled(C.DynamicPositionBias(6, 3))
    changes = [lambda p: p.add_(.1), lambda p: p.data.mul_(1.1), lambda p: setattr(p, 'data', p.data + .1), lambda p: p.data[0].fill_(.3), lambda p: p.copy_(p * 2)]
    first = pos.bias(7)
    assert pos.bias(7) is first and pos.bias((7, 7)) is first and pos.bias(5) is not first and pos.bias(7) is first
    for change in changes:
        old = pos.bias(7)
        change(pos.layers[1][2].weight)
        assert not torch.equal(pos.bias(7), old) and torch.equal(pos.bias(7), pos.spread(7))
    pos.layers[0][2].weight = torch.nn.Parameter(pos.layers[0][2].weight * 2)
    assert torch.equal(pos.bias(7), pos.spread(7))
    pos.load_state_dict({k: v + 1 for k, v in pos.state_dict().items()})
    assert torch.equal(pos.bias(7), pos.spread(7))
    assert pos.double().bias(7).dtype == torch.double and torch.equal(pos.bias(7), pos.spread(7))
    for g in range(1, 30): assert torch.equal(pos.bias(g), pos.spread(g))
    assert len(pos._kept) <= 9


def test_kept_bias_stays_out_of_training_copies_and_files():
    pos = filled(C.DynamicPositionBias(6, 3))
    with torch.inference_mode(): kept = pos.bias(7)
    live = pos.bias(7)
    assert live is not kept and live.requires_grad and torch.equal(live, kept)
    names = set(pos.state_dict())
    assert copy.deepcopy(pos)._kept == {} and pickle.loads(pickle.dumps(pos))._kept == {} and set(pos.state_dict()) == names
    batched = {k: torch.stack([v, v + .1]) for k, v in pos.state_dict().items()}
    with torch.no_grad(): two = torch.func.vmap(lambda w: torch.func.functional_call(pos, w, (torch.ones(1, 2),)))(batched)
    assert two.shape == (2, 1, 3)


@torch.no_grad()
def test_kept_bias_in_a_model_under_functional_call():
    model, x = small(), torch.rand(1, 3, 64, 64)
    model(x)
    other = {k: v * 1.1 for k, v in model.state_dict().items()}
    swapped = torch.func.functional_call(model, other, (x,))
    fresh = small()
    fresh.load_state_dict(other)
    assert_close(swapped, fresh(x))


# ---- padding

@pytest.mark.parametrize('pad_type', [0, 1])
def test_what_stands_in_the_padding_does_not_matter(pad_type):
    "A 7x7 map, G = 3, I = 2: padded to 12x12, 16 groups of 9; noise instead of zeros changes nothing."
    b = block(3, 2, pad_type=pad_type)
    seen = []
    b.attn.register_forward_pre_hook(lambda m, args: seen.append(args))
    x = torch.randn(2, 7, 7, 16, dtype=torch.double)
    with torch.no_grad(): want = b(x)
    tokens, group, mask = seen[0]
    assert tokens.shape == (2 * 16, 9, 16) and group == (3, 3) and mask.sum() == 2 * 49
    b.attn.register_forward_pre_hook(lambda m, args: (torch.where(args[2][..., None], args[0], torch.randn_like(args[0])), *args[1:]))
    with torch.no_grad(): assert_close(b(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('pad_type', [0, 1])
def test_gradients_with_empty_groups(pad_type):
    "Groups of padding alone are cropped; their gradients must be finite all the same."
    b = block(3, 5, pad_type=pad_type).train()                                                   # a 4x4 map padded to 15x15: four of the five residues along each axis are real
    masks = []
    b.attn.register_forward_pre_hook(lambda m, args: masks.append(args[2]))
    x = torch.randn(1, 4, 4, 16, dtype=torch.double, requires_grad=True)
    y = b(x)
    assert masks[0].any(1).sum() == 16 and len(masks[0]) == 25
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in b.parameters())
    with torch.no_grad(): assert_close(b.eval()(x), y)                                           # the fused path and the one with a gradient agree
    half = copy.deepcopy(b).to(torch.bfloat16)
    with torch.no_grad(): assert half(x.to(torch.bfloat16)).isfinite().all()


def test_without_the_mask_padding_is_seen():
    b = block(3, 2, no_mask=True)
    masked = block(3, 2)
    x = torch.randn(1, 7, 7, 16, dtype=torch.double)
    with torch.no_grad(): assert (b(x) - masked(x)).abs().max() > 1e-3
    whole = torch.randn(1, 12, 12, 16, dtype=torch.double)
    with torch.no_grad(): assert torch.equal(b(whole), masked(whole))


# ---- group sizes of CrossFormer++

def test_group_types():
    "As the official code prints them for 224 pixels and depths 2, 2, 18, 2."
    at = lambda kind, g=(4, 4, 14, 7): C.group_sizes(g, (2, 2, 18, 2), 56, kind)
    assert at('constant') == [[4] * 2, [4] * 2, [14] * 18, [7] * 2] and at('constant', 7) == [[7] * 2, [7] * 2, [7] * 18, [7] * 2]
    assert at('7_14') == [[4] * 2, [4] * 2, [7] * 4 + [14] * 14, [7] * 2]
    linear = at('linear')
    assert linear == LINEAR and all(len(a) == n for a, n in zip(linear, (2, 2, 18, 2)))
    assert at('linear_div') == LINEAR_DIV and at('alter') == ALTER


LINEAR = [[4, 7], [5, 6], [4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13], [7, 7]]
LINEAR_DIV = [[4, 7], [5, 6], [4, 4, 5, 5, 6, 6] + [7] * 8 + [14] * 4, [7, 7]]
ALTER = [[4, 7], [5, 6], [4, 4, 5, 5, 6, 6, 7, 7] + [7, 14] * 5, [7, 7]]


@pytest.mark.parametrize('bad, words', [(dict(group_type='cubic'), 'group_type'), (dict(group_size=(4, 4)), 'group_size'), (dict(group_size=((4,), (4, 4), (4,), (4,))), 'group_size'), (dict(group_type='linear', img_size=16, depths=(1,)), 'img_size'),
                                        (dict(num_heads=(1, 2)), 'num_heads'), (dict(num_heads=(3, 2, 4, 8)), 'num_heads'), (dict(crs_interval=(1,)), 'crs_interval'), (dict(mlp_ratio=(4., 4.)), 'mlp_ratio'),
                                        (dict(merge_kernels=((2, 4),)), 'merge_kernels'), (dict(patch_kernels=(4, 9)), 'kernels'), (dict(merge_kernels=((3,), (2,), (2,))), 'kernels'), (dict(embed_dim=36), 'dim'),
                                        (dict(embed_dim=8, patch_kernels=(4,)), 'dim'), (dict(img_size=72), 'img_size.*72'), (dict(img_size=2), 'img_size'), (dict(use_cpe='maps'), 'use_cpe'), (dict(group_size=0), 'group_size')])
def test_bad_arguments_are_named(bad, words):
    with pytest.raises(ValueError, match=words): C.CrossFormer(**{**SMALL, **bad})


def test_bad_pictures_are_named(unchecked):
    with pytest.raises(ValueError, match='x must.*40x64'): small()(torch.rand(1, 3, 40, 64))
    with pytest.raises(ValueError, match='rows.*img_size'): small(use_cpe=True)(torch.rand(1, 3, 96, 64))
    with pytest.raises(ValueError, match='even.*5x4'): C.PatchMerging(8, 16)(torch.rand(1, 5, 4, 8))


def test_cpe_as_meant_takes_any_size():
    model = small(use_cpe='map')
    with torch.no_grad(): assert model(torch.rand(1, 3, 96, 64)).shape == (1, 7)
    assert measure.parameters(model) != measure.parameters(small(use_cpe=True))


# ---- whole models

# the official README's figures; it prints 4.9 for pp_small, where the counter in its own code gives 4.39
PAPER = {'tiny': (27.8, 2.9), 'small': (30.7, 4.9), 'base': (52.0, 9.2), 'large': (92.0, 16.1), 'pp_small': (23.3, 4.39), 'pp_base': (52.0, 9.5), 'pp_large': (92.0, 16.6), 'pp_huge': (96.0, 21.8)}


@pytest.mark.parametrize('size', PAPER)
def test_parameters_and_flops(size, unchecked):
    millions, gmacs = PAPER[size]
    with torch.device('meta'): model, x = create_model(f'crossformer_{size}'), torch.empty(1, 3, 224, 224)
    assert abs(measure.parameters(model) / 1e6 - millions) < .051
    assert abs(measure.flops(model, x) / 2e9 / gmacs - 1) < .02


def test_small_exactly(): assert model_info('crossformer_small')['parameters'] == 30_657_394


@torch.no_grad()
def test_portions_change_nothing():
    "Without gradients a stage runs on a few pictures at a time; with them on all."
    model, x = small(), torch.rand(5, 3, 64, 64)
    want = model.feature_maps(x)
    stage = model.stages[0]
    tokens = model.embed(x)
    calls = []
    stage[0].register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    for size in (1, 2 * 4 * tokens[0].numel() * 4, 2 ** 30):
        assert_close(C.in_portions(stage, tokens, size).permute(0, 3, 1, 2), want[0], atol=1e-6, rtol=1e-5)
    assert calls == [1] * 5 + [2, 2, 1] + [5]
    calls.clear()
    with torch.enable_grad(): C.in_portions(stage, tokens, 1)
    assert calls == [5]


def test_with_and_without_gradients_agree():
    model, x = small(group_size=(5, 3, 3, 2), crs_interval=(2, 3, 2, 1)), torch.rand(2, 3, 64, 64)
    live = model(x)
    with torch.no_grad(): assert_close(model(x), live.detach(), atol=1e-5, rtol=1e-4)
    with torch.inference_mode(): assert_close(model(x), live.detach(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_at_another_size():
    model = small(ape=True)
    other = C.CrossFormer.from_official(official_names_of(model), img_size=(96, 64), **{k: SMALL[k] for k in ('group_size', 'crs_interval')})
    assert other.pos_embed.shape == (1, 24 * 16, 32)
    x = torch.rand(1, 3, 96, 64)
    assert_close(other(x), model(x))                                   # interpolated at loading, or at every call


def test_a_full_checkpoint_loads(tmp_path):
    with torch.device('meta'): sd = official_names_of(create_model('crossformer_small'))
    sd = {k: torch.full(v.shape, .01) for k, v in sd.items()} | {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(49, 49, dtype=torch.long), 'layers.0.blocks.0.attn.biases': torch.zeros(169, 2)}
    torch.save({'model': {f'module.{k}': v for k, v in sd.items()}}, tmp_path/'small.pth')
    model = load_checkpoint(create_model('crossformer_small'), tmp_path/'small.pth')
    assert all((p == .01).all() for p in model.parameters())
    told = C.CrossFormer.official_arguments(sd)
    assert told['depths'] == (2, 2, 6, 2) and told['num_heads'] == (3, 6, 12, 24) and told['mlp_ratio'] == (4.,) * 4 and told['embed_dim'] == 96 and told['patch_kernels'] == (4, 8, 16, 32)


def test_what_does_not_fit_is_listed():
    model = small()
    sd = official_names_of(model)
    sd['head.weight'], sd['stray'] = torch.zeros(3, 3), torch.zeros(1)
    del sd['norm.weight']
    with pytest.raises(ValueError, match=r'(?s)norm\.weight.*stray.*head\.weight'): model.from_official(sd)
    with pytest.raises(ValueError, match='no CrossFormer'): C.CrossFormer.from_official({'a': torch.zeros(1)})


def test_initial_values():
    torch.manual_seed(0)
    model = C.CrossFormer(**SMALL, ape=True)
    for name, p in model.named_parameters():
        if 'projs' in name: continue                                    # convolutions: PyTorch's own
        if 'pos_embed' in name or name.endswith('weight') and p.dim() == 2: assert p.numel() < 1000 or abs(p.std() - .02) < .001, name
        elif name.endswith('bias'): assert (p == 0).all(), name
        else: assert (p == 1).all(), name


def test_cooling_stands_after_every_third_block_but_the_last():
    model = small(use_acl=True, depths=(4, 1, 7, 3))
    assert [[b.cool is not None for b in s] for s in model.stages] == [[False, False, True, False], [False], [False, False, True, False, False, True, False], [False] * 3]


def test_drop_path_grows():
    model = C.CrossFormer(**SMALL, drop_path_rate=.8)
    rates = [b.drop_path.p for s in model.stages for b in s]
    assert_close(torch.tensor(rates), torch.linspace(0, .8, 9))


def test_features_only():
    maps = create_model('crossformer_small', features_only=True, out_indices=(1, 3), **SMALL).eval()
    assert maps.strides == [8, 32] and maps.channels == [64, 256]
    with torch.no_grad(): assert [m.shape for m in maps(torch.rand(1, 3, 64, 96))] == [(1, 64, 8, 12), (1, 256, 2, 3)]
