"""The official Qwen2.5-VL of transformers, built from a sheet with our parts."""
import torch

PARTS = {'Qwen2_5_VLModel.get_rope_index': 'ids', 'Qwen2_5_VisionTransformerPretrainedModel': 'tower',
         'Qwen2_5_VLTextModel': 'decoder', 'Qwen2_5_VLForConditionalGeneration': 'model'}        # official name -> part


def part_of(weights):
    "The part by the names of its weights, where the sheet does not say its class."
    if not weights: return 'ids'
    if not any('patch_embed.proj' in k for k in weights): return 'decoder'
    return 'model' if any('embed_tokens' in k for k in weights) else 'tower'


def qwen25_vl(config, weights, inputs, module=''):
    "The vision tower, the language model, the ids of positions or the whole model."
    from vitbook.multimodal import qwen25_vl as Q
    grids = lambda name: inputs[name].tolist() if name in inputs else ()
    numbers = lambda name: inputs[name].flatten().tolist() if name in inputs else None
    mask = inputs['attention_mask'].bool() if 'attention_mask' in inputs else None
    tokens = next((inputs[k] for k in ('ids', 'input_ids', 'tokens') if k in inputs), None)
    part = PARTS.get(module) or part_of(weights)
    if part == 'ids':                                                    # several sets of seconds may share a sheet
        flat = config | config.get('vision_config', {})
        names = dict(image_token_id='image_token', video_token_id='video_token', spatial_merge_size='merge_size', tokens_per_second='tokens_per_second')
        given, outputs = dict(tokens_per_second=4) | {ours: flat[theirs] for theirs, ours in names.items() if theirs in flat}, {}
        for end, seconds in {k.removeprefix('seconds') if k.startswith('seconds') else '': k for k in inputs if k.startswith(('seconds', 'second_per_grid'))}.items() or [('', '')]:
            ids, after = Q.mrope_ids(tokens, grids('image_grid_thw'), grids('video_grid_thw'), numbers(seconds), mask=mask, whole_seconds=True, **given)
            outputs |= {f'position_ids{end}': ids.float(), f'delta{end}': (after - tokens.shape[1]).float()[:, None]}
        return outputs
    if part == 'tower':
        model = Q.from_official(weights, config)
        sizes, patches = next(inputs[k] for k in inputs if 'grid' in k), next(inputs[k] for k in inputs if 'grid' not in k)
        states, at = model.forward_blocks(patches, sizes), model.layout(sizes)
        angles = Q.axial_angles(Q.patch_positions(Q.check_grids(sizes, model.merge_size), model.merge_size), model.head_dim)
        outputs = dict(features=model(patches, sizes), last_hidden=states[-1], angles=angles)
        outputs |= dict(window_index=at.order.float(), cu_window_seqlens=torch.tensor(at.windows).float(), cu_seqlens=torch.tensor(at.frames).float())
        return outputs | {f'block{i}': x for i, x in enumerate(states[1:])}
    changes = dict(padded_queries='mean')                                # what the sheets' eager attention gives to padding
    if part == 'model':
        model = Q.from_official(weights, config, whole_seconds=True, **changes)
        return model(tokens, inputs.get('pixel_values'), grids('image_grid_thw'), inputs.get('pixel_values_videos'), grids('video_grid_thw'),
                     numbers('second_per_grid_ts'), mask)
    head = weights.get('lm_head.weight')
    model = Q.from_official({k: v for k, v in weights.items() if k != 'lm_head.weight'}, config, **changes)
    x = next((inputs[k] for k in ('embeds', 'inputs_embeds') if k in inputs), None)
    ids = inputs.get('position_ids')
    states = model.forward_blocks(model.embed(tokens) if x is None else x, ids if ids is None or ids.dim() == 3 else ids.expand(3, *ids.shape), None if mask is None or mask.all() else mask)
    last = model.norm(states[-1])
    outputs = dict(last_hidden=last) if head is None else dict(logits=last @ head.T, last_hidden=last)
    return outputs | {f'layer{i}': s for i, s in enumerate(states)} | {f'block{i}': s for i, s in enumerate(states[1:])}
