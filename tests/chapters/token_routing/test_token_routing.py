"""tokens.token_routing: the grid against its equation, both forms against each other, gates, costs, PVTv2 against another implementation, and answers to bad input."""
import copy
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook import measure
from vitbook.diagram import Diagram
from vitbook.registry import create_model
from vitbook.tokens import token_routing as T
from vitbook.train import fit, batches
from vitbook.vit import VisionTransformer

KINDS = pytest.mark.parametrize('kind', ['plain', 'pyramid'])


def router(kind='plain', M=3, N=3, seed=0, scatter=0., **more):
    "A small router in eval mode; with `scatter`, gates of random weights that open and shut."
    torch.manual_seed(seed)
    small = dict(img_size=32, in_chans=2, num_classes=5, embed_dims=(16, 24, 32)[:N], depths=(1, 2, 1)[:N], num_heads=(1, 2, 4)[:N], mlp_ratios=(2, 2, 2)[:N], sr_ratios=(4, 2, 1)[:N],
                 num_stages=M, block=kind, init_std=None)
    model = T.TokenRouter(**small | more)
    if scatter:
        with torch.no_grad():
            for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
            for g in model.gates():
                g.weight.normal_(0, scatter)
                if g.bias is not None: g.bias.zero_()
        T.update_momentum(model, 0.)
    return model.eval()


def images(n=4, size=(32, 32), chans=2, seed=0): return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(seed))
def masks(model, n, seed, size=(32, 32)):
    "Random gates of every node, among them images with all or none of their tokens."
    g = torch.Generator().manual_seed(seed)
    def one(l):
        m = torch.rand(n, l, generator=g) < torch.rand(n, 1, generator=g)
        m[torch.rand(n, generator=g) < .2] = True
        m[torch.rand(n, generator=g) < .2] = False
        return m.float()
    row = [[one(math.prod(model.grid_of(size, i))) for _ in range(model.num_stages)] for i in range(len(model.embed_dims))]
    return row, [[(torch.rand(n, generator=g) < .6).float() for _ in range(model.num_stages + 1)] for _ in model.embed_dims[1:]]


def naive(model, x, row, col):
    "The node update, eq. 4, column by column, every module on all tokens; a map at which nothing has arrived is left alone."
    N, M = len(model.embed_dims), model.num_stages
    grid = [model.grid_of(tuple(x.shape[2:]), i) for i in range(N)]
    maps, seen = [[None] * (M + 1) for _ in range(N)], reach(N, M, col, len(x))
    for j in range(M + 1):
        for i in range(N):
            if i == j == 0: maps[0][0] = model.embed(x); continue
            t = 0
            if j > 0:
                f, g = maps[i][j - 1], row[i][j - 1] * seen[i][j - 1][:, None]
                y = g[..., None] * f
                for block in model.rows[i][j - 1].blocks: y = block(y, mask=g[:, None, None] > 0) if model.block == 'plain' else block(y, grid[i], g > 0)
                t = t + g[..., None] * y + (1 - g)[..., None] * f
            if i > 0: t = t + (seen[i - 1][j] * col[i - 1][j])[:, None, None] * model.cols[i - 1][j](maps[i - 1][j], grid[i - 1])
            maps[i][j] = t
    return maps


def reach(N, M, col, n):
    seen = [[torch.zeros(n) for _ in range(M + 1)] for _ in range(N)]
    for j in range(M + 1):
        for i in range(N):
            if i == 0: seen[i][j] = torch.ones(n); continue
            if j: seen[i][j] = torch.maximum(seen[i][j], seen[i][j - 1])
            seen[i][j] = torch.maximum(seen[i][j], seen[i - 1][j] * col[i - 1][j])
    return seen


# the gate

