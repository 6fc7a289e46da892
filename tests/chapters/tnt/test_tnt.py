"""backbones.tnt: against the equations written out over the official names, and what the paper says must hold."""
import copy, pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from sheets import sheets, weight
from vitbook.backbones import tnt as T
from vitbook.layers.attention import Attention
from vitbook.layers.position import resize_position
from vitbook.measure import flops, parameters
from vitbook.registry import create_model
from vitbook.probe import recording

SMALL = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=24, inner_dim=8, depth=3, num_heads=3, inner_num_heads=2)
OFFICIAL = dict(img_size=224, patch_size=16, in_chans=3, num_classes=1000, outer_dim=768, inner_dim=48, depth=12, outer_num_heads=12, inner_num_heads=4,
                mlp_ratio=4., qkv_bias=False, qk_scale=None, inner_stride=4, se=0)             # what the official constructor takes if nothing is said


def model(seed=0, **more):
    "A small model with every entry away from its start, in eval mode and double precision."
    torch.manual_seed(seed)
    made = T.TNT(**{**SMALL, **more}).double().eval()
    with torch.no_grad():
        for p in made.parameters(): p.add_(torch.randn_like(p) * .1)
    return made


def picture(b=2, size=(32, 32), chans=3, seed=0): return torch.rand(b, chans, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# ---- the official network, written out

def both(size): return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def official_shapes(config, inner_blocks=None):
    "Names and shapes of an official state dict."
    c, d, r = config['inner_dim'], config['outer_dim'], config['mlp_ratio']
    p, H = both(config['patch_size']), both(config['img_size'])
    n, m = (H[0] // p[0]) * (H[1] // p[1]), -(-p[0] // config['inner_stride']) * -(-p[1] // config['inner_stride'])
    norm = lambda name, k: {f'{name}.weight': (k,), f'{name}.bias': (k,)}
    linear = lambda name, i, o, bias=True: {f'{name}.weight': (o, i)} | ({f'{name}.bias': (o,)} if bias else {})
    def half(name, k):
        b = config['qkv_bias']
        return (norm(f'{name}_norm1', k) | linear(f'{name}_attn.qk', k, 2 * k, b) | linear(f'{name}_attn.v', k, k, b) | linear(f'{name}_attn.proj', k, k)
                | norm(f'{name}_norm2', k) | linear(f'{name}_mlp.fc1', k, int(k * r)) | linear(f'{name}_mlp.fc2', int(k * r), k))
    out = dict(cls_token=(1, 1, d), outer_tokens=(1, n, d), outer_pos=(1, n + 1, d), inner_pos=(1, m, c))
    out |= {'patch_embed.proj.weight': (c, config['in_chans'], 7, 7), 'patch_embed.proj.bias': (c,)}
    out |= norm('proj_norm1', m * c) | linear('proj', m * c, d) | norm('proj_norm2', d)
    for i in range(config['depth']):
        b = f'blocks.{i}.'
        if inner_blocks is None or i in inner_blocks: out |= half(f'{b}inner', c) | norm(f'{b}proj_norm1', m * c) | linear(f'{b}proj', m * c, d, False) | norm(f'{b}proj_norm2', d)
        out |= half(f'{b}outer', d)
        if config['se']: out |= norm(f'{b}se_layer.fc.0', d) | linear(f'{b}se_layer.fc.1', d, d // 4) | linear(f'{b}se_layer.fc.3', d // 4, d)
    return out | norm('norm', d) | (linear('head', d, config['num_classes']) if config['num_classes'] else {})


def official_weights(config, inner_blocks=None, dtype=torch.double):
    return {name: weight(name, list(shape)).to(dtype) for name, shape in official_shapes(config, inner_blocks).items()}


def equations(w, x, config):
    "The whole network from the equations: patches, heads and words in loops, nothing fused."
    p, (rows, cols) = both(config['patch_size']), (x.shape[2] // both(config['patch_size'])[0], x.shape[3] // both(config['patch_size'])[1])
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])
    linear = lambda name, x: F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))
    def attend(name, x, heads):                                             # x: tokens by channels
        d = x.shape[-1] // heads
        qk, v, out = linear(f'{name}.qk', x), linear(f'{name}.v', x), []
        for h in range(heads):
            q, k = qk[:, h * d:(h + 1) * d], qk[:, x.shape[1] + h * d:x.shape[1] + (h + 1) * d]
            out.append((q @ k.T * (config['qk_scale'] or d ** -.5)).softmax(-1) @ v[:, h * d:(h + 1) * d])
        return linear(f'{name}.proj', torch.cat(out, -1))
    def mlp(name, x): return linear(f'{name}.fc2', F.gelu(linear(f'{name}.fc1', x)))
    def half(b, kind, x, heads):
        x = x + attend(f'{b}{kind}_attn', norm(f'{b}{kind}_norm1', x), heads)
        u = mlp(f'{b}{kind}_mlp', norm(f'{b}{kind}_norm2', x))
        if kind == 'outer' and config['se']:
            gate = linear(f'{b}se_layer.fc.3', linear(f'{b}se_layer.fc.1', norm(f'{b}se_layer.fc.0', u.mean(0))).relu()).tanh()
            u = u + gate * u
        return x + u
    out = []
    for image in x:
        patches = [image[:, i * p[0]:(i + 1) * p[0], j * p[1]:(j + 1) * p[1]] for i in range(rows) for j in range(cols)]
        words = [F.conv2d(patch[None], w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], config['inner_stride'], 3)[0].flatten(1).T + w['inner_pos'][0] for patch in patches]
        z = torch.stack([norm('proj_norm2', linear('proj', norm('proj_norm1', y.flatten()))) for y in words])
        z = torch.cat([w['cls_token'][0], z]) + w['outer_pos'][0]
        for i in range(config['depth']):
            b = f'blocks.{i}.'
            if f'{b}proj.weight' in w:
                words = [half(b, 'inner', y, config['inner_num_heads']) for y in words]
                z = torch.cat([z[:1], torch.stack([s + norm(f'{b}proj_norm2', linear(f'{b}proj', norm(f'{b}proj_norm1', y.flatten()))) for s, y in zip(z[1:], words)])])
            z = half(b, 'outer', z, config['outer_num_heads'])
        z = norm('norm', z)[0]
        out.append(linear('head', z) if config['num_classes'] else z)
    return torch.stack(out)


