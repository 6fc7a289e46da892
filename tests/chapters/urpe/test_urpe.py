"""dynamics.urpe: what no relative Transformer can do whatever its size, what the factor changes, both forms of the attention, the official code's numbers, and bad input."""
import copy, io, math, pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from sheets import sheets
from vitbook.dynamics import urpe as U
from vitbook.layers.attention import attention, masked_softmax
from vitbook.layers.block import Block
from vitbook.layers.position import RelativePositionBias, apply_rope, rope_1d
from vitbook.registry import create_model, list_models, model_info
from vitbook.vit import VisionTransformer

seeds = st.integers(0, 10_000)


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, dtype=torch.double): return torch.randn(*shape, generator=rng(seed), dtype=dtype)
def qkv(seed=0, b=2, h=3, n=7, d=5, m=None, dtype=torch.double): return [normal(b, h, k, d, seed=seed + i, dtype=dtype) for i, k in enumerate((n, m or n, m or n))]
def shaken(module, seed=0, by=.5):
    "All parameters moved at random, so that zeros and ones hide nothing."
    g = rng(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return module.eval()


def loops(q, k, v, B, C, mask=None, causal=False):
    "The equation, entry by entry."
    b, h, n, d = q.shape
    m, out = k.shape[2], torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for x in range(b):
        for y in range(h):
            for i in range(n):
                seen = [j for j in range(m) if (not causal or j <= i + m - n) and (mask is None or mask.expand(b, h, n, m)[x, y, i, j])]
                if not seen: continue
                s = torch.stack([q[x, y, i] @ k[x, y, j] / d ** .5 + B[y, i, j] for j in seen]).softmax(0)
                out[x, y, i] = sum(s[a] * C[y, i, j] * v[x, y, j] for a, j in enumerate(seen))
    return out


# Toeplitz matrices

@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 5), st.integers(1, 4), seeds)
def test_toeplitz(n, more, past, heads, seed):
    n_max, m = n + past + more, n + past
    table = normal(2 * n_max - 1, heads, seed=seed)
    M = U.toeplitz(table, n, m)
    assert M.shape == (heads, n, m) and table.numel() == (2 * n_max - 1) * heads
    assert torch.equal(M[:, 1:, 1:], M[:, :-1, :-1])
    for i in range(n):
        for j in range(m): assert torch.equal(M[:, i, j], table[j - (i + m - n) + n_max - 1])       # queries are the last n of m places
    low = m // 3
    assert torch.equal(U.toeplitz_columns(table, n, m, low, m), M[..., low:])


def test_toeplitz_orientation_centre_and_limits():
    table = torch.arange(7.)[:, None]                                     # offsets -3 … 3
    assert U.toeplitz(table, 4)[0].tolist() == [[3, 4, 5, 6], [2, 3, 4, 5], [1, 2, 3, 4], [0, 1, 2, 3]]     # j - i + n - 1: to the right is later
    assert U.toeplitz(table, 2)[0].tolist() == [[3, 4], [2, 3]]           # the middle of the table
    for wrong, match in [(lambda: U.toeplitz(table, 5), 'table has 7 rows'), (lambda: U.toeplitz(table[:6], 2), 'odd'), (lambda: U.toeplitz(table, 0), 'n must'),
                         (lambda: U.toeplitz(table, 3, 2), 'n must'), (lambda: U.RelativeTable(4, 1)(5), 'max_len is 4, got 5'), (lambda: U.RelativeTable(0, 1), 'max_len')]:
        with pytest.raises(ValueError, match=match): wrong()


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_diagonal_sums_is_the_adjoint_of_toeplitz(n, w, seed):
    X, table = normal(2, n, w, seed=seed), normal(n + w - 1, 2, seed=seed + 1)
    i, j = torch.arange(n)[:, None], torch.arange(w)
    M = U.by_class(table, j - i + n - 1)
    assert_close((M * X).sum(), (table.T * U.diagonal_sums(X)).sum())
    assert_close(U.diagonal_sums(X)[0, 0], X[0, -1, 0])                   # the lower left corner comes first


@given(st.integers(2, 60), st.sampled_from([4, 8, 16, 32, 64]), st.sampled_from([40, 64, 128]))
def test_buckets(max_len, num_buckets, max_distance):
    rows = U.offset_buckets(max_len, num_buckets, max_distance)
    assert rows.shape == (2 * max_len - 1,) and rows.min() == 0 and rows.max() <= num_buckets
    assert (rows.diff() >= 0).all()                                       # never back
    zero, exact = rows[max_len - 1].item(), num_buckets // 4
    assert zero - rows[max_len - 2] == 3 and rows[max_len] - zero == 1     # two unused rows before offset 0
    near = rows[max_len - 1:max_len - 1 + exact]
    assert torch.equal(near, zero + torch.arange(len(near)))               # a row each, as long as they are near
    table = U.RelativeTable(max_len, 2, None, num_buckets, max_distance)
    assert table.weight.shape == (num_buckets + 1, 2)
    longer = U.toeplitz(table(2 * max_len).table, 2 * max_len)             # any length: far offsets share the last row
    assert torch.equal(longer[:, :max_len, :max_len], U.toeplitz(table(max_len).table, max_len))
    assert torch.equal(longer[:, 0, -1], table.weight[rows[-1]]) and torch.equal(longer[:, -1, 0], table.weight[rows[0]])


def test_bucket_arguments():
    for arguments, match in [((8, 3), 'num_buckets'), ((8, 64, 16), 'max_distance'), ((0,), 'max_len')]:
        with pytest.raises(ValueError, match=match): U.offset_buckets(*arguments)
    rows = U.offset_buckets(200)
    assert rows[199 + 127] == rows[199 + 128] == rows[-1] and len(rows.unique()) == 63    # from max_distance on one row; 65 rows, two unused


