"""The official FiT, of both versions,, built from a sheet with our parts."""
import torch


def fitv2(config, weights, inputs):
    "A whole FiT, or one of its parts, told apart by the names of the weights and of the configuration."
    from vitbook.generation import fitv2 as V
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
        out = {} if 'x' not in inputs else dict(y=V.apply_rope(inputs['x'], cos[:, None], sin[:, None]))
        return out | dict(freqs_cos=cos, freqs_sin=sin, freqs_h=rows, freqs_w=columns)
    if 'x_embedder.proj.weight' not in weights:
        names = {k.replace('fc1_g', 'gate').replace('fc1_x', 'value'): v for k, v in weights.items()}
        gated = any(k.endswith('gate.weight') for k in names)
        names = {k.replace('fc2', 'out') if gated and 'fc2' in k and k.replace('fc2', 'gate') in names else k: v for k, v in names.items()}
        if 'embedding_table.weight' in names: return filled(V.LabelEmbed(c['num_classes'], c['hidden_size'], config.get('dropout_prob', c['class_dropout_prob'])), names)(next(iter(inputs.values())))
        if 'mlp.2.weight' in names: return filled(V.TimeEmbed(len(names['mlp.2.bias']), names['mlp.0.weight'].shape[1] // 2), names)(next(iter(inputs.values())))
        x, cos, sin, mask = (inputs.get(k) for k in ('x', 'freqs_cos', 'freqs_sin', 'mask'))
        rope = None if cos is None or not rotates else tuple(z if z.dim() == 4 else z[:, None] for z in (cos, sin))
        pairs, valid = (None, None) if mask is None else (mask[:, None, :, None] == mask[:, None, None, :], (mask != 0)[..., None])
        heads = c['num_heads'] if 'num_heads' in config or 'hidden_size' in config else 8
        if 'qkv.weight' in names: return filled(V.FlexAttention(x.shape[-1], heads, 'qkv.bias' in names, weighted(c['q_norm']), weighted(c['k_norm']), c['add_rel_pe_to_v']), names)(x, rope, pairs, valid)
        if 'linear.weight' in names: return filled(V.FinalLayer(x.shape[-1], len(names['linear.bias']), c['norm_type'], adaln, c['adaln_bias']), names)(x, inputs['c'])
        mlp = 'gelu' if not config.get('use_swiglu', config.get('swiglu', True)) else 'swiglu_large' if config.get('use_swiglu_large', config.get('swiglu_large', False)) else 'swiglu'
        block = V.FiTBlock(x.shape[-1], heads, c['mlp_ratio'], mlp, config.get('norm_layer', c['norm_type']), weighted(c['q_norm']), weighted(c['k_norm']), c['qkv_bias'], c['ffn_bias'], adaln, c['adaln_lora_dim'], c['adaln_bias'], c['add_rel_pe_to_v'])
        return filled(block, names)(x, inputs['c'], inputs.get('global_adaln'), rope, pairs, valid)
    model = V.FiT(c['patch_size'], c['in_channels'], c['num_classes'], c['hidden_size'], c['depth'], c['num_heads'], c['mlp_ratio'], mlp=mlp, norm=c['norm_type'], q_norm=weighted(c['q_norm']),
                  k_norm=weighted(c['k_norm']), qkv_bias=c['qkv_bias'], mlp_bias=c['ffn_bias'], adaln=adaln, adaln_rank=c['adaln_lora_dim'], adaln_bias=c['adaln_bias'], rope=rotates, rope_theta=c['rope_theta'],
                  rope_scaling=scaling, train_len=c['ori_max_pe_len'] or 16, rope_len=length, decouple=c['decouple'], rotate_values=c['add_rel_pe_to_v'], class_dropout=c['class_dropout_prob'],
                  flow=c['use_sit'], learn_sigma=c['learn_sigma'], time_shift=c['time_shifting'], official=True).from_official(weights).eval()
    flat = (lambda z: z) if c['use_sit'] else (lambda z: z.transpose(1, 2))                           # the noise models have tokens last
    x, t, y, grid, mask, size = (inputs.get(k) for k in ('x', 't', 'y', 'grid', 'mask', 'size'))
    scale = {**config, **inputs}.get('cfg_scale')
    if scale is None: return flat(model(flat(x), t, y, grid, mask, size))
    half, power, p = len(x) // 2, float({**config, **inputs}.get('scale_pow', 0.)), 3 * c['patch_size'] ** 2
    out = model(flat(torch.cat([x[:half]] * 2)), t, y, grid, mask, size)                              # the official call gets the classes and "any" in one batch, and returns both halves
    guided = V.guide(out[:half], out[half:], V.falling_scale(t[:half], float(scale), power), min(p, out.shape[-1]))
    return flat(torch.cat([torch.cat([guided[..., :p]] * 2), out[..., p:]], -1))