def test_the_gate_is_gumbel_softmax_of_the_probabilities():
    "Forward: how often it opens is softmax(scores). Backward: the gradient of the soft gate at the same noise, which F.gumbel_softmax gives too."
    scores = torch.tensor([[0., 2.], [1., 0.], [0., -1.], [0., 0.]])
    torch.manual_seed(0)
    rate = T.gumbel_gate(scores.expand(20_000, -1, -1)).mean(0)
    assert_close(rate, scores.softmax(-1)[:, 1], atol=.012, rtol=0)
    for tau in (.5, 1., 3.):
        a, b = (torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        torch.manual_seed(3); ours = T.gumbel_gate(a, tau)
        torch.manual_seed(3); theirs = F.gumbel_softmax(b.log_softmax(-1), tau, hard=True)[..., 1]
        ours.mul(torch.arange(50)).sum().backward(); theirs.mul(torch.arange(50)).sum().backward()
        assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert_close(a.grad, b.grad)
        assert set(ours.tolist()) == {0., 1.} and a.grad[1:].abs().min() > 0
    assert T.gumbel_gate(scores, noise=False).tolist() == [1, 0, 0, 0]


def test_probabilities_as_logits_would_be_wrong():
    "Feeding softmax outputs instead of their logarithms would keep every open rate between sigmoid(-1) and sigmoid(1)."
    torch.manual_seed(0)
    assert T.gumbel_gate(torch.tensor([0., 8.]).expand(4000, 2)).mean() > .99
    assert T.gumbel_gate(torch.tensor([0., -8.]).expand(4000, 2)).mean() < .01


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_gate_dtypes_and_extreme_scores(dtype):
    torch.manual_seed(0)
    s = torch.tensor([[1e4, 0.], [0., 1e4], [-1e4, -1e4]], dtype=dtype, requires_grad=True)
    g = T.gumbel_gate(s)
    g.sum().backward()
    assert g.isfinite().all() and s.grad.isfinite().all() and g[:2].tolist() == [0, 1] and g.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_row_gates_look_at_their_token_only_and_column_gates_at_the_mean():
    torch.manual_seed(0)
    row, col = T.RowGate(8).eval(), T.ColumnGate(8, None).eval()
    for g in (row, col): g.weight.data.normal_(); g.update_momentum(0.)
    x = torch.randn(20, 10, 8)
    out, moved = row(x), x.clone()
    moved[:, 4] += torch.randn(8) * 10
    assert torch.equal(row(moved)[:, :4], out[:, :4]) and torch.equal(row(moved)[:, 5:], out[:, 5:])
    assert out.shape == (20, 10) and col(x).shape == (20,) and 0 < col(x).mean() < 1
    assert_close(col(x), ((x.mean(1) @ col.weight.T).diff(dim=1)[:, 0] > 0).float())
    assert_close(out, ((x @ row.weight.T + row.bias).diff(dim=-1)[..., 0] > 0).float())
    assert col.bias is None and col.bias_hat is None
    assert row(x, shift=1e3).all() and not row(x, shift=-1e3).any()


def test_momentum_weights():
    torch.manual_seed(0)
    gate = T.RowGate(6)
    first = gate.weight.detach().clone()
    with torch.no_grad(): gate.weight.add_(1.); gate.bias.sub_(.5)
    gate.update_momentum(.9)
    assert_close(gate.weight_hat, .9 * first + .1 * gate.weight)
    assert_close(gate.bias_hat, torch.tensor([-.05, 1.95]))
    gate.update_momentum(0.)
    assert torch.equal(gate.weight_hat, gate.weight) and torch.equal(gate.bias_hat, gate.bias)
    assert 'weight_hat' in gate.state_dict() and not any('hat' in n for n, _ in gate.named_parameters())
    for m in (1., -.1):
        with pytest.raises(ValueError, match=f'm must.*{m}'): gate.update_momentum(m)


# the grid against its equation

@KINDS
@settings(max_examples=6)
@given(seed=st.integers(0, 9999), M=st.integers(1, 4), N=st.integers(1, 3))
def test_the_grid_is_its_equation_in_all_forms(kind, seed, M, N):
    "Random masks, all-zero and all-one images among them: literal node update == dense == mixed == gathered, early stop or not."
    model, x = router(kind, M, N, seed=seed % 7, scatter=1.), images(5, seed=seed)
    row, col = masks(model, 5, seed)
    want = naive(model, x, row, col)
    seen = reach(N, M, col, 5)
    with torch.no_grad(): got = {form: model.route(x, row, col, form=form) for form in ('dense', 'mixed', 'gathered')} | {'to the end': model.route(x, row, col, form='gathered', early_stop=False)}
    for form, r in got.items():
        for i in range(N):
            assert_close(r.maps[i], want[i][M].expand_as(r.maps[i]), atol=1e-5, rtol=1e-4, msg=lambda m: f'{form}, scale {i}: {m}')
            assert (r.maps[i][seen[i][M] == 0] == 0).all()
        for i, line in enumerate(r.reached):
            for j, flag in enumerate(line): assert torch.equal(flag, seen[i][j])
        assert_close(r.cost, got['dense'].cost)


@KINDS
@settings(max_examples=6)
@given(seed=st.integers(0, 9999), size=st.sampled_from([(32, 32), (16, 48), (64, 32)]), M=st.integers(1, 4), guard=st.booleans(), shift=st.floats(-2, 2))
def test_own_gates_decide_alike_in_both_forms(kind, seed, size, M, guard, shift):
    model, x = router(kind, M, seed=seed % 5, scatter=1., guard=guard).double(), images(4, size, seed=seed).double()
    with torch.no_grad():
        a = model.route(x, form='dense', shift=shift)
        for r in (model.route(x, form='gathered', shift=shift), model.route(x, form='gathered', shift=shift, early_stop=False)):
            for p, q in zip(a.maps, r.maps): assert_close(p, q, atol=1e-5, rtol=1e-5)
            for p, q in zip([*a.row, *a.col], [*r.row, *r.col]): assert all(torch.equal(s, t) for s, t in zip(p, q))
            assert_close(a.cost, r.cost)


@KINDS
def test_mixed_form_has_the_gradients_of_the_dense_form(kind):
    model, x = router(kind, scatter=1.).double().train(), images().double()
    grads = []
    for form in ('dense', 'mixed'):
        torch.manual_seed(5)
        model.zero_grad()
        r = model.route(x, form=form)
        (sum(t.square().mean() for t in r.maps) + r.relative.mean()).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])   # none where a whole batch skipped a stage
    assert len(grads[0]) == len(grads[1]) > 50
    for a, b in zip(*grads): assert_close(a, b, atol=1e-9, rtol=1e-6)


@KINDS
def test_the_gradient_of_a_gate_is_what_computing_instead_of_copying_changes(kind):
    "d loss / d g = <d loss / d F', B(F) - F> for an open gate, <d loss / d F', -F> for a shut one: B gives 0 there, and nothing comes through the key mask."
    model, x = router(kind, 1, 1, scatter=1.).double(), images().double()
    g = (torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) < .5).double().requires_grad_()
    r, up = model.route(x, [[g]], [], form='dense'), torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(1)).double()
    (r.maps[0] * up).sum().backward()
    start = model.embed(x)
    y = model.rows[0][0](start, (8, 8), g > 0)
    assert_close(g.grad, ((y - start) * up).sum(-1))


def test_gates_that_are_plain_numbers_are_the_same_as_tensors():
    model, x = router(scatter=1.), images()
    for path in ('open', 'shut', 'staircase'):
        row, col = model.forced(path)
        full = [[torch.full((4, math.prod(model.grid_of((32, 32), i))), g) for g in line] for i, line in enumerate(row)], [[torch.full((4,), g) for g in line] for line in col]
        for form in ('dense', 'mixed', 'gathered'):
            a, b = model.route(x, row, col, form=form), model.route(x, *full, form=form)
            for p, q in zip(a.maps, b.maps): assert_close(p, q, atol=1e-5, rtol=1e-4)
            assert_close(a.cost, b.cost)


@KINDS
def test_all_shut_is_the_identity_bit_for_bit(kind):
    model, x = router(kind, 4, scatter=1.), images()
    row, col = model.forced('shut')
    shut = [[torch.zeros(4, math.prod(model.grid_of((32, 32), i)))] * 4 for i in range(3)]
    for form in ('dense', 'mixed', 'gathered'):
        for r in (row, shut): assert torch.equal(model.route(x, r, col, form=form).maps[0], model.embed(x))


