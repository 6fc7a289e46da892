"""The official iTransformer and its family, built from a sheet with our parts."""
import torch

PARTS = dict(Model='model', DataEmbedding_inverted='embed', EncoderLayer='layer', AttentionLayer='attention', FullAttention='bare',
             FlashAttention='bare', FlowAttention='bare', ProbAttention='bare')             # official class -> part


def part_of(weights):
    "The part by the names of its weights, where the sheet does not say its class."
    known = {'projector.weight': 'model', 'value_embedding.weight': 'embed', 'conv1.weight': 'layer'}
    return next((part for name, part in known.items() if name in weights), 'attention' if weights else 'bare')


def itransformer(config, weights, inputs, module=''):
    "A whole model of the family, or one of its parts; which attention it has is said by its class or the configuration's words."
    from torch import nn
    from vitbook.probe import recording
    from vitbook.sequences import itransformer as T
    words = ' '.join(str(v) for k, v in (config | dict(module=module)).items() if k in ('model', 'name', 'variant', 'attention', 'attn', 'module', 'class', 'inner_attention')).lower()
    kind = next((ours for theirs, ours in (('inform', 'prob'), ('prob', 'prob'), ('flow', 'flow'), ('flash', 'flash'), ('reform', 'lsh'), ('lsh', 'lsh')) if theirs in words), 'full')
    heads, seed = config.get('n_heads', config.get('heads', 8)), next((config[k] for k in ('seed', 'manual_seed', 'torch_seed') if k in config), None)
    act = nn.ReLU if config.get('activation', 'gelu' if 'e_layers' in config else 'relu') == 'relu' else nn.GELU     # the layer by itself is born with relu, the model with gelu
    part = PARTS.get(module) or part_of(weights)
    x, mark = next(iter(inputs.values())), next((v for k, v in inputs.items() if 'mark' in k), None)
    def again(f, *given):                                               # each output starts from the same random numbers, if a sheet names its seed
        if seed is not None: torch.manual_seed(seed)
        return f(*given)
    if part == 'model':
        model = T.ITransformer.from_official(weights, heads, attn='lsh' if any('toqk' in k for k in weights) else kind, act_layer=act, use_norm=bool(config.get('use_norm', True)),
                                             factor=config.get('factor', 1), official=True, eval_seed=None).eval()
        outputs = dict(y=again(model, x, mark), y_without_marks=again(model, x, None))
        if model.attn in ('full', 'flash'): outputs |= {f'attention{i}': w for i, w in enumerate(model.attention_maps(x, mark))}
        return outputs
    if part == 'embed':
        dim, steps = weights['value_embedding.weight'].shape
        embed = T.VariateEmbedding(steps, dim)
        embed.load_state_dict({k.replace('value_embedding', 'proj'): v for k, v in weights.items()})
        return embed(x, mark)
    if part == 'bare':                                                  # (b l h e) queries, keys, values
        q, k, v = (t.transpose(1, 2) for t in list(inputs.values())[:3])
        if kind != 'prob': return again(T.flow_attention if kind == 'flow' else T.attention, q, k, v).transpose(1, 2)
        y = again(lambda: T.prob_attention(q, k, v, config.get('factor', 5), official=True))
        return y.transpose(1, 2).reshape(*q.shape[:3], -1)              # theirs comes as b h l e
    if part == 'layer':
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
    layer.load_state_dict({k.removeprefix('blocks.0.').removeprefix('' if part == 'layer' else 'attn.'): v for k, v in names.items()})
    with recording(layer) as seen: y = again(layer, x)
    return dict(y=y) | {'attention': w for w in seen.weights[:1]}
