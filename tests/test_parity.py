"""Models agree with the official code, by the sheets in tests/parity. A sheet without a builder fails: add one below, named after the sheet, or after the chapter for all of its sheets."""
import pytest
import torch

from sheets import noise, sheets, weight

SHEETS = {sheet.name: sheet for sheet in sheets()}
BUILDERS = {}


def builder_of(name): return BUILDERS.get(name) or BUILDERS.get(name.split('__')[0])


def builder(name):
    "Registers `build(config, weights, inputs) -> outputs`, which maps the official names to ours."
    def keep(build):
        BUILDERS[name] = build
        return build
    return keep


@builder('vit__tiny')
def vit(config, weights, inputs):
    from vitbook.vit import VisionTransformer
    model = VisionTransformer(**config).eval()
    model.load_state_dict(weights)                                      # timm's names are ours: nothing to map, nothing may be left over
    return dict(logits=model(inputs['x']), features=model.forward_features(inputs['x']))


@builder('sigma_reparam')
@torch.enable_grad()
def sigma_reparam(config, weights, inputs):
    from vitbook.dynamics.sigma_reparam import SigmaConv2d, SigmaLinear, from_official
    layer, x = (SigmaLinear if 'in_features' in config else SigmaConv2d)(**config), inputs['x']
    layer.load_state_dict(from_official(weights, layer))
    layer.eval()
    out = dict(y=layer(x), weight=layer.effective_weight().flatten(1))
    layer.train()
    out |= dict(first_pass=layer(x), u_after_first=layer.u[0].clone())
    out['first_pass'].square().sum().mul(.5).backward()
    out |= dict(weight_gradient=layer.weight.grad.flatten(1), sigma_gradient=layer.gamma.grad, second_pass=layer(x), u_after_second=layer.u[0].clone())
    return out | ({} if layer.bias is None else dict(bias_gradient=layer.bias.grad))


@builder('urpe')
def urpe(config, weights, inputs):
    from vitbook.dynamics.urpe import URPEAttention, from_official, join_qkv
    if 'vocab_size' in config:
        states = from_official(weights, config)(inputs['tokens'], inputs.get('segment_labels'), inputs.get('positions'), inputs.get('token_embeddings'), return_states=True)
        return {'embedded' if i == 0 else f'layer{i - 1}': x for i, x in enumerate(states)} | dict(last=states[-1], sentence_rep=states[-1][:, 0])
    bias = config.get('bias', True)
    model = URPEAttention(config['embed_dim'], config['num_heads'], qkv_bias=bias, proj_bias=bias).eval()
    model.load_state_dict(join_qkv(weights))
    hidden, added = inputs.get('key_padding_mask'), [inputs[k] for k in ('bias', 'attn_mask') if k in inputs]
    return dict(y=model(inputs['x'], bias=sum(added) if added else None, factor=inputs.get('multiplier'), mask=None if hidden is None else ~hidden.bool()[:, None, None]))