def literal_staircase(model, x):
    "The static pyramid, written down without the grid."
    t, N, M = model.embed(x), len(model.embed_dims), model.num_stages
    grid = model.grid_of(tuple(x.shape[2:]))
    scale = 0
    for j in range(M):
        for block in model.rows[scale][j].blocks: t = block(t) if model.block == 'plain' else block(t, grid)
        if scale < N - 1:
            t = model.cols[scale][j + 1](t, grid)
            scale, grid = scale + 1, (grid[0] // 2, grid[1] // 2)
    for i in range(scale, N - 1): t, grid = model.cols[i][M](t, grid), (grid[0] // 2, grid[1] // 2)
    return model.head(model.norm(t).mean(1))


@KINDS
@pytest.mark.parametrize('M', [1, 2, 3, 5])
def test_the_staircase_is_a_plain_pyramid(kind, M):
    model, x = router(kind, M, scatter=1.), images(3, (64, 32))
    for form in ('dense', 'mixed', 'gathered'):
        r = model.route(x, *model.forced('staircase'), form=form)
        assert_close(model.forward_head(model.norm(r.maps[-1])), literal_staircase(model, x), atol=1e-5, rtol=1e-4)
        gates = sum(c for i, c in enumerate(r.costs.row_gate) for j in range(M) if r.reached[i][j].all()) + sum(c for i, c in enumerate(r.costs.col_gate) for j in range(M + 1) if r.reached[i][j].all())
        assert_close(r.cost, torch.full((3,), float(r.costs.base + gates)))
    model.set_mode('staircase')
    assert_close(model(x), literal_staircase(model, x), atol=1e-5, rtol=1e-4)


def test_skipped_tokens_are_copied_and_selected_ones_do_not_see_them():
    model, x = router('plain', 1, 2, scatter=1.), images(4)
    row, col = masks(model, 4, 3)
    row[0][0][0], row[0][0][1] = 0., 1.
    r = model.route(x, row, [[torch.zeros(4)] * 2])
    start = model.embed(x)
    skipped = row[0][0] == 0
    for form in ('dense', 'mixed', 'gathered'): assert torch.equal(model.route(x, row, [[torch.zeros(4)] * 2], form=form).maps[0][skipped], start[skipped])
    keep, stage = row[0][0] > 0, model.rows[0][0]
    changed = torch.where(keep[..., None], start, torch.randn_like(start) * 50)
    for gathered in (False, True):
        assert_close(stage(changed, (8, 8), keep, gathered), stage(start, (8, 8), keep, gathered), atol=1e-5, rtol=1e-4)
        assert (stage(start, (8, 8), keep, gathered)[~keep] == 0).all()
    assert (r.maps[0][keep] != start[keep]).any(-1).all()
    with_column = model.route(x, [row[0], [torch.zeros(4, 16)]], [[torch.zeros(4), torch.ones(4)]])   # the sum of a copied map and a column term
    without = model.route(x, [row[0], [torch.zeros(4, 16)]], [[torch.ones(4), torch.zeros(4)]])
    both = model.route(x, [row[0], [torch.zeros(4, 16)]], [[torch.ones(4), torch.ones(4)]])
    assert_close(both.maps[1] - with_column.maps[1], without.maps[1], atol=1e-5, rtol=1e-4)


@KINDS
def test_unselected_tokens_say_nothing_to_selected_ones(kind):
    "Also through convolutions: places are filled with zeros behind the norms, so what stood there does not matter."
    stage, keep = router(kind, scatter=1.).rows[0][0], torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < .4
    x = torch.randn(3, 64, 16)
    changed = torch.where(keep[..., None], x, torch.randn_like(x) * 30)
    for gathered in (False, True): assert_close(stage(changed, (8, 8), keep, gathered), stage(x, (8, 8), keep, gathered), atol=1e-5, rtol=1e-4)


def test_closing_a_column_of_one_image_leaves_the_others():
    model, x = router(scatter=1.), images()
    row, col = masks(model, 4, 1)
    col = [[torch.ones(4)] * 4 for _ in range(2)]
    shut = [[*line] for line in col]
    shut[0][1] = torch.tensor([0., 1., 1., 1.])
    for form in ('dense', 'gathered'):
        a, b = model.route(x, row, col, form=form), model.route(x, row, shut, form=form)
        for p, q in zip(a.maps, b.maps): assert_close(p[1:], q[1:], atol=1e-6, rtol=1e-5)
        assert (a.maps[1][0] - b.maps[1][0]).abs().max() > 1e-3 and torch.equal(a.maps[0], b.maps[0])


@pytest.mark.parametrize('pad_to', [1, 5, 16, 1000])
def test_padding_of_the_gathered_form_changes_nothing(pad_to):
    for kind in ('plain', 'pyramid'):
        model, x = router(kind, scatter=1.), images()
        want = model.route(x, form='dense')
        model.pad_to = pad_to
        for p, q in zip(want.maps, model.route(x, form='gathered').maps): assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_select():
    keep = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    kept = T.select(keep)
    assert kept.rows.tolist() == [0, 2] and kept.index[0].tolist() == [1, 3, 4] and kept.valid.tolist() == [[True] * 3, [True, False, False]]
    x = torch.arange(30.).view(3, 5, 2)
    assert torch.equal(kept.put(kept.take(x), torch.zeros_like(x)), x * keep[..., None])
    assert torch.equal(kept.spread(kept.take(x), 5), (x * keep[..., None])[[0, 2]])
    assert torch.equal(kept.put(kept.take(x) * 0, x), x * ~keep[..., None])


def test_the_gathered_form_computes_no_more_than_the_gates_say():
    "Multiply-adds counted by torch: a shut grid costs stem and gates; a few tokens cost few."
    for kind in ('plain', 'pyramid'):
        model, x = router(kind, 2, 2), images(2)
        few = torch.zeros(2, 64); few[:, :8] = 1
        count = lambda row, col: measure.flops(lambda: model.route(x, row, col, form='gathered', early_stop=False)) // 2 - 2 * model.costs().stem
        row, col = model.forced('shut')
        assert count(row, col) == 0
        some = count([[few, 0.], [0., 0.]], col)
        full = count([[1., 0.], [0., 0.]], col)
        assert 0 < some < (.2 if kind == 'plain' else .5) * full and full == 2 * model.costs().row[0]
        assert count(row, [[0., 0., torch.tensor([1., 0.])]]) == model.costs().col[0]    # one patch embedding, of the image whose gate is open


def test_early_stop():
    "A row that will neither compute nor send nor receive anything more is left; the others go on."
    model, x = router(M=4, scatter=1.), images(3)
    row, col = model.forced('shut')
    row[0][1] = torch.cat([torch.zeros(1, 64), torch.ones(2, 64)])     # images 1, 2 compute in stage 1 of the finest scale
    col[0][2] = torch.tensor([0., 0., 1.])                             # image 2 goes down in column 2 …
    col[1][2] = torch.tensor([0., 0., 1.])
    r = model.route(x, row, col, form='gathered')
    assert r.stop[:, 0].tolist() == [0, 2, 2] and r.stop[:, 1].tolist() == [0, 0, 2] and r.stop[:, 2].tolist() == [0, 0, 2]
    assert model.route(x, row, col, form='gathered', early_stop=False).stop.min() == 4 == model.route(x, row, col, form='dense').stop.min()
    for g in model.gates(): g.bias_hat.copy_(torch.tensor([0., -50.]))
    calls = []
    for gate in model.gates(): gate.register_forward_hook(lambda m, x, y: calls.append(m))
    stopped = model.route(x, form='gathered')
    assert (stopped.stop == torch.tensor([0, 4, 4])).all()             # the guard sends maps down in the last column only
    assert all(torch.equal(p, q) for p, q in zip(stopped.maps, model.route(x, form='gathered', early_stop=False).maps))


# the guard and what is never reached

def test_unreached_nodes_cost_nothing_and_the_guard_keeps_a_path():
    for kind in ('plain', 'pyramid'):
        model, x = router(kind, scatter=1.), images()
        for g in model.gates(): g.bias_hat.copy_(torch.tensor([0., -50.]))
        for form in ('dense', 'gathered'):
            r = model.route(x, form=form)
            logits = model.forward_head(model.norm(r.maps[-1]))
            assert logits.isfinite().all() and (logits[0] - logits[1]).abs().max() > 1e-3
            first, last = 3 * r.costs.row_gate[0] + 4 * r.costs.col_gate[0], r.costs.col_gate[1]
            assert_close(r.cost, torch.full((4,), float(first + last + sum(r.costs.col))))   # row 0's gates; in the last column the edges, and the gate of the node that they reach
            assert [g.all().item() for g in r.col[0]] == [False, False, False, True]
        model.guard = False
        r = model.route(x)
        assert_close(r.cost, torch.full((4,), float(first)))
        assert (r.maps[1] == 0).all() and model(x).isfinite().all()
        ones = torch.ones(4)                                           # open gates behind a closed column: nothing there to compute
        for form in ('dense', 'mixed', 'gathered'):
            lone = model.route(x, [[0., 0., 0.], [1., 1., 1.], [ones, ones, ones]], [[0.] * 4, [1.] * 4], form=form, early_stop=False)
            assert_close(lone.cost, torch.full((4,), float(first)))
            assert all((m == 0).all() for m in lone.maps[1:]) and all((g == 0).all() for line in lone.row[1:] for g in line)


# costs

@KINDS
@pytest.mark.parametrize('linear', [False, True])
def test_costs_are_what_torch_counts(kind, linear):
    if linear and kind == 'plain': return
    model = router(kind, 2, linear=linear)
    for size in ((32, 32), (64, 48)):
        costs, x = model.costs(size), images(1, size)
        for i in range(3):
            grid = model.grid_of(size, i)
            t = torch.randn(1, math.prod(grid), model.embed_dims[i])
            assert measure.flops(model.rows[i][0], t, grid) == 2 * costs.row[i]
            assert measure.flops(model.row_gates[i][0], t) == 2 * costs.row_gate[i]
            if i < 2: assert measure.flops(model.cols[i][0], t, grid) == 2 * costs.col[i] and measure.flops(model.col_gates[i][0], t) == 2 * costs.col_gate[i]
        assert measure.flops(model.stem, x) == 2 * costs.stem and measure.flops(model.head, torch.randn(1, 32)) == 2 * costs.head
        whole = measure.flops(lambda: model.forward_head(model.norm(model.route(x, *model.forced('open'), form='dense').maps[-1]))) // 2
        gates = 2 * sum(costs.row_gate) + 3 * sum(costs.col_gate)
        r = model.route(x, *model.forced('open'))
        assert_close(r.cost, torch.full((1,), float(whole - costs.stem - costs.head + gates)))
        assert T.complexity(costs, *model.forced('shut')) == gates
        assert T.complexity(costs, *model.forced('open')) == 2 * sum(costs.row) + 3 * sum(costs.col) + gates


@given(st.integers(0, 9999))
def test_the_cost_is_affine_in_every_gate(seed):
    model, g = router('pyramid'), torch.Generator().manual_seed(seed)
    tables = [([[torch.rand((), generator=g, dtype=torch.double) for _ in range(3)] for _ in range(3)], [[torch.rand((), generator=g, dtype=torch.double) for _ in range(4)] for _ in range(2)]) for _ in range(2)]
    a = torch.rand((), generator=g, dtype=torch.double)
    mix = tuple([[a * p + (1 - a) * q for p, q in zip(s, t)] for s, t in zip(*pair)] for pair in zip(*tables))
    space = lambda *gates: T.complexity(model.costs(), *gates)
    assert_close(space(*mix), a * space(*tables[0]) + (1 - a) * space(*tables[1]))
    for i in range(3):
        for j in range(3):
            more = [list(line) for line in tables[0][0]]
            more[i][j] = more[i][j] + 1
            assert_close(space(more, tables[0][1]) - space(*tables[0]), torch.tensor(float(model.costs().row[i])).double())


def test_reference_sizes():
    "PVTv2-B2 at 224: parameters, multiply-adds a block and a patch embedding, the open grid, and the paper's Fig. 4(a) read as computed tokens."
    with torch.device('meta'): pyramid, grid = create_model('pvt_v2_b2'), create_model('token_routing_b2')
    assert measure.parameters(pyramid) == 25_362_856
    c = grid.costs()
    assert [round(r / d / 1e6, 1) for r, d in zip(c.row, (3, 4, 6, 3))] == [278.6, 262.7, 239.2, 157.5]
    assert [round(x / 1e6, 1) for x in (c.stem, *c.col)] == [29.5, 57.8, 72.3, 72.3]
    assert 16.0e9 < T.complexity(c, *grid.forced('open')) + c.stem < 16.25e9
    shown = [[.72, .13, 0, 0], [.43, .38, .12, 0], [0, .68, .30, .08], [0, 0, .46, .42]]
    used = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    total = lambda t: (T.complexity(c, t, used) + c.stem + c.head) / 1e9
    assert 3.7 < total(shown) < 3.9
    skipped = [[1 - x if x else 0 for x in line] for line in shown]
    assert total(skipped) > 5.5                                        # the caption's word, 'skipped', does not fit the paper's 3.8
    assert [round(create_model_meta(f'pvt_v2_b{i}') / 1e6, 1) for i in (0, 1, 3, 4, 5)] == [3.7, 14.0, 45.2, 62.6, 82.0]


def create_model_meta(name):
    with torch.device('meta'): return measure.parameters(create_model(name))


# training

@KINDS
def test_training_gates_are_hard_and_have_gradients(kind):
    model, x = router(kind, gate_bias=0.).train(), images(6)
    for seed in range(4):                                                  # in one draw a gate may happen to have nothing but shut tokens before it
        torch.manual_seed(seed)
        logits, r = model(x, return_routing=True)
        for line in (*r.row, *r.col):
            for g in line: assert ((g == 0) | (g == 1)).all()
        assert any(0 < g.mean() < 1 for line in r.row for g in line)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    for g in model.gates(): assert g.weight.grad.abs().max() > 0 and g.weight.grad.isfinite().all()


@KINDS
@pytest.mark.parametrize('form', ['dense', 'mixed'])
def test_what_was_reached_is_no_way_for_gradients(kind, form):
    "Where nothing arrives nothing is computed: that is counted with hard numbers, and no gate learns through it."
    model, x = router(kind, gate_bias=0.).train(), images(3)
    torch.manual_seed(0)
    r = model.route(x, form=form)
    assert not any(a.requires_grad for line in r.reached for a in line) and any(g.requires_grad for line in r.col for g in line)


def test_running_gates_are_no_parameters():
    "W_hat follows W without a graph, and learns nothing itself."
    gate, x = T.RowGate(6), torch.randn(2, 3, 6, requires_grad=True)
    gate.update_momentum(.5)
    assert gate.weight_hat.is_leaf and not gate.weight_hat.requires_grad and not gate.bias_hat.requires_grad and gate.weight_hat.data_ptr() != gate.weight.data_ptr()
    gate.eval()(x).sum().backward()
    assert gate.weight.grad is None and gate.bias.grad is None and x.grad is not None
    pyramid_of = router('plain')
    score = pyramid_of.rows[0][0].received(torch.randn(2, 16, pyramid_of.embed_dims[0]), (4, 4))
    assert not score.requires_grad


@pytest.mark.parametrize('target, sign', [(.3, 1), (3., -1)])
def test_the_budget_pushes_gates_towards_it(target, sign):
    model, x = router(gate_bias=0., gate_noise=True).train(), images(6)
    torch.manual_seed(2)
    r = model.route(x)
    assert .3 < r.relative.mean() < 3.
    T.budget_loss(r.cost, r.costs.base, target).backward()
    for gate in model.gates():
        if gate.bias.grad is not None and gate.bias.grad.abs().max() > 0:
            assert torch.sign(gate.bias.grad[1]) == sign and torch.sign(gate.bias.grad[0]) == -sign    # descent lowers the open score when too dear
    assert sum(bool(g.bias.grad is not None and g.bias.grad.abs().max() > 0) for g in model.gates()) >= 14


def test_budget_loss_is_of_the_mean():
    assert_close(T.budget_loss(torch.tensor([50., 150.]), 100., 1.), torch.tensor(0.))
    assert_close(T.budget_loss(torch.tensor([50., 150.]), 100., .4), torch.tensor(.36))
    with pytest.raises(ValueError, match='base'): T.budget_loss(torch.ones(2), 0., 1.)


def test_budget_schedule_and_momentum_under_fit():
    model = router(gate_bias=2.).train()
    budget = T.Budget(1., 20, begin=.25, end=.75, start=3., momentum=0.)
    assert [round(b, 6) for b in (at(budget, s) for s in (0, 5, 10, 15, 20))] == [3., 3., 2., 1., 1.]
    budget.step = 0
    data = T.gratings(64)
    x = data.images.repeat(1, 2, 1, 1)
    fit(model, batches(x, data.labels, batch_size=16), steps=20, loss=budget.loss, callbacks=[budget.after], optimizer=torch.optim.AdamW(model.param_groups(1e-3)), progress=False)
    assert len(budget.costs) == 20 and budget.step == 20 and all(torch.equal(g.weight, g.weight_hat) for g in model.gates())
    with pytest.raises(ValueError, match='begin'): T.Budget(1., 20, begin=.8, end=.2)


def at(budget, step):
    budget.step = step
    return budget.now()


def test_evaluation_is_deterministic_and_uses_the_momentum_weights():
    model, x = router(scatter=1.), images()
    out = model(x)
    assert torch.equal(model(x), out)
    for g in model.gates(): g.weight.data.normal_(); g.bias.data.normal_()
    assert torch.equal(model(x), out)                                  # W itself does not matter
    for g in model.gates(): g.weight_hat.normal_()
    assert not torch.equal(model(x), out)
    model.train()
    assert not torch.equal(model(x), model(x))                         # noise
    model.gate_noise = False
    assert torch.equal(model(x), model(x))


def test_drop_path_does_not_touch_skipped_tokens():
    model, x = router('pyramid', drop_path_rate=.9).train(), images(8)
    row, col = masks(model, 8, 0)
    r = model.route(x, row, [[torch.zeros(8)] * 4] * 2)
    never = sum(row[0]) == 0
    assert never.any() and torch.equal(r.maps[0][never], model.embed(x)[never])


# modes

def test_modes():
    model, x = router(scatter=1.), images(6)
    open_, stairs = model.route(x, *model.forced('open')), model.route(x, *model.forced('staircase'))
    expect = {'fully': open_, 'staircase': stairs}
    for mode in T.MODES:
        model.set_mode(mode)
        r = model.route(x)
        if mode in expect: assert_close(r.cost, expect[mode].cost); assert_close(r.maps[-1], expect[mode].maps[-1])
        if mode == 'scale': assert all(g[s > 0].all() for line, seen in zip(r.row, r.reached) for g, s in zip(line, seen)) and any(0 < g.mean() < 1 for line in r.col for g in line)
        if mode == 'depth':
            for i in range(3):
                for j in range(3): assert i == j or (r.row[i][j] == 0).all()
            assert [[g.mean().item() for g in line] for line in r.col] == model.forced('staircase')[1] and 0 < r.row[0][0].mean() < 1
        a, b = model.route(x, form='dense'), model.route(x, form='gathered')
        if mode != 'random':
            for p, q in zip(a.maps, b.maps): assert_close(p, q, atol=1e-5, rtol=1e-4)
        assert all(p.requires_grad == (mode != 'static') for g in model.gates() for p in g.parameters())
    model.set_mode('random')
    model.set_rates(torch.full((3, 3), .25), torch.full((2, 4), 1.))
    torch.manual_seed(0)
    r = model.route(images(64))
    assert all(abs(g.mean() - .25) < .05 for line in r.row for g in line) and all(g.all() for line in r.col for g in line)
    with pytest.raises(ValueError, match='row must have the shape'): model.set_rates(torch.ones(2, 2), torch.ones(2, 4))
    with pytest.raises(ValueError, match="mode must.*'fast'"): model.set_mode('fast')


@KINDS
def test_attention_mode_takes_the_tokens_most_looked_at(kind):
    model, x = router(kind, scatter=1., mode='attention'), images()
    model.set_rates(torch.full((3, 3), .25), torch.ones(2, 4))
    r = model.route(x)
    start = model.embed(x)
    score = model.rows[0][0].received(start, (8, 8))
    assert (r.row[0][0].sum(1) == 16).all() and score.shape == (4, 64)
    for i in range(4): assert score[i][r.row[0][0][i] > 0].min() >= score[i][r.row[0][0][i] == 0].max() - 1e-7
    if kind == 'plain':
        block = model.rows[0][0].blocks[0]
        from vitbook.probe import recording
        with recording(block) as rec: block(start)
        assert_close(score, rec.weights[0].mean((1, 2)))


# PVTv2

def hf_names(state, depths):
    "Our pyramid's names -> Hugging Face's."
    out = {}
    for k, v in state.items():
        if k.startswith('head'): out[k.replace('head', 'classifier')] = v; continue
        kind, *rest = k.split('.')
        i = int(kind[-1]) - 1
        base = f'pvt_v2.encoder.layers.{i}.'
        if kind.startswith('patch_embed'): name = 'patch_embedding.' + '.'.join(rest).replace('norm', 'layer_norm')
        elif kind.startswith('norm'): name = 'layer_norm.' + rest[0]
        else:
            name = 'blocks.' + '.'.join(rest)
            for a, b in (('.norm1.', '.layer_norm_1.'), ('.norm2.', '.layer_norm_2.'), ('.attn.', '.attention.'), ('attention.q.', 'attention.query.'), ('.fc1.', '.dense1.'), ('.fc2.', '.dense2.'),
                         ('attention.sr.', 'attention.spatial_reduction.'), ('attention.norm.', 'attention.layer_norm.')): name = name.replace(a, b)
            if '.kv.' in name:
                for part, w in zip(('key', 'value'), v.chunk(2)): out[base + name.replace('kv', part)] = w
                continue
        out[base + name] = v
    return out


@pytest.mark.parametrize('linear', [False, True])
def test_the_pyramid_is_pvt_v2(linear):
    "The same weights in Hugging Face's implementation: one written by others."
    transformers = pytest.importorskip('transformers')
    dims, depths = (16, 24, 40, 48), (1, 2, 1, 2)
    torch.manual_seed(0)
    ours = T.Pyramid(num_classes=7, embed_dims=dims, depths=depths, num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), linear=linear).eval()
    with torch.no_grad():
        for p in ours.parameters(): p.add_(.1 * torch.randn_like(p))
    config = transformers.PvtV2Config(image_size=64, hidden_sizes=list(dims), depths=list(depths), num_attention_heads=[1, 2, 5, 8], mlp_ratios=[8, 8, 4, 4], sr_ratios=[8, 4, 2, 1], qkv_bias=True,
                                      linear_attention=linear, num_labels=7, layer_norm_eps=1e-6)
    theirs = transformers.PvtV2ForImageClassification(config).eval()
    report = theirs.load_state_dict(hf_names(ours.state_dict(), depths), strict=True)
    x = images(2, (64, 96), 3)
    with torch.no_grad(): assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('more', [dict(), dict(linear=True), dict(qkv_bias=False), dict(qk_scale=.3), dict(norm_eps=1e-3)])
def test_a_grid_started_from_a_pyramid_computes_it_on_the_staircase(more):
    small = dict(num_classes=5, embed_dims=(16, 24, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), mlp_ratios=(2, 3, 2), sr_ratios=(4, 2, 1)) | more
    torch.manual_seed(0)
    pyramid, grid = T.Pyramid(**small).eval(), T.TokenRouter(img_size=32, num_stages=3, out_norm=True, mode='staircase', **small).eval()
    with torch.no_grad():
        for p in pyramid.parameters(): p.add_(.1 * torch.randn_like(p))
    x = images(2, (48, 32), 3)
    T.inflate(grid, pyramid)
    assert_close(grid(x), pyramid(x), atol=1e-5, rtol=1e-4)
    assert_close(grid.features(x)[-1], pyramid.features(x)[-1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='embed_dims'): T.inflate(router('plain'), pyramid)
    with pytest.raises(ValueError, match='does not fit'): T.inflate(T.TokenRouter(img_size=32, num_stages=3, **small | dict(depths=(2, 2, 1))), pyramid)


def test_features_for_dense_prediction():
    model = router('pyramid', out_norm=True)
    maps = model.features(images(2, (64, 32)))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 8), (2, 24, 8, 4), (2, 32, 4, 2)] and model.strides == [4, 8, 16]
    assert all(abs(m.mean(1)).max() < 1e-5 for m in maps)
    tokens = model.forward_features(images(2, (64, 32)))
    assert_close(maps[-1].flatten(2).transpose(1, 2), tokens)