def test_grid_table():
    h, w = 2, 3
    table = U.RelativeTable2d((h, w), 2, num_prefix=2)
    assert table.weight.shape == ((2 * h - 1) * (2 * w - 1) + 3, 2)
    M = table(8)
    at = lambda dy, dx: table.weight[(dy + h - 1) * (2 * w - 1) + dx + w - 1]
    for i in range(6):
        for j in range(6): assert torch.equal(M[:, 2 + i, 2 + j], at(j // w - i // w, j % w - i % w))
    assert torch.equal(M[:, :2, :2], table.weight[-1][:, None, None].expand(2, 2, 2))
    assert torch.equal(M[:, 0, 2:], table.weight[-3][:, None].expand(2, 6)) and torch.equal(M[:, 2:, 1], table.weight[-2][:, None].expand(2, 6))
    assert U.RelativeTable2d(3, 4).weight.shape == (25, 4)
    with pytest.raises(ValueError, match='img_size'): table(7)


# the attention

@given(seeds, st.booleans(), st.booleans(), st.integers(0, 3))
@settings(max_examples=15)
def test_both_forms_are_the_equation(seed, causal, padded, past):
    n, m = 5, 5 + past
    q, k, v = qkv(seed, n=n, m=m)
    tables = [U.Toeplitz(normal(2 * 9 - 1, 3, seed=seed + i)) for i in (7, 8)]
    B, C = (U.toeplitz(t.table, n, m) for t in tables)
    mask = torch.arange(m) < torch.tensor([m - 2, m])[:, None] if padded else None
    mask = None if mask is None else mask[:, None, None]
    want = loops(q, k, v, B, C, mask, causal)
    rest = dict(mask=mask, causal=causal)
    assert_close(U.urpe_attention(q, k, v, bias=B, factor=C, **rest), want)
    assert_close(U.urpe_attention(q, k, v, bias=tables[0], factor=tables[1], **rest), want)
    for size in (1, 2, 3, 100):
        assert_close(U.blockwise_urpe_attention(q, k, v, bias=tables[0], factor=tables[1], block_size=size, **rest), want)
        assert_close(U.blockwise_urpe_attention(q, k, v, bias=B, factor=C[None], block_size=size, **rest), want)
    assert_close(U.log_factor_attention(q, k, v, bias=B, factor=C, **rest), want)


@pytest.mark.parametrize('backend', ['dense', 'blockwise'])
def test_a_factor_of_one_is_relative_attention(backend):
    q, k, v = qkv(dtype=torch.float)
    B, one = normal(3, 7, 7, dtype=torch.float), U.Toeplitz(torch.ones(13, 3))
    ours = U.urpe_attention(q, k, v, bias=B, factor=one, backend=backend)
    assert_close(ours, attention(q, k, v, bias=B), rtol=0, atol=1e-6)
    assert_close(U.urpe_attention(q, k, v, factor=one, backend=backend), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-6)
    assert_close(U.urpe_attention(q, k, v, bias=0 * B, factor=one, backend=backend), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-6)
    assert not torch.allclose(U.urpe_attention(q, k, v, factor=B, backend=backend), F.scaled_dot_product_attention(q, k, v), atol=.01)


@given(seeds)
def test_row_sums(seed):
    q, k, v = qkv(seed)
    C = U.toeplitz(normal(13, 3, seed=seed + 5), 7)
    _, W, A = U.urpe_attention(q, k, v, bias=normal(3, 7, 7, seed=seed), factor=C, return_weights=True)
    assert_close(A.sum(-1), torch.ones(2, 3, 7).double())
    assert_close(W, A * C)
    for i in range(7): assert_close(W.sum(-1)[:, :, i], sum(A[:, :, i, j] * C[:, i, j] for j in range(7)))


@pytest.mark.parametrize('n', [1, 2, 5, 32])
def test_position_vector_of_the_step(n):
    zero = torch.zeros(1, 2, n, 4).double()
    W = U.urpe_attention(zero, zero, zero, factor=U.toeplitz(U.step_table(n + 3, 2).double(), n), return_weights=True).weights
    assert_close(W.sum(-1)[0, 0], (n - torch.arange(n)).double() / n, rtol=0, atol=1e-15)


@pytest.mark.parametrize('scale', [-2., 0., .5, 3.])
def test_scaling_the_factor_scales_the_branch(scale):
    for backend in ('dense', 'blockwise'):
        q, k, v = qkv()
        table = normal(13, 3)
        run = lambda s: U.urpe_attention(q, k, v, bias=normal(3, 7, 7), factor=U.Toeplitz(s * table), backend=backend)
        assert_close(run(scale), scale * run(1.))
    block = shaken(U.URPEBlock(12, 3, norm_position='none', act='relu', qkv_bias=False))
    x, C = normal(2, 7, 12, dtype=torch.float), normal(3, 7, 7, dtype=torch.float)
    branch = lambda s: block.attn(x, factor=s * C)
    assert_close(branch(scale), scale * branch(1.), atol=1e-5, rtol=1e-4)
    if scale == 0:
        assert (branch(0.) == 0).all()
        think = lambda x: x + block.fc2(block.fc1(x).relu())
        assert_close(block(x, factor=0 * C), think(x))                    # the residual alone


@given(seeds, st.integers(1, 6))
def test_shift(seed, by):
    "With tables that reach `w` places and content that stays `w` away from the ends, moving the content moves the output."
    n, w, h = 20, 3, 2
    B, C = torch.full((2 * n - 1, h), -math.inf).double(), normal(2 * n - 1, h, seed=seed)
    B[n - 1 - w:n + w] = normal(2 * w + 1, h, seed=seed + 1)
    q, k, v = qkv(seed, h=h, n=n)
    run = lambda *x: U.urpe_attention(*x, bias=U.toeplitz(B, n), factor=U.toeplitz(C, n))
    moved = run(*(t.roll(by, 2) for t in (q, k, v)))
    inside = slice(w + by, n - w)
    assert_close(moved[:, :, inside], run(q, k, v).roll(by, 2)[:, :, inside])
    assert not torch.allclose(moved, run(q, k, v))


@given(seeds, st.booleans())
@settings(max_examples=15)
def test_gradients(seed, causal):
    "The table's gradient is the sum over the diagonals of the dense one's, and both forms have the same gradients."
    n = 6
    q, k, v = (t.requires_grad_() for t in qkv(seed, b=2, h=2, n=n, d=3))
    tB, tC, g = normal(2 * n + 3, 2, seed=seed).requires_grad_(), normal(2 * n + 3, 2, seed=seed + 1).requires_grad_(), normal(2, 2, n, 3, seed=seed + 2)
    mask = torch.ones(2, 1, 1, n, dtype=torch.bool); mask[0, ..., 4:] = False
    B, C = (U.toeplitz(t, n).detach().requires_grad_() for t in (tB, tC))
    dense = torch.autograd.grad((U.urpe_attention(q, k, v, bias=B, factor=C, mask=mask, causal=causal) * g).sum(), (q, k, v, B, C))
    for run in (lambda: U.urpe_attention(q, k, v, bias=U.Toeplitz(tB), factor=U.Toeplitz(tC), mask=mask, causal=causal, backend='dense'),
                lambda: U.blockwise_urpe_attention(q, k, v, bias=U.Toeplitz(tB), factor=U.Toeplitz(tC), mask=mask, causal=causal, block_size=4)):
        got = torch.autograd.grad((run() * g).sum(), (q, k, v, tB, tC))
        for a, b in zip(got[:3], dense): assert_close(a, b)
        for a, b in zip(got[3:], dense[3:]):
            assert_close(a[2:-2], U.diagonal_sums(b).T)                   # the table has two offsets more on each side than 6 tokens use
            assert (a[:2] == 0).all() and (a[-2:] == 0).all()
            for offset in range(1 - n, n): assert_close(a[offset + n + 1], b.diagonal(offset, -2, -1).sum(-1))
    blocks = torch.autograd.grad((U.blockwise_urpe_attention(q, k, v, bias=B, factor=C, mask=mask, causal=causal, block_size=4) * g).sum(), (q, k, v, B, C))
    for a, b in zip(blocks, dense): assert_close(a, b)


def test_gradcheck():
    q, k, v = (t.requires_grad_() for t in qkv(b=1, h=2, n=4, d=2))
    B, C = normal(7, 2).requires_grad_(), normal(7, 2, seed=1).requires_grad_()
    for backend in ('dense', 'blockwise'):
        assert torch.autograd.gradcheck(lambda q, k, v, B, C: U.urpe_attention(q, k, v, bias=U.Toeplitz(B), factor=U.Toeplitz(C), backend=backend), (q, k, v, B, C))
    single = normal(7, 1).requires_grad_()                                # one table for all heads
    assert torch.autograd.gradcheck(lambda C: U.urpe_attention(q, k, v, factor=U.Toeplitz(C), backend='blockwise'), (single,))
    wide = normal(1, 1, 4, 1).requires_grad_()                            # a factor of the query alone
    assert torch.autograd.gradcheck(lambda C: U.urpe_attention(q, k, v, bias=C, factor=C, backend='blockwise'), (wide,))


@pytest.mark.parametrize('backend', ['dense', 'blockwise'])
def test_padding(backend):
    q, k, v = qkv(dtype=torch.float)
    C = U.toeplitz(normal(13, 3, dtype=torch.float), 7).clone()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool); mask[0, ..., 5:] = False; mask[1] = False
    run = lambda C, v, **kw: U.urpe_attention(q, k, v, factor=C, mask=mask, backend=backend, **kw)
    out = run(C, v)
    loud, other = C.clone(), v.clone(); loud[..., 5:] = 1e30; other[0, :, 5:] = 1e5
    assert_close(run(loud, other)[0], out[0])                             # padded keys add nothing, however large their factor
    assert (out[1] == 0).all() and out.isfinite().all()                   # nothing to look at: zero, no nan
    for t in (q, k, v): t.requires_grad_()
    C.requires_grad_()
    (run(C, v) ** 2).sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, C)) and (v.grad[0, :, 5:] == 0).all() and (k.grad[1] == 0).all() and (C.grad[..., 5:] == 0).all()


