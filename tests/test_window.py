"""layers.window: windows, padding and the mask of a rolled map, against maps that know where each token came from."""
import pytest
import torch
from hypothesis import given, strategies as st

from vitbook.layers.window import pad_to_window, shift_mask, window_partition, window_reverse

small, side = st.integers(1, 4), st.integers(1, 5)


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@given(small, small, side, side, side, side)
def test_window_reverse_is_the_inverse_of_partition(b, c, rows, cols, p, q):
    x = seeded(b, rows * p, cols * q, c)
    windows = window_partition(x, (p, q))
    assert windows.shape == (b * rows * cols, p * q, c)
    assert torch.equal(window_reverse(windows, (p, q), (rows * p, cols * q)), x)
    assert torch.equal(windows[0].reshape(p, q, c), x[0, :p, :q]), 'the first window is the upper left corner of the first map'


def test_windows_stand_row_by_row():
    x = seeded(2, 6, 20, 3)
    windows = window_partition(x, (2, 5))
    for b in range(2):
        for i in range(3):
            for j in range(4): assert torch.equal(windows[b * 12 + i * 4 + j].reshape(2, 5, 3), x[b, i * 2:i * 2 + 2, j * 5:j * 5 + 5])


@given(side, side, side, side)
def test_padding_is_zeros_below_and_to_the_right(rows, cols, p, q):
    x = seeded(2, rows, cols, 3) + 9
    padded = pad_to_window(x, (p, q))
    assert padded.shape == (2, rows + -rows % p, cols + -cols % q, 3)
    assert torch.equal(padded[:, :rows, :cols], x) and padded[:, rows:].eq(0).all() and padded[:, :, cols:].eq(0).all()
    back = window_reverse(window_partition(padded, (p, q)), (p, q), tuple(padded.shape[1:3]))[:, :rows, :cols]
    assert torch.equal(back, x), 'padded, cut, put together and cropped: the map'


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.data())
def test_the_mask_joins_what_the_roll_did_not_bring_together(rows, cols, p, q, data):
    "Windows and shifts of any two sides: in a window two tokens see each other if they are as far apart in the map that was rolled."
    sy, sx = data.draw(st.integers(0, p - 1)), data.draw(st.integers(0, q - 1))
    size = rows * p, cols * q
    places = torch.stack(torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing='ij'), -1)[None]
    now = window_partition(places, (p, q)).tolist()
    before = window_partition(places.roll((-sy, -sx), (1, 2)), (p, q)).tolist()
    mask = shift_mask(size, (p, q), (sy, sx))
    assert mask.shape == (rows * cols, p * q, p * q) and mask.dtype == torch.bool
    for window, (here, there) in enumerate(zip(now, before)):
        for i in range(p * q):
            for j in range(p * q):
                same = all(here[i][axis] - here[j][axis] == there[i][axis] - there[j][axis] for axis in (0, 1))
                assert mask[window, i, j] == same


def test_one_number_is_both_sides():
    assert torch.equal(shift_mask((4, 6), 2, 1), shift_mask((4, 6), (2, 2), (1, 1)))
    assert shift_mask((4, 6), 2, 0).all() and torch.equal(pad_to_window(torch.ones(1, 3, 5, 1), 4), pad_to_window(torch.ones(1, 3, 5, 1), (4, 4)))


@pytest.mark.parametrize('what, call', [
    ('window', lambda: window_partition(torch.zeros(1, 5, 6, 2), 3)),
    ('window', lambda: window_reverse(torch.zeros(4, 9, 2), 3, (5, 6))),
    ('windows', lambda: window_reverse(torch.zeros(3, 9, 2), 3, (6, 6))),
    ('windows', lambda: window_reverse(torch.zeros(4, 8, 2), 3, (6, 6))),
    ('window', lambda: shift_mask((5, 6), 3, 1)),
    ('size', lambda: shift_mask((6, 6), 3, (0, -1))),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()
