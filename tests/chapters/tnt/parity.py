"""The official TNT, built from a sheet with our parts."""


PARTS = dict(TNT='model', Block='block', Attention='attention', SE='gate', PixelEmbed='embed')   # official class -> part


def part_of(weights):
    "The part by the names of its weights, where the sheet does not say its class."
    known = {'cls_token': 'model', 'outer_norm1.weight': 'block', 'qk.weight': 'attention', 'fc.0.weight': 'gate'}
    return next((part for name, part in known.items() if name in weights), 'embed')


def tnt(config, weights, inputs, module=''):
    "A whole TNT, or one of its parts."
    from torch import nn
    from vitbook.backbones import tnt as T
    from vitbook.layers.attention import Attention
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    filled = lambda module, state: (module.load_state_dict(state), module.eval())[1]
    renamed = lambda start: {k.removeprefix('blocks.0.'): v for k, v in T.TNT.official_names({f'blocks.0.{start}{k}': v for k, v in weights.items()}).items()}
    given, x = list(inputs.values()), next(iter(inputs.values()))
    part = PARTS.get(module) or part_of(weights)
    if part == 'model':
        official = dict(img_size=224, patch_size=16, in_chans=3, num_classes=1000, outer_dim=768, inner_dim=48, depth=12, outer_num_heads=12, inner_num_heads=4, mlp_ratio=4., qkv_bias=False, qk_scale=None,
                        drop_rate=0., attn_drop_rate=0., drop_path_rate=0., inner_stride=4, se=0) | {k: v for k, v in config.items() if k != 'norm_layer'}
        official |= dict(se=official['se'] > 0, crop=True)              # the official Unfold drops what is left over of a picture
        names = dict(outer_dim='embed_dim', outer_num_heads='num_heads')
        model = T.TNT(**{names.get(k, k): v for k, v in official.items()}, inner_blocks=[i for i in range(official['depth']) if f'blocks.{i}.proj.weight' in weights]).from_official(weights)
        tokens = model.forward_features(x)
        return dict(logits=model(x), features=tokens[:, 0], tokens=tokens, words=model.word_stream(x)[-1])
    if part == 'block':                                                 # words, sentences -> words, sentences
        wanted = {k: config[k] for k in ('mlp_ratio', 'qkv_bias', 'qk_scale') if k in config}
        inner = config['inner_dim'] if config['inner_dim'] > 0 else None
        block = T.TNTBlock(config['outer_dim'], inner, config['outer_num_heads'], config['inner_num_heads'], config['num_words'], **wanted, se=config.get('se', 0) > 0)
        words, z = filled(block, renamed(''))(*given)
        return dict(inner=words, outer=z)
    if part == 'attention':
        attention = Attention(config['dim'], config.get('num_heads', 8), config.get('qkv_bias', False))
        if config.get('qk_scale'): attention.q_norm = T.QueryScale(config['qk_scale'] * attention.head_dim ** .5)
        return filled(attention, {k.removeprefix('outer.attn.'): v for k, v in renamed('outer_attn.').items()})(x)
    if part == 'gate':
        gate = nn.Sequential(*[part for part in T.SEMlp(x.shape[-1], 1).se])
        gate[1], gate[3] = (nn.Linear(*reversed(weights[f'fc.{i}.weight'].shape)) for i in (1, 3))
        return filled(gate, {k.removeprefix('fc.'): v for k, v in weights.items()})(x.mean(1, keepdim=True)) * x
    embed = T.WordEmbed(**{k: v for k, v in config.items() if k in ('img_size', 'patch_size', 'in_chans', 'inner_dim', 'inner_stride')}, crop=True)
    return filled(embed, weights)(x)