def test_dropout_comes_after_the_product():
    torch.manual_seed(0)
    q, k, _ = qkv(n=40, dtype=torch.float)
    eye, C = torch.eye(40).expand(2, 3, 40, 40), U.toeplitz(normal(79, 3, dtype=torch.float), 40)
    out, W, A = U.urpe_attention(q, k, eye, factor=C, dropout_p=.25, return_weights=True)   # values = identity: the output is the dropped matrix
    kept = out != 0
    assert .7 < kept.float().mean() < .8
    assert_close(out[kept], (W / .75)[kept])
    assert_close(A.sum(-1), torch.ones(2, 3, 40))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = qkv(dtype=torch.float)
    B, C = U.Toeplitz(normal(13, 3, dtype=torch.float)), U.Toeplitz(1 + .3 * normal(13, 3, seed=2, dtype=torch.float))
    want = U.urpe_attention(q, k, v, bias=B, factor=C)
    for backend in ('dense', 'blockwise'):
        out = U.urpe_attention(*(t.to(dtype) for t in (q, k, v)), bias=B, factor=C, backend=backend)
        assert out.dtype == dtype
        assert_close(out.float(), want, rtol=.03, atol=.03)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for backend in ('dense', 'blockwise'): assert_close(U.urpe_attention(q, k, v, bias=B, factor=C, backend=backend).float(), want, rtol=.03, atol=.03)
    if dtype == torch.bfloat16: assert U.urpe_attention(100 * q.to(dtype), 100 * k.to(dtype), v.to(dtype), factor=C).isfinite().all()


def test_what_urpe_attention_refuses(unchecked):
    q, k, v = qkv()
    table = U.Toeplitz(normal(13, 3))
    for arguments, match in [(dict(backend='flash'), 'backend must'), (dict(backend='blockwise', dropout_p=.1), 'no dropout'), (dict(backend='blockwise', return_weights=True), 'no weights'),
                             (dict(factor=normal(5, 5)), 'factor must broadcast'), (dict(bias=normal(2, 7, 7)), 'bias must broadcast'), (dict(mask=torch.ones(7, 7)), 'dtype bool'),
                             (dict(factor=U.Toeplitz(normal(11, 3))), 'factor must be a table'), (dict(factor=U.Toeplitz(normal(13, 2))), 'factor must be a table'),
                             (dict(bias=U.Toeplitz(normal(14, 3))), 'bias must be a table')]:
        with pytest.raises(ValueError, match=match): U.urpe_attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match='q, k, v'): U.urpe_attention(q, k[:, :2], v[:, :2], factor=table)


def test_log_factor_form_takes_any_sign_and_any_kernel():
    q, k, v = qkv()
    B, C = normal(3, 7, 7), normal(3, 7, 7, seed=1)
    C[0], C[1] = C[0].abs(), -C[1].abs()
    C[2, 3] = 0                                                            # a row of zeros
    def kernel(q, k, v, *, bias, mask, causal, scale):                     # stands for a fused kernel that gives output and log-sum-exp
        s = q @ k.mT * q.shape[-1] ** -.5 + (0 if bias is None else bias)
        return masked_softmax(s) @ v, s.logsumexp(-1)
    for attend in ({}, dict(attend=kernel)):
        assert_close(U.log_factor_attention(q, k, v, bias=B, factor=C, **attend), U.urpe_attention(q, k, v, bias=B, factor=C))
        assert_close(U.log_factor_attention(q, k, v, factor=C, **attend), U.urpe_attention(q, k, v, factor=C))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, B)]
    for got, want in zip(*(torch.autograd.grad(f(*leaves[:3], bias=leaves[3], factor=C, causal=True).square().sum(), leaves) for f in (U.log_factor_attention, U.urpe_attention))): assert_close(got, want)


