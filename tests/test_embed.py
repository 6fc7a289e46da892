"""layers.embed: pictures to patches and back, by hand at every size, and each option of the embedding."""
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.layers.embed import PatchEmbed, check_divisible, pair, patchify, unpatchify

small, side = st.integers(1, 4), st.integers(1, 5)


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@given(small, small, side, side, side, side)
def test_unpatchify_is_the_inverse_of_patchify(b, c, rows, cols, p, q):
    x = seeded(b, c, rows * p, cols * q)
    t = patchify(x, (p, q))
    assert t.shape == (b, rows * cols, c * p * q)
    assert torch.equal(unpatchify(t, (p, q), (rows, cols), c), x)
    assert torch.equal(t[:, -1], x[:, :, -p:, -q:].flatten(1)), 'the last patch is the lower right corner'


@given(small, side, side, side, st.integers(1, 8))
def test_patch_embedding_is_patchify_and_one_product(c, rows, cols, p, dim):
    embed = PatchEmbed((rows * p, cols * p), p, c, dim).double()
    x = seeded(2, c, rows * p, cols * p)
    assert_close(embed(x), patchify(x, p) @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    assert embed.grid_size == (rows, cols) and embed.num_patches == rows * cols


def test_a_patch_is_its_piece_of_the_picture():
    "Rows before columns, for pictures and patches that are no squares; inside a patch as a convolution reads it."
    x, (p, q), (rows, cols) = seeded(2, 3, 6, 20), (2, 5), (3, 4)
    t = patchify(x, (p, q))
    for i in range(rows):
        for j in range(cols): assert torch.equal(t[:, i * cols + j].reshape(2, 3, p, q), x[:, :, i * p:(i + 1) * p, j * q:(j + 1) * q])
    assert torch.equal(unpatchify(t, (p, q), (rows, cols)), x)
    assert torch.equal(unpatchify(patchify(x[:, :1], 2), 2, (3, 10), in_chans=1), x[:, :1])


def test_options_of_the_embedding():
    x = seeded(2, 4, 6, 20, dtype=torch.float32)
    plain = PatchEmbed(None, (2, 5), 4, 7, bias=False)
    assert plain.proj.bias is None and plain.grid(6, 20) == (3, 4)
    want = patchify(x, (2, 5)) @ plain.proj.weight.flatten(1).T
    assert_close(plain(x), want, atol=1e-5, rtol=1e-5)
    assert plain(x[..., :10]).shape == (2, 6, 7), 'without img_size any multiple will do'
    with pytest.raises(ValueError, match='img_size is None'): plain.grid_size
    normed = PatchEmbed((6, 20), (2, 5), 4, 7, norm_layer=nn.LayerNorm, bias=False)
    normed.proj.load_state_dict(plain.proj.state_dict())
    assert_close(normed(x), nn.functional.layer_norm(want, (7,)), atol=1e-4, rtol=1e-4)
    assert normed.grid_size == (3, 4) and normed.num_patches == 12 and normed.proj.stride == (2, 5)


def test_sizes(unchecked):
    assert pair(3) == (3, 3) and pair((2, 5)) == (2, 5) and pair([2, 5]) == (2, 5) and pair(0) == (0, 0)
    for x in (-1, (1, -2), (1, 2, 3), 2.5, 'ab'):
        with pytest.raises(ValueError, match='size must be'): pair(x)
    check_divisible('x', (4, 10), (2, 5))
    for size in ((4, 11), (5, 10)):
        with pytest.raises(ValueError, match=rf'x must be a multiple of window 2x5, got {size[0]}x{size[1]}'): check_divisible('x', size, (2, 5), 'window')
    with pytest.raises(ValueError, match='window must be at least 1'): check_divisible('x', (4, 10), (0, 5), 'window')


@pytest.mark.parametrize('what, call', [
    ('patch_size', lambda: patchify(torch.zeros(1, 3, 10, 8), 4)),
    ('patch_size', lambda: PatchEmbed(30, 8)),
    ('in_chans', lambda: PatchEmbed(8, 4, 3, 5)(torch.zeros(1, 4, 8, 8))),
    ('img_size', lambda: PatchEmbed(8, 4, 3, 5)(torch.zeros(1, 3, 12, 8))),
    ('patch_size', lambda: PatchEmbed(None, 4, 3, 5)(torch.zeros(1, 3, 8, 9))),
    ('grid', lambda: unpatchify(torch.zeros(1, 5, 12), 2, (2, 2))),
    ('patches', lambda: unpatchify(torch.zeros(1, 4, 12), 2, (2, 2), in_chans=2)),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()
