"""The official HorNet, built from a sheet with our parts."""
import torch

PARTS = dict(HorNet='model', HorFPN='pyramid', GlobalLocalFilter='filter', Block='block', gnconv='convolution')  # official class -> part


def part_of(weights):
    "The part by the names of its weights, where the sheet does not say its class."
    if 'downsample_layers.0.0.weight' in weights: return 'model'
    if any(k.startswith('lateral_convs.') for k in weights): return 'pyramid'
    known = {'complex_weight': 'filter', 'gnconv.proj_in.weight': 'block'}
    return next((part for name, part in known.items() if name in weights), 'convolution')


def hornet(config, weights, inputs, module=''):
    "A whole HorNet, of classification or detection, or one of its parts."
    from fractions import Fraction
    from torch import nn
    from vitbook.mixers import hornet as H
    number = lambda s: [number(v) for v in s] if isinstance(s, (list, tuple)) else float(Fraction(s)) if isinstance(s, str) else float(s)
    x, part = inputs.get('x'), PARTS.get(module) or part_of(weights)
    scale = number(config.get('s', config.get('scale', 1. if part in ('filter', 'block', 'convolution') else '1/3')))
    outs = lambda maps: {f'map{i}': m for i, m in enumerate(maps)}
    filled = lambda module, names: (H.load_weights(module, names), module.eval())[1]
    inside = lambda module: lambda x: module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)               # ours are channels-last inside
    act = {'ReLU': nn.ReLU, 'GELU': nn.GELU}.get((config.get('act_cfg') or {}).get('type'))
    if part == 'model':
        model = H.HorNet.from_official(weights, scale=scale)
        maps = model.feature_maps(x)
        return dict(logits=model.forward_head(maps[-1]), features=model.forward_head(maps[-1], pre_logits=True)) | outs(maps)
    if part == 'pyramid':
        given = {k: config[k] for k in ('start_level', 'end_level', 'num_outs', 'add_extra_convs', 'relu_before_extra_convs', 'no_norm_on_lateral') if k in config}
        renamed = dict(in_chans=config['in_channels'], upsample=config.get('upsample_cfg'), act_layer=act)
        return outs(H.HorFPN.from_official(weights, **given, **{k: v for k, v in renamed.items() if v is not None})(list(inputs.values())))
    if part == 'filter':
        dim, *size, _ = weights['complex_weight'].shape
        return inside(filled(H.GlobalLocalFilter(2 * dim, size, scale), weights))(x)
    if part == 'block':
        width = weights['norm1.weight'].shape[0]
        block = H.HorBlock(width, scale=scale, init_values=1. if 'gamma1' in weights else 0., **H._gnconv_arguments(weights, 'gnconv.'))
        names = H.official_names({f'0.{k}': v for k, v in weights.items()})
        return inside(filled(block, {k[2:]: v for k, v in names.items()}))(x)
    names = H._renamed(weights, (r'^(bn|gn)\.', 'norm.'))
    dim, told = names['proj_in.weight'].shape[0] // 2, H._gnconv_arguments(weights)
    out = names['proj_out.weight'].shape[0] if 'proj_out.weight' in names else 0
    conv = filled(H.GnConv(dim, scale=scale, in_chans=names['proj_in.weight'].shape[1], out_chans=out, **told), {k: v for k, v in names.items() if not k.startswith('norm.')})
    y = inside(conv)(x)
    if 'norm.weight' in names: y = filled(nn.BatchNorm2d(y.shape[1]), {k[5:]: v for k, v in names.items() if k.startswith('norm.')} | dict(num_batches_tracked=torch.tensor(0)))(y)
    return act()(y) if act else y