# what no relative Transformer can do

TOKENS = dict(vocab_size=11, max_len=24, padding_idx=None)

def alike(model, n=16, token=5, c=None, **rest):
    tokens = torch.full((2, n), token)
    tokens[1] = token + 1
    return U.row_spread(model(tokens, **rest)).max().item()


@given(st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from(['offset', 'bucket', None]), st.sampled_from(['post', 'pre', 'none']), st.sampled_from(['relu', 'gelu', 'tanh']),
       st.booleans(), st.booleans(), st.booleans(), seeds)
def test_identical_tokens_stay_identical(depth, heads, bias, norm, act, shared, causal, embed_norm, seed):
    torch.manual_seed(seed)
    model = shaken(U.URPEncoder(**TOKENS, embed_dim=16, depth=depth, num_heads=heads, bias=bias, factor=None, norm_position=norm, act=act, shared_tables=shared, embed_norm=embed_norm), seed, .2)
    x = model(torch.full((1, 16), 3), causal=causal)
    assert U.row_spread(x).item() < 1e-5 * max(1., x.abs().max().item())
    torch.manual_seed(seed)
    constant = shaken(U.URPEncoder(**TOKENS, embed_dim=16, depth=depth, num_heads=heads, bias=bias, norm_position=norm, act=act, shared_tables=shared, embed_norm=embed_norm), seed, .2)
    with torch.no_grad():
        for name, p in constant.named_parameters():
            if 'factor_table' in name: p.fill_(1.7)                        # another constant than 1: still no positions, unless rows are cut short
    if not causal: assert alike(constant) < 1e-4 * max(1., constant(torch.full((1, 16), 5)).abs().max().item())


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(), seeds)
def test_a_factor_tells_them_apart(depth, heads, causal, seed):
    torch.manual_seed(seed)
    model = shaken(U.URPEncoder(**TOKENS, embed_dim=16, depth=depth, num_heads=heads), seed, .2)
    assert alike(model, causal=causal) > 1e-4                              # random C
    with torch.no_grad(): model.factor_table.weight.fill_(1.)
    assert alike(model, causal=causal) < 1e-5


def test_the_official_size_of_the_effect():
    "C = 1 + 0.1 noise: spreads about 1e-3, C = 1 about 1e-7."
    torch.manual_seed(0)
    model = U.URPEncoder(1011, embed_dim=96, depth=3, num_heads=12).eval()
    x = torch.full((1, 128), 20)
    with torch.no_grad():
        assert U.row_spread(model(x)) < 1e-5
        model.factor_table.weight.add_(.1 * torch.randn_like(model.factor_table.weight))
        assert U.row_spread(model(x)) > 1e-4


def test_padding_and_masks_do_not_help_but_absolute_positions_do():
    torch.manual_seed(0)
    rpe = shaken(U.URPEncoder(11, 24, 16, 3, 4, factor=None, padding_idx=1))
    tokens = torch.full((1, 16), 5); tokens[0, 12:] = 1
    assert U.row_spread(rpe(tokens)[:, :12]) < 1e-5
    for positions in ('learned', 'sinusoidal'):
        assert alike(shaken(U.URPEncoder(**TOKENS, embed_dim=16, num_heads=4, factor=None, positions=positions))) > .01


@given(st.integers(1, 3), st.sampled_from(['swin', 'rope', 'both', 'mask']), seeds)
def test_swin_bias_rotary_logits_and_windows_do_not_help(depth, kind, seed):
    torch.manual_seed(seed)
    blocks = [shaken(Block(16, 2), seed + i, .2) for i in range(depth)]
    swin = RelativePositionBias((4, 4), 2)
    given = dict(bias=shaken(swin, seed)() if kind in ('swin', 'both') else None, rope=rope_1d(16, 8) if kind in ('rope', 'both') else None,
                 mask=torch.rand(16, 16, generator=rng(seed)).gt(.5) | torch.eye(16).bool() if kind == 'mask' else None)
    x = normal(1, 1, 16, seed=seed, dtype=torch.float).expand(1, 16, 16)
    for block in blocks: x = block(x, **given)
    assert U.row_spread(x) < 1e-5 * max(1., x.abs().max().item())


def test_positions_in_the_values_do_help():
    x = normal(1, 1, 1, 8, dtype=torch.float).expand(1, 1, 16, 8)
    cos, sin = rope_1d(16, 8)
    turned = apply_rope(x, cos, sin)
    spread = lambda y: U.row_spread(y[:, 0])
    assert spread(attention(turned, turned, x)) < 1e-5                     # rotary in the logits
    assert spread(attention(turned, turned, turned)) > .01                 # rotary in the values
    assert spread(attention(turned, turned, x + cos)) > .001               # a position added to the values


@given(seeds, st.integers(2, 20))
def test_the_distance_is_fixed(seed, n):
    "No tensor of equal rows is nearer to a target than the spread of its rows; and on identical tokens the loss of the index task is at least ln n."
    target, row = normal(2, n, 3, seed=seed), normal(2, 1, 3, seed=seed + 1)
    floor = U.distance_floor(target)
    assert ((target - row).square().mean((1, 2)).sqrt() >= floor - 1e-12).all()
    assert_close((target - target.mean(1, keepdim=True)).square().mean((1, 2)).sqrt(), floor)
    logits = (3 * normal(1, 1, n, seed=seed)).expand(1, n, n)              # what a relative Transformer says of n identical tokens
    assert U.task_loss(logits, U.Task(torch.zeros(1, n).long(), torch.arange(n)[None], -100)) >= math.log(n) - 1e-9


# the sufficient condition

@given(seeds, st.integers(2, 12))
def test_conditions(seed, n):
    q, k = normal(3, 2, n, 4, seed=seed), normal(3, 2, n, 4, seed=seed + 1)
    weights = lambda q, k, **kw: U.urpe_attention(q, k, k, return_weights=True, **kw).weights
    scores, step = q @ k.mT / 2, U.toeplitz(U.step_table(n, 2).double(), n)
    assert U.is_attentive(weights(q, k, factor=torch.ones(2, n, n).double()), scores)          # C = 1
    assert not U.is_attentive(weights(q, k, factor=step), scores)
    assert U.is_position_aware(weights(0 * q, k, factor=step)[:, 0])                           # q = 0, C the step
    assert not U.is_position_aware(weights(q, k, factor=step)[:, 0], 1e-4)                     # row sums depend on the input
    assert not U.is_position_aware(weights(0 * q, k, bias=normal(2, n, n, seed=seed))[:, 0])   # no bias makes row sums differ
    with pytest.raises(ValueError, match='two inputs'): U.is_position_aware(weights(q, k)[:1, 0])


