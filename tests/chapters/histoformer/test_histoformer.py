"Histoformer: each line of the card's `Must hold`, the exported functions against plain loops, and what a user may do wrong."
import copy, math, pickle, re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sheets import answers, builder_of, sheets
from tools import chapters
from vitbook import measure
from vitbook.data.degradations import restore
from vitbook.registry import create_model, list_models, model_info
from vitbook.restoration import histoformer as H

SMALL = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratio=2, refine_depth=1)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def tensors(count, *shape, seed=0, dtype=torch.float64): return [t for t in torch.randn(count, *shape, generator=gen(seed), dtype=dtype)]
def core(qkv, temperature, bins, **how): return H.histogram_attention(qkv[:4:2], qkv[1:4:2], qkv[4], temperature, bins, **how)


def loops(q1, k1, q2, k2, v, temperature, bins):
    "One picture, number by number: sort, bins as lists of places, attention, product, places again."
    c, n = v.shape
    heads, length = len(temperature), math.ceil(n / bins)
    out = torch.ones(c, n, dtype=v.dtype)
    orders = [sorted(range(n), key=lambda i, ch=ch: v[ch, i].item()) for ch in range(c)]
    for q, k, form in ((q1, k1, 'bin'), (q2, k2, 'frequency')):
        for h in range(heads):
            tokens = []                                              # (channel, places in sorted order)
            for ch in range(h * c // heads, (h + 1) * c // heads):
                for b in range(bins):
                    places = range(b * length, (b + 1) * length) if form == 'bin' else range(b, bins * length, bins)
                    tokens.append((ch, list(places)))
            read = lambda x, ch, places: torch.stack([x[ch, orders[ch][p]] if p < n else x.new_zeros(()) for p in places])
            for ch, places in tokens:
                a = read(q, ch, places)
                scores = torch.stack([F.normalize(a, dim=0) @ F.normalize(read(k, o, ps), dim=0) for o, ps in tokens]) * temperature[h].item()
                w = scores.exp() / (1 + scores.exp().sum())
                y = sum(wi * read(v, o, ps) for wi, (o, ps) in zip(w, tokens))
                for value, p in zip(y, places):
                    if p < n: out[ch, orders[ch][p]] *= value
    return out


# ---- sorting

def test_sort_and_back_is_the_identity():
    x = torch.randn(2, 3, 5, 7, generator=gen())
    values, order = x.flatten(2).sort(-1)
    assert values.scatter(-1, order, values).equal(x.flatten(2))
    s = H.sort_map(x)
    assert H.unsort_map(*s).equal(x) and not s.values.equal(x)
    assert H.unsort_map(s.values, torch.zeros_like(s.rows) + s.rows, s.cols).equal(x)
    wrong = H.unsort_map(s.values.scatter(-2, s.rows, s.values).scatter(-1, s.cols, s.values), s.rows, s.cols)
    assert not wrong.equal(x), 'the order of the two matters'


@pytest.mark.parametrize('size', [(1, 1), (1, 6), (6, 1), (4, 9), (16, 5)])
def test_rows_and_columns_ascend(size):
    s = H.sort_map(torch.randn(2, 4, *size, generator=gen()))
    assert (s.values.diff(dim=-1) >= 0).all() and (s.values.diff(dim=-2) >= 0).all()


def test_columns_are_sorted_first():
    x = torch.tensor([[[[3., 0.], [1., 2.]]]])
    s = H.sort_map(x)
    assert s.rows.flatten().tolist() == [1, 0, 0, 1] and s.values.flatten().tolist() == [0, 1, 2, 3]
    assert not s.values.equal(x.sort(-1)[0]) and s.cols.flatten().tolist() == [1, 0, 1, 0]


def test_stable_keeps_equal_values_in_order():
    many = torch.randint(-9, 9, (3, 200), generator=gen()).float() * -.1                               # ties
    many[:, ::2].abs_()                                                                               # and both zeros
    assert len({math.copysign(1, v) for v in many[many == 0].tolist()}) == 2
    for d in (0, 1):
        for ours, torchs in zip(H.ascending(many, d, stable=True), many.sort(dim=d, stable=True)): assert ours.equal(torchs)
    x = torch.zeros(1, 1, 40, 3)
    s = H.sort_map(x, stable=True)
    assert s.rows.equal(torch.arange(40).view(1, 1, 40, 1).expand_as(x)) and H.unsort_map(*s).equal(x)


def test_orders_are_kept_and_put_in():
    "Of every torch sort, however it is called; an order that does not sort the values it meets is refused."
    x = torch.randn(2, 3, 5, 7, generator=gen(), dtype=torch.float64)
    with H.SortOrders() as kept:
        found = [*H.sort_map(x)[1:], x.sort(-2)[1], torch.sort(x, 2, True)[1], x.sort(stable=True, dim=1)[1]]
    assert len(kept.orders) == 5 and all(a.equal(b) for a, b in zip(kept.orders, found))
    with H.SortOrders(lambda which, own: kept.orders[3]):
        assert torch.sort(x, 2, True)[1].equal(kept.orders[3])
    near = x + 1e-9 * torch.randn(x.shape, generator=gen(1), dtype=torch.float64)
    near[0, 0, :2, 0] = x[0, 0, :2, 0] = torch.tensor([1., 1. + 1e-7])
    with H.SortOrders() as kept: x.sort(-2)
    near[0, 0, 0, 0] += 2e-7                                  # now the two stand the other way round
    assert not near.sort(-2)[1].equal(kept.orders[0])
    with H.SortOrders(lambda which, own: kept.orders[which]) as again: values, order = near.sort(-2)
    assert order.equal(kept.orders[0]) and values.equal(near.gather(-2, order)) and again.orders[0].equal(order)
    for wrong, slack, words in ((lambda which, own: own.flip(-2), 1e-5, 'order 0 must sort'),
                                (lambda which, own: kept.orders[0], 1e-9, 'must sort the values up to 1e-09'),
                                (lambda which, own: torch.zeros_like(own), 9., 'order 0 must sort'),
                                (lambda which, own: own[:1], 1e-5, r'shape \(2, 3, 5, 7\), got \(1, 3, 5, 7\)')):
        with pytest.raises(ValueError, match=words), H.SortOrders(wrong, slack): near.sort(-2)


def test_one_order_takes_the_leaps_away():
    "Two neighbours that change places move the output; in one order the change is as small as the cause."
    torch.manual_seed(0)
    layer = H.HistogramAttention(8, 2).double()
    x = torch.randn(1, 8, 6, 6, generator=gen(), dtype=torch.float64)
    x[0, 0, 0, 0], x[0, 0, 1, 0] = .3, .3 + 1e-9
    moved = x.clone()
    moved[0, 0, 0, 0] += 2e-9
    with torch.no_grad():
        with H.SortOrders() as kept: y = layer(x)
        with H.SortOrders(lambda which, own: kept.orders[which]): together = layer(moved)
        assert (together - y).abs().max() < 1e-7 and (layer(moved) - y).abs().max() > 1e-3


# ---- attention

@pytest.mark.parametrize('c, n, heads, bins', [(4, 12, 2, 3), (6, 35, 3, 4), (2, 7, 1, 1), (4, 5, 4, 8), (3, 9, 1, 9)])
def test_against_loops(c, n, heads, bins):
    qkv, tau = tensors(5, 1, c, n), torch.rand(heads, 1, 1, generator=gen(), dtype=torch.float64) * 3
    assert_close(core(qkv, tau, bins)[0], loops(*(t[0] for t in qkv), tau, bins))


@pytest.mark.parametrize('bins', [1, 3, 8])
def test_pixels_may_be_anywhere(bins):
    "Equivariant to every permutation of the pixels, to the last bit; without sorting it is not, unless there is one bin."
    qkv, tau = tensors(5, 2, 6, 24), torch.ones(2, 1, 1, dtype=torch.float64)
    move = torch.randperm(24, generator=gen(1))
    moved = [t[..., move] for t in qkv]
    assert core(moved, tau, bins).equal(core(qkv, tau, bins)[..., move])
    unsorted = (core(moved, tau, bins, sort=False) - core(qkv, tau, bins, sort=False)[..., move]).abs().max()
    assert unsorted < 1e-9 if bins == 1 else unsorted > 1e-3


def test_the_order_is_that_of_v():
    "Not of q or k: replacing v by another with the same order keeps who attends to whom."
    q, k, v = tensors(3, 1, 4, 20)
    tau = torch.ones(2, 1, 1, dtype=torch.float64)
    weights = lambda v: H.bin_attention(*(t.gather(-1, v.argsort(-1)) for t in (q, k, v)), tau, 4, return_weights=True)[1]
    assert weights(v).equal(weights(v.exp() * 3)) and not weights(v).equal(weights(-v))


def test_both_forms_are_one_for_one_bin():
    x, tau = tensors(3, 2, 4, 10), torch.ones(2, 1, 1, dtype=torch.float64)
    assert H.bin_attention(*x, tau, 1, 'bin').equal(H.bin_attention(*x, tau, 1, 'frequency'))


def test_frequency_is_bin_of_the_dealt_sequence():
    x, tau, bins, m = tensors(3, 2, 4, 24), torch.ones(2, 1, 1, dtype=torch.float64), 4, 6
    deal = torch.arange(24).view(m, bins).T.flatten()                 # (m B) -> (B m)
    assert_close(H.bin_attention(*x, tau, bins, 'frequency')[..., deal], H.bin_attention(*(t[..., deal] for t in x), tau, bins, 'bin'))
    assert not torch.allclose(H.bin_attention(*x, tau, bins, 'frequency'), H.bin_attention(*x, tau, bins, 'bin'))


def test_bins_are_intervals_of_intensity():
    v = torch.randn(2, 4, 24, generator=gen()).sort(-1)[0]
    bins = H.bin_tokens(v, 2, 6).unflatten(2, (2, 6))                 # b h c B m
    assert (bins[..., :-1, :].amax(-1) <= bins[..., 1:, :].amin(-1)).all() and bins.shape[-1] == 4
    dealt = H.bin_tokens(v, 2, 6, 'frequency').unflatten(2, (2, 6))
    assert (dealt[..., 0] <= dealt[..., -1]).all() and (dealt.amax(-1) - dealt.amin(-1)).min() > (bins.amax(-1) - bins.amin(-1)).max() * .5


def test_softmax1():
    z = torch.randn(5, 7, generator=gen(), dtype=torch.float64)
    total = z.exp().sum(-1)
    assert_close(H.softmax1(z).sum(-1), total / (1 + total))
    assert_close(H.softmax1(z), F.pad(z, (0, 1)).softmax(-1)[:, :-1])
    assert_close(H.softmax1(torch.zeros(3, 9)), torch.full((3, 9), .1))
    big = torch.tensor([[500., 499.], [-500., -501.]], requires_grad=True)
    out = H.softmax1(big)
    assert_close(out[0], torch.tensor([500., 499.]).softmax(-1))
    assert out[1].sum() == 0
    out.sum().backward()
    assert big.grad.isfinite().all()
    half = torch.tensor([[6.5, -9.], [8., 7.]])
    assert_close(H.softmax1(half.half()).float(), H.softmax1(half), rtol=1e-3, atol=1e-4)        # where exp is at its limit, in half precision
    beyond = torch.tensor([[12., 11.], [20., 3.]])                    # exp(12) is inf in half
    assert_close(H.softmax1(beyond.half()).float(), H.softmax1(beyond), rtol=1e-3, atol=1e-4)


def test_no_temperature_means_an_average_with_nothing():
    q, k, v = tensors(3, 1, 6, 20)
    out, weights = H.bin_attention(q, k, v, torch.full((2, 1, 1), 1e-9, dtype=torch.float64), 4, return_weights=True)
    n = 6 * 4 // 2
    assert weights.shape == (1, 2, n, n)
    assert_close(weights, torch.full_like(weights, 1 / (n + 1)))


@pytest.mark.parametrize('form', H.FORMS)
def test_zeros_stand_behind_the_largest(form):
    v = torch.rand(1, 2, 35, generator=gen()).add(1).sort(-1)[0]
    tokens = H.bin_tokens(v, 2, 4, form)
    assert tokens.shape == (1, 2, 4, 9) and (tokens == 0).sum() == 2
    assert (tokens[..., -1, -1] == 0).all()                           # the last place of the last bin, in both forms
    assert H.from_bins(tokens, 4, 35, form).equal(v)
    assert H.HistogramAttention(8, 4)(torch.randn(2, 8, 5, 7)).shape == (2, 8, 5, 7)


@pytest.mark.parametrize('forms', [('bin',), ('frequency',), ('frequency', 'bin')])
def test_forms_may_be_left_out(forms):
    qkv, tau = tensors(5, 1, 4, 12), torch.ones(2, 1, 1, dtype=torch.float64)
    v, order = qkv[4].sort(-1)
    parts = [H.bin_attention(qkv[2 * i].gather(-1, order), qkv[2 * i + 1].gather(-1, order), v, tau, 3, f) for i, f in enumerate(forms)]
    want = math.prod(parts) if len(parts) > 1 else parts[0]
    assert_close(H.histogram_attention(qkv[:2 * len(forms):2], qkv[1:2 * len(forms):2], qkv[4], tau, 3, forms), torch.empty_like(v).scatter(-1, order, want))
    layer = H.HistogramAttention(4, 2, forms=forms)
    assert layer(torch.randn(1, 4, 4, 4)).shape == (1, 4, 4, 4) and layer.qkv.out_channels == 4 * (2 * len(forms) + 1)


def test_gradient():
    qkv, tau = [t.requires_grad_() for t in tensors(5, 1, 4, 7)], torch.rand(2, 1, 1, generator=gen(), dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda *a: core(a[:5], a[5], 3), (*qkv, tau))


def test_gradient_reaches_all_weights_and_the_order_has_none():
    layer = H.HistogramAttention(8, 2)
    assert not H.sort_map(torch.randn(1, 2, 4, 4, requires_grad=True)).rows.requires_grad
    for stable in (False, True):
        x, up = torch.randn(2, 3, 9, requires_grad=True), torch.randn(2, 3, 9)
        values, order = H.ascending(x, -1, stable)
        assert not order.requires_grad
        assert torch.equal(torch.autograd.grad(values, x, up)[0], torch.zeros_like(up).scatter(-1, order, up)), 'each value hands its gradient to where it came from'
    layer(torch.randn(2, 8, 6, 6)).square().sum().backward()
    for name, p in layer.named_parameters(): assert p.grad.abs().sum() > 0, name
    by_part = layer.qkv.weight.grad.view(5, -1).abs().sum(1)
    assert (by_part > 0).all()


def test_the_input_is_left_alone():
    layer, x = H.HistogramAttention(8, 2), torch.randn(2, 8, 6, 6)
    kept = x.clone()
    layer(x)
    assert x.equal(kept)


# ---- the module's own steps

def module_by_hand(a, x):
    "The steps of the module, each as the card says it."
    half = a.dim // 2
    h, rows = x[:, :half].sort(-2)
    h, cols = h.sort(-1)
    maps = F.conv2d(F.conv2d(torch.cat([h, x[:, half:]], 1), a.qkv.weight, a.qkv.bias), a.dwconv.weight, a.dwconv.bias, padding=1, groups=5 * a.dim)
    q1, k1, q2, k2, v = maps.flatten(2).chunk(5, 1)
    out = torch.stack([loops(*(t[i] for t in (q1, k1, q2, k2, v)), a.temperature, a.num_bins) for i in range(len(x))])
    out = F.conv2d(out.view(x.shape), a.proj.weight, a.proj.bias)
    back = out[:, :half]
    back = torch.empty_like(back).scatter(-1, cols, back)
    back = torch.empty_like(back).scatter(-2, rows, back)
    return torch.cat([back, out[:, half:]], 1)


@pytest.mark.parametrize('bias', [False, True])
def test_module_against_its_steps(bias):
    a, x = H.HistogramAttention(6, 2, bias, num_bins=3).double(), torch.randn(2, 6, 4, 5, generator=gen(), dtype=torch.float64)
    with torch.no_grad():
        a.temperature.copy_(torch.tensor([.5, 2.]).view(2, 1, 1))
        assert_close(a(x), module_by_hand(a, x))


def test_sorting_can_be_switched_off():
    torch.manual_seed(0)
    a = H.HistogramAttention(8, 2)
    plain = H.HistogramAttention(8, 2, sort_conv=False, sort_attention=False)
    plain.load_state_dict(a.state_dict())
    x = torch.randn(1, 8, 6, 6)
    assert not torch.allclose(a(x), plain(x)) and sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in a.parameters())
    *qk, v = (t.flatten(2) for t in plain.queries_keys_values(x))
    want = math.prod(H.bin_attention(qk[2 * i], qk[2 * i + 1], v, plain.temperature, 2, f) for i, f in enumerate(H.FORMS))
    assert_close(plain(x), plain.proj(want.view(x.shape)))
    y = F.conv2d(F.conv2d(x, plain.qkv.weight), plain.dwconv.weight, padding=1, groups=40)
    assert_close(torch.cat(plain.queries_keys_values(x), 1), y)