def ours(config, weights):
    "As in parity.py: every official argument under our name."
    names = dict(outer_dim='embed_dim', outer_num_heads='num_heads')
    given = {names.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items()} | dict(se=config['se'] > 0, crop=True)
    return T.TNT(**given, inner_blocks=[i for i in range(config['depth']) if f'blocks.{i}.proj.weight' in weights]).from_official(weights)


@pytest.mark.parametrize('sheet', sheets('tnt'), ids=lambda s: s.name)
def test_parity(sheet):
    with torch.no_grad(): sheet.check(dict(logits=ours(OFFICIAL | sheet.config, sheet.weights())(sheet.inputs()['x'])))
    config = OFFICIAL | sheet.config
    assert official_shapes(config) == {k: tuple(v) for k, v in sheet.data['state'].items()}
    assert_close(ours(config, sheet.weights())(sheet.inputs()['x']).double(), equations({k: v.double() for k, v in sheet.weights().items()}, sheet.inputs()['x'].double(), config), atol=2e-5, rtol=0)


BASE = OFFICIAL | dict(img_size=32, patch_size=8, num_classes=5, outer_dim=24, inner_dim=8, depth=2, outer_num_heads=3, inner_num_heads=2)


@pytest.mark.parametrize('more', [
    dict(), dict(qkv_bias=True), dict(qk_scale=.7), dict(qk_scale=0), dict(se=1), dict(se=.5, qkv_bias=True, outer_dim=26, outer_num_heads=2), dict(img_size=(16, 40)),
    dict(img_size=(40, 18), patch_size=(10, 6)), dict(img_size=21, patch_size=7), dict(inner_stride=3), dict(inner_stride=1, patch_size=4, img_size=8), dict(inner_stride=9),
    dict(img_size=(37, 20)), dict(img_size=(35, 22), patch_size=(9, 7), inner_stride=2), dict(mlp_ratio=2.3), dict(num_classes=0), dict(in_chans=1), dict(depth=1), dict(depth=5, img_size=8),
    dict(outer_num_heads=1, inner_num_heads=8), dict(outer_dim=64, outer_num_heads=16, inner_dim=6, inner_num_heads=1)], ids=lambda m: ' '.join(map(str, m)) or 'base')