@given(seeds, st.integers(1, 20), st.integers(1, 6))
def test_urpe_makes_absolute_positions(seed, n, c):
    E = normal(n, c, seed=seed)
    layer = U.PositionsFromURPE(E)
    x = 3 * normal(4, n, c, seed=seed + 1)
    assert_close(layer(x), x + E, rtol=0, atol=1e-10)


# tasks

def test_tasks():
    etp = U.even_token_prediction(1, 4, 10, generator=rng(0))
    a, b, c, d = etp.tokens[0].tolist()
    assert etp.labels[0].tolist() == [b, d, 10, 10]
    pi = U.position_identification(3, 6, 10)
    assert pi.labels.tolist() == [list(range(6))] * 3 and pi.tokens.max() < 10
    odd = U.even_token_prediction(2, 7, 5)
    assert torch.equal(odd.labels[:, :3], odd.tokens[:, 1:6:2]) and (odd.labels[:, 3:] == 5).all()
    assert torch.equal(U.even_token_prediction(2, 8, 9, generator=rng(3)).tokens, U.even_token_prediction(2, 8, 9, generator=rng(3)).tokens)


def test_official_ids():
    pi, etp = U.position_identification(200, 128, 1000, official=True), U.even_token_prediction(200, 128, 1000, official=True)
    assert pi.labels[0].tolist() == list(range(1, 129)) and pi.ignore == 1                     # position 0 has the padding's id
    for t in (pi, etp): assert t.tokens.min() == 11 and t.tokens.max() == 990
    assert (etp.labels[:, 64:] == 998).all() and torch.equal(etp.labels[:, :64], etp.tokens[:, 1::2])
    logits = F.one_hot(pi.labels, 1011).float()
    assert U.task_accuracy(logits, pi) == 1
    logits[:, 0] = 0                                                                           # does not count
    assert U.task_accuracy(logits, pi) == 1 and U.task_loss(100 * logits, pi) < 1e-6
    logits[:, 1] = 0
    assert U.task_accuracy(logits, pi) == pytest.approx(126 / 127)
    with pytest.raises(ValueError, match='vocab'): U.position_identification(1, 4, 20, official=True)


# the official code

def build_attention(config, weights, inputs):
    model = U.URPEAttention(config['embed_dim'], config['num_heads'], qkv_bias=config.get('bias', True), proj_bias=config.get('bias', True)).eval()
    model.load_state_dict(U.join_qkv(weights))
    bias, mask = inputs.get('bias'), inputs.get('key_padding_mask')
    if inputs.get('attn_mask') is not None: bias = inputs['attn_mask'] + (0 if bias is None else bias)
    return dict(y=model(inputs['x'], bias=bias, factor=inputs.get('multiplier'), mask=None if mask is None else ~mask.bool()[:, None, None]))


def build_encoder(config, weights, inputs):
    states = U.URPEncoder.from_official(weights, config)(inputs['tokens'], inputs.get('segment_labels'), inputs.get('positions'), inputs.get('token_embeddings'), return_states=True)
    return {'embedded' if i == 0 else f'layer{i - 1}': x for i, x in enumerate(states)} | dict(last=states[-1], sentence_rep=states[-1][:, 0])


SHEETS = {sheet.name: sheet for sheet in sheets('urpe')}


@pytest.mark.parametrize('case, build', [('attention', build_attention), ('tiny', build_encoder)])
@torch.no_grad()
def test_parity(case, build):
    sheet = SHEETS[f'urpe__{case}']
    sheet.check(build(sheet.config, sheet.weights(), sheet.inputs()))


@torch.no_grad()
def test_parity_would_see_mistakes():
    sheet = SHEETS['urpe__tiny']
    weights = sheet.weights()
    for name, change in [('ur_rp_bias.weight', lambda w: w.flip(0)), ('rp_bias.weight', lambda w: w.flip(0)), ('ur_rp_bias.weight', torch.ones_like), ('emb_layer_norm.bias', lambda w: 1.02 * w)]:
        with pytest.raises(AssertionError): sheet.check(build_encoder(sheet.config, weights | {name: change(weights[name])}, sheet.inputs()))
    sheet = SHEETS['urpe__attention']
    inputs = sheet.inputs()
    with pytest.raises(AssertionError): sheet.check(build_attention(sheet.config, sheet.weights(), inputs | dict(multiplier=inputs['multiplier'].mT)))


def official_state(d=12, h=3, f=20, layers=2, vocab=15, **sizes):
    "Random weights under the official names."
    shape = {'embed_tokens.weight': (vocab, d)}
    for i in range(layers):
        for x in 'qkv': shape |= {f'layers.{i}.self_attn.{x}_proj.weight': (d, d), f'layers.{i}.self_attn.{x}_proj.bias': (d,)}
        shape |= {f'layers.{i}.self_attn.out_proj.weight': (d, d), f'layers.{i}.self_attn.out_proj.bias': (d,), f'layers.{i}.fc1.weight': (f, d), f'layers.{i}.fc1.bias': (f,),
                  f'layers.{i}.fc2.weight': (d, f), f'layers.{i}.fc2.bias': (d,)}
        for n in ('self_attn_layer_norm', 'final_layer_norm'): shape |= {f'layers.{i}.{n}.weight': (d,), f'layers.{i}.{n}.bias': (d,)}
    return {k: normal(*s, seed=i, dtype=torch.float) for i, (k, s) in enumerate((shape | sizes).items())}


