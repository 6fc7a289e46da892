"""The official Histoformer, built from a sheet with our parts."""
import torch


def histoformer(config, weights, inputs):
    """A whole Histoformer, one of its parts, told apart by the names of the weights, or the loss, which has none.

    On two threads, like the sheets: a sort turns a difference in the last bit into another order, and on one thread the official code itself is a tenth of the rms away from its sheet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try: return histoformer_parts(config, weights, inputs)
    finally: torch.set_num_threads(threads)


def histoformer_parts(config, weights, inputs):
    from vitbook.restoration import histoformer as H
    x, bias = next(iter(inputs.values())), any(k.endswith('.bias') for k in weights)
    last = lambda y: dict.fromkeys(('y', 'out', 'output', 'x', 'restored'), y)
    center = config.get('LayerNorm_type', 'WithBias') != 'BiasFree'
    filled = lambda module, names: (H.load_weights(module, names), module.eval())[1]
    bare = lambda start: {k.removeprefix(start): v for k, v in H.from_official({start + k: v for k, v in weights.items()}).items()}
    if 'output.weight' in weights: return last(H.Histoformer.from_official(weights, center=center).eval()(x))
    if 'attn_g.temperature' in weights:
        dim, hidden = weights['ffn.project_out.weight'].shape[:2]
        return last(filled(H.HistogramBlock(dim, len(weights['attn_g.temperature']), hidden / dim * (1 + 1e-9), bias, center), H.from_official(weights))(x))
    if 'temperature' in weights: return last(filled(H.HistogramAttention(weights['qkv.weight'].shape[1], len(weights['temperature']), bias), bare(''))(x))
    if 'dwconv_5.weight' in weights:
        dim, hidden = weights['project_out.weight'].shape[:2]
        return last(filled(H.DualScaleMlp(dim, hidden / dim * (1 + 1e-9), bias), {k.removeprefix('mlp.'): v for k, v in H.from_official({f'ffn.{k}': v for k, v in weights.items()}).items()})(x))
    if 'proj.1.weight' in weights: return last(filled(H.Thumbnail(x.shape[1]), {{'1': 'mix', '2': 'dwconv'}[k[5]] + k[6:]: v for k, v in weights.items()})(x))
    if 'body.0.weight' in weights: return last(filled(H.Resample(x.shape[1], weights['body.0.weight'].shape[0] < x.shape[1]), {k.replace('body.0', 'conv'): v for k, v in weights.items()})(x))
    if 'proj.weight' in weights: return last(torch.nn.functional.conv2d(x, weights['proj.weight'], weights.get('proj.bias'), padding=1))
    if not weights and len(inputs) == 2:
        rho = H.pearson(*inputs.values())
        return dict.fromkeys(('corr', 'rho'), rho[:, None]) | dict.fromkeys(('loss', 'l_pear', 'pearson', 'y', 'out'), H.restoration_loss(*inputs.values()) - H.restoration_loss(*inputs.values(), 0))
    return last(H.PixelNorm(center)(x))