@builder('tnt')
def tnt(config, weights, inputs):
    "A whole TNT, or one of its parts, told apart by the names of the weights."
    from torch import nn
    from vitbook.backbones import tnt as T
    from vitbook.layers.attention import Attention
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    filled = lambda module, state: (module.load_state_dict(state), module.eval())[1]
    renamed = lambda start: {k.removeprefix('blocks.0.'): v for k, v in T.TNT.official_names({f'blocks.0.{start}{k}': v for k, v in weights.items()}).items()}
    given, x = list(inputs.values()), next(iter(inputs.values()))
    if 'cls_token' in weights:
        official = dict(img_size=224, patch_size=16, in_chans=3, num_classes=1000, outer_dim=768, inner_dim=48, depth=12, outer_num_heads=12, inner_num_heads=4, mlp_ratio=4., qkv_bias=False, qk_scale=None,
                        drop_rate=0., attn_drop_rate=0., drop_path_rate=0., inner_stride=4, se=0) | {k: v for k, v in config.items() if k != 'norm_layer'}
        official |= dict(se=official['se'] > 0, crop=True)              # the official Unfold drops what is left over of a picture
        names = dict(outer_dim='embed_dim', outer_num_heads='num_heads')
        model = T.TNT(**{names.get(k, k): v for k, v in official.items()}, inner_blocks=[i for i in range(official['depth']) if f'blocks.{i}.proj.weight' in weights]).from_official(weights)
        tokens = model.forward_features(x)
        return dict(logits=model(x), features=tokens[:, 0], tokens=tokens, words=model.word_stream(x)[-1])
    if 'outer_norm1.weight' in weights:                                 # a block: words, sentences -> words, sentences
        wanted = {k: config[k] for k in ('mlp_ratio', 'qkv_bias', 'qk_scale') if k in config}
        inner = config['inner_dim'] if config['inner_dim'] > 0 else None
        block = T.TNTBlock(config['outer_dim'], inner, config['outer_num_heads'], config['inner_num_heads'], config['num_words'], **wanted, se=config.get('se', 0) > 0)
        words, z = filled(block, renamed(''))(*given)
        return {name: out for out, all_names in ((words, ('inner_tokens', 'inner', 'words')), (z, ('outer_tokens', 'outer', 'sentences'))) for name in all_names}
    if 'qk.weight' in weights:
        attention = Attention(config['dim'], config.get('num_heads', 8), config.get('qkv_bias', False))
        if config.get('qk_scale'): attention.q_norm = T.QueryScale(config['qk_scale'] * attention.head_dim ** .5)
        out = filled(attention, {k.removeprefix('outer.attn.'): v for k, v in renamed('outer_attn.').items()})(x)
    elif 'fc.0.weight' in weights:
        gate = nn.Sequential(*[part for part in T.SEMlp(x.shape[-1], 1).se])
        gate[1], gate[3] = (nn.Linear(*reversed(weights[f'fc.{i}.weight'].shape)) for i in (1, 3))
        out = filled(gate, {k.removeprefix('fc.'): v for k, v in weights.items()})(x.mean(1, keepdim=True)) * x
    else:
        embed = T.WordEmbed(**{k: v for k, v in config.items() if k in ('img_size', 'patch_size', 'in_chans', 'inner_dim', 'inner_stride')}, crop=True)
        out = filled(embed, weights)(x)
    return dict.fromkeys(('y', 'out', 'output', 'words', 'inner_tokens'), out)