# use in other models

def test_routed_blocks_of_a_vit():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, 1, 5, embed_dim=24, depth=3, num_heads=3).eval()
    x = torch.randn(6, 1, 16, 16)
    want = vit(x)
    T.routed(vit)
    assert [type(b).__name__ for b in vit.blocks] == ['Block', 'RoutedBlock', 'RoutedBlock']
    assert_close(vit(x), want)                                         # all gates open at first
    for block in vit.blocks[1:]: block.gate.weight_hat.normal_(); block.gate.bias_hat.zero_()
    with T.watched(vit) as gates: out = vit(x)
    assert len(gates) == 2 and all(0 < g.mean() < 1 and g.shape == (6, 16) for g in gates) and (out - want).abs().max() > 1e-3
    t = torch.randn(6, 17, 24)
    block = vit.blocks[1]
    with T.watched(vit) as gates: y = block(t)
    shut = F.pad(gates[0], (1, 0), value=1.) == 0
    assert torch.equal(y[shut], t[shut]) and (y[~shut] != t[~shut]).any(-1).all()
    block.gate.weight.data, block.gate.bias.data = block.gate.weight_hat.clone(), block.gate.bias_hat.clone()
    vit.train()
    torch.manual_seed(0)
    with T.watched(vit) as gates: vit(x)
    (sum(g.mean() for g in gates) / 2 - .5).square().backward()
    assert all(b.gate.weight.grad.abs().max() > 0 for b in vit.blocks[1:])
    copy.deepcopy(vit)