@pytest.mark.parametrize('sort_conv', [False, True])
@pytest.mark.parametrize('sort_attention', [False, True])
def test_each_sort_is_switched_by_its_own_option(sort_conv, sort_attention):
    "And the half is put back where it was sorted, whatever attention does."
    layer = H.HistogramAttention(6, 2, sort_conv=sort_conv, sort_attention=sort_attention).double()
    x = torch.randn(2, 6, 4, 5, generator=gen(), dtype=torch.float64)
    front, rows, cols = H.sort_map(x[:, :3])
    maps = layer.dwconv(layer.qkv(torch.cat([front, x[:, 3:]], 1) if sort_conv else x))
    q1, k1, q2, k2, v = maps.flatten(2).chunk(5, 1)
    out = H.histogram_attention([q1, q2], [k1, k2], v, layer.temperature, 2, sort=sort_attention)
    want = layer.proj(out.view(x.shape))
    if sort_conv: want = torch.cat([H.unsort_map(want[:, :3], rows, cols), want[:, 3:]], 1)
    assert_close(layer(x), want)


def test_norm():
    x = torch.randn(2, 6, 3, 4, generator=gen(), dtype=torch.float64) + 3
    assert_close(H.PixelNorm()(x), F.layer_norm(x.movedim(1, -1), (6,), eps=1e-5).movedim(-1, 1))
    assert_close(H.PixelNorm(center=False)(x), x / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
    assert not list(H.PixelNorm().parameters())


def test_feed_forward_works_at_twice_the_resolution():
    torch.manual_seed(0)
    mlp = H.DualScaleMlp(6, 2).double()
    assert mlp.fc1.out_channels == 24 and mlp.dwconv.in_channels == 3 == mlp.gate.in_channels
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    wide = F.conv2d(x, mlp.fc1.weight).view(1, 6, 2, 2, 4, 5).permute(0, 1, 4, 2, 5, 3).reshape(1, 6, 8, 10)
    gate = F.conv2d(F.pad(wide[:, 3:], (2, 2, 2, 2)), mlp.gate.weight, dilation=2, groups=3)
    y = gate * torch.tanh(F.softplus(gate)) * F.conv2d(wide[:, :3], mlp.dwconv.weight, padding=2, groups=3)
    y = y.view(1, 3, 4, 2, 5, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 12, 4, 5)
    assert_close(mlp(x), F.conv2d(y, mlp.fc2.weight))
    for ratio in (2.66, 2.5, .1):
        with pytest.raises(ValueError, match='mlp_ratio.*multiple of 4'): H.DualScaleMlp(6, ratio)


# ---- the whole model

def test_registered_size():
    assert 'histoformer' in list_models(part='restoration') and model_info('histoformer')['paper'].endswith('2407.10172')
    with torch.device('meta'): model = create_model('histoformer')
    assert measure.parameters(model) == 16_615_100
    macs = measure.flops(model, torch.empty(1, 3, 256, 256, device='meta')) / 2
    assert abs(macs / 1e9 - 113.33) < .01 * 113.33


def test_levels_and_shortcuts():
    "The map after each level has the width and resolution of the paper's figure; every thumbnail is made of the one before."
    model, seen = H.Histoformer(**SMALL), {}
    for name, m in model.named_modules():
        if name.count('.') == 1 and name.split('.')[0] in ('encoder', 'decoder', 'thumbnails'): m.register_forward_hook(lambda m, x, y, name=name: seen.update({name: tuple(y.shape[1:])}))
    model(torch.rand(1, 3, 32, 48))
    assert [seen[f'encoder.{i}'] for i in range(4)] == [(8, 32, 48), (16, 16, 24), (32, 8, 12), (64, 4, 6)]
    assert [seen[f'decoder.{i}'] for i in (2, 1, 0)] == [(32, 8, 12), (16, 16, 24), (16, 32, 48)]
    assert [seen[f'thumbnails.{i}'] for i in range(3)] == [(3, 16, 24), (3, 8, 12), (3, 4, 6)]
    assert [b.attn.num_bins for level in model.encoder for b in level] == [1, 2, 2, 4]


def test_model_against_its_steps():
    "The figure, arrow by arrow, and the small parts by themselves."
    torch.manual_seed(0)
    m, x, cat = H.Histoformer(**SMALL), torch.rand(1, 3, 16, 24), lambda *t: torch.cat(t, 1)
    t1 = m.thumbnails[0](x)
    t2 = m.thumbnails[1](t1)
    t3 = m.thumbnails[2](t2)
    e1 = m.encoder[0](m.stem(x))
    e2 = m.encoder[1](m.join_down[0](cat(m.down[0](e1), t1)))
    e3 = m.encoder[2](m.join_down[1](cat(m.down[1](e2), t2)))
    e4 = m.encoder[3](m.join_down[2](cat(m.down[2](e3), t3)))
    d3 = m.decoder[2](m.join_up[2](cat(m.up[2](e4), e3)))
    d2 = m.decoder[1](m.join_up[1](cat(m.up[1](d3), e2)))
    d1 = m.refine(m.decoder[0](cat(m.up[0](d2), e1)))
    assert m(x).equal(m.head(d1) + x)
    block, y = m.decoder[1][0], torch.randn(1, 16, 6, 4)
    z = y + block.attn(block.norm1(y))
    assert block(y).equal(z + block.mlp(block.norm2(z)))
    small, down, up = m.thumbnails[0], m.down[0], m.up[0]
    assert_close(t1, F.conv2d(F.conv2d(x.unflatten(3, (12, 2)).unflatten(2, (8, 2)).mean((3, 5)), small.mix.weight), small.dwconv.weight, padding=1, groups=3))
    assert down(e1).equal(F.pixel_unshuffle(F.conv2d(e1, down.conv.weight, padding=1), 2)) and up(d2).equal(F.pixel_shuffle(F.conv2d(d2, up.conv.weight, padding=1), 2))


def test_output_is_the_input_plus_a_correction():
    model, x = H.Histoformer(**SMALL), torch.rand(2, 3, 16, 24)
    assert_close(model(x), x + model.head(model.forward_features(x)))
    nn.init.zeros_(model.head.weight)
    assert model(x).equal(x)
    grey = H.Histoformer(out_chans=1, **SMALL)(x) - x
    assert_close(grey[:, 0], grey[:, 2], atol=1e-6, rtol=0)
    assert grey.abs().max() > 0


def test_flat_pictures_are_finite():
    model = H.Histoformer(**SMALL)
    for value in (0., .5, 1.):
        out = model(torch.full((1, 3, 16, 16), value))
        out.sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_any_size_by_padding():
    model, x = H.Histoformer(**SMALL).train(), torch.rand(2, 3, 19, 26)
    assert restore(model, x).shape == x.shape and model.training
    with pytest.raises(ValueError, match='multiples of 8, got 19x26'): model(x)


def official(name):
    "Our name in the official code's words."
    back = {'stem': 'patch_embed.proj', 'refine': 'refinement', 'head': 'output', 'encoder.3': 'latent'} | {f'encoder.{i}': f'encoder_level{i + 1}' for i in range(3)}
    back |= {f'decoder.{i}': f'decoder_level{i + 1}' for i in range(3)} | {f'join_down.{i}': f'reduce_chan_level_{i + 1}' for i in range(3)} | {f'join_up.{i}': f'reduce_chan_level{i + 1}' for i in (1, 2)}
    back |= {f'down.{i}.conv': f'down{i + 1}_{i + 2}.body.0' for i in range(3)} | {f'up.{i}.conv': f'up{i + 2}_{i + 1}.body.0' for i in range(3)}
    back |= {f'thumbnails.{i}.{a}': f'skip_patch_embed{i + 1}.proj.{b}' for i in range(3) for a, b in (('mix', 1), ('dwconv', 2))}
    inside = {'attn.dwconv': 'attn_g.qkv_dwconv', 'attn.proj': 'attn_g.project_out', 'attn.': 'attn_g.', 'mlp.fc1': 'ffn.project_in', 'mlp.fc2': 'ffn.project_out', 'mlp.dwconv': 'ffn.dwconv_5', 'mlp.gate': 'ffn.dwconv_dilated2_1'}
    start = next(s for s in sorted(back, key=len, reverse=True) if name.startswith(s + '.'))
    rest = name[len(start):]
    for a, b in inside.items():
        if f'.{a}' in rest: return back[start] + rest.replace(f'.{a}', f'.{b}')
    return back[start] + rest


def test_official_names_and_sizes(unchecked):
    "A state dict in the official names comes back as a model of the same sizes, all of them read off the weights."
    ours = H.Histoformer(embed_dim=6, depths=(1, 2, 0, 1), num_heads=(3, 2, 4, 6), mlp_ratio=2.667, refine_depth=2, bias=True, out_chans=1)
    theirs = {official(k): v for k, v in ours.state_dict().items()}
    assert len(theirs) == len(ours.state_dict()) and H.official_names(theirs).keys() == ours.state_dict().keys()
    model = H.Histoformer.from_official({'params': {f'module.{k}': v for k, v in theirs.items()} | {'skip_conv.weight': torch.zeros(12, 6, 1, 1)}})
    x = torch.rand(1, 3, 16, 16)
    assert model(x).equal(ours(x))
    centred = H.Histoformer.from_official(theirs, center=False)
    assert not centred(x).equal(ours(x))
    with pytest.raises(ValueError, match='whole Histoformer'): H.Histoformer.from_official({'a': torch.zeros(1)})
    del theirs['output.weight']
    with pytest.raises(ValueError): H.Histoformer.from_official(theirs)


@pytest.mark.parametrize('dim, ratio', [(4, 1), (4, 2), (12, 1.34), (12, 2.667), (24, 2.667), (36, 2.667), (36, 4), (22, 2.73), (26, 2.31)])     # the last two: hidden / width, times width, is a hair below hidden
def test_ratio_is_read_off_the_weights(dim, ratio):
    with torch.device('meta'):
        model = H.Histoformer(embed_dim=dim, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=ratio, refine_depth=1)
        read = H.official_arguments({official(k): v for k, v in model.state_dict().items()})
        assert [p.shape for p in H.Histoformer(**read).parameters()] == [p.shape for p in model.parameters()]


# ---- the loss

def test_pearson():
    x, y = torch.randn(3, 3, 8, 8, generator=gen(), dtype=torch.float64), torch.randn(3, 3, 8, 8, generator=gen(1), dtype=torch.float64)
    want = torch.stack([torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(x, y)])
    assert_close(H.pearson(x, y), want, atol=1e-6, rtol=0)
    half = lambda x, y: (1 - H.pearson(x, y)) / 2
    assert_close(half(2 * x + 3, x), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(half(-.5 * x + 3, x), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    a, b = torch.tensor([[1., 1., -1., -1.]]), torch.tensor([[1., -1., 1., -1.]])
    assert_close(half(a, b), torch.tensor([.5]))


def test_pearson_of_a_flat_picture():
    "Official arithmetic gives nan gradients here, for the square root of 0 has an infinite slope."
    x, y = torch.full((2, 3, 4, 4), .5, requires_grad=True), torch.rand(2, 3, 4, 4, generator=gen())
    assert_close(H.pearson(x, y), torch.zeros(2))
    H.restoration_loss(x, y).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_restoration_loss():
    x, y = torch.rand(3, 3, 8, 8, generator=gen()), torch.rand(3, 3, 8, 8, generator=gen(1))
    assert_close(H.restoration_loss(x, y, .3), (x - y).abs().mean() + .3 * ((1 - H.pearson(x, y)) / 2).mean())
    assert H.restoration_loss(x, y, 0).equal((x - y).abs().mean())
    assert H.restoration_loss(y, y) < 1e-6 < H.restoration_loss(y + .1, y) and abs(H.restoration_loss(y + .1, y).item() - .1) < 1e-4   # the level is L1's business
    broken = x.clone()
    broken[1] = math.inf
    assert_close(H.restoration_loss(broken, y) - (broken - y).abs().mean(), torch.tensor(math.nan), equal_nan=True)
    part = ((1 - H.pearson(broken, y)) / 2)
    assert part.isfinite().tolist() == [True, False, True]
    a, b = (torch.cat([t[:1] * 1e30, t[1:]]).clone() for t in (x, y))                                # the first correlation overflows, its L1 does not
    assert H.restoration_loss(a, b).isfinite()


# ---- a user's life

@pytest.mark.parametrize('call, words', [
    (lambda: H.HistogramAttention(6, 4), 'num_heads must divide the width 6, got 4'),
    (lambda: H.HistogramAttention(6, 0), 'num_heads'),
    (lambda: H.HistogramAttention(6, 2, num_bins=0), 'num_bins.*0'),
    (lambda: H.HistogramAttention(6, 2, forms=('bins',)), "forms.*'bins'"),
    (lambda: H.HistogramAttention(6, 2, forms=()), 'forms'),
    (lambda: H.HistogramAttention(6, 2, forms=('bin', 'bin')), 'forms'),
    (lambda: H.HistogramAttention(6, 2)(torch.zeros(1, 5, 4, 4)), '6 channels, got 5'),
    (lambda: H.bin_tokens(torch.zeros(1, 4, 8), 3, 2), 'num_heads.*3'),
    (lambda: H.bin_tokens(torch.zeros(1, 4, 8), 2, 0), 'num_bins'),
    (lambda: H.bin_tokens(torch.zeros(1, 4, 8), 2, 2, 'BHR'), "form.*'BHR'"),
    (lambda: H.histogram_attention([], [], torch.zeros(1, 2, 4), torch.ones(1, 1, 1), 2), 'forms'),
    (lambda: H.Histoformer(depths=(1, 1, 1)), 'depths must have 4'),
    (lambda: H.Histoformer(num_heads=(1, 2)), 'num_heads must have 4'),
    (lambda: H.Histoformer(num_bins=(1, 2)), 'num_bins must have 4'),
    (lambda: H.Histoformer(embed_dim=7), 'embed_dim'),
    (lambda: H.Histoformer(out_chans=2), 'out_chans.*got 2'),
    (lambda: H.Histoformer(**SMALL)(torch.zeros(1, 1, 8, 8)), 'in_chans = 3.*got 1'),
    (lambda: H.pearson(torch.zeros(1, 4), torch.zeros(1, 5)), 'one shape'),
    (lambda: H.HistogramTokens(8)(torch.zeros(1, 16, 8), mask=torch.ones(1, 1, 1, 16, dtype=torch.bool)), 'takes no mask'),
    (lambda: H.HistogramTokens(8)(torch.zeros(1, 15, 8)), 'hold')])
def test_mistakes_are_named(call, words, unchecked):
    with pytest.raises(ValueError, match=words): call()


def test_tokens_in_a_transformer():
    from vitbook.vit import VisionTransformer
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, class_token=False, global_pool='avg')
    for block in vit.blocks: block.attn = H.HistogramTokens(8, 2)
    vit(torch.rand(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in vit.parameters())
    layer, x = H.HistogramTokens(8, 2, grid=(3, 4), num_prefix=1), torch.randn(2, 13, 8)
    y = layer(x)
    assert (y[:, 0] == 0).all()
    assert_close(y[:, 1:].mT.reshape(2, 8, 3, 4), layer.attn(x[:, 1:].mT.reshape(2, 8, 3, 4)))


def test_copies_and_precisions():
    torch.manual_seed(0)
    block, x = H.HistogramBlock(8, 2, 2), torch.randn(2, 8, 6, 5)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))): assert twin(x).equal(block(x))
    assert_close(copy.deepcopy(block).double()(x.double()).float(), block(x), atol=1e-4, rtol=1e-4)
    for dtype in (torch.bfloat16, torch.float16): assert copy.deepcopy(block).to(dtype)(x.to(dtype)).isfinite().all()
    with torch.autocast('cpu', torch.bfloat16): assert block(x).isfinite().all()


