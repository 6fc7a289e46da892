"""vit: the model step by step from its parts, each option where it matters, and weights that carry their options. Hugging Face's weights: test_hf.py; timm's: the chapter's parity sheets."""
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import vitbook
from vitbook.layers.position import resize_position
from vitbook.registry import create_model
from vitbook.vit import VisionTransformer, from_huggingface, vit_from_state_dict

SMALL = dict(img_size=(16, 24), patch_size=8, in_chans=2, num_classes=5, embed_dim=24, depth=3, num_heads=3)


def vit(seed=0, **more):
    "A small model in eval mode whose every number is random, norms, tokens and biases too."
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL | more).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .2)
    return model


def pictures(y=16, x=24, chans=2, b=2): return torch.randn(b, chans, y, x, generator=torch.Generator().manual_seed(1))
def norm(x, layer, eps=1e-6): return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, eps)


OPTIONS = [{}, dict(reg_tokens=2), dict(no_embed_class=True), dict(no_embed_class=True, reg_tokens=3), dict(global_pool='avg'), dict(global_pool='avg', class_token=False), dict(global_pool='avg', class_token=False, reg_tokens=2),
           dict(global_pool='avg', norm_eps=.1), dict(global_pool='avg', reg_tokens=1, no_embed_class=True), dict(distilled=True), dict(distilled=True, reg_tokens=1), dict(init_values=.1), dict(qk_norm=True), dict(qkv_bias=False), dict(mlp_ratio=2.), dict(norm_eps=.1), dict(num_classes=0),
           dict(num_classes=0, global_pool='avg'), dict(num_classes=0, distilled=True), dict(patch_size=(4, 8)), dict(dynamic_img_size=True)]
each = pytest.mark.parametrize('options', OPTIONS, ids=lambda o: ' '.join(o) or 'plain')


@each
@torch.no_grad()
def test_the_model_is_its_parts(options):
    "Tokens in front: class, distillation, registers; positions on all or on patches alone; blocks; the norm before or after the pool; the heads."
    m, x, eps = vit(**options), pictures(), options.get('norm_eps', 1e-6)
    patches = m.patch_embed.proj(x).flatten(2).mT
    front = [t.expand(2, -1, -1) for t in (m.cls_token, m.dist_token, m.reg_token) if t is not None]
    assert sum(t.shape[1] for t in front) == m.num_prefix_tokens == options.get('class_token', True) + options.get('distilled', False) + options.get('reg_tokens', 0)
    t = torch.cat([*front, patches + m.pos_embed], 1) if options.get('no_embed_class') else torch.cat([*front, patches], 1) + m.pos_embed
    assert_close(m.embed(x), t)
    for block in m.blocks: t = block(t)
    avg = options.get('global_pool') == 'avg'
    features = t if avg else norm(t, m.norm, eps)
    assert_close(m.forward_features(x), features, atol=1e-5, rtol=1e-5)
    if avg: pooled = norm(t[:, m.num_prefix_tokens:].mean(1), m.fc_norm, eps)
    elif m.distilled: pooled = (features[:, 0] + features[:, 1]) / 2
    else: pooled = features[:, 0]
    assert_close(m.forward_head(m.forward_features(x), pre_logits=True), pooled, atol=1e-5, rtol=1e-5)
    want = pooled if m.num_classes == 0 else (m.head(features[:, 0]) + m.head_dist(features[:, 1])) / 2 if m.distilled else m.head(pooled)
    assert_close(m(x), want, atol=1e-5, rtol=1e-5)
    block = m.blocks[0]
    assert all(isinstance(l, nn.LayerNorm) and l.eps == eps for l in (block.norm1, block.norm2))
    assert (isinstance(block.attn.q_norm, nn.LayerNorm), block.attn.qkv.bias is not None, block.mlp.fc1.out_features) == (options.get('qk_norm', False), options.get('qkv_bias', True), 24 * options.get('mlp_ratio', 4))


@torch.no_grad()
def test_numbers_at_the_start():
    torch.manual_seed(0)
    m = VisionTransformer(**SMALL | dict(embed_dim=96, init_values=.1, reg_tokens=2))
    for linear in (l for l in m.modules() if isinstance(l, nn.Linear)): assert abs(linear.weight.std() - .02) < .004 and linear.weight.abs().max() < .1 and linear.bias.eq(0).all()
    assert abs(m.pos_embed.std() - .02) < .004 and m.cls_token.abs().max() < 1e-5 and m.reg_token.abs().max() < 1e-5 and m.cls_token.any() and m.blocks[1].ls2.gamma.eq(.1).all()