@torch.no_grad()
def test_other_configurations_follow_the_equations(more):
    config = BASE | more
    w = official_weights(config)
    made, x = ours(config, w).double(), picture(2, both(config['img_size']), config['in_chans'])
    made.load_state_dict(made.official_names(w))                            # from_official went through float32
    want = equations(w, x, config)
    assert_close(made(x), want, atol=1e-9, rtol=1e-9)
    assert_close(made.forward_head(made.forward_words_first(x, chunk=3)), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('blocks', [(), (0,), (1, 3), (0, 1, 2)])
@torch.no_grad()
def test_ordinary_blocks_in_chosen_places(blocks):
    config = BASE | dict(depth=4, img_size=16)
    w = official_weights(config, blocks)
    made, x = ours(config, w).double(), picture(2, (16, 16))
    made.load_state_dict(made.official_names(w))
    assert_close(made(x), equations(w, x, config), atol=1e-9, rtol=1e-9)
    assert_close(made.norm(made.forward_words_first(x)) * 0 + made.forward_words_first(x), made.forward_features(x))
    stream = made.word_stream(x)
    assert len(stream) == 5 and all((stream[i] is stream[i + 1]) == (i not in blocks) for i in range(4))


# ---- what must hold

@torch.no_grad()
def test_shapes_at_224():
    made = T.TNT(depth=1)
    x = torch.rand(1, 3, 224, 224)
    words = made.embed_words(x)
    z = made.embed_sentences(words, (14, 14))
    assert words.shape == (196, 16, 24) and z.shape == (1, 197, 384) and made.word_embed.num_words == 16
    words, z = made.blocks[0](words, z)
    assert words.shape == (196, 16, 24) and z.shape == (1, 197, 384) and made(x).shape == (1, 1000)


def test_a_word_never_sees_another_patch():
    "The Jacobian between patches is exactly 0, at every depth, and inside a patch it is not."
    made, x = model(), picture(1).requires_grad_()
    for words in made.word_stream(x):
        g, = torch.autograd.grad(words[5].square().sum(), x, retain_graph=True)
        own = torch.zeros(32, 32, dtype=torch.bool)
        own[8:16, 8:16] = True                                              # patch 5 of a 4x4 grid
        assert (g[..., ~own] == 0).all() and (g[..., own].abs().amax((0, 1)) > 0).all()


@torch.no_grad()
def test_no_sentence_ever_reaches_a_word():
    made, x = model(), picture()
    words, stream = made.embed_words(x), made.word_stream(x)
    for block, want in zip(made.blocks, stream[1:]):
        words, _ = block(words, torch.randn(2, 17, 24, dtype=torch.double))
        assert torch.equal(words, want)
    again = made.word_stream(torch.cat([picture(1, seed=3), x[1:]]))        # nor does another picture
    assert all(torch.equal(a[16:], b[16:]) and not torch.equal(a[:16], b[:16]) for a, b in zip(stream, again))


def encoder_layer(block, heads):
    "torch's own pre-norm Transformer layer with the weights of ours."
    d = block.norm1.weight.shape[0]
    layer = nn.TransformerEncoderLayer(d, heads, block.mlp.fc1.weight.shape[0], 0., 'gelu', batch_first=True, norm_first=True).double().eval()
    pairs = {'self_attn.in_proj_weight': block.attn.qkv.weight, 'self_attn.in_proj_bias': torch.zeros(3 * d), 'linear1.weight': block.mlp.fc1.weight, 'linear1.bias': block.mlp.fc1.bias,
             'linear2.weight': block.mlp.fc2.weight, 'linear2.bias': block.mlp.fc2.bias}
    pairs |= {f'self_attn.out_proj.{k}': v for k, v in block.attn.proj.named_parameters()} | {f'norm{i}.{k}': v for i in (1, 2) for k, v in getattr(block, f'norm{i}').named_parameters()}
    layer.load_state_dict(pairs)
    return layer


@torch.no_grad()
def test_without_fusion_the_sentences_are_a_vit():
    made, x = model(), picture()
    for block in made.blocks:
        block.fuse.proj.weight.zero_()
        block.fuse.norm2.bias.zero_()
    z = made.embed_sentences(made.embed_words(x), (4, 4))
    for block in made.blocks: z = encoder_layer(block.outer, 3)(z)
    assert_close(made.forward_features(x), made.norm(z))


@torch.no_grad()
def test_the_class_token_gets_nothing_from_words_directly():
    made, x = model(), picture()
    block, z = made.blocks[0], torch.randn(2, 17, 24, dtype=torch.double)
    block.outer = nn.Identity()
    words, out = block(made.embed_words(x), z)
    assert torch.equal(out[:, 0], z[:, 0]) and ((out - z)[:, 1:].abs().amax(-1) > 0).all()
    assert_close((out - z)[:, 1:], block.fuse(words, 16))
    free = T.TNTBlock(24, 8, 3, 2, 4, num_prefix_tokens=0).double()         # sentences without a class token, for models of one's own
    assert free(made.embed_words(x), z[:, 1:])[1].shape == (2, 16, 24)


@torch.no_grad()
def test_permuted_words():
    made, x = model(), picture()
    made.inner_pos.zero_()
    words, order, z = made.embed_words(x), torch.tensor([2, 0, 3, 1]), torch.randn(2, 17, 24, dtype=torch.double)
    (a, za), (b, zb) = (made.blocks[0](w, z) for w in (words, words[:, order]))
    assert_close(b, a[:, order])
    assert (za - zb).abs().max() > 1e-3                                     # the projection has a place for each word
    with_place = model()
    a, b = (with_place.blocks[0].inner(w + with_place.inner_pos) for w in (words, words[:, order]))
    assert (b - a[:, order]).abs().max() > 1e-3


@torch.no_grad()
def test_permuted_sentences():
    made, x = model(), picture()
    order = torch.randperm(16)
    patches = x.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    other = patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    want = made(x)
    assert (made(other) - want).abs().max() > 1e-4
    made.outer_pos[:, 1:] = made.outer_pos[:, 1:][:, order]
    assert_close(made(other), want)


@torch.no_grad()
def test_patches_one_by_one():
    made, x = model(), picture()
    words, block = made.embed_words(x), made.blocks[0]
    assert_close(torch.cat([block.inner(w[None]) for w in words]), block.inner(words))
    assert_close(made.word_embed(x), torch.cat([F.conv2d(x[b:b + 1, :, i:i + 8, j:j + 8], made.word_embed.proj.weight, made.word_embed.proj.bias, 4, 3).flatten(2).transpose(1, 2)
                                                for b in range(2) for i in range(0, 32, 8) for j in range(0, 32, 8)]))


@torch.no_grad()
def test_an_ordinary_block():
    block = model(inner_blocks=[0]).blocks[1]
    words, z = torch.randn(32, 4, 8, dtype=torch.double), torch.randn(2, 17, 24, dtype=torch.double)
    same, out = block(words, z)
    assert same is words and block.fuse is None
    assert_close(out, encoder_layer(block.outer, 3)(z))


@pytest.mark.parametrize('n, m, c, d, h, g, r', [(196, 16, 24, 384, 6, 4, 4.), (16, 4, 8, 24, 3, 2, 4.), (9, 16, 12, 48, 3, 2, 2.), (25, 9, 40, 64, 2, 4, 3.)])
def test_cost_formula(n, m, c, d, h, g, r):
    with torch.device('meta'):
        block, words, z = T.TNTBlock(d, c, h, g, m, r), torch.empty(n, m, c), torch.empty(1, n + 1, d)
        plain = T.TNTBlock(d, None, h, g, m, r)
    assert flops(block, words, z) == 2 * T.block_macs(n, m, c, d, r, prefix=1)
    assert flops(plain, words, z) == 2 * T.block_macs(n, m, 0, d, r, prefix=1)
    assert sum(p.numel() for p in block.parameters() if p.dim() == 2) == T.block_weights(m, c, d, r)
    assert r != 4 or T.block_macs(n, m, c, d) == 2 * n * m * c * (6 * c + m) + n * m * c * d + 2 * n * d * (6 * d + n)


def test_the_papers_cost():
    assert round(T.block_macs(196, 16, 0, 384) / 1e5) == 3763 and round(T.block_macs(196, 16, 24, 384) / 1e5) == 4293
    assert T.block_weights(16, 0, 384) == 1_769_472 and T.block_weights(16, 24, 384) == 1_923_840
    with torch.device('meta'): assert parameters(T.TNTBlock(384, 24, 6, 4, 16)) == 1_929_456


@pytest.mark.parametrize('name, count, frozen, million, giga', [
    ('tnt_tiny_patch16_224', None, 196 * 192, 6.1, 1.4), ('tnt_small_patch16_224', 23_768_584, 75_264, 23.8, 5.2), ('tnt_base_patch16_224', None, 196 * 640, 65.6, 14.1)])
def test_sizes_of_the_paper(name, count, frozen, million, giga):
    with torch.device('meta'): made, x = create_model(name), torch.empty(1, 3, 224, 224)
    assert count is None or parameters(made) == count
    assert abs(parameters(made) + frozen - million * 1e6) < .06e6 and abs(flops(made, x) / 2e9 / giga - 1) < .02
    head = 196 * 147 * made.word_embed.num_words * made.inner_pos.shape[2] + 196 * made.inner_pos[0].numel() * made.embed_dim + 1000 * made.embed_dim
    c = made.inner_pos.shape[2]
    assert flops(made, x) == 2 * (head + 12 * T.block_macs(196, 16, c, made.embed_dim, prefix=1))


@pytest.mark.parametrize('name, d, c, h, g', [('tnt_tiny_patch16_224', 192, 12, 3, 2), ('tnt_small_patch16_224', 384, 24, 6, 4), ('tnt_base_patch16_224', 640, 40, 10, 4)])
def test_full_size_official_checkpoints(name, d, c, h, g):
    "Their entries, the frozen zeros counted in, and every one of them has a place."
    config = OFFICIAL | dict(outer_dim=d, inner_dim=c, outer_num_heads=h, inner_num_heads=g)
    shapes = official_shapes(config)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    assert name != 'tnt_small_patch16_224' or total == 23_843_848
    with torch.device('meta'):
        made = create_model(name)
        assert total - parameters(made) == 196 * d                          # outer_tokens
        named = made.official_names({k: torch.empty(s) for k, s in shapes.items()})
        assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in made.state_dict().items() if k != 'pos_grid'}
        assert T.TNT.official_arguments({k: torch.empty(s) for k, s in shapes.items()}) | dict(inner_blocks=None) == dict(
            img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=d, inner_dim=c, depth=12, num_heads=h, inner_num_heads=g, mlp_ratio=4., qkv_bias=False, inner_stride=4,
            inner_kernel=7, se=False, inner_blocks=None)