@torch.no_grad()
def test_the_sheet_is_exact_arithmetic_but_for_six_pairs():
    "In float64 as well, on every machine; and the six are needed: with exact orders the output is another."
    sheet = next(s for s in sheets('histoformer') if s.name == 'histoformer__tiny')
    orders_of = answers('histoformer').histoformer_orders
    model, x = H.Histoformer.from_official(sheet.weights()).eval(), sheet.inputs()['x']
    orders, y = orders_of(model, x)
    assert (len(orders), sum(o.numel() for o in orders)) == (24, 162_816)
    sheet.check(dict(y=y), 1e-5)
    exact = orders_of(model, x, {})[1]
    with pytest.raises(AssertionError, match='histoformer__tiny is off'): sheet.check(dict(y=exact))


# ---- the chapter's page

@pytest.fixture(scope='module')
def page():
    "What the cells of the story define, its networks trained for two steps; and the story's cells."
    import matplotlib
    matplotlib.use('agg')
    notebook = next(notebook for notebook in chapters() if notebook.slug == 'histoformer')
    heads = [cell['source'].startswith('## In the library') for cell in notebook.cells]
    story, names = notebook.cells[:heads.index(True)], {}
    kept = ['STEPS = 150' in cell['source'] for cell in story]
    assert sum(kept) == 1
    for cell in story:
        if cell['cell_type'] != 'code' or {'hide', 'default_exp', 'slow'} & set(cell['directives']): continue
        if re.search(r'see\.(slider|player)|before_after\(|^record\(', cell['source'], re.M): continue
        exec(compile(cell['source'].replace('STEPS = 150', 'STEPS = 2'), cell['id'], 'exec'), names)
    matplotlib.pyplot.close('all')
    names['story'] = story
    return names


