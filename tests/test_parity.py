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


@builder('qwen25_vl')
def qwen25_vl(config, weights, inputs):
    "The vision tower, the language model, the ids of positions or the whole model, told apart by the names of weights and inputs."
    from vitbook.multimodal import qwen25_vl as Q
    grids = lambda name: inputs[name].tolist() if name in inputs else ()
    numbers = lambda name: inputs[name].flatten().tolist() if name in inputs else None
    mask = inputs['attention_mask'].bool() if 'attention_mask' in inputs else None
    tokens = next((inputs[k] for k in ('ids', 'input_ids', 'tokens') if k in inputs), None)
    if not weights:                                                      # ids of positions; several sets of seconds may share a sheet
        flat = config | config.get('vision_config', {})
        names = dict(image_token_id='image_token', video_token_id='video_token', spatial_merge_size='merge_size', tokens_per_second='tokens_per_second')
        given, outputs = dict(tokens_per_second=4) | {ours: flat[theirs] for theirs, ours in names.items() if theirs in flat}, {}
        for end, seconds in {k.removeprefix('seconds') if k.startswith('seconds') else '': k for k in inputs if k.startswith(('seconds', 'second_per_grid'))}.items() or [('', '')]:
            ids, after = Q.mrope_ids(tokens, grids('image_grid_thw'), grids('video_grid_thw'), numbers(seconds), mask=mask, whole_seconds=True, **given)
            told = dict(position_ids=ids.float(), delta=(after - tokens.shape[1]).float()[:, None])
            outputs |= {f'{k}{"_seconds" * end.startswith("_")}{end}': v for k, v in told.items()} | {k + end: v for k, v in told.items()} | {f'rope_{k}{end}': v for k, v in told.items()} | {f'rope_{k}s{end}': v for k, v in told.items()} | {f'mrope_position_deltas{end}': told['delta']}
        return outputs
    if any('patch_embed.proj' in k for k in weights) and not any('embed_tokens' in k for k in weights):
        model = Q.from_official(weights, config)
        sizes, patches = next(inputs[k] for k in inputs if 'grid' in k), next(inputs[k] for k in inputs if 'grid' not in k)
        states, at = model.forward_blocks(patches, sizes), model.layout(sizes)
        angles = Q.axial_angles(Q.patch_positions(Q.check_grids(sizes, model.merge_size), model.merge_size), model.head_dim)
        outputs = {f'block{i}': x for i, x in enumerate(states[1:])} | dict(window_index=at.order.float(), cu_window_seqlens=torch.tensor(at.windows).float(), cu_seqlens=torch.tensor(at.frames).float(), angles=angles)
        return outputs | dict.fromkeys(('features', 'merged', 'y', 'out', 'pooler_output'), model(patches, sizes)) | dict.fromkeys(('last_hidden', 'last_hidden_state'), states[-1])
    changes = dict(padded_queries='mean')                                # what the sheets' eager attention gives to padding
    if any('patch_embed.proj' in k for k in weights):
        model = Q.from_official(weights, config, whole_seconds=True, **changes)
        logits = model(tokens, inputs.get('pixel_values'), grids('image_grid_thw'), inputs.get('pixel_values_videos'), grids('video_grid_thw'), numbers('second_per_grid_ts'), mask)
        return dict(logits=logits)
    head = weights.get('lm_head.weight')
    model = Q.from_official({k: v for k, v in weights.items() if k != 'lm_head.weight'}, config, **changes)
    x = next((inputs[k] for k in ('embeds', 'inputs_embeds') if k in inputs), None)
    ids = inputs.get('position_ids')
    states = model.forward_blocks(model.embed(tokens) if x is None else x, ids if ids is None or ids.dim() == 3 else ids.expand(3, *ids.shape), None if mask is None or mask.all() else mask)
    last = model.norm(states[-1])
    return {f'layer{i}': s for i, s in enumerate(states)} | {f'block{i}': s for i, s in enumerate(states[1:])} | dict.fromkeys(('last_hidden', 'last_hidden_state', 'y', 'out'), last) | ({} if head is None else dict(logits=last @ head.T))