def test_a_full_size_checkpoint_loads():
    config = OFFICIAL | dict(outer_dim=192, inner_dim=12, outer_num_heads=3, inner_num_heads=2)
    w = {k: torch.randn(s) * .02 for k, s in official_shapes(config).items()}
    w['outer_tokens'].zero_()
    made = T.TNT.from_official(w)
    assert not made.training and made.blocks[3].inner.attn.num_heads == 2 and torch.equal(made.blocks[11].outer.attn.qkv.weight[384:], w['blocks.11.outer_attn.v.weight'])
    larger = T.TNT.from_official(w, img_size=(256, 192))
    assert larger.grid_size == (16, 12) and torch.equal(larger.inner_pos, w['inner_pos'])
    assert_close(larger.outer_pos, resize_position(w['outer_pos'], 14, (16, 12)))


def test_from_official_on_the_class_knows_the_options():
    config = BASE | dict(img_size=48, patch_size=16, se=1, qkv_bias=True, mlp_ratio=3., in_chans=2, num_classes=0, depth=3)
    w = official_weights(config, (0, 2))
    made = T.TNT.from_official(w, num_heads=3, inner_num_heads=2)
    assert made.img_size == (48, 48) and [b.inner is not None for b in made.blocks] == [True, False, True]
    x = picture(2, (48, 48), 2)
    assert_close(made.double()(x), equations(w, x, config), atol=1e-5, rtol=1e-5)
    strip = T.TNT.from_official(official_weights(BASE | dict(img_size=(16, 48), patch_size=16)), img_size=(16, 48), num_heads=3, inner_num_heads=2)     # no square grid: has to be said
    assert strip.grid_size == (1, 3)