def test_official_options():
    "Every option of the official constructor that changes the output does, and the encoder is put together as its equations say."
    base = dict(vocab_size=15, num_encoder_layers=2, embedding_dim=12, ffn_embedding_dim=20, num_attention_heads=3, max_seq_len=9, num_segments=0, use_position_embeddings=False, rel_pos=False, ur_attn=False)
    weights = official_state()
    tokens = torch.randint(3, 15, (2, 7), generator=rng(1))
    tokens[0, 5:] = 1
    x = weights['embed_tokens.weight'][tokens] * (tokens != 1)[..., None]
    norm = lambda x, at: F.layer_norm(x, (12,), weights[f'{at}.weight'], weights[f'{at}.bias'])
    lin = lambda x, at: F.linear(x, weights[f'{at}.weight'], weights[f'{at}.bias'])
    heads = lambda x: x.unflatten(-1, (3, 4)).transpose(1, 2)
    for i in range(2):
        at = f'layers.{i}'
        q, k, v = (heads(lin(x, f'{at}.self_attn.{s}_proj')) for s in 'qkv')
        p = (q @ k.mT / 2).masked_fill((tokens == 1)[:, None, None], -math.inf).softmax(-1)
        x = norm(x + lin((p @ v).transpose(1, 2).flatten(2), f'{at}.self_attn.out_proj'), f'{at}.self_attn_layer_norm')
        x = norm(x + lin(lin(x, f'{at}.fc1').relu(), f'{at}.fc2'), f'{at}.final_layer_norm')
    assert_close(U.URPEncoder.from_official(weights, base)(tokens), x, rtol=1e-4, atol=1e-5)

    table = lambda rows, seed=0: normal(rows, 3, seed=seed, dtype=torch.float)
    outs = {'base': x}
    for name, config, more in [
        ('gelu', dict(activation_fn='gelu'), {}), ('gelu_accurate', dict(activation_fn='gelu_accurate'), {}), ('tanh', dict(activation_fn='tanh'), {}), ('linear', dict(activation_fn='linear'), {}),
        ('norm', dict(encoder_normalize_before=True), {'emb_layer_norm.weight': torch.ones(12), 'emb_layer_norm.bias': torch.zeros(12)}), ('scale', dict(embed_scale=3.), {}),
        ('learned', dict(use_position_embeddings=True), {'embed_positions.weight': normal(11, 12, dtype=torch.float)}),
        ('learned, no offset', dict(use_position_embeddings=True, offset_positions_by_padding=False), {'embed_positions.weight': normal(9, 12, dtype=torch.float)}),
        ('sines', dict(use_position_embeddings=True, learned_pos_embedding=False), {'embed_positions._float_tensor': torch.zeros(1)}),
        ('quantised', dict(q_noise=.1), {'quant_noise.weight': normal(12, 12, dtype=torch.float)}),
        ('B', dict(rel_pos=True, rel_pos_unique=True), {'rp_bias.weight': table(17)}), ('C', dict(ur_attn=True, ur_attn_unique=True), {'ur_rp_bias.weight': table(17)}),
        ('B buckets', dict(rel_pos=True, rp_bucket=8, max_rp=9), {'rp_bias.weight': table(9)}), ('C buckets', dict(ur_attn=True, ur_rp_bucket=8, ur_max_rp=9), {'ur_rp_bias.weight': table(9)}),
        ('C buckets, nearer', dict(ur_attn=True, ur_rp_bucket=8, ur_max_rp=5), {'ur_rp_bias.weight': table(9)})]:
        outs[name] = U.URPEncoder.from_official(weights | more, base | config)(tokens)
        assert outs[name].isfinite().all() and outs[name].shape == (2, 7, 12)
    names = list(outs)
    for i, a in enumerate(names):
        for b in names[:i]: assert (outs[a] - outs[b]).abs().max() > 1e-5, f'{a} and {b} give the same'
    with pytest.raises(ValueError, match='unknown arguments'): U.URPEncoder.from_official(weights, base | dict(rel_posi=True))
    with pytest.raises(ValueError, match='missing'): U.URPEncoder.from_official(weights, base | dict(rel_pos=True))

    segments = torch.tensor([[0, 0, 1, 1, 1, 0, 0]] * 2)
    two = U.URPEncoder.from_official(weights | {'segment_embeddings.weight': normal(2, 12, dtype=torch.float)}, base | dict(num_segments=2))
    assert_close(two(tokens), x, rtol=1e-4, atol=1e-5)
    assert (two(tokens, segments) - x).abs().max() > .1
    assert_close(two(tokens, embedded=weights['embed_tokens.weight'][tokens]), x, rtol=1e-4, atol=1e-5)


def test_official_buckets_by_hand():
    "The rule of the official code, number by number in Python."
    def row(offset, half, exact, far):
        n = abs(offset)
        b = n if n < exact else min(half - 1, exact + int(torch.log(torch.tensor(n / exact)).item() / math.log(far / exact) * (half - exact)))
        return (b + 2 if offset >= 0 else -b)
    for max_len, num, far in [(12, 64, 128), (50, 16, 30), (200, 64, 128)]:
        raw = [row(o, num // 2, num // 4, far) for o in range(1 - max_len, max_len)]
        assert U.offset_buckets(max_len, num, far).tolist() == [r - min(raw) for r in raw]


def test_roberta_around_it():
    base = dict(vocab_size=15, num_encoder_layers=2, embedding_dim=12, ffn_embedding_dim=20, num_attention_heads=3, max_seq_len=9, num_segments=0, use_position_embeddings=False, rel_pos=False, ur_attn=False, activation_fn='gelu')
    head = {'lm_head.weight': normal(15, 12, seed=99, dtype=torch.float), 'lm_head.bias': normal(15, dtype=torch.float), 'lm_head.dense.weight': normal(12, 12, dtype=torch.float),
            'lm_head.dense.bias': normal(12, dtype=torch.float), 'lm_head.layer_norm.weight': normal(12, dtype=torch.float), 'lm_head.layer_norm.bias': normal(12, dtype=torch.float)}
    weights = official_state()
    whole = {f'encoder.sentence_encoder.{k}': v for k, v in weights.items()} | {f'encoder.{k}': v for k, v in head.items()}
    tokens = torch.randint(3, 15, (2, 7))
    untied = U.URPEncoder.from_official(whole, base | dict(untie_weights_roberta=True))
    x = U.URPEncoder.from_official(weights, base)(tokens)
    y = F.layer_norm(F.gelu(F.linear(x, head['lm_head.dense.weight'], head['lm_head.dense.bias'])), (12,), head['lm_head.layer_norm.weight'], head['lm_head.layer_norm.bias'])
    assert_close(untied(tokens), F.linear(y, head['lm_head.weight'], head['lm_head.bias']), rtol=1e-4, atol=1e-4)
    tied = U.URPEncoder.from_official(whole, base)
    assert torch.equal(tied.embed.weight, head['lm_head.weight']) and not hasattr(tied.head, 'weight') and tied(tokens).shape == (2, 7, 15)


# modules

def test_counts():
    for name, want in [('urpe_synthetic_nope', 22_041_600), ('urpe_synthetic_rpe', 22_044_660), ('urpe_synthetic', 22_047_720)]: assert model_info(name)['parameters'] == want
    size = lambda **kw: sum(p.numel() for p in U.URPEncoder(30, 10, 24, 3, 4, **kw).parameters())
    assert size() - size(factor=None) == 19 * 4 and size(shared_tables=False) - size() == 2 * 2 * 19 * 4
    assert size(bias='bucket') - size(bias=None) == 65 * 4
    vit = lambda **kw: sum(p.numel() for p in U.URPEVisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=10, **kw).parameters())
    plain = sum(p.numel() for p in VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=3, num_classes=10).parameters())
    assert vit(bias=False, factor=False, abs_pos=True) == plain and vit() == plain - 17 * 48 + 2 * 2 * (49 + 3) * 3 and vit(shared_tables=True) == plain - 17 * 48 + 2 * 52 * 3