def test_a_routed_block_is_the_same_in_both_forms():
    torch.manual_seed(0)
    vit = T.routed(VisionTransformer(16, 4, 1, 5, embed_dim=24, depth=3, num_heads=3, reg_tokens=2), [0, 2]).eval()
    for block in (vit.blocks[0], vit.blocks[2]): block.gate.weight_hat.normal_(); block.gate.bias_hat.zero_()
    t = torch.randn(5, 19, 24)
    g = F.pad(vit.blocks[0].gate(t[:, 3:]), (3, 0), value=1.)
    dense = T.run_selected([vit.blocks[0].block], t, g > .5)
    assert_close(vit.blocks[0](t), torch.where(g[..., None] > 0, dense, t), atol=1e-5, rtol=1e-4)


class TimmBlock(nn.Module):
    "A block called as timm's are: `attn_mask`, which its attention adds to the scores."
    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = block.norm1, block.norm2, block.attn, block.mlp

    def forward(self, x, attn_mask=None):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        s = q @ k.transpose(-2, -1) * self.attn.head_dim ** -.5
        weights = (s if attn_mask is None else s + attn_mask).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TokensOnly(nn.Module):
    "A block without any mask, as other libraries have them; its result may come in a tuple."
    def __init__(self, block, wrapped): super().__init__(); self.inner, self.norm, self.wrapped = block, block.norm1, wrapped
    def forward(self, hidden, attention_mask=None): return (self.inner(hidden),) if self.wrapped else self.inner(hidden)


