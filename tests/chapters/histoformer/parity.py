"""The official Histoformer, built from a sheet with our parts."""
import copy

import torch

# Six pairs of neighbours in the sorted rows of histoformer__tiny that rounding turned round in the official
# run, closer than 1.4e-6 of their row's range: which of its 24 sorts -> (picture, channel, row, place).
HISTOFORMER_TURNED = {2: [(0, 0, 844)], 19: [(0, 9, 22, 25)], 20: [(0, 1, 864), (0, 3, 636)],
                      23: [(0, 13, 167), (0, 20, 402)]}


def histoformer_orders(model, x, turned=HISTOFORMER_TURNED):
    """The orders of exact arithmetic but for the pairs `turned`, and the output they give.

    In float64, where no two values are close enough for a machine to matter."""
    from vitbook.restoration import histoformer as H

    def turn(which, order):
        order = order.clone()
        for *row, place in turned.get(which, ()):
            pair = *row, slice(place, place + 2)
            order[pair] = order[pair].flip(-1)
        return order

    with H.SortOrders(turn) as kept: y = copy.deepcopy(model).double()(x.double())
    return kept.orders, y


def one_for_all(y): return dict.fromkeys(('y', 'out', 'output', 'x', 'restored'), y)


def centred(config): return config.get('LayerNorm_type', 'WithBias') != 'BiasFree'


def whole(config, weights):
    from vitbook.restoration import histoformer as H
    return H.Histoformer.from_official(weights, center=centred(config))


def histoformer__tiny(config, weights, inputs):
    """The one sheet whose turned pairs are known: its sorts get their order handed in.

    A sort turns a last bit into another order, so that even the official code, on one thread, is a tenth of
    the rms away from this sheet. Any other sheet of a whole model is compared plainly, by `histoformer`."""
    from vitbook.restoration import histoformer as H
    model, x = whole(config, weights), inputs['x']
    orders, _ = histoformer_orders(model, x)
    with H.SortOrders(lambda which, own: orders[which]): return one_for_all(model(x))


def histoformer(config, weights, inputs):
    "A whole Histoformer, a part, told apart by the names of the weights, or the loss, which has none."
    from vitbook.restoration import histoformer as H
    x, bias = next(iter(inputs.values())), any(k.endswith('.bias') for k in weights)
    center = centred(config)

    def ours(start=''):
        named = H.official_names({start + k: v for k, v in weights.items()})
        return {k.removeprefix(start and 'mlp.'): v for k, v in named.items()}

    def answer(module, names):
        H.load_weights(module, names)
        return one_for_all(module.eval()(x))

    if 'output.weight' in weights: return one_for_all(whole(config, weights)(x))
    if 'attn_g.temperature' in weights:
        dim, hidden = weights['ffn.project_out.weight'].shape[:2]
        ratio = hidden / dim * (1 + 1e-9)
        return answer(H.HistogramBlock(dim, len(weights['attn_g.temperature']), ratio, bias, center), ours())
    if 'temperature' in weights:
        dim, heads = weights['qkv.weight'].shape[1], len(weights['temperature'])
        return answer(H.HistogramAttention(dim, heads, bias), ours())
    if 'dwconv_5.weight' in weights:
        dim, hidden = weights['project_out.weight'].shape[:2]
        return answer(H.DualScaleMlp(dim, hidden / dim * (1 + 1e-9), bias), ours('ffn.'))
    if 'proj.1.weight' in weights:
        names = {'1': 'mix', '2': 'dwconv'}
        return answer(H.Thumbnail(x.shape[1]), {names[k[5]] + k[6:]: v for k, v in weights.items()})
    if 'body.0.weight' in weights:
        down = weights['body.0.weight'].shape[0] < x.shape[1]
        names = {k.replace('body.0', 'conv'): v for k, v in weights.items()}
        return answer(H.Resample(x.shape[1], down), names)
    if 'proj.weight' in weights:
        kernel, shift = weights['proj.weight'], weights.get('proj.bias')
        return one_for_all(torch.nn.functional.conv2d(x, kernel, shift, padding=1))
    if not weights and len(inputs) == 2:
        pair = inputs.values()
        apart = H.restoration_loss(*pair) - H.restoration_loss(*pair, 0)
        rho = dict.fromkeys(('corr', 'rho'), H.pearson(*pair)[:, None])
        return rho | dict.fromkeys(('loss', 'l_pear', 'pearson', 'y', 'out'), apart)
    return one_for_all(H.PixelNorm(center)(x))