def test_starts():
    model = U.URPEncoder(30, 10, 24, 1, 4)
    assert (model.factor_table.weight == 1).all() and .005 < model.bias_table.weight.std() < .05 and (model.embed.weight[1] == 0).all()
    assert U.URPEncoder(30, 10, 24, 1, 4, factor_init=None).factor_table.weight.abs().max() < .2
    torch.manual_seed(0); a = U.URPEncoder(30, 10, 24, 1, 4).eval()
    b = U.URPEncoder(30, 10, 24, 1, 4, factor=None).eval()
    b.load_state_dict({k: v for k, v in a.state_dict().items() if 'factor' not in k})
    x = torch.randint(2, 30, (2, 8))
    assert_close(a(x), b(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('shared', [True, False])
def test_with_urpe_is_the_old_model_until_it_learns(shared):
    torch.manual_seed(0)
    vit = shaken(VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=10, reg_tokens=1), by=.05)
    x = torch.rand(2, 3, 32, 32)
    before, names = vit(x), set(vit.state_dict())
    new = U.with_urpe(copy.deepcopy(vit), shared_tables=shared)
    assert_close(new(x), before, rtol=0, atol=1e-6)
    added = set(new.state_dict()) - names
    assert names < set(new.state_dict()) and len(added) == (2 if shared else 6) and all('_table.weight' in k for k in added)
    new(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())
    with torch.no_grad():
        for k, p in new.named_parameters():
            if 'factor_table' in k: p.add_(.3 * torch.randn_like(p))
    assert (new(x) - before).abs().max() > 1e-3
    twin = copy.deepcopy(new)
    assert torch.equal(twin(x), new(x))
    with torch.no_grad():
        for k, p in twin.named_parameters():
            if 'factor_table' in k: p.zero_()
    assert not torch.equal(twin(x), new(x))                               # the copy has tables of its own
    back = pickle.loads(pickle.dumps(new))
    assert torch.equal(back(x), new(x))
    buffer = io.BytesIO()
    torch.save(new.state_dict(), buffer)
    other = U.with_urpe(VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=10, reg_tokens=1), shared_tables=shared).eval()
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(other(x), new(x))


def test_with_urpe_on_sequences_and_what_it_refuses():
    model = nn.Sequential(Block(16, 4), Block(16, 4)).eval()
    x = torch.randn(2, 9, 16)
    before = model(x)
    assert_close(U.with_urpe(model, max_len=12)(x), before, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match='max_len is 12'): model(torch.randn(1, 13, 16))
    with pytest.raises(ValueError, match='no vitbook Attention'): U.with_urpe(nn.Linear(3, 3))
    with pytest.raises(ValueError, match='grid'): U.with_urpe(nn.Sequential(Block(16, 4)))
    with pytest.raises(ValueError, match='dynamic_img_size'): U.with_urpe(VisionTransformer(32, 8, embed_dim=48, depth=1, num_heads=3, dynamic_img_size=True))
    half = U.with_urpe(nn.Sequential(Block(16, 4)).to(torch.bfloat16), max_len=9)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_attention_module():
    tables = lambda: dict(bias_table=U.RelativeTable(9, 4), factor_table=U.RelativeTable(9, 4, 1.))
    attn = shaken(U.URPEAttention(16, 4, qk_norm=True, **tables()), by=.2)
    x, rope = torch.randn(2, 7, 16), rope_1d(6, 4)
    seen = attn.attend(x, rope=rope, causal=True)
    assert_close(seen.weights, seen.softmax * U.toeplitz(attn.factor_table.weight, 7))
    assert (seen.weights.triu(1) == 0).all()
    assert_close(attn.proj(seen.out.transpose(1, 2).flatten(2)), attn(x, rope=rope, causal=True))
    extra = torch.randn(4, 7, 7)
    assert_close(attn.attend(x, factor=extra).weights, attn.attend(x).weights * extra)
    assert (attn(x, bias=extra) - attn(x)).abs().max() > 1e-3
    attn.backend = 'blockwise'
    y = attn(x)
    attn.backend = 'auto'
    assert_close(y, attn(x))
    with pytest.raises(ValueError, match='num_heads'): U.URPEAttention(16, 3)