class Own(nn.Module):
    "A model without `blocks`, `embed_dim` and `num_prefix_tokens`."
    def __init__(self, vit, kind):
        super().__init__()
        self.vit, self.layers, self.wrapped = [vit], nn.ModuleList(kind(b) for b in vit.blocks), kind is WRAPPED
    def forward(self, x):
        x = self.vit[0].embed(x)
        for layer in self.layers:
            x = layer(x, attention_mask=None) if not isinstance(getattr(layer, 'block', layer), TimmBlock) else layer(x)
            if self.wrapped: x, = x
        return self.vit[0].forward_head(self.vit[0].norm(x))


WRAPPED = lambda b: TokensOnly(b, True)
@pytest.mark.parametrize('kind', [TimmBlock, lambda b: TokensOnly(b, False), WRAPPED], ids=['timm', 'no mask', 'tuple'])
@pytest.mark.parametrize('training', [False, True])
def test_blocks_of_other_libraries(kind, training):
    "The same outputs, the same gradients as by a block of ours, when the gates are the same."
    def made(other):
        torch.manual_seed(0)
        vit = VisionTransformer(16, 4, 1, 5, embed_dim=24, depth=3, num_heads=3)
        model = T.routed(Own(vit, kind), blocks='layers', num_prefix=1) if other else T.routed(vit)
        for m in model.modules():
            if isinstance(m, T.RoutedBlock): m.gate.weight_hat.copy_(w := torch.randn(m.gate.weight_hat.shape)); m.gate.weight.data = w.clone(); m.gate.bias_hat.zero_(); m.gate.bias.data.zero_()
        return model.train(training), vit
    x, results = torch.randn(6, 1, 16, 16), []
    for other in (False, True):
        model, vit = made(other)
        torch.manual_seed(1)
        with T.watched(model) as gates: out = model(x)
        out.square().sum().backward()
        results.append((out, gates, vit.blocks[0].mlp.fc1.weight.grad, [m.gate.weight.grad for m in model.modules() if isinstance(m, T.RoutedBlock)]))
    (a, g, p, w), (b, h, q, v) = results
    assert all(torch.equal(x, y) and len(x.sum(1).unique()) > 1 for x, y in zip(g, h)), 'images differ in how many tokens are open'
    assert_close(b, a, atol=1e-5, rtol=1e-4)
    assert_close(q, p, atol=1e-4, rtol=1e-3)
    if training: assert_close(v, w, atol=1e-4, rtol=1e-3)