@pytest.mark.parametrize('ratio', [4., 3., 2.3, 1.37, 2 / 3, 2.9999])
@pytest.mark.parametrize('d, c', [(24, 8), (192, 12), (99, 7)])
def test_the_mlps_width_is_read_off(ratio, d, c):
    shapes = official_shapes(BASE | dict(outer_dim=d, inner_dim=c, mlp_ratio=ratio))
    with torch.device('meta'): found = T.TNT.official_arguments({k: torch.empty(s) for k, s in shapes.items()}, 3, 1)['mlp_ratio']
    assert (int(d * found), int(c * found)) == (int(d * ratio), int(c * ratio)) and (ratio % 1 or found == ratio)
    del shapes['blocks.0.outer_mlp.fc1.weight']                             # a broken checkpoint is the loader's to answer, not a KeyError
    with torch.device('meta'): T.TNT.official_arguments({k: torch.empty(s) for k, s in shapes.items()}, 3, 1)


def test_what_does_not_fit_is_listed():
    w = official_weights(BASE)
    del w['blocks.1.inner_attn.v.weight'], w['norm.bias']
    w['extra'] = torch.zeros(1)
    w['cls_token'] = torch.zeros(1, 1, 23)
    before = copy.deepcopy(made := T.TNT(**{**SMALL, 'depth': 2})).state_dict()
    with pytest.raises(ValueError) as error: made.from_official(w)
    for part in ('2 missing', 'blocks.1.inner.attn.qkv.weight', 'norm.bias', '2 unexpected', 'blocks.1.inner_attn.qk.weight', 'extra', 'cls_token: (1, 1, 23) instead of (1, 1, 24)'): assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    with pytest.raises(ValueError, match='no official TNT.*outer_pos'): T.TNT.from_official(dict(inner_pos=torch.zeros(1, 4, 8)))


