"""layers.norm: each norm against its equation in float64, in every precision and with each option."""
import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook.layers.norm import LayerNorm2d, RMSNorm, deviation, unit

side = st.integers(1, 5)
HALF = [torch.bfloat16, torch.float16]


def rms(x, weight, eps): return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@given(st.integers(2, 6), side, side)
def test_layer_norm_2d_is_layer_norm_over_the_channels(c, y, x):
    norm, image = LayerNorm2d(c).double(), seeded(2, c, y, x)
    with torch.no_grad(): norm.weight.copy_(seeded(c)); norm.bias.copy_(seeded(c, seed=1))
    assert_close(norm(image), torch.nn.functional.layer_norm(image.permute(0, 2, 3, 1), (c,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize('size', [1., 1e-3, 1e3])
@pytest.mark.parametrize('kept', ['wide', 'narrow'])
def test_rms_norm_is_its_equation_in_every_precision(dtype, size, kept):
    "Squares that half precision cannot hold; weights kept wide or in the precision of the input."
    norm, x = RMSNorm(48), (seeded(5, 48) * size).to(dtype)
    with torch.no_grad(): norm.weight.copy_(1 + .3 * seeded(48))
    if kept == 'narrow' or dtype == torch.float64: norm.to(dtype)
    out, eps = norm(x), torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert_close(out.double(), rms(x.double(), norm.weight.double(), 1e-6), atol=0, rtol=2 * eps if dtype in HALF else 4e-6 if dtype == torch.float32 else 1e-12)


def test_eps_of_the_norms():
    "Where it weighs as much as the numbers."
    x = seeded(3, 8) * .1
    assert_close(RMSNorm(8, eps=.04).double()(x), rms(x, 1, .04))
    assert RMSNorm(8).eps == LayerNorm2d(8).eps == 1e-6
    image = seeded(2, 4, 3, 5) * .1
    for eps in (1e-6, .04):
        away = image - image.mean(1, keepdim=True)
        assert_close(LayerNorm2d(4, eps).double()(image), away / (away.square().mean(1, keepdim=True) + eps).sqrt())
        assert_close(deviation(x, -1, eps), (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).add(eps).sqrt())
    assert_close(deviation(x), deviation(x, -1, 1e-5))


@pytest.mark.parametrize('dtype', HALF)
def test_layer_norm_2d_in_half_precision(dtype):
    norm, x = LayerNorm2d(48), (seeded(2, 48, 3, 5) + 20).to(dtype)
    norm.to(dtype)
    wide = x.double()
    away = wide - wide.mean(1, keepdim=True)
    assert_close(norm(x).double(), away / (away.square().mean(1, keepdim=True) + 1e-6).sqrt(), atol=torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize('dim', [0, 1, -1])
def test_unit_and_deviation(dtype, dim):
    "Along any axis; sums of more squares than half precision can hold."
    x = (seeded(6, 7, 40) * 300 + 100).to(dtype)
    wide, eps = x.double(), max(torch.finfo(dtype).eps, 1e-6) if dtype != torch.float64 else 1e-12
    assert unit(x, dim).dtype == dtype and deviation(x, dim).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(unit(x, dim).double(), wide / wide.square().sum(dim, keepdim=True).sqrt(), atol=0, rtol=2 * eps)
    away = wide - wide.mean(dim, keepdim=True)
    assert deviation(x, dim).shape == away.mean(dim, keepdim=True).shape
    assert_close(deviation(x, dim).double(), (away.square().mean(dim, keepdim=True) + 1e-5).sqrt(), atol=0, rtol=1e-5 if dtype != torch.float64 else 1e-12)


def test_zeros_have_no_direction():
    assert unit(torch.zeros(2, 3)).eq(0).all()
    assert_close(unit(torch.tensor([3., 4.]), eps=10.), torch.tensor([.3, .4]))
    assert_close(unit(torch.tensor([3e-5, 4e-5], dtype=torch.float64)), torch.tensor([.6, .8], dtype=torch.float64))


def test_bad_input(unchecked):
    with pytest.raises(ValueError, match='x must have 4 channels, got 5'): LayerNorm2d(4)(torch.zeros(1, 5, 2, 2))
