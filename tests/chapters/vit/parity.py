"""The official Vision Transformer of timm, built from a sheet with our parts."""


def vit(config, weights, inputs):
    from vitbook.vit import VisionTransformer
    model = VisionTransformer(**config).eval()
    model.load_state_dict(weights)                                      # timm's names are ours: nothing to map, nothing may be left over
    return dict(logits=model(inputs['x']), features=model.forward_features(inputs['x']))