@builder('itransformer')
def itransformer(config, weights, inputs):
    "A whole model of the family, or one of its parts, told apart by the names of the weights; which attention it has is said by the configuration's words."
    from torch import nn
    from vitbook import see
    from vitbook.sequences import itransformer as T
    words = ' '.join(str(v) for k, v in config.items() if k in ('model', 'name', 'variant', 'attention', 'attn', 'module', 'class', 'inner_attention')).lower()
    kind = next((ours for theirs, ours in (('inform', 'prob'), ('prob', 'prob'), ('flow', 'flow'), ('flash', 'flash'), ('reform', 'lsh'), ('lsh', 'lsh')) if theirs in words), 'full')
    heads, seed = config.get('n_heads', config.get('heads', 8)), next((config[k] for k in ('seed', 'manual_seed', 'torch_seed') if k in config), None)
    act = nn.ReLU if config.get('activation', 'gelu' if 'e_layers' in config else 'relu') == 'relu' else nn.GELU     # the layer by itself is born with relu, the model with gelu
    last = lambda y: dict.fromkeys(('y', 'out', 'output'), y)
    x, mark = next(iter(inputs.values())), next((v for k, v in inputs.items() if 'mark' in k), None)
    def again(f, *given):                                               # each output starts from the same random numbers, if a sheet names its seed
        if seed is not None: torch.manual_seed(seed)
        return f(*given)
    if 'projector.weight' in weights:
        model = T.ITransformer.from_official(weights, heads, attn='lsh' if any('toqk' in k for k in weights) else kind, act_layer=act, use_norm=bool(config.get('use_norm', True)),
                                             factor=config.get('factor', 1), official=True, eval_seed=None).eval()
        outputs = last(again(model, x, mark)) | dict(y_without_marks=again(model, x, None))
        if model.attn in ('full', 'flash'): outputs |= {f'{name}{i}': w for name in ('attn', 'attns', 'attention', 'attention_', 'layer') for i, w in enumerate(model.attention_maps(x, mark))}
        return outputs
    if 'value_embedding.weight' in weights:
        dim, steps = weights['value_embedding.weight'].shape
        embed = T.VariateEmbedding(steps, dim)
        embed.load_state_dict({k.replace('value_embedding', 'proj'): v for k, v in weights.items()})
        return last(embed(x, mark))
    if not weights:                                                     # a bare attention of (b l h e) queries, keys, values
        q, k, v = (t.transpose(1, 2) for t in list(inputs.values())[:3])
        if kind == 'prob': return last(again(lambda: T.prob_attention(q, k, v, config.get('factor', 5), official=True).transpose(1, 2).reshape(*q.shape[:3], -1)))   # theirs comes as b h l e
        return last(again(T.flow_attention if kind == 'flow' else T.attention, q, k, v).transpose(1, 2))
    if 'conv1.weight' in weights:                                       # one layer
        names = T.official_names({f'encoder.attn_layers.0.{k}': v for k, v in weights.items()})
        dim, hidden = weights['conv1.weight'].shape[1], weights['conv1.weight'].shape[0]
        model = T.ITransformer(1, 1, dim, 1, heads, hidden / dim, attn='lsh' if 'blocks.0.attn.qk.weight' in names else kind, act_layer=act, head_dim=names['blocks.0.attn.proj.weight'].shape[1] // heads,
                               factor=config.get('factor', 1), official=True, eval_seed=None)
        layer = model.blocks[0].eval()
    else:                                                               # an attention with its projections
        names = T.official_names({f'encoder.attn_layers.0.attention.{k}': v for k, v in weights.items()})
        dim, inner = names['blocks.0.attn.proj.weight'].shape
        lsh = 'blocks.0.attn.qk.weight' in names
        layer = (T.LSHAttention(dim, heads, head_dim=inner // heads, eval_seed=None) if lsh else T.VariateAttention(dim, heads, kind, head_dim=inner // heads, factor=config.get('factor', 5), official=True, eval_seed=None)).eval()
    layer.load_state_dict({k.removeprefix('blocks.0.').removeprefix('' if 'conv1.weight' in weights else 'attn.'): v for k, v in names.items()})
    with see.recording(layer) as seen: y = again(layer, x)
    return last(y) | {name: w for w in seen.weights[:1] for name in ('attn', 'attention', 'weights')}


@builder('dsvt')
def dsvt(config, weights, inputs):
    "A whole DSVT, its input layer, or one of its parts, told apart by the names of the weights."
    import re
    from vitbook.detection import dsvt as D
    from vitbook.layers.voxels import DynamicVFE, grid_size, to_bev
    filled = lambda module, names: (D.load_weights(module, {k: torch.tensor(0) if v is None else v for k, v in names.items()}), module.eval())[1]
    has = lambda *parts: any(re.search(part, name) for part in parts for name in weights)
    last = lambda y, *names: dict.fromkeys(('y', 'out', 'output', 'x', *names), y)
    table = {name.lower(): value for name, value in config.items()}
    get = lambda *names, default=None: next((table[n] for n in names if n in table), default)
    batches = lambda state: state | {k.rsplit('.', 1)[0] + '.num_batches_tracked': None for k in state if k.endswith('running_var')}   # `constructed`, so not among the weights
    coords = next((v for k, v in inputs.items() if 'coord' in k or 'coor' in k), None)
    x = next((v for k, v in inputs.items() if k in ('x', 'src', 'voxel_features', 'features', 'children', 'points', 'spatial_features')), next(iter(inputs.values()), None))
    act = D.act_named(config.get('activation', 'relu'))                     # the official layers' default; the whole model has none
    heads, drop = get('nhead', 'num_heads', default=8), get('dropout', default=.1)

    def model_of(full, layer):
        depths = [info[1] for info in full.get('set_info', layer['set_info'])]
        dims = full.get('d_model', layer['d_model'])
        return D.DSVT(layer['sparse_shape'], dims, depths, [info[0] for info in layer['set_info']], layer['window_shape'], layer['hybrid_factor'], layer['shifts_list'], layer['downsample_stride'],
                      full.get('nhead', [1] * len(dims)), [f / d for f, d in zip(full.get('dim_feedforward', dims), dims)], pooling=full.get('reduction_type', 'attention' if full.get('nhead') else 'linear'),
                      activation=full.get('activation', 'gelu'), attn_drop_rate=full.get('dropout', 0.), normalize_pos=layer.get('normalize_pos', False), pos_bug=config.get('pos_bug', True))

    if has(r'^stage_0\.'):
        model = filled(model_of(config, config['INPUT_LAYER']), batches(D.official_names(weights)))
        y, out = model(x, coords)
        return last(y, 'features', 'pillar_features', 'voxel_features') | dict.fromkeys(('coords_out', 'coords', 'voxel_coords'), out)
    if has(r'posembed_layers'):
        layer = config.get('INPUT_LAYER', config)
        model = model_of({}, layer)
        filled(model, model.state_dict() | batches(D.official_names(weights)))
        found = {}
        for s, stage in enumerate(model.partition(coords)):
            for c, (windows, sets, window) in enumerate(stage.configs):
                found |= {f'set_inds_stage{s}_config{c}': sets.inds, f'set_mask_stage{s}_config{c}': sets.mask.int(), f'pos_stage{s}_config{c}': model.stages[s][0].pos[c](windows.place, window),
                          f'coords_in_win_stage{s}_config{c}': windows.place, f'coors_in_win_stage{s}_config{c}': windows.place}
                found |= {f'set_voxel_inds_stage{s}_shift{c}': sets.inds, f'set_voxel_mask_stage{s}_shift{c}': sets.mask.int()}
                found |= {f'pos_stage{s}_block{b}_config{c}': block.pos[c](windows.place, window) for b, block in enumerate(model.stages[s])}
                found |= {f'pos_embed_stage{s}_block{b}_shift{c}': block.pos[c](windows.place, window) for b, block in enumerate(model.stages[s])}
            if stage.pooled is not None:
                for t in (s, s + 1):
                    found |= {f'pooling_mapping_index_stage{t}': stage.pooled.parent, f'pooling_index_in_pool_stage{t}': stage.pooled.child, f'pool_parent_stage{t}': stage.pooled.parent, f'pool_child_stage{t}': stage.pooled.child}
                found |= {f'{name}_stage{s + 1}': stage.pooled.coords for name in ('coords', 'coors', 'voxel_coors')}
        return found | dict(coords_stage0=coords, voxel_coors_stage0=coords)
    if has(r'position_embedding_head'):
        width, inner = weights['position_embedding_head.0.weight'].shape
        mlp = filled(D.PositionMlp(width, inner == 2), {k.replace('position_embedding_head', 'net'): v for k, v in batches(weights).items()})
        return last(mlp.net(x), 'pos', 'position_embedding')
    if has(r'^encoder_list\.') or has(r'win_attn'):
        names = D.official_names(weights)
        first = next(k for k in names if k.endswith('attn.proj.weight'))
        c, hidden = len(names[first]), len(next(v for k, v in names.items() if k.endswith('mlp.fc1.bias')))
        given = lambda *keys: next((inputs[k] for k in keys if k in inputs), None)
        inds, mask, pos = given('inds', 'set_voxel_inds', 'voxel_inds'), given('mask', 'set_voxel_masks', 'key_padding_mask'), given('pos', 'pos_embed')
        mask = None if mask is None else mask.bool()
        if not has(r'^encoder_list\.'):
            layer = filled(D.SetLayer(c, heads, hidden, act, drop), names)
            return last(layer(x, pos, inds, mask), 'layer') | dict(set_attention=layer.inner(x, pos, inds, mask))
        layers = [filled(D.SetLayer(c, heads, hidden, act, drop), {k.removeprefix(f'layers.{i}.'): v for k, v in names.items() if k.startswith(f'layers.{i}.')}) for i in range(2)]
        number, y = config.get('block_id', int(inputs.get('block_id', 0))), x
        for i, layer in enumerate(layers):
            tables = [next(v for k, v in inputs.items() if re.search(rf'{what}.*{number % 2}$', k)) for what in ('inds', 'mask')] if inds is None else (inds[number % 2], mask[number % 2])
            y = layer(y, inputs[f'pos{i}'] if f'pos{i}' in inputs else inputs[f'pos_{i}'] if f'pos_{i}' in inputs else pos[i], tables[0][i], tables[1][i].bool())
        return last(y)
    if has(r'^win_attn|^self_attn') and has(r'linear1'):
        names = D.official_names({f'win_attn.{k}': v for k, v in weights.items()})
        layer = D.SetLayer(len(weights['linear2.bias']), heads, len(weights['linear1.bias']), act, drop)
        filled(layer, names | {f'norm.{k}': v for k, v in layer.norm.state_dict().items()})
        given = lambda *keys: next((inputs[k] for k in keys if k in inputs), None)
        mask = given('mask', 'key_padding_mask')
        return last(layer.inner(x, given('pos'), given('inds', 'voxel_inds'), None if mask is None else mask.bool()), 'set_attention')
    if has(r'pos_embedding$'):
        volume, c = weights['pos_embedding'].shape
        pool = filled(D.AttentionPooling(c, volume), {k.removeprefix('pools.0.'): v for k, v in D.official_names({f'stage_0_reduction.{k}': v for k, v in weights.items()}).items()})
        return last(pool(x.transpose(1, 2)), 'pooled', 'features')           # the official order is voxel, channel, cell
    if has(r'^linear1\.weight$') and has(r'^norm\.'):
        out, wide = weights['linear1.weight'].shape
        pool = filled(D.LinearPooling(wide, 1, out), {k.replace('linear1', 'linear'): v for k, v in weights.items()})
        return last(pool(x.flatten(1)[:, None]), 'pooled', 'features')
    if has(r'^pfn_layers\.'):
        sizes, span = get('voxel_size'), get('point_cloud_range')
        name = str(get('name', default='')).lower()
        points = next(v for v in inputs.values() if v.dim() == 2)
        vfe = DynamicVFE(sizes, span, points.shape[1] - 1, get('num_filters'), norm=get('use_norm', default=True), absolute=get('use_abslote_xyz', 'use_absolute_xyz', default=True),
                         distance=get('with_distance', default=False), ignore_z='3d' not in name if name else grid_size(sizes, span)[2] == 1)
        filled(vfe, {k.replace('pfn_layers', 'layers'): v for k, v in batches(weights).items()})
        y, found = vfe(points)
        return last(y, 'features', 'pillar_features', 'voxel_features') | dict.fromkeys(('coords', 'coords_out', 'voxel_coords'), found)
    if has(r'^shared_conv\.'):
        outputs = {k.split('.')[2]: len(v) for k, v in weights.items() if re.fullmatch(r'heads_list\.0\.\w+\.\d+\.bias', k)}
        convs = 1 + max(int(m[1]) for k in weights if (m := re.fullmatch(r'heads_list\.0\.hm\.(\d+)\.bias', k)))
        width, wide = weights['shared_conv.0.weight'].shape[:2]
        head = D.CenterHead(wide, outputs.pop('hm'), width, outputs, convs, bias='shared_conv.0.bias' in weights, eps=get('bn_eps', default=1e-5), momentum=get('bn_mom', default=.1))
        return filled(head, {k.replace('heads_list.0', 'outputs'): v for k, v in batches(weights).items()})(x)
    if has(r'^blocks\.'):
        bev = D.BEVBackbone(weights['blocks.0.0.conv1.weight'].shape[1], get('layer_nums'), get('layer_strides'), get('num_filters'), get('upsample_strides', default=()), get('num_upsample_filters', default=()))
        return last(filled(bev, batches(weights))(x), 'spatial_features_2d')
    if not weights and coords is not None:
        y = to_bev(x, coords, get('input_shape', 'grid_size', 'grid'))
        return last(y, 'bev', 'spatial_features')
    raise ValueError(f'no part of DSVT has the weights {list(weights)}')


@builder('fitv2')
def fitv2(config, weights, inputs):
    "A whole FiT, or one of its parts, told apart by the names of the weights and of the configuration."
    from vitbook.generation import fitv2 as V
    last = lambda y: dict.fromkeys(('velocity', 'noise', 'eps', 'out', 'output', 'y', 'prediction', 'x'), y)
    filled = lambda module, state: (module.load_state_dict(state), module.eval())[1]
    scalings = {'normal': 'none', 'linear': 'linear', 'ntk-aware': 'ntk', 'ntk-aware-pro1': 'ntk_pro1', 'ntk-aware-pro2': 'ntk_pro2', 'ntk-by-parts': 'ntk_by_parts', 'yarn': 'yarn'}
    c = dict(hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4., class_dropout_prob=.1, num_classes=1000, patch_size=2, in_channels=4, learn_sigma=True, use_sit=False, use_swiglu=False,
             use_swiglu_large=False, rel_pos_embed='rope', norm_type='layernorm', q_norm=None, k_norm=None, qk_norm_weight=False, qkv_bias=True, ffn_bias=True, adaln_bias=True, adaln_type='normal',
             adaln_lora_dim=None, rope_theta=10000., custom_freqs='normal', max_pe_len_h=None, max_pe_len_w=None, decouple=False, ori_max_pe_len=None, online_rope=False, add_rel_pe_to_v=False, time_shifting=1) | config
    weighted = lambda kind: 'w_layernorm' if kind == 'layernorm' and c['qk_norm_weight'] else kind
    scaling, adaln = scalings[c['custom_freqs'].lower()], dict(normal='full').get(c['adaln_type'], c['adaln_type'])
    mlp = 'gelu' if not c['use_swiglu'] else 'swiglu_large' if c['use_swiglu_large'] else 'swiglu'
    length = None if c['online_rope'] or scaling == 'none' else (c['max_pe_len_h'], c['max_pe_len_w'])
    rotates = str(c['rel_pos_embed']).lower() in ('rope', 'xpos')
    if 'head_dim' in config and not weights:                                # the rotary embedding alone
        rope = V.VisionRope(c['head_dim'], config.get('theta', 10000.), scaling, c['ori_max_pe_len'] or 16, length, c['decouple'], double_len=True)
        cos, sin = (z[:, 0] for z in rope(inputs['grid'], inputs.get('size')))
        rows, columns = rope.frequencies(rope.lengths(inputs.get('size'))) if scaling != 'none' else [V.axis_frequencies(rope.dim, rope.theta)] * 2
        out = dict(freqs_cos=cos, cos=cos, freqs_sin=sin, sin=sin, freqs_h=rows, freqs_w=columns)
        return out | ({} if 'x' not in inputs else last(V.apply_rope(inputs['x'], cos[:, None], sin[:, None])))
    if 'x_embedder.proj.weight' not in weights:
        names = {k.replace('fc1_g', 'gate').replace('fc1_x', 'value'): v for k, v in weights.items()}
        gated = any(k.endswith('gate.weight') for k in names)
        names = {k.replace('fc2', 'out') if gated and 'fc2' in k and k.replace('fc2', 'gate') in names else k: v for k, v in names.items()}
        if 'embedding_table.weight' in names: return last(filled(V.LabelEmbed(c['num_classes'], c['hidden_size'], config.get('dropout_prob', c['class_dropout_prob'])), names)(next(iter(inputs.values()))))
        if 'mlp.2.weight' in names: return last(filled(V.TimeEmbed(len(names['mlp.2.bias']), names['mlp.0.weight'].shape[1] // 2), names)(next(iter(inputs.values()))))
        x, cos, sin, mask = (inputs.get(k) for k in ('x', 'freqs_cos', 'freqs_sin', 'mask'))
        rope = None if cos is None or not rotates else tuple(z if z.dim() == 4 else z[:, None] for z in (cos, sin))
        pairs, valid = (None, None) if mask is None else (mask[:, None, :, None] == mask[:, None, None, :], (mask != 0)[..., None])
        heads = c['num_heads'] if 'num_heads' in config or 'hidden_size' in config else 8
        if 'qkv.weight' in names: return last(filled(V.FlexAttention(x.shape[-1], heads, 'qkv.bias' in names, weighted(c['q_norm']), weighted(c['k_norm']), c['add_rel_pe_to_v']), names)(x, rope, pairs, valid))
        if 'linear.weight' in names: return last(filled(V.FinalLayer(x.shape[-1], len(names['linear.bias']), c['norm_type'], adaln, c['adaln_bias']), names)(x, inputs['c']))
        mlp = 'gelu' if not config.get('use_swiglu', config.get('swiglu', True)) else 'swiglu_large' if config.get('use_swiglu_large', config.get('swiglu_large', False)) else 'swiglu'
        block = V.FiTBlock(x.shape[-1], heads, c['mlp_ratio'], mlp, config.get('norm_layer', c['norm_type']), weighted(c['q_norm']), weighted(c['k_norm']), c['qkv_bias'], c['ffn_bias'], adaln, c['adaln_lora_dim'], c['adaln_bias'], c['add_rel_pe_to_v'])
        return last(filled(block, names)(x, inputs['c'], inputs.get('global_adaln'), rope, pairs, valid))
    model = V.FiT(c['patch_size'], c['in_channels'], c['num_classes'], c['hidden_size'], c['depth'], c['num_heads'], c['mlp_ratio'], mlp=mlp, norm=c['norm_type'], q_norm=weighted(c['q_norm']),
                  k_norm=weighted(c['k_norm']), qkv_bias=c['qkv_bias'], mlp_bias=c['ffn_bias'], adaln=adaln, adaln_rank=c['adaln_lora_dim'], adaln_bias=c['adaln_bias'], rope=rotates, rope_theta=c['rope_theta'],
                  rope_scaling=scaling, train_len=c['ori_max_pe_len'] or 16, rope_len=length, decouple=c['decouple'], rotate_values=c['add_rel_pe_to_v'], class_dropout=c['class_dropout_prob'],
                  flow=c['use_sit'], learn_sigma=c['learn_sigma'], time_shift=c['time_shifting'], official=True).from_official(weights).eval()
    flat = (lambda z: z) if c['use_sit'] else (lambda z: z.transpose(1, 2))                           # the noise models have tokens last
    x, t, y, grid, mask, size = (inputs.get(k) for k in ('x', 't', 'y', 'grid', 'mask', 'size'))
    scale = {**config, **inputs}.get('cfg_scale')
    if scale is None: return last(flat(model(flat(x), t, y, grid, mask, size)))
    half, power, p = len(x) // 2, float({**config, **inputs}.get('scale_pow', 0.)), 3 * c['patch_size'] ** 2
    out = model(flat(torch.cat([x[:half]] * 2)), t, y, grid, mask, size)                              # the official call gets the classes and "any" in one batch, and returns both halves
    guided = V.guide(out[:half], out[half:], V.falling_scale(t[:half], float(scale), power), min(p, out.shape[-1]))
    return last(flat(torch.cat([torch.cat([guided[..., :p]] * 2), out[..., p:]], -1)))


# Six pairs of neighbours in the sorted rows of histoformer__tiny that rounding turned round in the official run,
# closer than 1.4e-6 of the row's range: which of the 24 sorts -> (picture, channel, row of a map, place of the first)
HISTOFORMER_TURNED = {2: [(0, 0, 844)], 19: [(0, 9, 22, 25)], 20: [(0, 1, 864), (0, 3, 636)],
                      23: [(0, 13, 167), (0, 20, 402)]}


def histoformer_orders(model, x, turned=HISTOFORMER_TURNED):
    """The orders of exact arithmetic but for the pairs `turned`, and the output they give.

    Exact is float64, where no two values are close enough for a machine to matter.
    """
    import copy
    from vitbook.restoration import histoformer as H

    def turn(which, order):
        order = order.clone()
        for *row, place in turned.get(which, ()):
            pair = *row, slice(place, place + 2)
            order[pair] = order[pair].flip(-1)
        return order

    with H.SortOrders(turn) as kept: y = copy.deepcopy(model).double()(x.double())
    return kept.orders, y


@builder('histoformer')
def histoformer(config, weights, inputs):
    """A whole Histoformer, one of its parts, told apart by the names of the weights, or the loss, which has none.

    The whole gets the order of its sorts handed in: they turn a last bit into another order, so that even the
    official code, on one thread, is a tenth of the rms away from its sheet.
    """
    from vitbook.restoration import histoformer as H
    x, bias = next(iter(inputs.values())), any(k.endswith('.bias') for k in weights)
    last = lambda y: dict.fromkeys(('y', 'out', 'output', 'x', 'restored'), y)
    center = config.get('LayerNorm_type', 'WithBias') != 'BiasFree'
    filled = lambda module, names: (H.load_weights(module, names), module.eval())[1]
    bare = lambda start: {k.removeprefix(start): v for k, v in H.from_official({start + k: v for k, v in weights.items()}).items()}
    if 'output.weight' in weights:
        model = H.Histoformer.from_official(weights, center=center).eval()
        orders, _ = histoformer_orders(model, x)
        with H.SortOrders(lambda which, own: orders[which]): return last(model(x))
    if 'attn_g.temperature' in weights:
        dim, hidden = weights['ffn.project_out.weight'].shape[:2]
        return last(filled(H.HistogramBlock(dim, len(weights['attn_g.temperature']), hidden / dim * (1 + 1e-9), bias, center), H.from_official(weights))(x))
    if 'temperature' in weights: return last(filled(H.HistogramAttention(weights['qkv.weight'].shape[1], len(weights['temperature']), bias), bare(''))(x))
    if 'dwconv_5.weight' in weights:
        dim, hidden = weights['project_out.weight'].shape[:2]
        return last(filled(H.DualScaleMlp(dim, hidden / dim * (1 + 1e-9), bias), {k.removeprefix('mlp.'): v for k, v in H.from_official({f'ffn.{k}': v for k, v in weights.items()}).items()})(x))
    if 'proj.1.weight' in weights: return last(filled(H.Thumbnail(x.shape[1]), {{'1': 'mix', '2': 'dwconv'}[k[5]] + k[6:]: v for k, v in weights.items()})(x))
    if 'body.0.weight' in weights: return last(filled(H.Resample(x.shape[1], weights['body.0.weight'].shape[0] < x.shape[1]), {k.replace('body.0', 'conv'): v for k, v in weights.items()})(x))
    if 'proj.weight' in weights: return last(torch.nn.functional.conv2d(x, weights['proj.weight'], weights.get('proj.bias'), padding=1))
    if not weights and len(inputs) == 2:
        rho = H.pearson(*inputs.values())
        return dict.fromkeys(('corr', 'rho'), rho[:, None]) | dict.fromkeys(('loss', 'l_pear', 'pearson', 'y', 'out'), H.restoration_loss(*inputs.values()) - H.restoration_loss(*inputs.values(), 0))
    return last(H.PixelNorm(center)(x))


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
def test_histoformer_is_exact_arithmetic_but_for_six_pairs():
    "In float64 as well, on every machine; without the six turned round the output is another."
    from vitbook.restoration import histoformer as H
    sheet = SHEETS['histoformer__tiny']
    model, x = H.Histoformer.from_official(sheet.weights()).eval(), sheet.inputs()['x']
    orders, y = histoformer_orders(model, x)
    assert (len(orders), sum(o.numel() for o in orders)) == (24, 162_816)
    sheet.check(dict(y=y), 1e-5)
    exact = histoformer_orders(model, x, {})[1]
    with pytest.raises(AssertionError, match='histoformer__tiny is off'): sheet.check(dict(y=exact))


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
