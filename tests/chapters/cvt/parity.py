"""The official CvT, built from a sheet with our parts."""


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
