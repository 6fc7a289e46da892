"""The official DSVT, built from a sheet with our parts."""
import re

import torch

PARTS = dict(DSVT='model', DSVTInputLayer='partition', PositionEmbeddingLearned='position', DSVTBlock='layers', DSVT_EncoderLayer='layers',
             SetAttention='attention', Stage_ReductionAtt_Block='pooling', Stage_Reduction_Block='linear pooling', DynamicPillarVFE='vfe',
             DynamicPillarVFE3D='vfe', CenterHead='head', BaseBEVResBackbone='bev', PointPillarScatter3d='scatter')  # official class -> part
NAMES = {'model': r'^stage_0\.', 'partition': 'posembed_layers', 'position': 'position_embedding_head', 'layers': r'^encoder_list\.|win_attn',
         'attention': '^self_attn', 'pooling': 'pos_embedding$', 'linear pooling': r'^linear1\.weight$', 'vfe': r'^pfn_layers\.',
         'head': r'^shared_conv\.', 'bev': r'^blocks\.'}                                    # part -> a name among its weights


def part_of(weights):
    "The part by the names of its weights, where the sheet does not say its class."
    return next((part for part, name in NAMES.items() if any(re.search(name, k) for k in weights)), 'scatter')


def dsvt(config, weights, inputs, module=''):
    "A whole DSVT, its input layer, or one of its parts."
    from vitbook.detection import dsvt as D
    from vitbook.layers.voxels import DynamicVFE, grid_size, to_bev
    filled = lambda module, names: (D.load_weights(module, {k: torch.tensor(0) if v is None else v for k, v in names.items()}), module.eval())[1]
    has = lambda *parts: any(re.search(part, name) for part in parts for name in weights)
    part = PARTS.get(module) or part_of(weights)
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

    if part == 'model':
        model = filled(model_of(config, config['INPUT_LAYER']), batches(D.official_names(weights)))
        y, out = model(x, coords)
        return dict(features=y, coords=out)
    if part == 'partition':
        layer = config.get('INPUT_LAYER', config)
        model = model_of({}, layer)
        filled(model, model.state_dict() | batches(D.official_names(weights)))
        found = {}
        for s, stage in enumerate(model.partition(coords)):
            for c, (windows, sets, window) in enumerate(stage.configs):
                found |= {f'set_inds_stage{s}_config{c}': sets.inds, f'set_mask_stage{s}_config{c}': sets.mask.int(),
                          f'coords_in_win_stage{s}_config{c}': windows.place}
                positions = [block.pos[c](windows.place, window) for block in model.stages[s]]
                found |= {f'pos_stage{s}_config{c}': positions[0]} | {f'pos_stage{s}_block{b}_config{c}': p for b, p in enumerate(positions)}
            if stage.pooled is not None:
                found |= {f'pooling_mapping_index_stage{s + 1}': stage.pooled.parent, f'pooling_index_in_pool_stage{s + 1}': stage.pooled.child,
                          f'coords_stage{s + 1}': stage.pooled.coords}
        return found | dict(coords_stage0=coords)
    if part == 'position':
        width, inner = weights['position_embedding_head.0.weight'].shape
        mlp = filled(D.PositionMlp(width, inner == 2), {k.replace('position_embedding_head', 'net'): v for k, v in batches(weights).items()})
        return mlp.net(x)
    if part == 'layers':
        names = D.official_names(weights)
        first = next(k for k in names if k.endswith('attn.proj.weight'))
        c, hidden = len(names[first]), len(next(v for k, v in names.items() if k.endswith('mlp.fc1.bias')))
        given = lambda *keys: next((inputs[k] for k in keys if k in inputs), None)
        inds, mask, pos = given('inds', 'set_voxel_inds', 'voxel_inds'), given('mask', 'set_voxel_masks', 'key_padding_mask'), given('pos', 'pos_embed')
        mask = None if mask is None else mask.bool()
        if not has(r'^encoder_list\.'):
            layer = filled(D.SetLayer(c, heads, hidden, act, drop), names)
            return dict(y=layer(x, pos, inds, mask), set_attention=layer.inner(x, pos, inds, mask))
        layers = [filled(D.SetLayer(c, heads, hidden, act, drop), {k.removeprefix(f'layers.{i}.'): v for k, v in names.items() if k.startswith(f'layers.{i}.')}) for i in range(2)]
        number, y = config.get('block_id', int(inputs.get('block_id', 0))), x
        for i, layer in enumerate(layers):
            tables = [next(v for k, v in inputs.items() if re.search(rf'{what}.*{number % 2}$', k)) for what in ('inds', 'mask')] if inds is None else (inds[number % 2], mask[number % 2])
            y = layer(y, inputs[f'pos{i}'] if f'pos{i}' in inputs else inputs[f'pos_{i}'] if f'pos_{i}' in inputs else pos[i], tables[0][i], tables[1][i].bool())
        return y
    if part == 'attention':
        names = D.official_names({f'win_attn.{k}': v for k, v in weights.items()})
        layer = D.SetLayer(len(weights['linear2.bias']), heads, len(weights['linear1.bias']), act, drop)
        filled(layer, names | {f'norm.{k}': v for k, v in layer.norm.state_dict().items()})
        given = lambda *keys: next((inputs[k] for k in keys if k in inputs), None)
        mask = given('mask', 'key_padding_mask')
        return layer.inner(x, given('pos'), given('inds', 'voxel_inds'), None if mask is None else mask.bool())
    if part == 'pooling':
        volume, c = weights['pos_embedding'].shape
        pool = filled(D.AttentionPooling(c, volume), {k.removeprefix('pools.0.'): v for k, v in D.official_names({f'stage_0_reduction.{k}': v for k, v in weights.items()}).items()})
        return pool(x.transpose(1, 2))                                       # the official order is voxel, channel, cell
    if part == 'linear pooling':
        out, wide = weights['linear1.weight'].shape
        pool = filled(D.LinearPooling(wide, 1, out), {k.replace('linear1', 'linear'): v for k, v in weights.items()})
        return pool(x.flatten(1)[:, None])
    if part == 'vfe':
        sizes, span = get('voxel_size'), get('point_cloud_range')
        name = str(get('name', default='')).lower()
        points = next(v for v in inputs.values() if v.dim() == 2)
        vfe = DynamicVFE(sizes, span, points.shape[1] - 1, get('num_filters'), norm=get('use_norm', default=True), absolute=get('use_abslote_xyz', 'use_absolute_xyz', default=True),
                         distance=get('with_distance', default=False), ignore_z='3d' not in name if name else grid_size(sizes, span)[2] == 1)
        filled(vfe, {k.replace('pfn_layers', 'layers'): v for k, v in batches(weights).items()})
        y, found = vfe(points)
        return dict(features=y, coords=found)
    if part == 'head':
        outputs = {k.split('.')[2]: len(v) for k, v in weights.items() if re.fullmatch(r'heads_list\.0\.\w+\.\d+\.bias', k)}
        convs = 1 + max(int(m[1]) for k in weights if (m := re.fullmatch(r'heads_list\.0\.hm\.(\d+)\.bias', k)))
        width, wide = weights['shared_conv.0.weight'].shape[:2]
        head = D.CenterHead(wide, outputs.pop('hm'), width, outputs, convs, bias='shared_conv.0.bias' in weights, eps=get('bn_eps', default=1e-5), momentum=get('bn_mom', default=.1))
        return filled(head, {k.replace('heads_list.0', 'outputs'): v for k, v in batches(weights).items()})(x)
    if part == 'bev':
        bev = D.BEVBackbone(weights['blocks.0.0.conv1.weight'].shape[1], get('layer_nums'), get('layer_strides'), get('num_filters'), get('upsample_strides', default=()), get('num_upsample_filters', default=()))
        return filled(bev, batches(weights))(x)
    if not weights and coords is not None: return to_bev(x, coords, get('input_shape', 'grid_size', 'grid'))
    raise ValueError(f'no part of DSVT has the weights {list(weights)}')