def test_where_gradients_come_from():
    "The convolution learns through the first sentences and through every block's fusion; the last words through their own fusion only."
    made, x = model().train(), picture()
    def reaches(*cut):
        made.zero_grad()
        kept = [(m.proj.weight, m.proj.weight.detach().clone()) for m in cut]
        with torch.no_grad():
            for m in cut: m.proj.weight.zero_()
        made(x).square().sum().backward()
        with torch.no_grad():
            for p, old in kept: p.copy_(old)
        return made.word_embed.proj.weight.grad.abs().max() > 0
    fusions = [made.fuse, *[b.fuse for b in made.blocks]]
    assert reaches() and not reaches(*fusions)
    for kept in fusions: assert reaches(*[f for f in fusions if f is not kept])
    reaches(made.blocks[-1].fuse)
    assert made.blocks[-1].inner.mlp.fc2.weight.grad.abs().max() == 0 and made.blocks[-2].inner.mlp.fc2.weight.grad.abs().max() > 0


def test_words_first_has_the_same_gradients():
    made, x = model(), picture()
    grads = []
    for forward in (made.forward_features, made.forward_words_first, lambda x: made.forward_words_first(x, chunk=5)):
        made.zero_grad()
        forward(x).square().sum().backward()
        grads.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
    for other in grads[1:]:
        for a, b in zip(grads[0], other): assert_close(a, b)


def test_words_are_dropped_patch_by_patch():
    made, x = model(drop_path_rate=.5, depth=2).train(), picture(4)
    block, words = made.blocks[1], made.embed_words(picture(4)).detach()
    assert block.inner.drop_path1.p == block.outer.drop_path2.p == .5 and made.blocks[0].inner.drop_path1.p == 0
    torch.manual_seed(0)
    after = block.inner(words)
    still = (after == words).all(-1).all(-1).view(4, 16)                    # a quarter lose both branches
    assert .1 < still.double().mean() < .4 and still.any(1).all() and not still.all(1).any()
    z = torch.randn(64, 17, 24, dtype=torch.double)
    kept = (block.outer(z) == z).all(-1)                                    # sentences: a picture as a whole
    assert (kept.all(1) == kept.any(1)).all() and .1 < kept[:, 0].double().mean() < .4