@builder('hornet')
def hornet(config, weights, inputs):
    "A whole HorNet, of classification or detection, or one of its parts, told apart by the names of the weights."
    from fractions import Fraction
    from torch import nn
    from vitbook.mixers import hornet as H
    number = lambda s: [number(v) for v in s] if isinstance(s, (list, tuple)) else float(Fraction(s)) if isinstance(s, str) else float(s)
    x, part = inputs.get('x'), any(k.startswith(('proj_in.', 'gnconv.proj_in.')) for k in weights)
    scale = number(config.get('s', config.get('scale', 1. if part or 'complex_weight' in weights else '1/3')))
    outs = lambda maps: {f'{name}{i + first}': m for name in ('out', 'p', 'map', 'stage', 'feature') for first in (0, 1) for i, m in enumerate(maps)}
    last = lambda y: dict.fromkeys(('y', 'out', 'output'), y)
    filled = lambda module, names: (H.load_weights(module, names), module.eval())[1]
    inside = lambda module: lambda x: module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)               # ours are channels-last inside
    act = {'ReLU': nn.ReLU, 'GELU': nn.GELU}.get((config.get('act_cfg') or {}).get('type'))
    if 'downsample_layers.0.0.weight' in weights:
        model = H.HorNet.from_official(weights, scale=scale)
        maps = model.feature_maps(x)
        return outs(maps) | dict(logits=model.forward_head(maps[-1]), features=model.forward_head(maps[-1], pre_logits=True), pooled=model.forward_head(maps[-1], pre_logits=True))
    if any(k.startswith('lateral_convs.') for k in weights):
        given = {k: config[k] for k in ('start_level', 'end_level', 'num_outs', 'add_extra_convs', 'relu_before_extra_convs', 'no_norm_on_lateral') if k in config}
        renamed = dict(in_chans=config['in_channels'], upsample=config.get('upsample_cfg'), act_layer=act)
        return outs(H.HorFPN.from_official(weights, **given, **{k: v for k, v in renamed.items() if v is not None})(list(inputs.values())))
    if 'complex_weight' in weights:
        dim, *size, _ = weights['complex_weight'].shape
        return last(inside(filled(H.GlobalLocalFilter(2 * dim, size, scale), weights))(x))
    if 'gnconv.proj_in.weight' in weights:
        width = weights['norm1.weight'].shape[0]
        block = H.HorBlock(width, scale=scale, init_values=1. if 'gamma1' in weights else 0., **H._gnconv_arguments(weights, 'gnconv.'))
        return last(inside(filled(block, {k[2:]: v for k, v in H.official_names({f'0.{k}': v for k, v in weights.items()}).items()}))(x))
    names = H._renamed(weights, (r'^(bn|gn)\.', 'norm.'))
    dim, told = names['proj_in.weight'].shape[0] // 2, H._gnconv_arguments(weights)
    out = names['proj_out.weight'].shape[0] if 'proj_out.weight' in names else 0
    conv = filled(H.GnConv(dim, scale=scale, in_chans=names['proj_in.weight'].shape[1], out_chans=out, **told), {k: v for k, v in names.items() if not k.startswith('norm.')})
    y = inside(conv)(x)
    if 'norm.weight' in names: y = filled(nn.BatchNorm2d(y.shape[1]), {k[5:]: v for k, v in names.items() if k.startswith('norm.')} | dict(num_batches_tracked=torch.tensor(0)))(y)
    return last(act()(y) if act else y)


@builder('crossformer')
def crossformer(config, weights, inputs):
    from vitbook.backbones.crossformer import CrossFormer
    renamed = {'patch_size': 'patch_kernels', 'merge_size': 'merge_kernels'}
    given = {renamed.get(k, k): v for k, v in config.items() if k not in ('use_checkpoint', 'norm_layer', 'init_cfg')}
    if 'patch_kernels' in given: given['patch_size'] = given['patch_kernels'][0]     # the official stride
    dense = 'norm.weight' not in weights                                             # the dense-prediction backbone, which has no head and ignores two arguments
    if dense: given = {k: v for k, v in given.items() if k not in ('pad_type', 'no_mask', 'num_classes')}
    model = CrossFormer.from_official(weights, **given)                              # what the configuration leaves out, the weights tell
    maps = model.feature_maps(inputs['x'])
    outputs = {f'{name}{i}': m for i, m in enumerate(maps) for name in ('stage', 'feat', 'out', 'map', '')}
    if not dense: outputs |= dict(logits=model(inputs['x']), features=model.forward_head(model.forward_features(inputs['x']), pre_logits=True))
    return outputs