def test_dropout_where_it_was_asked_for():
    "Each option acts in training alone, at its own place."
    for option, layers in (('drop_rate', ['head_drop']), ('pos_drop_rate', ['pos_drop']), ('proj_drop_rate', [f'blocks.{i}.{n}' for i in range(3) for n in ('attn.proj_drop', 'mlp.drop')]), ('attn_drop_rate', []), ('drop_path_rate', [])):
        m, x = vit(**{option: .5}), pictures()
        assert [n for n, l in m.named_modules() if isinstance(l, nn.Dropout) and l.p == .5] == layers, option
        assert [b.attn.attn_drop for b in m.blocks] == [.5 * (option == 'attn_drop_rate')] * 3
        assert [b.drop_path1.p for b in m.blocks] == [b.drop_path2.p for b in m.blocks] == ([0, .25, .5] if option == 'drop_path_rate' else [0, 0, 0])
        assert_close(m(x), m(x))
        assert_close(m(x), vit()(x))
        m.train()
        assert not torch.allclose(m(x), m(x)), option
    m = vit(drop_rate=.5).train()
    features = m.forward_features(pictures())
    pooled = m.forward_head(features, pre_logits=True)
    assert ((pooled == 0) | ((pooled - 2 * features[:, 0]).abs() < 1e-6)).all()


def test_both_heads_for_the_distilled_loss():
    m, x = vit(distilled=True), pictures()
    assert m(x).shape == (2, 5)
    m.distilled_training = True
    assert m(x).shape == (2, 5)
    one, two = m.train()(x)
    assert_close((one + two) / 2, m.eval()(x))
    assert not torch.allclose(one, two)


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, dict(no_embed_class=True), dict(reg_tokens=2)], ids=lambda o: ' '.join(o) or 'plain')
def test_pictures_of_another_size(options):
    m, x = vit(dynamic_img_size=True, **options), pictures(32, 16)
    prefix = 0 if options.get('no_embed_class') else m.num_prefix_tokens
    other = VisionTransformer(**SMALL | dict(img_size=(32, 16), **options)).eval()
    other.load_state_dict({k: v for k, v in m.state_dict().items() if k != 'pos_grid'} | {'pos_embed': resize_position(m.pos_embed, (2, 3), (4, 2), prefix)})
    assert_close(m(x), other(x))
    assert [f.shape for f in m.feature_maps(x)] == [(2, 24, 4, 2)] * 3
    with pytest.raises(ValueError, match='patch_size'): m(pictures(20, 24))
    with pytest.raises(ValueError, match='img_size'): vit()(x)


@torch.no_grad()
@pytest.mark.parametrize('depth, taps', [(12, [2, 5, 8, 11]), (3, [0, 1, 2]), (1, [0]), (2, [0, 1]), (8, [1, 3, 5, 7]), (4, [0, 1, 2, 3])])
def test_maps_a_quarter_of_the_depth_apart(depth, taps):
    m, x = vit(depth=depth, reg_tokens=1), pictures()
    assert m.taps == taps and [tuple(l) for l in m.levels] == [(24, 8)] * len(taps)
    t, want = m.embed(x), []
    for i, block in enumerate(m.blocks):
        t = block(t)
        if i in taps: want.append(t[:, 2:].mT.unflatten(2, (2, 3)))
    for got, expected in zip(m.feature_maps(x), want, strict=True): assert torch.equal(got, expected)


def test_new_heads():
    m = vit(distilled=True)
    m.reset_classifier(7)
    assert m.num_classes == 7 and m.head.out_features == m.head_dist.out_features == 7 and m(pictures()).shape == (2, 7)
    m.double().reset_classifier(4)
    assert m.head.weight.dtype == torch.float64
    m.reset_classifier(0, 'token')
    assert m(pictures().double()).shape == (2, 24)
    with pytest.raises(ValueError, match="global_pool is 'token' by construction, got 'avg'"): m.reset_classifier(3, 'avg')


@pytest.mark.parametrize('more, word', [(dict(global_pool='max'), 'global_pool'), (dict(class_token=False), 'class_token'), (dict(distilled=True, global_pool='avg'), 'distilled'), (dict(num_heads=5), 'num_heads'), (dict(img_size=20), 'img_size')])
def test_bad_arguments(more, word, unchecked):
    with pytest.raises(ValueError, match=rf'\b{word}\b'): VisionTransformer(**SMALL | more)


@pytest.mark.parametrize('name, dim, heads, depth, patch, many', [
    ('vit_tiny_patch16_224', 192, 3, 12, 16, 5717416), ('vit_small_patch16_224', 384, 6, 12, 16, 22050664), ('vit_base_patch16_224', 768, 12, 12, 16, 86567656), ('vit_base_patch32_224', 768, 12, 12, 32, 88224232),
    ('vit_large_patch16_224', 1024, 16, 24, 16, 304326632), ('vit_huge_patch14_224', 1280, 16, 32, 14, 632045800), ('deit_tiny_distilled_patch16_224', 192, 3, 12, 16, 5910800),
    ('deit_small_distilled_patch16_224', 384, 6, 12, 16, 22436432), ('deit_base_distilled_patch16_224', 768, 12, 12, 16, 87338192)])