def test_a_routed_torch_encoder():
    layer = lambda first: nn.TransformerEncoderLayer(24, 2, 32, batch_first=first)
    encoder, x = nn.TransformerEncoder(layer(True), 3, enable_nested_tensor=False).eval(), torch.randn(4, 9, 24)
    want = encoder(x)
    T.routed(encoder, blocks=encoder.layers, num_prefix=0)
    assert_close(encoder(x), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='no tensor but its tokens'): encoder(x, mask=torch.zeros(9, 9))
    with pytest.raises(ValueError, match='batch_first=False'): T.RoutedBlock(layer(False), 24)


def test_qk_scale_is_a_factor_of_the_queries():
    torch.manual_seed(0)
    scaled, plain = (T.PyramidStage(16, 2, 2, sr_ratio=2, qk_scale=scale).eval() for scale in (.9, None))
    plain.load_state_dict(scaled.state_dict())
    x = 3 * torch.randn(2, 32, 16)
    with torch.no_grad():
        assert (plain(x, (4, 8)) - scaled(x, (4, 8))).abs().max() > 1e-3
        for block in plain.blocks:
            for p in block.attn.q.parameters(): p.mul_(.9 * 8 ** .5)     # heads of width 8
        assert_close(plain(x, (4, 8)), scaled(x, (4, 8)), atol=1e-5, rtol=1e-4)


def test_a_gate_keeps_its_precision_where_tokens_have_less():
    torch.manual_seed(0)
    gate, x = T.RowGate(64).eval(), torch.randn(4, 50, 64)
    gate.weight_hat.normal_()
    want = gate.scores(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = gate.scores(x)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    short = x.bfloat16()
    assert torch.equal(gate.scores(short), gate.scores(short.float()))


# library quality

def test_copies_pickles_and_state():
    model, x = router('pyramid', scatter=1.), images()
    with torch.no_grad(): out = model(x)
    model.train()(x)                                                   # nothing of a pass may stay behind
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(twin(x), out)
    other = router('pyramid', seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), out)


@KINDS
def test_low_precision_and_compile(kind, unchecked):
    model, x = router(kind, 2, 2, scatter=1.), images()
    with torch.no_grad():
        out = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16): assert model(x).isfinite().all()
        torch._dynamo.reset()
        assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), out, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()


def test_gratings():
    data = T.gratings(200, seed=3)
    assert data.images.shape == (200, 1, 32, 32) and data.labels.unique().tolist() == [0, 1, 2, 3] and 70 < data.large.sum() < 130
    assert set(data.objects.sum((1, 2)).tolist()) == {64, 576} and (data.objects.sum((1, 2)) == 576).equal(data.large)
    assert torch.equal(T.gratings(200, seed=3).images, data.images) and not torch.equal(T.gratings(200, seed=4).images, data.images)
    clean = T.gratings(400, seed=1, noise=0.)
    assert (clean.images[:, 0][~clean.objects] == 0).all() and clean.images.abs().max() <= 1
    flat = lambda d: (clean.images[:, 0].diff(dim=d).square().sum((1, 2)))
    assert (flat(1)[clean.labels == 0] < .5 * flat(2)[clean.labels == 0]).all() and (flat(2)[clean.labels == 2] < .5 * flat(1)[clean.labels == 2]).all()


# bad input

@pytest.mark.parametrize('more, words', [(dict(M=0), 'num_stages.*0'), (dict(img_size=40), 'img_size.*16x16.*40x40'), (dict(num_heads=(3, 2, 4)), 'num_heads.*3'), (dict(depths=(1, 1)), 'depths.*3.*2'),
                                         (dict(block='swin'), "block.*'swin'"), (dict(mode='quick'), "mode.*'quick'"), (dict(linear=True), 'linear'), (dict(train_form='gathered'), 'train_form'),
                                         (dict(qk_scale=2.), 'qk_scale')])
def test_bad_arguments(more, words):
    with pytest.raises(ValueError, match=words): router(**more)


@pytest.mark.parametrize('call, words', [
    (lambda m: m(images(1, (40, 32))), 'x must have sides that are multiples of 16 pixels, got 40x32'),
    (lambda m: m(images(1, chans=3)), 'in_chans=2.*3'), (lambda m: m.route(images(1), form='fast'), "form.*'fast'"),
    (lambda m: m.route(images(1), row=[[1.]]), r'row must hold 3 lists of 3'), (lambda m: m.route(images(1), col=[[1.]]), r'col must hold 2 lists of 4'), (lambda m: m.costs(24), 'img_size.*24x24'),
    (lambda m: m.forced('up'), "path.*'up'"), (lambda m: T.gumbel_gate(torch.zeros(2, 2), 0.), 'temperature.*0'), (lambda m: T.gumbel_gate(torch.zeros(2, 3)), 'logits.*3'),
    (lambda m: m.costs(0), 'img_size.*0x0')])
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words): call(router())


