"""see: what a probe writes down against what attention itself says, for every option of every attention it watches; rollout by hand; and what the figures show."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vitbook import see
from vitbook.layers.attention import BACKENDS, Attention, attention, refusal
from vitbook.layers.window import shift_mask, window_partition

pytest.importorskip('matplotlib')


def seeded(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def identity(b, heads, m): return torch.eye(m).expand(b, heads, m, m).contiguous()      # as values: the output of attention is then its weights


def agree(call, weights, expected_out=None):
    "The call, watched twice: with its weights kept, which must be these, and with entropies alone."
    with see.recording() as full: out = call()
    with see.recording(weights=False) as short: call()
    assert len(full.weights) == len(full.entropy) == len(short.entropy) == 1 and short.weights == []
    assert full.weights[0].dtype == torch.float32 and not full.weights[0].requires_grad and not full.entropy[0].requires_grad
    assert_close(full.weights[0], weights, atol=1e-5, rtol=1e-4)
    for H in (full.entropy[0], short.entropy[0]): assert_close(H, torch.special.entr(weights).sum(-1), atol=1e-4, rtol=1e-4)
    assert full.names == short.names == ['']
    if expected_out is not None: assert_close(out, expected_out)


# ---- the library's own attention

B, H, N, M, D = 2, 6, 5, 7, 4
CLOSED = torch.ones(N, M, dtype=torch.bool)
CLOSED[2] = False
OPTIONS = {
    'plain': {}, 'causal': dict(causal=True), 'more queries than keys, causal': dict(n=9, causal=True), 'shared key heads': dict(g=2), 'one key head': dict(g=1, causal=True),
    'keys hidden': dict(mask=torch.tensor([[True] * 4 + [False] * 3, [False] + [True] * 6])[:, None, None]), 'a query that sees nothing': dict(mask=CLOSED),
    'bias of a head': dict(bias=seeded(1, H, N, M) * 3), 'bias of a key': dict(bias=seeded(B, 1, 1, M) * 3), 'scale': dict(scale=2.),
    'all': dict(g=3, causal=True, mask=CLOSED.flip(1), bias=seeded(B, H, N, M), scale=.1),
}


def problem(g=H, n=N, **given): return seeded(B, H, n, D), seeded(B, g, M, D, seed=1), identity(B, g, M), given


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('backend', [b for b in ('auto', *BACKENDS) if b not in ('flex', 'triton')])
def test_our_attention(option, backend):
    q, k, v, given = problem(**OPTIONS[option])
    wanted = dict(bias='bias' in given, uneven='causal' in given and q.shape[2] != M)
    if backend != 'auto' and refusal(backend, head_dim_differs=True, width=M, **wanted): v = seeded(B, k.shape[1], M, D, seed=2)
    if backend != 'auto' and (why := refusal(backend, head_dim_differs=v.shape[-1] != D, **wanted)): pytest.skip(why)
    weights = attention(q, k, v, return_weights=True, **given).weights
    if v.shape[-1] == M: assert_close(attention(q, k, v, **given), weights)
    agree(lambda: attention(q, k, v, backend=backend, **given), weights, attention(q, k, v, **given))
    agree(lambda: attention(q.requires_grad_(), k, v, backend=backend, **given), weights)


def test_dropout_is_not_in_what_is_written_down():
    q, k, v, _ = problem()
    weights = attention(q, k, v, return_weights=True).weights
    agree(lambda: attention(q, k, v, dropout_p=.5), weights)
    agree(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=.5), weights)
    module, x = Attention(12, 3, attn_drop=.5), seeded(2, 5, 12)
    with see.recording(module) as on: module(x)
    with see.recording(module) as off: module.eval()(x)
    assert_close(on.weights[0], off.weights[0])


def test_windows_of_a_rolled_map():
    "Weights of every window, the mask of each its own."
    x, mask = seeded(2, 4, 6, 8), shift_mask((4, 6), (2, 3), (1, 2))
    q, k = (window_partition(x.roll((-1, -2), (1, 2)) @ seeded(8, 8, seed=s), (2, 3)).unflatten(-1, (2, 4)).transpose(1, 2) for s in (0, 1))
    mask = mask.repeat(2, 1, 1)[:, None]
    weights = attention(q, k, identity(8, 2, 6), mask=mask)
    assert weights.shape == (8, 2, 6, 6) and ((weights > 0) == mask).all()
    agree(lambda: attention(q, k, k, mask=mask), weights)


# ---- torch's

@pytest.mark.parametrize('given', [{}, dict(is_causal=True), dict(n=M, is_causal=True), dict(n=9, is_causal=True), dict(attn_mask=CLOSED | (torch.arange(M) < 2)), dict(attn_mask=seeded(N, M) * 3),
                                   dict(attn_mask=seeded(B, 1, N, M) * 3, scale=.1), dict(scale=2.), dict(g=2, enable_gqa=True), dict(g=1, enable_gqa=True, is_causal=True)], ids=lambda g: ' '.join(g) or 'plain')
def test_torchs_scaled_dot_product_attention(given):
    q, k, v, given = problem(**given)
    weights = F.scaled_dot_product_attention(q, k, v, **given)
    agree(lambda: F.scaled_dot_product_attention(q, k, v, **given), weights, weights)
    agree(lambda: F.scaled_dot_product_attention(query=q, key=k, value=v, **given), weights)
    if 'attn_mask' in given and len(given) == 1: agree(lambda: F.scaled_dot_product_attention(q, k, v, given['attn_mask']), weights)
    if [*given] == ['is_causal']: agree(lambda: F.scaled_dot_product_attention(q, k, v, None, 0., True), weights)


MASKS = {'plain': {}, 'keys hidden': dict(key_padding_mask=torch.tensor([[False] * 5 + [True] * 2, [True] + [False] * 6])), 'mask': dict(attn_mask=torch.ones(N, M, dtype=torch.bool).triu(3)),
         'bias': dict(attn_mask=seeded(N, M)), 'bias of heads': dict(attn_mask=seeded(B * 3, N, M))}


@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('options', [{}, dict(batch_first=True), dict(dropout=.4), dict(add_zero_attn=True), dict(add_bias_kv=True, bias=False), dict(kdim=6, vdim=10)], ids=lambda o: ' '.join(o) or 'plain')
@pytest.mark.parametrize('need_weights', [False, True])
def test_torchs_module(options, masks, need_weights):
    module, first = nn.MultiheadAttention(12, 3, **options), options.get('batch_first', False)
    q, k, v = seeded(B, N, 12), seeded(B, M, options.get('kdim', 12), seed=1), seeded(B, M, options.get('vdim', 12), seed=2)
    if not first: q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    weights = module.eval()(q, k, v, average_attn_weights=False, **MASKS[masks])[1].detach()
    for training in (False, True):
        agree(lambda: module.train(training)(q, k, v, need_weights=need_weights, **MASKS[masks])[0], weights)
    module.eval()
    with torch.no_grad(): agree(lambda: module(q, k, v, need_weights=need_weights, **MASKS[masks])[0], weights)      # where torch has a faster way


@pytest.mark.parametrize('training', [False, True])
def test_torchs_encoder_and_one_sample(training):
    layer, x = nn.TransformerEncoderLayer(12, 3, 16, dropout=0., batch_first=True).train(training), seeded(B, N, 12)
    weights = layer.self_attn(x, x, x, average_attn_weights=False)[1].detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            plain = layer(x)
            agree(lambda: layer(x), weights, plain)
    with see.recording(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)) as rec: layer(x)
    assert len(rec.weights) == 1
    single = nn.MultiheadAttention(12, 3).eval()
    agree(lambda: single(x[0], x[0], x[0])[0], single(*[x[0]] * 3, average_attn_weights=False)[1][None].detach())


def test_softmaxes_of_four_axes():
    "As Hugging Face's eager attention computes them; other axes and other shapes are not attention."
    s = seeded(B, H, N, M)
    for call in (lambda: F.softmax(s, dim=-1), lambda: torch.softmax(s, -1), lambda: s.softmax(3), lambda: s.softmax(dim=-1), lambda: F.softmax(s, -1, dtype=torch.float64)): agree(call, s.softmax(-1))
    with see.recording() as rec: s.softmax(1), s[0].softmax(-1), F.softmax(s, dim=2), s.sigmoid()
    assert rec.weights == rec.entropy == rec.names == []


# ---- what it does to a model

def model(): return nn.ModuleDict({'first': Attention(12, 3), 'second': nn.ModuleDict({'attn': Attention(12, 2)})})


def test_layers_by_name_and_by_choice():
    m, x = model(), seeded(2, 5, 12)
    def both(): return m['second']['attn'](m['first'](x))
    with see.recording(m) as rec: both()
    assert rec.names == ['first', 'second.attn'] and [w.shape[1] for w in rec.weights] == [3, 2]
    with see.recording(m, every=lambda name: name.startswith('second')) as rec: both()
    assert rec.names == ['second.attn'] and len(rec.weights) == len(rec.entropy) == 1
    with see.recording(m, weights=False, every=lambda name: False) as rec: both()
    assert rec.names == rec.entropy == []
    both()
    assert not rec.names


def test_after_an_error_nothing_watches():
    m, x = model(), seeded(2, 5, 12)
    with pytest.raises(ValueError, match='on purpose'):
        with see.recording(m) as rec:
            m['first'](x)
            with pytest.raises(ValueError): m['first'](x, mask=torch.ones(4, 4, dtype=torch.bool))
            m['second']['attn'](x)
            raise ValueError('on purpose')
    assert rec.names == ['first', 'second.attn'], 'a layer that failed is not on the stack any more'
    m['first'](x)
    assert len(rec.names) == 2 and not any(l._forward_hooks or l._forward_pre_hooks for l in m.modules())


# ---- rollout

@pytest.mark.parametrize('depth', [1, 2, 3])
def test_rollout_is_the_product_of_the_layers(depth):
    "A token's sources: those of the last layer, then of the one before; each half itself and half what it looked at. The order matters."
    weights = [(3 * seeded(2, 3, 5, 5, seed=i)).softmax(-1) for i in range(depth)]
    want = np.eye(5)[None].repeat(2, 0)
    for w in weights: want = (w.mean(1).numpy() + np.eye(5)) / 2 @ want
    got = see.rollout(weights)
    assert_close(got, torch.from_numpy(want).float())
    assert_close(got.sum(-1), torch.ones(2, 5))
    if depth > 1: assert not torch.allclose(see.rollout(weights[::-1]), got, atol=1e-3)
    assert see.rollout([w.bfloat16() for w in weights]).dtype == torch.float32


def test_rollout_by_hand():
    "Two tokens: in layer 1 both look at the first, in layer 2 both at the second."
    one, two = torch.tensor([[1., 0.], [1., 0.]])[None, None], torch.tensor([[0., 1.], [0., 1.]])[None, None]
    assert_close(see.rollout([one, two])[0], torch.tensor([[.75, .25], [.5, .5]]))
    assert_close(see.rollout([one * 0])[0], torch.eye(2))      # a row that sees nothing is itself


# ---- figures

@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


def test_pictures_in_any_order():
    x = torch.rand(3, 4, 5)
    want = x.permute(1, 2, 0).numpy()
    for given in (x, x.numpy(), want, x.double(), x.clone().requires_grad_()): assert np.allclose(see.picture(given), want)
    assert see.picture(x[:1]).shape == see.picture(x[0]).shape == (4, 5) and see.picture(torch.tensor([[[2., -1.]]] * 3)).tolist() == [[[1, 1, 1], [0, 0, 0]]]
    for shape in ((2, 4, 5), (1, 3, 4, 5), (5,)):
        with pytest.raises(ValueError, match='a picture must be'): see.picture(torch.zeros(shape))


def test_a_map_over_a_picture():
    "Enlarged between the centres of its cells: at the edge it stays what it is there."
    _, ax = see.figure()
    see.on_picture(ax, torch.zeros(4, 8), torch.tensor([[0., 4.]]), vmax=3., title='here')
    under, over = (np.asarray(image.get_array()) for image in ax.images)
    assert under.shape == over.shape == (4, 8) and np.allclose(over, [[0, 0, .5, 1.5, 2.5, 3.5, 4, 4]] * 4)
    assert ax.images[1].get_clim() == (0, 3) and ax.get_title(loc='left') == 'here'
    _, ax = see.figure()
    see.on_picture(ax, torch.zeros(3, 4, 4), torch.tensor([0., 1., 2., 3.]))
    assert np.asarray(ax.images[1].get_array())[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 1, 2, 3], 'a square grid, row by row'
    with pytest.raises(ValueError, match='6 tokens make no square'): see.on_picture(ax, torch.zeros(4, 4), torch.zeros(6))


def test_dropped_tokens_are_painted_over():
    _, ax = see.figure()
    im = torch.rand(3, 4, 9)
    keep = torch.tensor([True, False, True, True, True, False])
    see.token_mask(ax, im, keep, patch=(2, 3))
    shown = np.asarray(ax.images[0].get_array())
    want = im.permute(1, 2, 0).numpy()
    for i in range(2):
        for j in range(3):
            at = np.s_[2 * i:2 * i + 2, 3 * j:3 * j + 3]
            assert np.allclose(shown[at], want[at]) == bool(keep[3 * i + j])
    assert (shown[:2, 3:6, 2] > shown[:2, 3:6, 0]).all(), 'pale blue'
    see.token_mask(ax, torch.rand(4, 4), torch.ones(2, 2, dtype=torch.bool), patch=2, title='all')
    with pytest.raises(ValueError, match='keep must name 2x3 tokens, got'): see.token_mask(ax, im, keep[:5], patch=(2, 3))


def test_curves_and_matrices():
    fig, (a, b) = see.figure(1, 2, width=5., height=2., sharey=True)
    assert tuple(fig.get_size_inches()) == (5., 2.) and tuple(see.figure(2, 2)[0].get_size_inches()) == pytest.approx((7.4, 5.7))
    see.lines(a, [1, 10, 100], {'one': torch.tensor([1., 2., 3.]), 'two': [3., 2., 1.]}, logx=True, logy=True, xlabel='n', ylabel='s', title='t', spread={'one': ([0, 1, 2], [2, 3, 4])}, marker='o')
    assert a.get_xscale() == a.get_yscale() == 'log' and (a.get_xlabel(), a.get_ylabel(), a.get_title(loc='left')) == ('n', 's', 't')
    assert [t.get_text() for t in a.get_legend().get_texts()] == ['one', 'two'] and len(a.collections) == 1 and a.lines[0].get_marker() == 'o'
    see.lines(b, [1, 2], {'alone': [1, 2]})
    assert b.get_legend() is None and b.get_xscale() == 'linear'
    _, ax = see.figure()
    drawn = see.heat(ax, torch.arange(6.).reshape(2, 3), xticks='abc', yticks=[5, 6], vmin=-1., vmax=9., cmap='magma', unit='nats', aspect='equal')
    assert [t.get_text() for t in ax.get_xticklabels()] == ['a', 'b', 'c'] and [t.get_text() for t in ax.get_yticklabels()] == ['5', '6']
    assert drawn.get_clim() == (-1, 9) and drawn.get_cmap().name == 'magma' and ax.get_aspect() in (1, 'equal') and ax.figure.axes[-1].get_ylabel() == 'nats'
    _, ax = see.figure()
    see.heat(ax, torch.zeros(2, 20), colorbar=False)
    assert len(ax.figure.axes) == 1 and len(ax.get_yticks()) == 2 and len(ax.get_xticks()) != 20


def test_heads_and_traces():
    values = torch.arange(6.).reshape(2, 3)
    ax = see.heads(values, title='t', vmax=9.).axes[0]
    assert [t.get_text() for t in ax.texts] == ['0', '1', '2', '3', '4', '5'] and [t.get_position() for t in ax.texts] == [(j, i) for i in range(2) for j in range(3)]
    assert not see.heads(torch.zeros(13, 13)).axes[0].texts, 'numbers where there is room'
    axes = see.entropy_trace([0, 5], torch.arange(12.).reshape(2, 3, 2), maximum=4., title='t').axes
    assert len(axes) == 3 and [len(a.lines) for a in axes] == [3, 3, 3]
    assert axes[1].lines[1].get_ydata().tolist() == [3., 9.] and axes[0].lines[2].get_ydata()[0] == 4. and axes[0].get_ylim()[0] == 0


def test_pictures_side_by_side():
    fig = see.strip([torch.rand(3, 4, 4), torch.tensor([[-2., 5.]]), torch.rand(4, 4)], ['a', 'b', 'c'], rows=2, title='t')
    assert len(fig.axes) == 4 and [a.get_title(loc='center') for a in fig.axes] == ['a', 'b', 'c', ''] and [len(a.images) for a in fig.axes] == [1, 1, 1, 0]
    assert fig.axes[1].images[0].get_clim() == (-2, 5) and fig.axes[2].images[0].get_clim() == (0, 1)
    assert see.strip([torch.rand(4, 4)], vmin=.2, vmax=.4).axes[0].images[0].get_clim() == pytest.approx((.2, .4))


def test_tables():
    t = see.table([dict(a=1234567, b=.123456, c=True), dict(a=None, b=12345.6, c=False, d='x|y\nz'), dict(a=torch.tensor(3), b=np.float32(2), c=True)], digits=2)
    assert str(t).splitlines() == ['| a | b | c | d |', '|---:|---:|---|---|', '| 1,234,567 | 0.12 | yes |  |', r'|  | 12,346 | no | x\|y z |', '| 3 | 2 | yes |  |']
    assert repr(t) == str(t) == t._repr_markdown_()
    assert str(see.table({'n': 3, 'p': .5})).splitlines()[2:] == ['| n | 3 |', '| p | 0.5 |']


def test_a_player_and_a_slider(monkeypatch):
    seen = []
    page = see.player(lambda ax, frame: (seen.append(frame), ax.plot([0, frame])), [1, 2, 3], title='a <line>', width=2., height=1.)._repr_html_()
    assert {*seen} == {1, 2, 3} and page.startswith('<iframe title="a &lt;line&gt;"') and not re.search(r'https?://(?!www\.w3)', page)
    pytest.importorskip('ipywidgets')
    with pytest.raises(ValueError, match='n must be .*object'): see.slider(lambda **_: None, n=object())
    monkeypatch.setenv('VITBOOK_RUN', '1')
    see.slider(lambda **values: seen.append(values), n=(1, 9, 2), kind=['a', 'b'], on=True)
    assert seen[-1] == dict(n=5, kind='a', on=True)
