"""see: rollout by hand, and what the figures show."""
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vitbook import see

pytest.importorskip('matplotlib')


def seeded(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


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