@pytest.mark.parametrize('call, words', [
    (lambda vit: T.routed(nn.Linear(2, 2)), 'blocks: Linear has no `blocks`'), (lambda vit: T.routed(vit, [0, 2]), 'layers: got .0, 2., wanted some of 0 … 1'), (lambda vit: T.routed(vit, []), 'layers'),
    (lambda vit: T.routed(vit, blocks='layers'), r"blocks: got 'layers'.*such as ..blocks"), (lambda vit: T.routed(vit, blocks=nn.ModuleList()), 'a ModuleList that is no list in VisionTransformer'),
    (lambda vit: T.routed(vit, [99]), 'layers: got .99., wanted some of 0 … 1'), (lambda vit: T.routed(nn.Sequential(vit.blocks), blocks='0'), 'num_prefix: Sequential has no'),
    (lambda vit: T.routed(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), blocks='0', num_prefix=0), 'dim: block 1 has no norm'), (lambda vit: T.watched(vit), 'no routed block')])
def test_routing_what_cannot_be_routed(call, words):
    vit = VisionTransformer(16, 8, num_classes=3, embed_dim=12, depth=2, num_heads=3)
    with pytest.raises(ValueError, match=words): call(vit)
    assert not any(isinstance(m, T.RoutedBlock) for m in vit.modules())


# the page: its schematics and its exercises

NOTEBOOK = Path(__file__).parents[3]/'nbs'/'04_tokens'/'01_token_routing.ipynb'


def cells(kind):
    "The notebook's cells of a kind, as text."
    return [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
            if cell['cell_type'] == kind]


def schematic(name):
    "The picture that a function of the notebook draws."
    source, = [cell for cell in cells('code') if f'def {name}()' in cell]
    known = {'Diagram': Diagram}
    exec(source, known)
    return known[name]()


def watch(modules):
    "What the modules, by name, take and give in a pass: {name: (input, output)}."
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: (given[0], out)}))
    return seen


@pytest.mark.parametrize('size', [(32, 32), (16, 48)])
def test_the_grid_is_drawn_as_it_is(size):
    "Every stage, patch embedding and copy of a 2 x 2 grid, none besides, with their shapes."
    drawn, model = schematic('grid_picture'), router('plain', 2, 2)
    stages = {f'B{i}{j}': stage for i, line in enumerate(model.rows) for j, stage in enumerate(line)}
    down = {f'P{j}': edge for j, edge in enumerate(model.cols[0])}
    nodes = {f'F{i}{j}' for i in range(len(model.strides)) for j in range(model.num_stages + 1)}
    assert set(drawn.things) == {'stem', 'head'} | set(stages) | set(down) | nodes
    wanted = {('stem', 'F00'), ('F12', 'head')}
    for i, j in ((i, j) for i in range(2) for j in range(2)):
        wanted |= {(f'F{i}{j}', f'B{i}{j}'), (f'B{i}{j}', f'F{i}{j + 1}'), (f'F{i}{j}', f'F{i}{j + 1}')}
    for j in range(3): wanted |= {(f'F0{j}', f'P{j}'), (f'P{j}', f'F1{j}')}
    assert set(drawn.shapes) == wanted
    seen = watch(stages | down | {'stem': model.stem, 'head': model.norm})
    model(images(3, size))
    r = model.route(images(3, size), *model.forced('open'), form='dense')
    tensors = {('stem', 'F00'): seen['stem'][1], ('F12', 'head'): seen['head'][0]}
    for name, (given, out) in seen.items():
        into, beyond = [[ends for ends in wanted if ends[side] == name] for side in (1, 0)]
        if name[0] in 'BP': tensors |= {into[0]: given, beyond[0]: out}
    for i in range(2):                                    # a copy has the shape of the node it leads to
        for j in range(2): tensors[f'F{i}{j}', f'F{i}{j + 1}'] = r.maps[i]
    assert set(tensors) == wanted
    assert drawn.sizes(tensors) == dict(b=3, l=size[0] * size[1] // 16, d=16, e=24)


def test_the_path_marked_in_the_grid_is_the_staircase():
    drawn, model = schematic('grid_picture'), router('plain', 2, 2)
    row, col = model.forced('staircase')
    path = {ends for ends, arrow in drawn.arrows.items() if arrow.path}
    computed = {f'B{i}{j}' for i, line in enumerate(row) for j, gate in enumerate(line) if gate}
    sent = {f'P{j}' for j, gate in enumerate(col[0]) if gate}
    assert {name for ends in path for name in ends if name[0] in 'BP'} == computed | sent
    assert {('stem', 'F00'), ('F12', 'head')} <= path and len(path) == 2 + 2 * len(computed | sent)


def test_a_stage_is_drawn_as_it_is():
    "Gate, selection, stage and what is put back, held against a gathered pass."
    drawn, model = schematic('stage_picture'), router('plain', 1, 1, scatter=1.)
    stage, gate, x = model.rows[0][0], model.row_gates[0][0], images(4)
    seen = watch({'gate': gate, 'first': stage.blocks[0], 'last': stage.blocks[-1], 'stage': stage})
    start = model.embed(x)
    r = model.route(x, form='gathered')
    g, k = r.row[0][0], int(r.row[0][0].sum(1).max())
    assert torch.equal(seen['gate'][1], g) and torch.equal(seen['gate'][0], start) and 0 < k < 64
    tensors = {('F', 'gate'): seen['gate'][0], ('gate', 'select'): g, ('gate', 'put'): g,
               ('F', 'select'): start,
               ('select', 'B'): seen['first'][0], ('B', 'put'): seen['last'][1], ('F', 'put'): start,
               ('put', 'next'): r.maps[0]}
    assert set(tensors) == set(drawn.shapes) and drawn.sizes(tensors) == dict(b=4, l=64, k=k, d=16)
    assert torch.equal(r.maps[0][g == 0], start[g == 0]), 'the arrow named copy'


def solutions():
    "The code of the folded solutions, in order."
    page = '\n\n'.join(cells('markdown')).split('\n## Exercises')[1].split('\n## ')[0]
    return [re.search('```python\n(.*?)```', fold, re.S)[1] for fold in page.split('<details>')[1:]]


@pytest.fixture(scope='module')
def told():
    "What an exercise's code finds in the notebook: the module, the data, the toy's sizes."
    known = vars(T) | dict(torch=torch, F=F, math=math, fit=fit, batches=batches)
    setting, = [cell for cell in cells('code') if '\nsetting = dict(' in cell]
    exec(re.search(r'^setting = dict\(.*?^\s+block=.*?\)$', setting, re.S | re.M)[0], known)
    return known | dict(train_set=T.gratings(6000, seed=100), test_set=T.gratings(800, seed=101))


def test_the_exercises_say_what_their_code_gives(told):
    open_grid, hasty, flips, bill = solutions()
    known = dict(told)
    exec(open_grid, known)
    assert round(known['ratio'], 2) == 4.05
    exec(hasty, known)
    costs = known['hasty'].costs
    assert costs[0] > 2.6 and costs[50] < .5 * costs[0]
    exec(flips, known)
    assert 2 * known['flips']['W'] < known['flips']['W_hat'] < .02
    exec(bill, known)
    honest = known['honest']
    assert 2.6 < honest[.05] < 3 and 1.05 < honest[.5] < 1.15 and honest[1.] == 1 == min(honest.values())
