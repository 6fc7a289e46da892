"""mixers.hornet: what the card says must hold, a reference on official names over many configurations, and what it answers to bad input."""
import copy, math, pickle, re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook import measure
from vitbook.weights import load_checkpoint
from vitbook.layers.norm import LayerNorm2d
from vitbook.mixers import hornet as H
from vitbook.registry import create_model, list_models
from vitbook.vit import VisionTransformer

SMALL = dict(embed_dim=16, depths=(1, 1, 2, 1), num_classes=5)


def noisy(module, size=.3, seed=0):
    "Every parameter moved off its start, so that zero biases and tiny gammas hide nothing."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn(p.shape, generator=g).to(p) * size)
    return module


def unbiased(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith('bias'): p.zero_()
    return module


def to_official(state):
    "Our names -> the official code's, linear maps of gated convolutions -> 1x1 kernels."
    found = {}
    for name, v in state.items():
        if re.search(r'(proj_in|proj_out|pws\.\d+)\.weight$', name): v = v[:, :, None, None]
        name = re.sub(r'^stem\.conv', 'downsample_layers.0.0', re.sub(r'^stem\.norm', 'downsample_layers.0.1', name))
        name = re.sub(r'^downs\.(\d+)\.(norm|conv)', lambda m: f'downsample_layers.{int(m[1]) + 1}.{dict(norm=0, conv=1)[m[2]]}', name)
        name = re.sub(r'^out_norms\.(\d)', r'norm\1', re.sub(r'\.mlp\.fc([12])', r'.pwconv\1', re.sub(r'\.ls([12])\.gamma', r'.gamma\1', name)))
        found[name] = v
    return found


# a reference on official names: channels first, one projection and one convolution a gate, norms by hand

def norm(x, w, at):
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
    return x * w[at + 'weight'][:, None, None] + w[at + 'bias'][:, None, None]


def gnconv(x, w, at, order, scale):
    C = w[at + 'proj_in.weight'].shape[0] // 2
    widths = [C // 2 ** (order - 1 - k) for k in range(order)]
    fused = F.conv2d(x, w[at + 'proj_in.weight'], w[at + 'proj_in.bias'])
    p, q = fused[:, :widths[0]], fused[:, widths[0]:]
    if at + 'dwconv.weight' in w: g = F.conv2d(q, w[at + 'dwconv.weight'], w[at + 'dwconv.bias'], padding=w[at + 'dwconv.weight'].shape[-1] // 2, groups=q.shape[1])
    else:
        u = norm(q, w, at + 'dwconv.pre_norm.')
        y, z, half = *u.shape[2:], u.shape[1] // 2
        W = w[at + 'dwconv.complex_weight']
        if W.shape[1:3] != (y, z // 2 + 1): W = F.interpolate(W.permute(3, 0, 1, 2), (y, z // 2 + 1), mode='bilinear', align_corners=True).permute(1, 2, 3, 0)
        far = torch.fft.irfft2(torch.fft.rfft2(u[:, half:]) * torch.complex(W[..., 0], W[..., 1]), s=(y, z))
        near = F.conv2d(u[:, :half], w[at + 'dwconv.dw.weight'], padding=1, groups=half)
        g = torch.empty_like(u)
        g[:, ::2], g[:, 1::2] = near, far
        g = norm(g, w, at + 'dwconv.post_norm.')
    parts = (g * scale).split(widths, 1)
    p = p * parts[0]
    for k in range(order - 1): p = F.conv2d(p, w[f'{at}pws.{k}.weight'], w[f'{at}pws.{k}.bias']) * parts[k + 1]
    return F.conv2d(p, w[at + 'proj_out.weight'], w[at + 'proj_out.bias'])


def reference(x, w, depths, orders, scales):
    maps = []
    for i, depth in enumerate(depths):
        at = f'downsample_layers.{i}.'
        x = norm(F.conv2d(x, w[at + '0.weight'], w[at + '0.bias'], stride=4), w, at + '1.') if i == 0 else F.conv2d(norm(x, w, at + '0.'), w[at + '1.weight'], w[at + '1.bias'], stride=2)
        for j in range(depth):
            at = f'stages.{i}.{j}.'
            gamma = [w[f'{at}gamma{n}'][:, None, None] if f'{at}gamma{n}' in w else 1. for n in (1, 2)]
            x = x + gamma[0] * gnconv(norm(x, w, at + 'norm1.'), w, at + 'gnconv.', orders[i], scales[i])
            h = F.gelu(F.linear(norm(x, w, at + 'norm2.').permute(0, 2, 3, 1), w[at + 'pwconv1.weight'], w[at + 'pwconv1.bias']))
            x = x + gamma[1] * F.linear(h, w[at + 'pwconv2.weight'], w[at + 'pwconv2.bias']).permute(0, 3, 1, 2)
        maps.append(norm(x, w, f'norm{i}.') if f'norm{i}.weight' in w else x)
    if 'norm.weight' not in w: return maps, None
    pooled = F.layer_norm(x.mean((2, 3)), (x.shape[1],), w['norm.weight'], w['norm.bias'], 1e-6)
    return maps, F.linear(pooled, w['head.weight'], w['head.bias'])


CASES = {
    'plain': (dict(), (64, 64)),
    'rectangular and odd': (dict(depths=(1, 2, 1, 1)), (75, 101)),
    'global filters of the stored size': (dict(global_filter=(None, None, (4, 3), (2, 2))), (64, 64)),
    'global filters, interpolated up': (dict(global_filter=(None, None, (14, 8), (7, 4)), embed_dim=32), (33 * 16, 256)),
    'global filters, interpolated down to one pixel': (dict(global_filter=(None, (9, 5), (24, 13), (12, 7))), (45, 63)),
    'global filters everywhere': (dict(global_filter=((5, 9), (3, 3), (24, 13), (12, 7)), orders=(1, 2, 3, 4)), (96, 77)),
    'one order, no scale, grey, no layer scale': (dict(orders=5, scale=1., in_chans=1, layer_scale_init_value=0.), (64, 40)),
    'a scale, an order and a kernel a stage': (dict(orders=(1, 4, 2, 3), scale=(.5, 1., 2., .1), kernel_size=(3, 5, 9, 1)), (64, 96)),
    'detection': (dict(out_norms=True, num_classes=0, global_filter=(None, None, None, (7, 4))), (96, 64)),
}


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_reference(case):
    arguments, size = CASES[case]
    arguments = SMALL | arguments
    model = noisy(H.HorNet(**arguments), .05).double().eval()
    x = torch.randn(2, model.in_chans, *size, dtype=torch.double)
    each = lambda v: list(v) if isinstance(v, tuple) else [v] * 4
    official = to_official(model.state_dict())
    maps, logits = reference(x, official, arguments['depths'], each(arguments.get('orders', (2, 3, 4, 5))), each(arguments.get('scale', 1 / 3)))
    for a, b in zip(model.feature_maps(x), maps, strict=True): assert_close(a, b, rtol=1e-9, atol=1e-9)
    if logits is not None: assert_close(model(x), logits, rtol=1e-9, atol=1e-9)
    again = H.HorNet.from_official({k: v.float() for k, v in official.items()}, scale=arguments.get('scale', 1 / 3))          # everything but the scale is told by the weights
    scale = maps[-1].square().mean().sqrt().item()
    for a, b in zip(again.feature_maps(x.float()), maps, strict=True): assert_close(a.double(), b, rtol=0, atol=1e-4 * max(scale, 1))
    assert not again.training and all(torch.equal(v, model.float().state_dict()[k]) for k, v in again.state_dict().items())


# the gated convolution

def test_widths():
    for order in range(1, 7):
        for factor in (1, 3):
            dim = factor * 2 ** (order - 1)
            g = H.GnConv(dim, order)
            assert g.widths == [dim // 2 ** (order - 1 - k) for k in range(order)] and g.widths[0] + sum(g.widths) == 2 * dim == g.proj_in.out_features
            assert len(g.pws) == order - 1 and [(m.in_features, m.out_features) for m in g.pws] == list(zip(g.widths, g.widths[1:]))


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('kernel_size', [3, 7])
@torch.no_grad()
def test_homogeneous_of_degree_order_plus_one(order, kernel_size):
    g = unbiased(noisy(H.GnConv(32, order, kernel_size, 1 / 3))).double()
    x = torch.randn(2, 6, 5, 32, dtype=torch.double)
    for t in (2., -1., .5): assert_close(g(t * x), t ** (order + 1) * g(x), rtol=1e-10, atol=1e-10 * g(x).abs().max().item())


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
@torch.no_grad()
def test_with_biases_a_polynomial_of_that_degree(order):
    g = noisy(H.GnConv(32, order, 3, 1 / 3)).double()
    v = torch.randn(1, 4, 4, 32, dtype=torch.double)
    values = [g(t * v) for t in range(order + 3)]
    difference = lambda n: sum((-1) ** (n - k) * math.comb(n, k) * values[k] for k in range(n + 1))
    size = max(y.abs().max() for y in values)
    assert difference(order + 2).abs().max() < 1e-10 * size and difference(order + 1).abs().max() > 1e-6 * size


@torch.no_grad()
def test_order_one_is_the_gated_convolution():
    g = noisy(H.GnConv(8, 1, scale=.7)).double()
    x = torch.randn(2, 9, 8, 8, dtype=torch.double)
    p, q = g.proj_in(x).chunk(2, -1)
    want = g.proj_out(p * .7 * F.conv2d(q.permute(0, 3, 1, 2), g.dwconv.weight, g.dwconv.bias, padding=3, groups=8).permute(0, 2, 3, 1))
    assert_close(g(x), want)


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
@torch.no_grad()
def test_scale_enters_once_a_gate(order):
    g = noisy(H.GnConv(16, order, scale=1 / 3)).double()
    for m in (*g.pws, g.proj_out): m.bias.zero_()
    x = torch.randn(1, 5, 5, 16, dtype=torch.double)
    y = g(x)
    g.dwconv.scale *= 3.
    assert g.dwconv.bias.abs().max() > .1                               # scaled too
    assert_close(g(x), 3. ** order * y)


@torch.no_grad()
def test_translation_equivariance():
    x, shift = torch.randn(1, 14, 15, 16, dtype=torch.double), (2, -3)
    zeros, circular = (noisy(H.GnConv(16, 4, padding_mode=m)).double() for m in ('zeros', 'circular'))
    roll = lambda t: t.roll(shift, (1, 2))
    assert_close(circular(roll(x)), roll(circular(x)))                  # all pixels
    a, b = zeros(roll(x)), roll(zeros(x))
    inside = (slice(None), slice(3 + 2, -3), slice(3, -3 - 3))          # 3 from the edge, before and after
    assert_close(a[inside], b[inside])
    assert (a - b)[:, :2].abs().max() > 1e-3


@pytest.mark.parametrize('order', [1, 3, 5])
def test_receptive_field_is_the_kernel_at_any_order(order):
    g = noisy(H.GnConv(16, order)).double()
    x = torch.randn(1, 15, 15, 16, dtype=torch.double, requires_grad=True)
    g(x)[0, 7, 7].sum().backward()
    reach = x.grad[0].abs().sum(-1) > 0
    assert reach[4:11, 4:11].all() and reach.sum() == 49


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 5, 7]), st.integers(1, 9), st.integers(1, 9))
def test_macs_formula_is_what_the_counter_sees(order, factor, K, h, w):
    C = factor * 2 ** (order - 1) * 2
    with torch.device('meta'): counted = measure.flops(H.GnConv(C, order, K), torch.empty(1, h, w, C)) / 2
    formula = 3 * C ** 2 + 2 / 3 * C ** 2 * (1 - 4. ** (1 - order)) + K ** 2 * C * (2 - 2. ** (1 - order))
    assert abs(counted - h * w * formula) < 1e-6 * counted
    assert h * w * (formula + C * (2 - 2. ** (1 - order))) < h * w * C * (2 * K ** 2 + 11 / 3 * C + 2)


@torch.no_grad()
def test_other_widths_in_and_out():
    x = torch.randn(2, 4, 5, 6)
    assert H.GnConv(8, 2, in_chans=6, out_chans=10)(x).shape == (2, 4, 5, 10) and H.GnConv(8, 3, in_chans=6, out_chans=0)(x).shape == (2, 4, 5, 8)
    g = noisy(H.GnConv(8, 2, in_chans=6, out_chans=0))
    full = H.GnConv(8, 2, in_chans=6)
    full.load_state_dict(g.state_dict() | {'proj_out.weight': torch.eye(8), 'proj_out.bias': torch.zeros(8)})
    assert_close(full(x), g(x))


# the global-local filter

@torch.no_grad()
def test_global_half_is_a_circular_convolution(monkeypatch):
    f = noisy(H.GlobalLocalFilter(8, (6, 4))).double()
    monkeypatch.setattr(H.F, 'layer_norm', lambda x, *a: x)               # both norms out of the way
    f.pre_norm.forward = lambda x: x
    x = torch.randn(2, 6, 7, 8, dtype=torch.double)
    kernel = torch.fft.irfft2(torch.view_as_complex(f.complex_weight), s=(6, 7), norm='backward')      # c y x
    want = torch.zeros(2, 6, 7, 4, dtype=torch.double)
    for dy in range(6):
        for dx in range(7): want += kernel[:, dy, dx] * x[..., 4:].roll((dy, dx), (1, 2))
    assert_close(f(x)[..., 1::2], want)
    local = F.conv2d(x[..., :4].permute(0, 3, 1, 2), f.dw.weight, padding=1, groups=4).permute(0, 2, 3, 1)
    assert_close(f(x)[..., ::2], local)
    shifted = f(x.roll((2, 3), (1, 2)))[..., 1::2]
    assert_close(shifted, f(x)[..., 1::2].roll((2, 3), (1, 2)))           # equivariant to circular shifts
    f.complex_weight.copy_(torch.tensor([1., 0.]).expand_as(f.complex_weight))
    assert_close(f(x)[..., 1::2], x[..., 4:])                             # W = 1: identity
    f.complex_weight.zero_()
    f.dw.weight.zero_()
    f.dw.register_forward_hook(lambda m, i, o: torch.ones_like(o))
    assert torch.equal(f(x)[0, 0, 0], torch.tensor([1., 0.] * 4).double())                            # local even, global odd


@torch.no_grad()
def test_norms_of_the_filter():
    f = noisy(H.GlobalLocalFilter(8, (6, 4))).double()
    x = torch.randn(2, 6, 7, 8, dtype=torch.double)
    assert_close(f(5 * x + 3), f(x), rtol=1e-4, atol=1e-4)                # pre-norm
    bare = (f(x) - f.post_norm.bias) / f.post_norm.weight
    assert_close(bare.mean(-1), torch.zeros(2, 6, 7).double(), rtol=0, atol=1e-9)
    f.scale = .5
    assert_close(f(x), .5 * ((f.post_norm.weight * bare) + f.post_norm.bias))


@pytest.mark.parametrize('size', [(1, 1), (2, 1), (1, 5), (5, 5), (6, 11), (14, 14), (15, 28)])
@torch.no_grad()
def test_filter_at_any_size(size):
    f = noisy(H.GlobalLocalFilter(8, (14, 8))).eval()
    x = torch.randn(2, *size, 8)
    assert f(x).shape == x.shape and f(x).isfinite().all()
    W = H.resize_spectra(f.complex_weight, (size[0], size[1] // 2 + 1))
    assert W.shape == (4, size[0], size[1] // 2 + 1, 2)
    assert_close(W[:, 0, 0], f.complex_weight[:, 0, 0])                                          # corners on corners: the mean keeps its factor
    if min(size) > 2: assert_close(W[:, -1, -1], f.complex_weight[:, -1, -1])


@torch.no_grad()
def test_kept_spectra_never_go_stale():
    f, x = noisy(H.GlobalLocalFilter(8, (14, 8))).eval(), torch.randn(1, 6, 6, 8)
    fresh = lambda f: torch.view_as_complex(H.resize_spectra(f.complex_weight, (6, 4)).contiguous()).permute(1, 2, 0)
    f(x)
    assert f.spectrum((6, 6)) is f.spectrum((6, 6)) and f.spectrum((6, 7)).shape == (6, 4, 4)
    f.complex_weight.mul_(2)
    assert_close(f.spectrum((6, 6)), fresh(f))
    f.load_state_dict(noisy(H.GlobalLocalFilter(8, (14, 8)), seed=1).state_dict())
    assert_close(f.spectrum((6, 6)), fresh(f))
    f.complex_weight = nn.Parameter(torch.randn(4, 14, 8, 2))
    assert_close(f.spectrum((6, 6)), fresh(f))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(f)))
    twin.complex_weight.add_(1)
    assert_close(twin.spectrum((6, 6)), fresh(twin))
    assert_close(f.spectrum((6, 6)), fresh(f))
    f.complex_weight.data = f.complex_weight.data + 1
    assert_close(f.eval().spectrum((6, 6)), fresh(f))
    assert f.double().spectrum((6, 6)).dtype == torch.complex128
    f.train()
    assert f.spectrum((6, 6)) is not f.spectrum((6, 6))
    with torch.enable_grad(): assert f.eval().spectrum((6, 6)).requires_grad
    f.eval().requires_grad_(False)
    with torch.inference_mode(): f(x.double())
    with torch.enable_grad(): f(x.double().requires_grad_()).sum().backward()                         # no inference tensor was kept


def test_filter_under_autocast_and_in_half_precision():
    f, x = noisy(H.GlobalLocalFilter(8, (14, 8))), torch.randn(2, 7, 9, 8)
    want = f(x)
    with torch.autocast('cpu', torch.bfloat16): low = f(x)
    assert (low - want).abs().max() < .1 * want.abs().max()
    low.float().sum().backward()
    assert f.complex_weight.grad.isfinite().all() and f.complex_weight.grad.abs().sum() > 0
    half = f.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - want).abs().max() < .1 * want.abs().max()


def test_filter_gradients():
    f = noisy(H.GlobalLocalFilter(4, (3, 4))).double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(f, {'complex_weight': w}, (x,)), (x, f.complex_weight))


# block and model

@torch.no_grad()
def test_channels_first_norm():
    mine, x = noisy(LayerNorm2d(6)), torch.randn(2, 6, 4, 5)
    w = {'weight': mine.weight, 'bias': mine.bias}
    plain = nn.LayerNorm(6, eps=1e-6)
    plain.load_state_dict(mine.state_dict())
    assert_close(norm(x, w, ''), plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert_close(norm(x, w, ''), mine(x))


def test_a_fresh_block_is_nearly_the_identity_and_learns():
    for size in (None, (4, 3)):
        block, x = H.HorBlock(16, 3, global_filter=size), torch.randn(2, 6, 6, 16)
        assert 0 < (block(x) - x).abs().max() < 1e-5
        block(x).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())
    assert not any('ls' in n for n, _ in H.HorBlock(16, 3, init_values=0.).named_parameters())


VARIANTS = {'tiny_7x7': (22.4, 4.0), 'tiny_gf': (23, 3.9), 'small_7x7': (50, 8.8), 'small_gf': (50, 8.7), 'base_7x7': (87, 15.6), 'base_gf': (88, 15.5), 'base_gf_img384': (None, None),
            'large_7x7': (209, 34.8), 'large_gf': (211, 34.7), 'large_gf_img384': (216, 101.8)}    # the repository's tables; the large ones with a head for ImageNet-22k


def test_all_variants_are_registered(): assert list_models('hornet_*', part='mixers') == sorted(f'hornet_{v}' for v in VARIANTS)


@pytest.mark.parametrize('variant', VARIANTS)
def test_published_sizes(variant):
    with torch.device('meta'):
        model = create_model(f'hornet_{variant}', num_classes=10459 if 'large' in variant else 1000).eval()      # the largest index of the official class map is 10458
        macs = measure.flops(model, torch.empty(1, 3, *2 * [384 if '384' in variant else 224])) / 2e9
    parameters, published = VARIANTS[variant]
    if variant == 'tiny_7x7': assert measure.parameters(model) == 22_409_512
    if parameters: assert abs(measure.parameters(model) / 1e6 - parameters) <= .5 + 1e-9
    if published: assert abs(macs / published - 1) < .02
    one = model.stages[2][0]
    if variant == 'tiny_7x7': assert measure.parameters(one.gnconv) == 264_832 and measure.parameters(one) == 791_936
    wanted = {'7x7': {None: 25}, 'gf': {(14, 8): 18, (7, 4): 2, None: 5}, 'gf_img384': {(24, 13): 18, (12, 7): 2, None: 5}}[variant.split('_', 1)[1]]
    sizes = [tuple(b.gnconv.dwconv.complex_weight.shape[1:3]) if isinstance(b.gnconv.dwconv, H.GlobalLocalFilter) else None for s in model.stages for b in s]
    assert {k: sizes.count(k) for k in set(sizes)} == wanted and {b.gnconv.dwconv.scale for s in model.stages for b in s} == {1 / 3}
    assert [len(b[0].gnconv.widths) for b in model.stages] == [2, 3, 4, 5] and len({b[0].gnconv.widths[1] // 2 for b in model.stages}) == 1


def test_first_weights():
    torch.manual_seed(0)
    plain, uniform = H.HorNet(**SMALL, global_filter=(None, None, (14, 8), (7, 4))), H.HorNet(**SMALL, uniform_init=True, head_init_scale=.1)
    for name, p in plain.named_parameters():
        if name.endswith('bias'): assert (p == 0).all()
        elif 'gamma' in name: assert (p == 1e-6).all()
        elif p.dim() > 1 and p.numel() > 2000: assert abs(p.std() - .02) < .002, name
    w = uniform.stages[2][0].mlp.fc1.weight
    bound = math.sqrt(6 / sum(w.shape))
    assert .9 * bound < w.abs().max() <= bound and abs(w.std() - bound / math.sqrt(3)) < .05 * bound
    k = uniform.stages[2][0].gnconv.dwconv.weight
    assert k.abs().max() <= math.sqrt(6 / (49 + 49 * len(k)))
    assert uniform.head.weight.abs().max() <= .1 * math.sqrt(6 / (128 + 5))
    rates = [b.drop_path.p for s in H.HorNet(**SMALL, drop_path_rate=.4).stages for b in s]
    assert_close(torch.tensor(rates), torch.linspace(0, .4, 5))


# weights

@pytest.mark.parametrize('variant', ['tiny_7x7', 'tiny_gf'])
def test_official_weights_of_full_size(variant):
    with torch.device('meta'): names = to_official(create_model(f'hornet_{variant}').state_dict())
    assert len(names) == len(create_model(f'hornet_{variant}', **SMALL | dict(depths=(2, 3, 18, 2))).state_dict())
    state = {k: torch.full(v.shape, .01) for k, v in names.items()}
    model = H.HorNet.from_official(state)
    assert measure.parameters(model) == sum(v.numel() for v in state.values()) and all((p == .01).all() for p in model.parameters())


def test_spectra_are_resized_when_loaded(tmp_path):
    small = noisy(H.HorNet(**SMALL, global_filter=(None, None, (14, 8), (7, 4))))
    large = H.HorNet(**SMALL, global_filter=(None, None, (24, 13), (12, 7)))
    torch.save({'model': to_official(small.state_dict())}, tmp_path/'small.pth')
    load_checkpoint(large, tmp_path/'small.pth')
    at = 'stages.2.1.gnconv.dwconv.complex_weight'
    a, b = small.state_dict()[at], large.state_dict()[at]
    assert_close(b, F.interpolate(a.permute(3, 0, 1, 2), (24, 13), mode='bilinear', align_corners=True).permute(1, 2, 3, 0))
    assert b.shape == (60, 24, 13, 2)                                       # half of 8 + 16 + 32 + 64 channels
    x = torch.rand(1, 3, 384, 384)
    with torch.no_grad(): assert_close(large.eval()(x), small.eval()(x), rtol=1e-3, atol=1e-4)          # what the small one does at call time


def test_wrong_weights_are_answered_with_everything():
    state = to_official(H.HorNet(**SMALL).state_dict())
    wrong = dict(state)
    wrong['stages.0.0.gama1'] = wrong.pop('stages.0.0.gamma1')
    wrong['head.weight'] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r'1 missing \(stages\.0\.0\.ls1\.gamma\).*1 unexpected.*gama1.*head\.weight: \(5, 3\) instead of \(5, 128\)'): H.HorNet(**SMALL).from_official(wrong)
    with pytest.raises(ValueError, match='downsample_layers'): H.HorNet.from_official({'conv1.weight': torch.zeros(1)})
    with pytest.raises(ValueError, match='fused'): H.HorNet(**SMALL).fuse().from_official(state)


@pytest.mark.parametrize('filters', [None, (None, None, (14, 8), (7, 4))])
@pytest.mark.parametrize('gamma', [0., 1e-6])
@torch.no_grad()
def test_fuse_changes_nothing_but_the_work(filters, gamma):
    model = noisy(H.HorNet(**SMALL, global_filter=filters, layer_scale_init_value=gamma)).double().eval()
    x = torch.rand(2, 3, 70, 64, dtype=torch.double)
    before = [t.clone() for t in (*model.feature_maps(x), model(x))]
    weights = copy.deepcopy(model).state_dict()
    assert model.fuse() is model and model.fused
    for a, b in zip((*model.feature_maps(x), model(x)), before): assert_close(a, b, rtol=1e-9, atol=1e-9)
    blocks = [b for s in model.stages for b in s]
    assert all(b.gnconv.dwconv.scale == 1 and not any('ls' in n for n, _ in b.named_parameters()) for b in blocks)
    moved = 'post_norm.bias' if filters else 'bias'
    assert not torch.equal(model.state_dict()[f'stages.2.0.gnconv.dwconv.{moved}'], weights[f'stages.2.0.gnconv.dwconv.{moved}'])
    again = model.fuse()(x)
    assert_close(again, before[-1], rtol=1e-9, atol=1e-9)                  # twice is once


# decoders

def test_gated_convolution_for_decoders():
    x = torch.rand(2, 48, 6, 9)
    m = H.GnConv2d(48, 16, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU).eval()                                  # a fusion convolution: four maps in, one out
    assert m(x).shape == (2, 16, 6, 9) and (m(x) >= 0).all() and m.gnconv.dwconv.scale == 1 and m.gnconv.widths == [8, 16]
    assert H.GnConv2d(48, 16, dim_ratio=2, order=3, proj_out=False)(x).shape == (2, 32, 6, 9)
    filtered = H.GnConv2d(48, 16, global_filter=(32, 17))
    assert filtered.gnconv.dwconv.complex_weight.shape == (12, 32, 17, 2) and filtered(x).shape == (2, 16, 6, 9)


def fpn_reference(fpn, maps, extra):
    "Plain FPN with the gated convolutions of ours."
    lat = [conv(m) for conv, m in zip(fpn.lateral_convs, maps)]
    for i in (2, 1, 0): lat[i] = lat[i] + lat[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :lat[i].shape[2], :lat[i].shape[3]]
    outs = [conv(l) for conv, l in zip(fpn.fpn_convs, lat)]
    if not extra: return outs + [outs[-1][:, :, ::2, ::2]]
    source = dict(on_input=maps[-1], on_lateral=lat[-1], on_output=outs[-1])[extra]
    five = fpn.fpn_convs[4](source)
    return outs + [five, fpn.fpn_convs[5](five.relu() if fpn.relu_before_extra_convs else five)]


@pytest.mark.parametrize('extra', [False, 'on_input', 'on_lateral', 'on_output'])
@pytest.mark.parametrize('size', [None, (32, 17)])
@torch.no_grad()
def test_pyramid(extra, size):
    chans = [16, 32, 64, 128]
    fpn = H.HorFPN(chans, 16, num_outs=6 if extra else 5, add_extra_convs=extra, relu_before_extra_convs=True, global_filter=size).eval()
    maps = [torch.randn(2, c, 24 // 2 ** i, 16 // 2 ** i) for i, c in enumerate(chans)]
    outs = fpn(maps)
    for a, b in zip(outs, fpn_reference(fpn, maps, extra), strict=True): assert_close(a, b)
    assert {o.shape[1] for o in outs} == {16} and [o.shape[2] for o in outs][:5] == [24, 12, 6, 3, 2]
    official = {}
    for name, v in fpn.state_dict().items():
        if re.search(r'(proj_in|proj_out|pws\.\d+)\.weight$', name): v = v[:, :, None, None]
        official[name.replace('gnconv.', '')] = v
    again = H.HorFPN.from_official(official, **dict(relu_before_extra_convs=True) | (dict(add_extra_convs=extra) if extra else {}))
    for a, b in zip(again(maps), outs, strict=True): assert_close(a, b)


@torch.no_grad()
def test_pyramid_on_a_backbone():
    backbone = create_model('hornet_tiny_7x7', features_only=True, embed_dim=16, depths=(1, 1, 2, 1)).eval()
    fpn = H.HorFPN(backbone.channels, 24, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU).eval()
    outs = fpn(backbone(torch.rand(1, 3, 100, 132)))
    assert [tuple(o.shape[2:]) for o in outs] == [(25, 33), (12, 16), (6, 8), (3, 4), (2, 2)] and all((o >= 0).all() for o in outs)
    part = H.HorFPN(backbone.channels, 24, 2, start_level=1, end_level=2)
    assert [tuple(o.shape) for o in part(backbone(torch.rand(1, 3, 64, 64)))] == [(1, 24, 8, 8), (1, 24, 4, 4)]
    assert H.HorFPN([8], 8, 1, norm_layer=nn.BatchNorm2d, no_norm_on_lateral=True).lateral_convs[0].conv.bias is not None


# in other models

@torch.no_grad()
def test_in_the_place_of_attention(unchecked):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, class_token=False, global_pool='avg').eval()
    for block in vit.blocks: block.attn = H.GnConvTokens(32, 4)
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    m, x = noisy(H.GnConvTokens(16, 3, grid=(2, 5), num_prefix=1)), torch.randn(2, 11, 16)
    assert_close(m(x)[:, 1:], m.gnconv(x[:, 1:].view(2, 2, 5, 16)).flatten(1, 2))
    assert (m(x)[:, 0] == 0).all()
    with pytest.raises(ValueError, match='2x5 tokens, got 14'): m(torch.randn(2, 14, 16))
    with pytest.raises(ValueError, match='mask'): m(x, mask=torch.ones(11, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match='tokens'): H.GnConvTokens(16, 3)(torch.randn(2, 11, 16))


# bad input

def test_bad_arguments(unchecked):
    for call, words in [
        (lambda: H.GnConv(24, 5), 'dim.*16.*24'), (lambda: H.GnConv(16, 0), 'order.*0'), (lambda: H.GnConv(16, -1), 'order'), (lambda: H.GnConv(16, 2, 4), 'kernel_size.*odd.*4'),
        (lambda: H.GnConv(7, 1, global_filter=(4, 3)), 'dim must be even.*7'), (lambda: H.GlobalLocalFilter(9), 'even.*9'), (lambda: H.GlobalLocalFilter(8, (0, 3)), r'global_filter.*\(0, 3\)'),
        (lambda: H.HorNet(embed_dim=9), 'embed_dim=9'), (lambda: H.HorNet(orders=(1, 2)), 'orders.*4 stages.*2'), (lambda: H.HorNet(global_filter=[None]), 'global_filter.*4 stages.*1'),
        (lambda: H.HorNet(scale=[1.]), 'scale.*4'), (lambda: H.HorNet(kernel_size=6), 'kernel_size.*6'), (lambda: H.HorNet(orders=0), 'order'),
        (lambda: H.HorNet(**SMALL)(torch.rand(1, 3, 31, 64)), 'x must.*32 pixels.*31x64'), (lambda: H.HorNet(**SMALL)(torch.rand(1, 1, 64, 64)), 'in_chans=3.*1'),
        (lambda: H.HorFPN([8, 16], 8, 1), 'num_outs.*at least 2.*1'), (lambda: H.HorFPN([8, 16], 8, 3, end_level=0), 'num_outs must be 1.*3'), (lambda: H.HorFPN([8], 8, start_level=1), 'start_level'),
        (lambda: H.HorFPN([8, 16], 8, add_extra_convs='top'), "add_extra_convs.*'top'"), (lambda: H.HorFPN([8, 16], 8)([torch.rand(1, 8, 4, 4)]), r'in_chans=\[8, 16\].*\[8\]'),
        (lambda: H.HorFPN.from_official({'a': torch.zeros(1)}), 'lateral_convs')]:
        with pytest.raises(ValueError, match=words): call()


def test_copies_and_files():
    model = noisy(H.HorNet(**SMALL, global_filter=(None, None, (14, 8), (7, 4)))).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(twin(x), want)
