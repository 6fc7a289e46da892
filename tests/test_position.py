"""layers.position: sines, rotations, biases and learned grids against loops over rows, columns and channels; resizing by hand; every option."""
import itertools, math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.layers.position import (
    LearnedGrid, RelativePositionBias, angles, apply_rope, frequencies, hands_kept, mixed, ntk_base, relative_index,
    resize_position, rope_1d, rope_2d, rope_last, rotate_halves, sincos_1d, sincos_2d, trained_grid, yarn_sharpness)

side = st.integers(1, 5)


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)),
                       dtype=dtype)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 8, 12]))
def test_rope_keeps_norms_and_sees_only_differences(rows, cols, d):
    cos, sin = rope_2d(rows, cols, d)
    q = seeded(1, 1, rows * cols, d, dtype=torch.float32)
    turned = apply_rope(q, cos, sin)
    assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert_close(turned[:, :, 0], q[:, :, 0])
    # one content at every place: scores can only say where
    same = torch.ones(1, 1, rows * cols, d) * seeded(d, dtype=torch.float32)
    s = (apply_rope(same, cos, sin) @ apply_rope(same * .5, cos, sin).mT)[0, 0].reshape(rows, cols, rows, cols)
    if rows > 1 and cols > 1:
        assert_close(s[1:, 1:, 1:, 1:], s[:-1, :-1, :-1, :-1], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.sampled_from([2, 4, 10]))
def test_sines_and_cosines(n, dim):
    p = sincos_1d(n, dim)
    assert p.shape == (n, dim)
    assert_close(p.square().sum(-1), torch.full((n,), dim / 2)), 'sin² + cos² of every frequency'
    assert len({tuple(row) for row in p.tolist()}) == n, 'every place has its own code'


@given(side, side, st.sampled_from([4, 8]))
def test_sincos_2d_tells_rows_from_columns(h, w, dim):
    p = sincos_2d(h, w, dim).reshape(h, w, dim)
    halves = p[..., :dim // 2], p[..., dim // 2:]
    along = [(half == half[:1]).all().item() for half in halves], [
        (half == half[:, :1]).all().item() for half in halves]
    assert any(along[0]) and any(along[1]), 'one half does not change with the row, the other not with the column'


@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2))
def test_resizing_positions(h, w, c, prefix):
    pos = seeded(1, prefix + h * w, c, dtype=torch.float32)
    assert torch.equal(resize_position(pos, (h, w), (h, w), prefix), pos), 'the same grid changes nothing'
    larger = resize_position(pos, (h, w), (2 * h, 2 * w + 1), prefix)
    assert larger.shape == (1, prefix + 2 * h * (2 * w + 1), c)
    assert torch.equal(larger[:, :prefix], pos[:, :prefix])
    flat = torch.ones(1, prefix + h * w, c)
    assert_close(resize_position(flat, (h, w), (h + 3, w + 2), prefix),
                 torch.ones(1, prefix + (h + 3) * (w + 2), c))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_relative_bias_depends_on_the_offset_only(h, w, heads):
    bias = RelativePositionBias((h, w), heads)()
    assert bias.shape[-2:] == (h * w, h * w)
    values = bias.reshape(heads, h, w, h, w)
    if h > 1: assert torch.equal(values[:, 1:, :, 1:], values[:, :-1, :, :-1])
    if w > 1: assert torch.equal(values[:, :, 1:, :, 1:], values[:, :, :-1, :, :-1])
    assert values[0].unique().numel() == (2 * h - 1) * (2 * w - 1), 'and differs between any two offsets'


# ---- each number by hand