def test_the_known_sizes(name, dim, heads, depth, patch, many):
    "With timm's numbers of parameters."
    with torch.device('meta'): m = create_model(name)
    assert (m.embed_dim, m.blocks[0].attn.num_heads, len(m.blocks), m.patch_embed.patch_size, m.distilled) == (dim, heads, depth, (patch, patch), 'deit' in name)
    assert sum(p.numel() for p in m.parameters()) == many


# ---- weights

SQUARE = dict(img_size=24, num_heads=1)
KEPT = [o for o in OPTIONS if not {'norm_eps', 'dynamic_img_size'} & set(o) and not (o.get('distilled') and o.get('num_classes') == 0)]      # two tokens and no head are registers


@pytest.mark.parametrize('options', KEPT, ids=lambda o: ' '.join(o) or 'plain')
@pytest.mark.parametrize('told', [True, False])
@torch.no_grad()
def test_weights_tell_their_options(options, told):
    "Sizes, tokens, norms and heads are read off; the grid too, where it is square or said."
    more = options | (SQUARE | ({} if 'patch_size' not in options else dict(patch_size=(4, 4), img_size=16)) if not told else dict(num_heads=1))
    m = vit(**more)
    state = {k: v for k, v in m.state_dict().items() if told or k != 'pos_grid'}
    made = vit_from_state_dict(state, num_heads=1)
    x = pictures(*m.img_size)
    assert not made.training and made.img_size == m.img_size and made.global_pool == m.global_pool
    assert_close(made(x), m(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_for_another_size():
    m = vit(img_size=24)
    other = vit_from_state_dict(m.state_dict(), num_heads=3, img_size=(16, 32))
    want = VisionTransformer(**SMALL | dict(img_size=(16, 32))).eval()
    want.load_state_dict(m.state_dict() | {'pos_embed': resize_position(m.pos_embed, (3, 3), (2, 4)), 'pos_grid': torch.tensor([2, 4])})
    assert_close(other(x := pictures(16, 32)), want(x))
    assert vit_from_state_dict(vit(embed_dim=128, num_heads=2).state_dict()).blocks[0].attn.num_heads == 2, 'heads of width 64 unless told'
    registers = m.state_dict() | {'dist_token': torch.randn(1, 1, 24), 'pos_embed': torch.randn(1, 11, 24)}
    found = vit_from_state_dict(registers, num_heads=3)
    assert not found.distilled and torch.equal(found.reg_token, registers['dist_token']), 'a second token that no head listens to is a register'
    with pytest.raises(ValueError, match='number of heads'): VisionTransformer.from_official(m.state_dict())


def test_each_missing_entry_is_named():
    "Every one in turn; nothing is loaded."
    m, state = vit(qk_norm=True, init_values=.1, distilled=True, reg_tokens=1), vit(seed=1, qk_norm=True, init_values=.1, distilled=True, reg_tokens=1).state_dict()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    for name in state:
        if name == 'pos_grid': continue
        with pytest.raises(ValueError, match=rf'1 missing \({re.escape(name)}\)(; only the head differs.*)?$'): m.from_official({k: v for k, v in state.items() if k != name})
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert m.from_official(state) is m and torch.equal(m.pos_embed, state['pos_embed'])


def test_queries_keys_and_values_are_joined_in_order():
    parts = {f'encoder.layer.0.attention.attention.{n}.{kind}': torch.full((2, 2) if kind == 'weight' else (2,), float(i)) for i, n in enumerate(('query', 'key', 'value')) for kind in ('weight', 'bias')}
    out = from_huggingface(dict(reversed(parts.items())) | {'pooler.dense.weight': torch.zeros(1), 'vit.embeddings.mask_token': torch.zeros(1)})
    assert {k: v.flatten().tolist() for k, v in out.items()} == {'blocks.0.attn.qkv.bias': [0, 0, 1, 1, 2, 2], 'blocks.0.attn.qkv.weight': [0] * 4 + [1] * 4 + [2] * 4}
    incomplete = from_huggingface({k: v for k, v in parts.items() if 'value' not in k})
    assert incomplete and not any('qkv' in k for k in incomplete), 'two of three are not joined: loading says what is missing'


def test_a_file_by_its_name(tmp_path):
    m = vit()
    torch.save(m.state_dict(), tmp_path/'vit.pth')
    assert_close(vitbook.load_checkpoint(vit(seed=1), tmp_path/'vit.pth')(pictures()), m(pictures()))
