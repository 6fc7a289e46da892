"""kernels.entropy_triton: the kernel, run by Python where there is no GPU, against loops over queries; the sizes of its tiles. As a backend among others, compiled and on a GPU: test_entropy_attention.py."""
import itertools, math

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip('triton')
from vitbook.kernels import entropy_triton as T  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def seeded(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def by_hand(q, k, v, bias=None, mask=None, causal=False, scale=None):
    "Output, entropy and log-sum-exp of one query after the other, in float64."
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    q, k, v = (x.double() for x in (q, k, v))
    bias = torch.zeros(b, h, n, m, device=q.device).double() if bias is None else bias.double().expand(b, h, n, m)
    mask = torch.ones(b, h, n, m, dtype=torch.bool, device=q.device) if mask is None else mask.expand(b, h, n, m)
    rows = []
    for i, j, y in itertools.product(range(b), range(h), range(n)):
        seen = [x for x in range(m) if mask[i, j, y, x] and (not causal or x <= y + m - n)]
        if not seen:
            rows.append(torch.cat([v.new_zeros(v.shape[-1] + 1), v.new_full((1,), -math.inf)]))
            continue
        s = k[i, j // (h // g), seen] @ q[i, j, y] * (d ** -.5 if scale is None else scale) + bias[i, j, y, seen]
        p = s.softmax(0)
        rows.append(torch.cat([p @ v[i, j // (h // g), seen], -(p * p.log()).sum()[None], s.logsumexp(0)[None]]))
    found = torch.stack(rows).view(b, h, n, -1)
    return found[..., :-2], found[..., -2], found[..., -1]


OPTIONS = {'plain': {}, 'causal': dict(causal=True), 'scale': dict(scale=.3), 'shared key heads': dict(g=2), 'one key head': dict(g=1, causal=True),
           'bias': dict(bias=seeded(2, 4, 19, 21)), 'bias of a head': dict(bias=seeded(4, 19, 1)), 'bias of keys': dict(bias=seeded(21)),
           'mask': dict(mask=(torch.arange(21) > 2) & (torch.arange(19) != 4)[:, None]), 'keys hidden': dict(mask=(torch.arange(21) < torch.tensor([[9], [21]]))[:, None, None]),
           'all': dict(g=2, causal=True, scale=.2, bias=seeded(1, 4, 19, 21), mask=(torch.arange(21) != 3)[None].expand(19, -1))}


@pytest.mark.parametrize('option', OPTIONS)
def test_outputs_and_gradients(option):
    given = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in OPTIONS[option].items()}
    g = given.pop('g', 4)
    leaves = [seeded(2, 4, 19, 8), seeded(2, g, 21, 8, seed=1), seeded(2, g, 21, 12, seed=2)] + ([given.pop('bias')] if 'bias' in given else [])
    found = []
    for f in (T.triton_attention, by_hand):
        inputs = [x.clone().requires_grad_() for x in leaves]
        outs = f(*inputs[:3], **given, **(dict(bias=inputs[3]) if len(inputs) > 3 else {}))
        loss = sum((x.double().masked_fill(x == -math.inf, 0) * seeded(*x.shape, seed=5)).sum() for x in outs)
        found.append([*(x.double() for x in outs), *(x.double() for x in torch.autograd.grad(loss, inputs))])
    for got, want in zip(*found, strict=True): assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('backward', [False, True])
def test_tiles(dtype, backward):
    "Powers of two that shrink as the heads grow; both widths count."
    area = []
    for d in (8, 64, 65, 128, 256):
        tile = T.tiles(d, 8, dtype, backward)
        assert tile == T.tiles(8, d, dtype, backward) and all(math.log2(tile[x]).is_integer() and tile[x] >= 16 for x in ('ROWS', 'COLS')) and tile['num_warps'] in (4, 8)
        area.append(tile['ROWS'] * tile['COLS'])
    assert area == sorted(area, reverse=True) and area[0] > area[-1]
    assert T.tiles(64, 64) == T.tiles(64, 64, torch.bfloat16, False)


def test_what_is_said_of_a_kernel():
    with pytest.raises(ValueError, match="kernel must be one of forward, to_queries, to_keys, got 'all'"): T.resources('all')
    if T.INTERPRETED:
        with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1'): T.resources('forward')


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(T, 'triton', None)
    for call in (lambda: T.resources('forward'), lambda: T.triton_attention(*[seeded(1, 1, 2, 4)] * 3)):
        with pytest.raises(ImportError, match='vitbook.gpu'): call()