@pytest.mark.parametrize('base', [10000., 50.])
@pytest.mark.parametrize('places', [6, [0., 2.5, -1.]])
def test_every_sine_and_cosine(base, places):
    pos, dim = places if isinstance(places, list) else range(places), 8
    given = torch.tensor(places) if isinstance(places, list) else places
    mixed, apart = sincos_1d(given, dim, base), sincos_1d(given, dim, base, interleaved=False)
    for row, p in enumerate(pos):
        for i in range(dim // 2):
            angle = p / base ** (2 * i / dim)
            want = torch.tensor([math.sin(angle), math.cos(angle)])
            assert_close(mixed[row, 2 * i:2 * i + 2], want)
            assert_close(apart[row, [i, dim // 2 + i]], want)


@pytest.mark.parametrize('base', [10000., 50.])
def test_every_number_of_sincos_2d(base):
    "A quarter each: sine and cosine of the column, then of the row."
    h, w, quarter = 3, 5, 4
    p = sincos_2d(h, w, 4 * quarter, *([base] if base != 10000. else []))
    for y, x, i in itertools.product(range(h), range(w), range(quarter)):
        a, b = x / base ** (i / quarter), y / base ** (i / quarter)
        assert_close(p[y * w + x, i::quarter],
                     torch.tensor([math.sin(a), math.cos(a), math.sin(b), math.cos(b)]))


@pytest.mark.parametrize('base', [100., 7.])
def test_every_angle_of_rope_2d(base):
    """The first half of the channels turns with the column, the second with the row.

    Two neighbours by one angle."""
    h, w, d = 3, 5, 12
    cos, sin = rope_2d(h, w, d, *([base] if base != 100. else []))
    for y, x, i in itertools.product(range(h), range(w), range(d // 4)):
        for start, place in ((0, x), (d // 2, y)):
            angle = place / base ** (i / (d // 4))
            for c in (start + 2 * i, start + 2 * i + 1):
                assert_close(cos[y * w + x, c], torch.tensor(math.cos(angle)))
                assert_close(sin[y * w + x, c], torch.tensor(math.sin(angle)))


@pytest.mark.parametrize('places', [7, [0., .5, -3.]])
@pytest.mark.parametrize('base', [10000., 9.])
def test_rope_turns_complex_numbers(places, base):
    given = torch.tensor(places) if isinstance(places, list) else places
    pos = torch.tensor(places if isinstance(places, list) else range(places)).double()
    x, d = seeded(2, 3, len(pos), 8), 8
    turn = torch.exp(1j * pos[:, None] * base ** (-torch.arange(0, d, 2).double() / d))
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    assert_close(apply_rope(x, *rope_1d(given, d, base)), want, atol=1e-6, rtol=1e-6)


def test_angles_of_each_sample_and_half_precision():
    cos, sin = (torch.stack([t, t.flip(0)])[:, None] for t in rope_1d(5, 8))
    x = seeded(2, 3, 5, 8, dtype=torch.float32)
    for b in range(2):
        assert_close(apply_rope(x, cos, sin)[b], apply_rope(x[b], cos[b, 0], sin[b, 0]))
    low = apply_rope(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, apply_rope(x.bfloat16().float(), cos, sin).bfloat16()), 'rounded once, at the end'


def test_index_and_bias_of_a_window_that_is_no_square():
    h, w, heads = 2, 4, 3
    index, module = relative_index(h, w), RelativePositionBias((h, w), heads)
    bias, table = module(), module.relative_position_bias_table
    assert table.shape == (3 * 7, heads) and bias.shape == (1, heads, 8, 8)
    assert [*module.state_dict()] == ['relative_position_bias_table']
    for (i, (yi, xi)), (j, (yj, xj)) in itertools.product(
        enumerate(itertools.product(range(h), range(w))), repeat=2):
        row = (yi - yj + h - 1) * (2 * w - 1) + (xi - xj + w - 1)
        assert index[i, j] == row
        assert torch.equal(bias[0, :, i, j], table[row])
    assert 0 < table.std() < .04 and RelativePositionBias(3, 1)().shape == (1, 1, 9, 9)


# ---- learned positions on another grid

def along(values, new, **options):
    "A row, and the same as a column, resized; both must be the same numbers."
    # two channels: torch's smoothed form is wrong for a single one a column wide
    pos = torch.tensor(values)[None, :, None] * torch.tensor([1., -1.])
    row = resize_position(pos, (1, len(values)), (1, new), 0, **options)
    assert_close(resize_position(pos, (len(values), 1), (new, 1), 0, **options), row)
    assert_close(row[..., 1], -row[..., 0])
    return row[0, :, 0]


def test_resizing_by_hand():
    "Cells have centres: the outermost of a finer grid lie beyond those of the coarser one."
    assert_close(along([0., 4.], 4, mode='bilinear'), torch.tensor([0., 1., 3., 4.]))
    assert_close(along([0., 0., 0., 8.], 2, mode='bilinear', antialias=False),
                 torch.tensor([0., 4.]))
    # a triangle twice as wide, cut at the edge
    assert_close(along([0., 0., 0., 8.], 2, mode='bilinear'), torch.tensor([0., 8 * .75 / 1.75]))
    assert_close(along([0., 0., 0., 8.], 2),
                 along([0., 0., 0., 8.], 2, mode='bicubic', antialias=True))
    cubic = along([0.] * 4 + [1.] + [0.] * 4, 18)
    # Keys' kernel, a = -1/2, which the smoothed form has
    near, far = ((1.5 * t - 2.5) * t * t + 1 for t in (.25, .75))
    outer = [((-.5 * t + 2.5) * t - 4) * t + 2 for t in (1.25, 1.75)]
    assert_close(
        cubic[4:14],
        torch.tensor([0., outer[1], outer[0], far, near, near, far, outer[0], outer[1], 0.]),
        atol=1e-5, rtol=0)


def test_rows_stay_rows():
    """Positions that say the row only, on a wider grid and a higher one.

    And the type they were kept in."""
    rows = torch.arange(3.).repeat_interleave(2)[None, :, None]
    wider = resize_position(rows, (3, 2), (3, 5), 0)
    assert_close(wider.flatten(), torch.arange(3.).repeat_interleave(5))
    higher = resize_position(rows, (3, 2), (6, 2), 0, mode='bilinear').reshape(6, 2)
    assert_close(
        higher[:, 0],
        torch.tensor([0., .25, .75, 1.25, 1.75, 2.])) and torch.equal(higher[:, 0], higher[:, 1])
    assert resize_position(rows.bfloat16(), (3, 2), (6, 4), 0).dtype == torch.bfloat16
    assert torch.equal(
        resize_position(torch.cat([rows[:, :1] + 9, rows], 1), (3, 2), (3, 5))[:, 1:],
        wider), 'one prefix token unless told'


@pytest.mark.parametrize('places, own, told, want', [
    (16, (4, 4), None, (4, 4)), (16, (7, 7), None, (4, 4)), (6, (2, 3), None, (2, 3)), (6, (3, 2), None, (3, 2)), (16, (2, 8), (2, 8), (2, 8)), (16, (4, 4), (8, 2), (8, 2)),
    (16, (2, 8), None, '4x4 or 2x8'), (6, (4, 4), None, 'any'),
])
def test_the_grid_of_weights(places, own, told, want):
    told = None if told is None else torch.tensor(told)
    if isinstance(want, tuple): assert trained_grid(places, own, told) == want
    else:
        with pytest.raises(ValueError, match=f'pos_grid.*{places} positions.*{want}'):
            trained_grid(places, own, told)


class Places(LearnedGrid, nn.Module):
    positions = 'places'

    def __init__(self, grid, learned=True, prefix=0):
        super().__init__()
        self.grid_size, self.places = grid, nn.Parameter(seeded(
            1, prefix + grid[0] * grid[1], 4, dtype=torch.float32)) if learned else None


def test_a_module_says_its_grid():
    old, new = Places((2, 8)), Places((4, 8))
    state = old.state_dict()
    assert state['pos_grid'].tolist() == [2, 8]
    assert 'pos_grid' not in Places((2, 8), learned=False).state_dict()
    with pytest.raises(ValueError, match='grid 4x8, got 2x8'): new.load_state_dict(state)
    square = Places((4, 4))
    # as many places, others
    with pytest.raises(ValueError, match='grid 4x4, got 2x8'): square.load_state_dict(state)
    new.load_state_dict(new.regridded(state))
    assert torch.equal(new.places, resize_position(old.places, (2, 8), (4, 8), 0))
    assert torch.equal(Places((2, 8)).regridded(state)['places'], old.places)
    assert 'places' in state and state['places'].shape[1] == 16, 'the given weights stay'
    fronted = Places((4, 8), prefix=3)
    assert torch.equal(fronted.regridded(Places((2, 8), prefix=3).state_dict(), 3)['places'][:, :3],
                       Places((2, 8), prefix=3).places[:, :3])
    none = {'other': torch.zeros(1)}
    assert new.regridded(none) == none and Places((2, 8), learned=False).regridded(state) == state


@pytest.mark.parametrize('what, call', [
    ('head_dim', lambda: rope_2d(2, 2, 6)),
    ('dim', lambda: sincos_2d(2, 2, 6)),
    ('dim', lambda: sincos_1d(2, 3)),
    ('dim', lambda: rope_1d(2, 3)),
    ('pos', lambda: resize_position(torch.zeros(1, 6, 4), 2, 3)),
    ('mode', lambda: resize_position(torch.zeros(1, 5, 4), 2, 3, mode='nearest')),
    ('cos', lambda: apply_rope(torch.zeros(1, 1, 4, 4), *rope_1d(3, 4))),
    ('cos', lambda: apply_rope(torch.zeros(1, 1, 4, 4), *rope_1d(4, 2))),
    ('sin', lambda: apply_rope(torch.zeros(1, 1, 4, 4), rope_1d(4, 4)[0], rope_1d(4, 2)[0])),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()


@given(st.sampled_from([2, 4, 6, 16]), st.sampled_from([3., 100., 1e4]))
def test_frequencies_by_the_equation(dim, base):
    want = [base ** (-2 * i / dim) for i in range(dim // 2)]
    assert_close(
        frequencies(dim, base), torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
    low = frequencies(dim, base, torch.float)
    assert low.dtype == torch.float
    assert torch.allclose(low.double(), frequencies(dim, base), rtol=1e-6)
    each = frequencies(dim, torch.tensor([[base], [2 * base]], dtype=torch.float64))
    assert_close(each, torch.stack([frequencies(dim, base), frequencies(dim, 2 * base)]))
    at = torch.tensor([0., 2.5, 9.])
    by_hand = [[m * f for f in want] for m in at.tolist()]
    assert_close(angles(at, dim, base), torch.tensor(by_hand, dtype=torch.float64))
    assert torch.equal(angles(4, dim, base), angles(torch.arange(4.), dim, base))


@pytest.mark.parametrize('dim', [0, 1, 7])
def test_frequencies_refuse_odd_widths(dim):
    for call in (frequencies, lambda d: angles(3, d), lambda d: rope_1d(3, d),
                 lambda d: sincos_1d(3, d)):
        with pytest.raises(ValueError, match=f'dim.*{dim}'): call(dim)


@given(st.integers(1, 5), st.sampled_from([2, 6, 8]))
def test_halves_are_neighbours_in_another_order(n, d):
    x, angle = seeded(2, 3, n, d), seeded(n, d // 2, seed=1)
    order = torch.arange(d).view(d // 2, 2).T.flatten()  # channels 0, 2, 4 … 1, 3, 5 …
    got = rotate_halves(x[..., order], angle.cos(), angle.sin())
    both = angle.repeat_interleave(2, -1)
    assert_close(got, apply_rope(x, both.cos(), both.sin())[..., order])
    z = torch.complex(x[..., ::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    assert_close(got, torch.cat([z.real, z.imag], -1))
    assert rotate_halves(x.bfloat16(), angle.float().cos(), angle.float().sin()).dtype == torch.bfloat16


@given(st.integers(0, 3), st.integers(1, 4))
def test_tokens_in_front_are_not_turned(prefix, n):
    x, (cos, sin) = seeded(2, 3, prefix + n, 8, dtype=torch.float), rope_1d(n, 8)
    got = rope_last(x, cos, sin)
    assert torch.equal(got[:, :, :prefix], x[:, :, :prefix])
    assert torch.equal(got[:, :, prefix:], apply_rope(x[:, :, prefix:], cos, sin))


@given(st.sampled_from([4, 6, 32]), st.floats(1, 50), st.sampled_from([100., 1e4]))
def test_ntk_slows_the_slowest_hand_by_the_factor(dim, factor, base):
    plain, slowed = frequencies(dim, base), frequencies(dim, ntk_base(factor, dim, base))
    assert slowed[0] == plain[0] == 1
    assert abs(slowed[-1] * factor / plain[-1] - 1) < 1e-9
    assert (slowed <= plain * (1 + 1e-12)).all() and (slowed >= plain / factor * (1 - 1e-12)).all()
    with pytest.raises(ValueError, match='dim.*2'): ntk_base(factor, 2)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('dim, length, fast, slow', [
    (64, 4096, 32, 1), (32, 512, 32, 1), (32, 64, 8, 2), (8, 16, 1.25, .75)])
def test_hands_that_turn_often_are_kept(dim, length, fast, slow, whole):
    kept = hands_kept(dim, length, fast, slow, whole=whole)
    turns = frequencies(dim) * length / (2 * math.pi)
    low, high = (next((i for i, t in enumerate(turns) if t <= many), dim // 2)
                 for many in (fast, slow))
    assert (kept[:max(low - 1, 0)] == 1).all() and (kept[high + 1:] == 0).all()
    assert (kept.diff() <= 0).all()
    if not whole:  # the index of a frequency, solved for by hand
        at = [dim * math.log(length / (many * 2 * math.pi)) / (2 * math.log(1e4))
              for many in (fast, slow)]
        first, last = max(at[0], 0), min(at[1], dim - 1)
        ramp = [min(max((i - first) / (last - first), 0.), 1.) for i in range(dim // 2)]
        assert_close(kept, 1 - torch.tensor(ramp))


def test_a_ramp_without_length_is_a_step():
    kept = hands_kept(32, 512, 4., 4., whole=False)
    assert set(kept.tolist()) == {0., 1.}
    turns = frequencies(32) * 512 / (2 * math.pi)
    assert torch.equal(kept == 1, turns > 4)


def test_mixing_and_sharpness():
    plain, kept = frequencies(32, dtype=torch.float), hands_kept(32, 512)
    yarn = mixed(plain / 4, plain, kept)
    assert torch.equal(yarn[kept == 1], plain[kept == 1])
    assert torch.equal(yarn[kept == 0], plain[kept == 0] / 4)
    inner = (kept > 0) & (kept < 1)
    assert inner.any() and (yarn < plain)[inner].all() and (yarn > plain / 4)[inner].all()
    assert yarn_sharpness(.5) == yarn_sharpness(1.) == 1
    assert abs(yarn_sharpness(2.) - 1 - .1 * math.log(2)) < 1e-12
    assert_close(yarn_sharpness(torch.tensor([.5, 4.]), .3),
                 torch.tensor([1., 1 + .3 * math.log(4)]))
