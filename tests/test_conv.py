"""layers.conv: tokens and maps, depthwise convolutions and positions by them, against torch's plain convolution channel by channel."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook.layers.conv import ConvPosition, DepthwiseConv2d, map_to_tokens, tokens_to_map

small, side = st.integers(1, 4), st.integers(1, 5)


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@given(small, small, side, side)
def test_tokens_and_maps_are_inverse(b, c, y, x):
    image = seeded(b, c, y, x)
    assert torch.equal(tokens_to_map(map_to_tokens(image), (y, x)), image)
    assert map_to_tokens(image)[0, -1].equal(image[0, :, -1, -1])


@given(st.integers(1, 6), st.sampled_from([1, 3, 5, 7]), side, side)
def test_depthwise_convolution_keeps_channels_apart(c, k, y, x):
    conv, image = DepthwiseConv2d(c, k).double(), seeded(1, c, y, x)
    out, changed = conv(image), image.clone()
    changed[:, 0] += 1
    assert out.shape == image.shape and torch.equal(conv(changed)[:, 1:], out[:, 1:])


def test_a_token_has_its_place_on_the_map():
    t = seeded(2, 3 + 2 * 5, 4)
    image = tokens_to_map(t, (2, 5), num_prefix=3)
    for i in range(2):
        for j in range(5): assert torch.equal(image[:, :, i, j], t[:, 3 + 5 * i + j])
    assert torch.equal(map_to_tokens(image), t[:, 3:])


def by_channel(conv, image, stride=1):
    k = conv.weight.shape[-1]
    bias = torch.zeros(image.shape[1]).to(image) if conv.bias is None else conv.bias
    return torch.cat([F.conv2d(image[:, [c]], conv.weight[[c]], stride=stride, padding=k // 2) + bias[c] for c in range(image.shape[1])], 1)


@pytest.mark.parametrize('options', [dict(), dict(kernel_size=5), dict(stride=2), dict(bias=False), dict(kernel_size=7, stride=3, bias=False)])
def test_options_of_the_depthwise_convolution(options):
    conv, image = DepthwiseConv2d(4, **options).double(), seeded(2, 4, 7, 10)
    assert (conv.bias is None) == (options.get('bias') is False) and conv.weight.shape == (4, 1, *[options.get('kernel_size', 3)] * 2)
    assert_close(conv(image), by_channel(conv, image, options.get('stride', 1)))


@pytest.mark.parametrize('prefix', [0, 2])
@pytest.mark.parametrize('kernel', [3, 5])
def test_conv_position_is_added_to_the_tokens(prefix, kernel):
    "Its convolution of the map, on top of the tokens, which stay; those in front pass."
    layer, t, kept = ConvPosition(4, kernel, prefix).double(), seeded(2, prefix + 3 * 5, 4), seeded(2, prefix + 3 * 5, 4)
    out = layer(t, (3, 5))
    assert torch.equal(t, kept), 'the given tokens are not overwritten'
    assert torch.equal(out[:, :prefix], t[:, :prefix])
    image = t[:, prefix:].transpose(1, 2).reshape(2, 4, 3, 5)
    assert_close(out[:, prefix:].transpose(1, 2).reshape(2, 4, 3, 5), image + by_channel(layer.proj, image))
    t.requires_grad_()
    with torch.no_grad(): [p.zero_() for p in layer.parameters()]
    layer(t, (3, 5)).sum().backward()
    assert torch.equal(t.grad, torch.ones_like(t)), 'without a convolution the identity, with its gradient'


@pytest.mark.parametrize('what, call', [
    ('kernel_size', lambda: DepthwiseConv2d(3, 4)),
    ('kernel_size', lambda: ConvPosition(3, 2)),
    ('t', lambda: tokens_to_map(torch.zeros(1, 5, 2), (2, 2))),
    ('t', lambda: tokens_to_map(torch.zeros(1, 5, 2), (1, 5), 1)),
    ('t', lambda: ConvPosition(2, 3, 1)(torch.zeros(1, 6, 2), (2, 3))),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()