# ---- the rest

def test_the_papers_own_words():
    "Without overlap a word is a linear map of its sub-patch."
    embed, x = T.WordEmbed(32, 8, 3, 6, 4, inner_kernel=None).double(), picture()
    sub = x[0, :, 8:16, 16:24].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(4, -1)      # patch 6 of the first picture
    assert_close(embed(x)[6], sub @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    with pytest.raises(ValueError, match='inner_stride.*3x3.*8x8'): T.WordEmbed(32, 8, inner_stride=3, inner_kernel=None)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 3, 7]))
def test_words_of_a_patch(p, q, s, k):
    embed = T.WordEmbed(None, (p, q), 1, 2, s, k)
    assert embed(torch.rand(1, 1, 2 * p, q)).shape == (2, embed.num_words, 2) and embed.num_words == -(-p // s) * -(-q // s)


@torch.no_grad()
def test_other_picture_sizes():
    made, fixed = model(dynamic_img_size=True), model()
    x = picture(2, (24, 40))
    with pytest.raises(ValueError, match='32x32.*24x40'): fixed.float()(x.float())
    with pytest.raises(ValueError, match='multiple of patch_size 8x8, got 24x44'): made(picture(1, (24, 44)))
    assert made(x).shape == (2, 5) and torch.equal(made(picture()), made.forward_head(made.forward_features(picture())))
    other = model(img_size=(24, 40))
    other.load_state_dict(other.resized(made.state_dict()))
    assert_close(other(x), made(x))
    cropping = model(crop=True, img_size=(37, 34))
    assert cropping.grid_size == (4, 4)
    y = picture(2, (37, 34))
    assert_close(cropping(y), fixed.double()(y[..., :32, :32]))
    with pytest.raises(ValueError, match='img_size must be at least one patch_size 8x8, got 7x40'): model(crop=True, img_size=(7, 40))


@torch.no_grad()
def test_feature_maps():
    made, x = model(depth=4), picture(2, (32, 32))
    maps = made.feature_maps(x)
    assert made.levels == ((8, 4), *[(24, 8)] * 4) and [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), *[(2, 24, 4, 4)] * 4]
    assert_close(made.norm(maps[-1].flatten(2).mT), made.forward_features(x)[:, 1:])
    words = made.word_stream(x)[-1].view(2, 4, 4, 2, 2, 8)
    assert torch.equal(maps[0][1, :, 5, 2], words[1, 2, 1, 1, 0])           # row 5 is the second of patch row 2, column 2 the first of patch column 1
    odd = model(inner_stride=3, inner_kernel=3)                             # three words on eight pixels: no map of a whole stride
    assert odd.levels == ((24, 8),) * 3 and len(odd.feature_maps(x)) == 3
    only = create_model('tnt_small_patch16_224', features_only=True, out_indices=(0, -1), **SMALL)
    assert only.strides == [4, 8] and only.channels == [8, 24] and [m.shape[2] for m in only(torch.rand(1, 3, 32, 32))] == [8, 4]


@torch.no_grad()
def test_attention_can_be_watched():
    made, x = model(), picture()
    with recording(made) as rec: made(x)
    assert [tuple(w.shape) for w in rec.weights] == [(32, 2, 4, 4), (2, 3, 17, 17)] * 3
    with torch.enable_grad(), recording(made) as learning: made(x)
    assert learning.names == rec.names and all(torch.equal(a, b) for a, b in zip(learning.weights, rec.weights))