def solved(page, number, capsys):
    "The solution of an exercise is run; what it defines and what it prints."
    exercises = '\n'.join(cell['source'] for cell in page['story'] if cell['cell_type'] == 'markdown')
    part = exercises.split('## Exercises')[1].split(f'**{number}. ')[1].split('</details>')[0]
    capsys.readouterr()
    names = dict(page)
    exec(compile(re.search(r'```python\n(.*?)```', part, re.S)[1], f'exercise {number}', 'exec'), names)
    return names, capsys.readouterr().out


def test_exercise_by_hand(page, capsys):
    _, out = solved(page, 1, capsys)
    assert out.splitlines() == ['3 bin [1, 3, 5]', '3 frequency [3, 4, 5]',
                                '6 bin [0, 1, 2, 3, 4, 5]', '6 frequency [0, 1, 2, 3, 4, 5]']


def test_exercise_one_bin(page, capsys):
    each, same = solved(page, 2, capsys)[0]['changes']
    assert each > .1 and same < 1e-5


def test_exercise_equal_widths(page, capsys):
    names, _ = solved(page, 3, capsys)
    assert names['share'].sum(1).allclose(torch.ones(64)) and names['count'].sum() == 64 * 1024
    assert names['share'].amax(1).mean() < page['best_share'](page['flakes'], page['bins'])
    assert names['count'].min() == 0 and names['count'].max() > 800