def test_block_is_the_layer_of_the_theory():
    "X + sum of heads of (softmax(X Wq (X Wk)^T + B) * C) X Wv Wo, then X + ReLU(X W1) W2; the scale lives in Wq."
    d, h, n = 8, 2, 6
    X, B, C = normal(1, n, d), normal(h, n, n), normal(h, n, n, seed=3)
    Wq, Wk, Wv = (normal(h, d, d // h, seed=s) for s in (4, 5, 6))
    Wo, W1, W2 = normal(h, d // h, d, seed=7), normal(d, 12, seed=8), normal(12, d, seed=9)
    Y = X + sum(((X @ Wq[i] @ (X @ Wk[i]).mT + B[i]).softmax(-1) * C[i]) @ X @ Wv[i] @ Wo[i] for i in range(h))
    Y = Y + (Y @ W1).relu() @ W2
    block = U.URPEBlock(d, h, 1.5, qkv_bias=False, mlp_bias=False, act='relu', norm_position='none').double()
    join = lambda W: W.permute(0, 2, 1).reshape(d, d)
    block.load_state_dict({'attn.qkv.weight': torch.cat([join(Wq) * (d // h) ** .5, join(Wk), join(Wv)]), 'attn.proj.weight': Wo.reshape(d, d).T, 'fc1.weight': W1.T, 'fc2.weight': W2.T})
    assert_close(block(X, bias=B, factor=C), Y)
    for wrong, match in [(dict(act='swoosh'), 'act must'), (dict(norm_position='sandwich'), 'norm_position')]:
        with pytest.raises(ValueError, match=match): U.URPEBlock(8, 2, **wrong)


def test_encoder_arguments(unchecked):
    for wrong, match in [(dict(bias='t5'), 'bias must'), (dict(factor=True), 'factor must'), (dict(positions='rotary'), 'positions must'), (dict(head='mlp'), 'head must'), (dict(num_heads=5), 'num_heads')]:
        with pytest.raises(ValueError, match=match): U.URPEncoder(30, 10, 24, **{'num_heads': 4, **wrong})
    with pytest.raises(ValueError, match='max_len = 10 long, got 11'): U.URPEncoder(30, 10, 24, 1, 4)(torch.zeros(1, 11).long())
    long = U.URPEncoder(30, 10, 24, 1, 4, bias='bucket', factor='bucket')(torch.randint(2, 30, (1, 25)))      # buckets take any length
    assert long.shape == (1, 25, 24) and long.isfinite().all()
    model = U.URPEncoder(30, 10, 24, 2, 4, head='tied').eval()
    assert model(torch.randint(2, 30, (2, 8))).shape == (2, 8, 30)
    assert (model(torch.ones(1, 5).long())).isfinite().all()              # nothing but padding


def test_encoder_is_causal():
    model = shaken(U.URPEncoder(30, 10, 24, 2, 4, padding_idx=None))
    x = torch.randint(0, 30, (1, 9)); y = x.clone(); y[0, 6] = (y[0, 6] + 1) % 30
    a, b = model(x, causal=True), model(y, causal=True)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])
    with torch.no_grad(): model.factor_table.weight[10:] = 1e6             # factors of later tokens are never used
    assert_close(model(x, causal=True), a)


def test_long_sequences_take_the_blocks():
    model = shaken(U.URPEncoder(30, 1100, 8, 1, 2, bias='bucket'), by=.1)
    x = torch.randint(2, 30, (1, 1100))
    with torch.no_grad():
        out = model(x)
        for block in model.blocks: block.attn.backend = 'dense'
        assert_close(model(x), out, rtol=1e-3, atol=1e-4)


def test_graphs():
    ring, path = torch.zeros(1, 6, 6, dtype=torch.bool), torch.zeros(1, 6, 6, dtype=torch.bool)
    for i in range(6):
        ring[0, i, (i + 1) % 6] = ring[0, (i + 1) % 6, i] = True
        if i < 5: path[0, i, i + 1] = path[0, i + 1, i] = True
    i = torch.arange(6)
    assert torch.equal(U.shortest_paths(path)[0], (i[:, None] - i).abs()) and U.shortest_paths(ring).max() == 3
    assert U.shortest_paths(path, far=2)[0, 0].tolist() == [0, 1, 2, 3, 3, 3]
    assert U.shortest_paths(torch.zeros(1, 3, 3, dtype=torch.bool), far=5)[0].tolist() == [[0, 6, 6], [6, 0, 6], [6, 6, 0]]
    block, table = shaken(U.URPEBlock(8, 2)), normal(22, 2, dtype=torch.float)
    atoms = torch.ones(1, 6, 8)
    run = lambda graph, **kw: block(atoms, **{k: U.by_class(v, U.shortest_paths(graph)) for k, v in kw.items()})
    assert U.row_spread(run(path, bias=table)) < 1e-5                      # B alone: all atoms of a molecule look alike
    assert U.row_spread(run(path, bias=table, factor=table)) > 1e-3 and U.row_spread(run(ring, bias=table, factor=table)) < 1e-5
    assert_close(run(path, factor=table)[:, 0], run(path, factor=table)[:, -1])   # the two ends are alike, as they should be


def test_vision_transformer():
    assert set(list_models('urpe_*')) == {'urpe_synthetic', 'urpe_synthetic_rpe', 'urpe_synthetic_nope', 'urpe_vit_tiny_patch16_224', 'urpe_vit_small_patch16_224', 'urpe_vit_base_patch16_224'}
    torch.manual_seed(0)
    flat = torch.full((1, 1, 24, 24), .5)
    small = dict(img_size=24, patch_size=4, in_chans=1, num_classes=0, embed_dim=24, depth=2, num_heads=2, class_token=False, global_pool='avg')
    for factor in (False, True):
        model = shaken(U.URPEVisionTransformer(**small, factor=factor), by=.3)
        spread = U.row_spread(model.forward_features(flat)).item()
        assert (spread > 1e-2) == factor and (factor or spread < 1e-5)     # a blank wall: only the factor knows where a patch hangs
    model = create_model('urpe_vit_tiny_patch16_224', img_size=32, num_classes=3)
    assert 'pos_embed' not in model.state_dict() and 'pos_embed' in create_model('urpe_vit_tiny_patch16_224', img_size=32, abs_pos=True).state_dict()
    with pytest.raises(ValueError, match='img_size'): model.eval()(torch.rand(1, 3, 48, 48))


def test_sinusoidal_positions():
    "Counted over real tokens from padding_idx + 1; all sines, then all cosines; the slowest wave is 10000 times the fastest."
    model = U.URPEncoder(20, 10, 12, 1, 3, positions='sinusoidal', embed_norm=False)
    x = model.tokens(torch.tensor([[5, 5, 1, 5]]), embedded=torch.zeros(1, 4, 12))[0]
    angle = torch.tensor([2., 3., 0., 4.])[:, None] * 10000 ** (-torch.arange(6) / 5)
    want = torch.cat([angle.sin(), angle.cos()], 1)
    want[2] = 0
    assert_close(x, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', ['dense', 'blockwise'])
def test_a_padding_mask_without_its_axes_is_refused(backend):
    "Batch x keys fits queries x keys where there are as many: it must be said."
    q, k, v = (torch.randn(4, 2, 4, 8) for _ in range(3))
    pad, factor = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:, None], torch.rand(4, 4)
    for name, given in (('mask', dict(mask=pad)), ('factor', dict(factor=factor)),
                        ('bias', dict(bias=factor))):
        with pytest.raises(ValueError, match=f'{name} must say whether its 4 rows'):
            U.urpe_attention(q, k, v, backend=backend, **{'factor': factor[None, None], **given})
    out = U.urpe_attention(q, k, v, factor=factor[None, None], mask=pad[:, None, None], backend=backend)
    for i, n in enumerate(pad.sum(1).tolist()):
        short, fits = factor[None, None, :, :n], slice(i, i + 1)
        want = U.urpe_attention(q[fits], k[fits, :, :n], v[fits, :, :n], factor=short, backend=backend)
        assert_close(out[fits], want, atol=1e-6, rtol=1e-5)
