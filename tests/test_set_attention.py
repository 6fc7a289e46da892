"""kernels.set_attention: the batched form against the loop, over tables of many kinds; gradients, dtypes, and what it answers to bad input."""
import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook.kernels.set_attention import first_slots, naive_set_attention, set_attention


def table(n, slots, generator, spare=0):
    "A random partition of n tokens into sets of at most `slots`, filled up with repeats anywhere in the row, and `spare` rows more of slots; the mask hides all but one copy."
    order, rows, masks = torch.randperm(n, generator=generator).tolist(), [], []
    while order:
        many = min(len(order), int(torch.randint(1, slots + 1, (1,), generator=generator)))
        members, order = order[:many], order[many:]
        row = members + [members[int(torch.randint(many, (1,), generator=generator))] for _ in range(slots - many)]
        row = [row[i] for i in torch.randperm(slots, generator=generator).tolist()]
        rows.append(row)
        masks.append([row[i] in row[:i] for i in range(slots)])
    return torch.tensor(rows), torch.tensor(masks)


def some(n, c, e, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, w, generator=g, dtype=dtype) for w in (c, c, e)], g


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([(4, 4, 1), (4, 4, 2), (6, 3, 3), (8, 16, 4)]), st.integers(0, 10 ** 6))
def test_batched_equals_the_loop(n, slots, widths, seed):
    c, e, heads = widths
    (q, k, v), g = some(n, c, e, seed)
    inds, mask = table(n, slots, g)
    want = naive_set_attention(q, k, v, inds, mask, heads)
    assert_close(set_attention(q, k, v, inds, mask, num_heads=heads), want)
    last = inds.numel() - 1 - first_slots(inds.flatten().flip(0), n)                  # the last copy instead of the first
    assert_close(set_attention(q, k, v, inds, mask, last, num_heads=heads), want)
    for one, hidden in zip(inds, mask):                                               # nothing from outside the set
        members = one[~hidden]
        assert_close(naive_set_attention(q[members], k[members], v[members], torch.arange(len(members))[None], torch.zeros(1, len(members), dtype=torch.bool), heads), want[members])


def test_by_hand():
    q = k = torch.zeros(3, 2)
    v = torch.tensor([[1., 0.], [3., 0.], [7., 5.]])
    inds, mask = torch.tensor([[0, 1, 1], [2, 2, 2]]), torch.tensor([[False, False, True], [False, True, True]])
    assert_close(set_attention(q, k, v, inds, mask, num_heads=1), torch.tensor([[2., 0.], [2., 0.], [7., 5.]]))
    assert_close(set_attention(q, k, v, inds, num_heads=1)[:2], torch.tensor([[7 / 3, 0.], [7 / 3, 0.]]))      # without a mask a repeat counts twice


def test_gradients():
    (q, k, v), g = some(13, 4, 6, 0, torch.double)
    inds, mask = table(13, 4, g)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: set_attention(*qkv, inds, mask, num_heads=2), inputs)
    a, b = (torch.autograd.grad(f.square().sum(), inputs) for f in (set_attention(*inputs, inds, mask, num_heads=2), naive_set_attention(*inputs, inds, mask, 2)))
    for x, y in zip(a, b): assert_close(x, y)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    (q, k, v), g = some(20, 8, 8, 1)
    inds, mask = table(20, 5, g)
    out = set_attention(*(t.to(dtype) for t in (q, k, v)), inds, mask, num_heads=2)
    assert out.dtype == dtype
    assert_close(out.float(), set_attention(q, k, v, inds, mask, num_heads=2), atol=.05, rtol=.05)


def test_scale_dropout_and_int32():
    (q, k, v), g = some(20, 8, 8, 2)
    inds, mask = table(20, 5, g)
    assert_close(set_attention(q, k, v, inds, mask, num_heads=2, scale=.3), set_attention(q * .3 * 2, k, v, inds, mask, num_heads=2))
    assert_close(set_attention(q, k, v, inds.int(), mask, num_heads=2), set_attention(q, k, v, inds, mask, num_heads=2))
    dropped = torch.stack([set_attention(q, k, torch.ones_like(v), inds, mask, num_heads=2, dropout_p=.5) for _ in range(400)])
    assert dropped.std(0).min() > .1 and (dropped.mean(0) - 1).abs().max() < .3


def test_no_tokens():
    e = torch.zeros(0, 8)
    assert set_attention(e, e, e, torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4, dtype=torch.bool), num_heads=2).shape == (0, 8)


@torch.no_grad()
def test_export_and_compile(unchecked):
    (q, k, v), g = some(20, 8, 8, 3)
    inds, mask = table(20, 5, g)
    slots = first_slots(inds, 20)
    fast = torch.compile(lambda *given: set_attention(*given, num_heads=2), backend='aot_eager', fullgraph=True)
    assert_close(fast(q, k, v, inds, mask, slots), set_attention(q, k, v, inds, mask, slots, num_heads=2))


def test_first_slots():
    assert first_slots(torch.tensor([[2, 0, 0], [1, 1, 2]]), 3).tolist() == [1, 3, 0]
    for inds, n, message in (([[0, 1]], 3, '1 are in no set'), ([[0, 3]], 3, r'0 … 2, got 0 … 3'), ([[-1, 0]], 1, r'got -1')):
        with pytest.raises(ValueError, match=message): first_slots(torch.tensor(inds), n)


@pytest.mark.parametrize('wrong, message', [(dict(num_heads=3), 'num_heads.*8.*3'), (dict(num_heads=0), 'num_heads'), (dict(mask=torch.zeros(2, 5, dtype=torch.bool)), 'mask'), (dict(slots=torch.zeros(4, dtype=torch.long)), 'slots')])
def test_errors(wrong, message, unchecked):
    (q, k, v), _ = some(10, 8, 8, 0)
    arguments = dict(inds=torch.arange(10).view(2, 5), mask=None, slots=None, num_heads=2) | wrong
    if 'mask' in wrong: arguments['inds'] = torch.arange(10).view(5, 2)
    with pytest.raises(ValueError, match=message): set_attention(q, k, v, **arguments)