def test_exercise_sum(page, capsys):
    "The sum takes the place of the product in the trained networks, and afterwards the product is back."
    names, out = solved(page, 4, capsys)
    product = page['marks'](page['train'](page['start'](0), 0))[0]
    assert len(names['sums']) == 3 and len(set(names['sums'])) == 3 and abs(names['sums'][0] - product) > 1e-4
    q, k, v = tensors(3, 2, 1, 4, 12)
    tau = torch.ones(2, 1, 1, dtype=torch.float64)
    for f, factor in ((H.histogram_attention, 4), (names['summed'], 2)):
        once, twice = (f([q[0], q[1]], [k[0], k[1]], s * v[0], tau, 3, H.FORMS, True, False) for s in (1, 2))
        assert_close(twice, factor * once)


def test_the_schematic_is_the_layer(page):
    "Every arrow has the shape of the tensor that goes there; boxes with weights are the layer's parameters."
    d, layer = page['layer_schematic'](), H.HistogramAttention(6, 3, num_bins=5)
    x, seen = torch.randn(2, 6, 4, 7, generator=gen()), {}
    seen['x', 'sort'], seen['x', 'join'] = x[:, :3], x[:, 3:]
    seen['proj', 'out'] = x[:, 3:]

    def note(patch, name, *told):
        "The function `name` of the module also notes what `told` says of its arguments and result, call by call."
        f, todo = getattr(H, name), list(told)

        def noted(*args, **kwargs):
            y = f(*args, **kwargs)
            found = todo.pop(0)(args, y) if todo else {}
            assert not found.keys() & seen.keys()
            seen.update(found)
            return y
        patch.setattr(H, name, noted)

    def attended(cut, attend):
        return lambda args, y: {('S', cut): args[2], (attend, 'times'): y}

    def nothing(args, y): return {}
    with pytest.MonkeyPatch.context() as patch:
        note(patch, 'sort_map', lambda args, y: {('sort', 'join'): y.values, ('sort', 'unsort'): y.rows})
        note(patch, 'unsort_map', lambda args, y: {('proj', 'unsort'): args[0], ('unsort', 'out'): y})
        note(patch, 'ascending', nothing, nothing, lambda args, y: {('S', 'back'): y[1]})      # the map's two first
        note(patch, 'bin_attention', attended('bins', 'across'), attended('deal', 'among'))
        note(patch, 'bin_tokens', lambda args, y: {('bins', 'across'): y}, nothing, nothing,   # q, k and v
             lambda args, y: {('deal', 'among'): y})
        note(patch, 'histogram_attention', lambda args, y: {('times', 'back'): y})
        layer.qkv.register_forward_hook(lambda m, a, y: seen.update({('join', 'qkv'): a[0], ('qkv', 'dwconv'): y}))
        layer.dwconv.register_forward_hook(lambda m, a, y: seen.update({('dwconv', 'S'): y}))
        layer.proj.register_forward_hook(lambda m, a, y: seen.update({('back', 'proj'): a[0]}))
        layer(x)
    seen['temperature', 'across'] = seen['temperature', 'among'] = layer.temperature
    assert seen.keys() == d.shapes.keys()
    assert d.sizes(seen) == dict(b=2, c=6, y=4, x=7, n=28, h=3, d=10, m=6)
    drawn = {name for name, thing in d.things.items() if thing.kind == 'layer'}
    assert drawn == {name.split('.')[0] for name, _ in layer.named_parameters()}


