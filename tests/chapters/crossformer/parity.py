"""The official CrossFormer, built from a sheet with our parts."""


def crossformer(config, weights, inputs):
    from vitbook.backbones.crossformer import CrossFormer
    renamed = {'patch_size': 'patch_kernels', 'merge_size': 'merge_kernels'}
    given = {renamed.get(k, k): v for k, v in config.items() if k not in ('use_checkpoint', 'norm_layer', 'init_cfg')}
    if 'patch_kernels' in given: given['patch_size'] = given['patch_kernels'][0]     # the official stride
    dense = 'norm.weight' not in weights                                             # the dense-prediction backbone, which has no head and ignores two arguments
    if dense: given = {k: v for k, v in given.items() if k not in ('pad_type', 'no_mask', 'num_classes')}
    model = CrossFormer.from_official(weights, **given)                              # what the configuration leaves out, the weights tell
    maps = model.feature_maps(inputs['x'])
    outputs = {f'stage{i}': m for i, m in enumerate(maps)}
    if dense: return outputs
    features = model.forward_head(model.forward_features(inputs['x']), pre_logits=True)
    return dict(logits=model(inputs['x']), features=features) | outputs