@builder('cvt')
def cvt(config, weights, inputs):
    from torch import nn
    from vitbook.backbones import cvt as C
    c = {k.upper(): v for k, v in (config | config.get('spec', config.get('SPEC', {}))).items()}   # the official settings' names; activation and norm are arguments beside them
    act = dict(QuickGELU=C.QuickGELU, GELU=nn.GELU, ReLU=nn.ReLU, SiLU=nn.SiLU)[c.get('ACT_LAYER', 'GELU')]
    c = {k: v[:c['NUM_STAGES']] if 'NUM_STAGES' in c and isinstance(v, list) else v for k, v in c.items()}                 # a setting may list more stages than it uses
    given = {ours: c[theirs] for ours, theirs in dict(
        in_chans='IN_CHANS', num_classes='NUM_CLASSES', embed_dims='DIM_EMBED', depths='DEPTH', num_heads='NUM_HEADS', mlp_ratio='MLP_RATIO', patch_size='PATCH_SIZE', patch_stride='PATCH_STRIDE',
        patch_padding='PATCH_PADDING', qkv_bias='QKV_BIAS', cls_token='CLS_TOKEN', qkv_method='QKV_PROJ_METHOD', kernel_qkv='KERNEL_QKV', stride_q='STRIDE_Q', stride_kv='STRIDE_KV', padding_q='PADDING_Q',
        padding_kv='PADDING_KV').items() if theirs in c}
    model = C.CvT(**given, act_layer=act, norm_layer=lambda dim: C.LayerNorm(dim, eps=c.get('NORM_EPS', 1e-5))).from_official(weights)
    x = inputs['x']
    maps, features = model.feature_maps(x), model.forward_features(x)
    outputs = dict(logits=model(x), features=model.forward_head(features, pre_logits=True))
    if len(x) == 1 and model.stages[-1].cls_token is not None: outputs = {k: v[0] for k, v in outputs.items()}   # the official code loses the axis of a batch of one
    return outputs | {f'stage{i}': m for i, m in enumerate(maps)}


@pytest.mark.parametrize('name', SHEETS)
@torch.no_grad()
def test_sheet(name, record_property):
    assert builder_of(name), f'tests/parity/{name}.json has no builder in tests/test_parity.py'
    sheet = SHEETS[name]
    worst = sheet.check(builder_of(name)(sheet.config, sheet.weights(), sheet.inputs()))
    record_property('worst error / rms', worst)


def test_every_builder_has_a_sheet():
    spare = {name for name in BUILDERS if not any(name in (sheet, sheet.split('__')[0]) for sheet in SHEETS)}
    assert not spare, f'builders without a sheet: {spare}'


@torch.no_grad()
def test_a_small_mistake_is_seen():
    "The check would be worth nothing if a swapped or slightly scaled weight passed it."
    sheet = SHEETS['vit__tiny']
    weights = sheet.weights()
    swapped = weights | {'blocks.1.norm1.weight': weights['blocks.1.norm2.weight']}
    scaled = weights | {'blocks.0.attn.qkv.bias': weights['blocks.0.attn.qkv.bias'] * 1.01}
    for wrong in (swapped, scaled):
        with pytest.raises(AssertionError, match='vit__tiny is off by'): sheet.check(vit(sheet.config, wrong, sheet.inputs()))


def test_the_report_sees_missing_outputs_shapes_and_nan():
    sheet = SHEETS['vit__tiny']
    good = dict(logits=torch.zeros(2, 10), features=torch.zeros(2, 17, 48))
    assert sheet.errors(dict(logits=good['logits']))['features'] == float('inf')
    assert sheet.errors(good | dict(logits=torch.zeros(10, 2)))['logits'] == float('inf')
    with pytest.raises(AssertionError): sheet.check(good | dict(logits=torch.full((2, 10), float('nan'))))


def test_the_rule():
    "The hash against the same integer arithmetic done by hand in Python's own integers, and what the names mean."
    import zlib
    for name, i in (('cls_token', 0), ('blocks.0.attn.qkv.weight', 4711)):
        h = (i + zlib.crc32(name.encode()) * 0x9E3779B9) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)): h = (h ^ h >> shift) * factor % 2**32
        assert noise(name, i + 1)[i] == (h ^ h >> 16) / 2**31 - 1
    assert weight('a.bias', [1000]).abs().max() <= .1 and (weight('a.weight', [1000]) - 1).abs().max() <= .1
    assert weight('bn.running_var', [1000]).min() >= .5 and weight('bn.running_mean', [1000]).abs().max() <= .1
    assert abs(weight('fc.weight', [50, 400]).std() * 20 - 1) < .02     # variance 1 / fan-in
