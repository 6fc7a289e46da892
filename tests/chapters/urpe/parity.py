"""The official URPE, built from a sheet with our parts."""


def urpe(config, weights, inputs, module=''):
    from vitbook.dynamics.urpe import URPEAttention, URPEncoder, join_qkv
    if module == 'TransformerSentenceEncoder' or 'vocab_size' in config:
        given = (inputs.get(k) for k in ('tokens', 'segment_labels', 'positions', 'token_embeddings'))
        states = URPEncoder.from_official(weights, config)(*given, return_states=True)
        named = {f'layer{i}': x for i, x in enumerate(states[1:])}
        return dict(last=states[-1], sentence_rep=states[-1][:, 0], embedded=states[0]) | named
    bias = config.get('bias', True)
    model = URPEAttention(config['embed_dim'], config['num_heads'], qkv_bias=bias, proj_bias=bias).eval()
    model.load_state_dict(join_qkv(weights))
    hidden, added = inputs.get('key_padding_mask'), [inputs[k] for k in ('bias', 'attn_mask') if k in inputs]
    mask = None if hidden is None else ~hidden.bool()[:, None, None]
    return model(inputs['x'], bias=sum(added) if added else None, factor=inputs.get('multiplier'), mask=mask)