@pytest.mark.parametrize('words', [1, 16, 31, 32, 40])
@pytest.mark.parametrize('more', [dict(), dict(qkv_bias=True), dict(qk_norm=True)], ids=str)
def test_words_attend_as_all_tokens_do(words, more):
    "Head by head or fused: outputs, gradients of inputs and weights, and second derivatives."
    torch.manual_seed(0)
    usual, quick = Attention(12, 3, **more).double(), T.WordAttention(12, 3, **more).double()
    quick.load_state_dict(usual.state_dict())
    if not more: usual.q_norm, quick.q_norm = T.QueryScale(.3), T.QueryScale(.3)
    x, push, seen = torch.randn(5, words, 12, dtype=torch.double, requires_grad=True), torch.randn(5, words, 12, dtype=torch.double), []
    usual.backend = 'naive'
    for module in (usual, quick):
        y = module(x)
        slopes = torch.autograd.grad(y, [x, *module.parameters()], push, create_graph=words < 32)
        seen.append((y, *slopes, *(torch.autograd.grad(slopes[0].square().sum(), x) if words < 32 else ())))   # fused attention has no second derivative
        with torch.no_grad(): assert_close(module(x), y)
    for a, b in zip(*seen): assert_close(a, b)
    hidden = torch.rand(5, 1, words, words) < .5                            # what only `Attention` can do is left to it
    with torch.no_grad():
        usual.backend = 'auto'
        for given in (dict(mask=hidden), dict(bias=hidden.double()), dict(rope=(hidden[0, 0, :, :1].double().expand(-1, 4), hidden[0, 0, :, :1].double().expand(-1, 4)))):
            assert_close(quick(x, **given), usual(x, **given))
            assert words == 1 or (quick(x, **given) - quick(x)).abs().max() > 1e-3


def test_rates_reach_every_part():
    made = T.TNT(**SMALL, drop_rate=.3, attn_drop_rate=.2)
    halves = [half for block in made.blocks for half in (block.inner, block.outer)]
    assert {(type(h.attn), h.attn.attn_drop, h.attn.proj_drop.p, h.mlp.drop.p) for h in halves} == {(T.WordAttention, .2, .3, .3), (Attention, .2, .3, .3)} and made.pos_drop.p == .3


def test_dropout_of_words_attention():
    "Of weights only while learning, and even on average."
    torch.manual_seed(0)
    module, x = T.WordAttention(8, 2, attn_drop=.4).double(), torch.randn(1, 6, 8, dtype=torch.double)
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(3000)]).mean(0)
        once = module(x)
        want = module.eval()(x)
    assert_close(mean, want, atol=.02, rtol=0)
    assert (once - want).abs().max() > .02 and torch.equal(module(x), want)


def test_start():
    torch.manual_seed(0)
    made = T.TNT(embed_dim=96, inner_dim=24, depth=2, num_heads=6, se=True)
    for name, p in made.named_parameters():
        if name in ('cls_token', 'outer_pos', 'inner_pos') or p.dim() == 2: assert abs(p.std() / .02 - 1) < .15 and p.abs().max() < 2, name
        elif 'norm' in name or name.endswith('se.0.weight') or name.endswith('se.0.bias'): assert (p == ('weight' in name)).all(), name
        elif p.dim() == 1 and 'word_embed' not in name: assert (p == 0).all(), name
    assert made.word_embed.proj.weight.abs().max() <= 147 ** -.5 + 1e-6 and made.no_weight_decay() <= {n for n, _ in made.named_parameters()}


@pytest.mark.parametrize('wrong, words', [
    (dict(img_size=36), 'img_size must be a multiple of patch_size 8x8, got 36x36'), (dict(inner_num_heads=3), 'inner_num_heads must divide inner_dim=8, got 3'),
    (dict(num_heads=5), 'num_heads must divide embed_dim=24, got 5'), (dict(inner_blocks=[3]), r'inner_blocks must lie between 0 and 2, got \[3\]'), (dict(inner_kernel=4), 'inner_kernel must be odd, or None, got 4'),
    (dict(inner_stride=0), 'inner_stride must be at least 1, got 0'), (dict(inner_blocks=[-1]), 'inner_blocks')])
def test_wrong_arguments(wrong, words):
    with pytest.raises(ValueError, match=words): T.TNT(**{**SMALL, **wrong})
    with pytest.raises(ValueError, match='inner_num_heads must divide the width 8'): T.TNTBlock(24, 8, 3, 3, 4)


def test_copies_and_dtypes():
    made, x = model(se=True, qk_scale=.3), picture()
    with torch.no_grad(): assert_close(pickle.loads(pickle.dumps(made))(x), made(x))
    low = copy.deepcopy(made).to(torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert 'factor=' in repr(made)