@pytest.mark.parametrize('n, num_bins', [(6, 2), (7, 3), (12, 4), (5, 5)])
def test_which_values_are_mixed(n, num_bins):
    "Bin-wise those of equal place in every bin, frequency-wise num_bins neighbours, of every channel."
    q, k = tensors(2, 2, 2, n)
    m = math.ceil(n / num_bins)
    groups = {'bin': lambda rank: rank % m, 'frequency': lambda rank: rank // num_bins}
    for form, group in groups.items():
        def attend(v, form=form):
            return H.bin_attention(q, k, v, torch.ones(1, 1, 1, dtype=torch.float64), num_bins, form)
        slopes = torch.autograd.functional.jacobian(attend, tensors(1, 2, 2, n)[0])[1]     # of the second picture
        assert not slopes[:, :, 0].any(), 'the first picture plays no part in it'
        reached = slopes[:, :, 1].abs() > 1e-12
        want = torch.tensor([[group(i) == group(j) for j in range(n)] for i in range(n)])
        for one in range(2):
            for other in range(2): assert reached[one, :, other].equal(want)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_single_precision_rounded(dtype):
    "The core in half precision, on values without ties, is what single precision gives for the same numbers."
    q, k = torch.randn(2, 2, 2, 4, 40, generator=gen()).to(dtype)
    v = torch.stack([torch.randperm(40, generator=gen(i)) for i in range(8)])
    v = v.view(2, 4, 40).sub(20).div(16).to(dtype)
    tau = torch.tensor([1., 8.]).view(2, 1, 1)
    low = H.histogram_attention([*q], [*k], v, tau.to(dtype), 5)
    high = H.histogram_attention([*q.float()], [*k.float()], v.float(), tau, 5)
    assert low.dtype == dtype
    assert_close(low.float(), high, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)       # three roundings


def test_turned_pairs_are_for_their_sheet_alone():
    "A sheet of another name, of a whole model too, is compared plainly: no order is handed in."
    sheet = next(s for s in sheets('histoformer') if s.name == 'histoformer__tiny')
    known = answers('histoformer')
    assert builder_of('histoformer__tiny') is known.histoformer__tiny
    assert builder_of('histoformer__other') is known.histoformer is not known.histoformer__tiny
    given = dict(config=sheet.config, weights=sheet.weights(), inputs=sheet.inputs())
    with torch.no_grad():
        plain = H.Histoformer.from_official(given['weights'])(given['inputs']['x'])
        with H.SortOrders() as own: assert known.histoformer(**given)['y'].equal(plain)
        with H.SortOrders() as handed: known.histoformer__tiny(**given)
    assert len(own.orders) == 24 and len(handed.orders) > 24, 'the tiny sheet sorts once more, in float64'
