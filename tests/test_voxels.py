"""layers.voxels: groups, windows and voxels against plain Python, and what they answer to bad input."""
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook.layers import voxels as V

RANGE, SIZE = (-4., -3., -1., 4., 3., 1.), (.5, .75, .5)


def cloud(n=300, seed=0, scenes=2, chans=5):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randint(scenes, (n, 1), generator=g).float(), torch.randn(n, 3, generator=g) * torch.tensor([3., 2., .7]), torch.rand(n, chans - 3, generator=g)], 1)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10 ** 6))
def test_scatters(p, n, seed):
    g = torch.Generator().manual_seed(seed)
    x, group = torch.randn(p, 3, generator=g), torch.randint(n, (p,), generator=g)
    mean, top = V.scatter_mean(x, group, n), V.scatter_max(x, group, n)
    for i in range(n):
        mine = x[group == i]
        assert_close(mean[i], mine.mean(0) if len(mine) else torch.zeros(3))
        assert_close(top[i], mine.amax(0) if len(mine) else torch.zeros(3))


def test_scatter_gradients():
    x, group = torch.randn(12, 2, dtype=torch.double, requires_grad=True), torch.tensor([0, 2, 2, 1, 0, 2, 1, 1, 4, 4, 0, 2])
    for f in (V.scatter_mean, V.scatter_max): assert torch.autograd.gradcheck(lambda x: f(x, group, 6), [x])
    assert V.scatter_max(x.float() - 100, group, 6)[[0, 1, 2, 4]].max() < -50             # no zero from the start value


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=40))
def test_ranks(rows):
    group, key = (torch.tensor([r[i] for r in rows], dtype=torch.long) for i in (0, 1))
    assert V.sort_in_groups(group, key).tolist() == sorted(range(len(rows)), key=lambda i: (rows[i], i))
    assert V.rank_in_group(group, key).tolist() == [sum(a[0] == b[0] and (a[1], j) < (b[1], i) for j, a in enumerate(rows)) for i, b in enumerate(rows)]
    assert V.rank_in_group(group).tolist() == [sum(a[0] == b[0] for a in rows[:i]) for i, b in enumerate(rows)]


@pytest.mark.parametrize('ignore_z', [False, True])
def test_voxelize_against_a_dictionary(ignore_z):
    points, found = cloud(), defaultdict(list)
    for i, (b, *xyz) in enumerate(points[:, :4].tolist()):
        cell = [math.floor((v - low) / s) for v, low, s in zip(xyz, RANGE, SIZE)]
        if ignore_z: cell[2] = 0
        if all(0 <= c < n for c, n in zip(cell, (16, 8, 4))): found[(int(b), *cell)].append(i)
    voxels = V.voxelize(points, SIZE, RANGE, ignore_z=ignore_z)
    assert [tuple(c) for c in voxels.coords[:, [0, 3, 2, 1]].tolist()] == sorted(found)    # scene, x, y, z in this order
    inside = voxels.inside.nonzero()[:, 0]
    assert sorted(inside.tolist()) == sorted(i for v in found.values() for i in v) and len(inside) < len(points)
    for number, cell in enumerate(sorted(found)): assert inside[voxels.of_point == number].tolist() == found[cell]


def test_edges_of_the_range():
    points = torch.tensor([[0, -4., -3., -1.], [0, 4., 0., 0.], [0, 3.999, 2.999, .999], [0, 0., 3., 0.], [1, 0., 0., 1.]])
    voxels = V.voxelize(points, SIZE, RANGE)
    assert voxels.inside.tolist() == [True, False, True, False, False] and voxels.coords.tolist() == [[0, 0, 0, 0], [0, 3, 7, 15]]
    assert V.voxelize(points, SIZE, RANGE, ignore_z=True).inside.tolist() == [True, False, True, False, True]
    empty = V.voxelize(torch.zeros(0, 5), SIZE, RANGE)
    assert empty.coords.shape == (0, 4) and V.grid_size((.32, .32, .1875), (-74.88, -74.88, -2, 74.88, 74.88, 4)) == (468, 468, 32)


@given(st.integers(0, 10 ** 6), st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(-9, 9)] * 3))
def test_windows_against_a_dictionary(seed, window, shift):
    g, grid = torch.Generator().manual_seed(seed), (9, 11, 3)
    cells = torch.randperm(2 * 9 * 11 * 3, generator=g)[:80]
    coords = torch.stack([cells // 297, cells % 3, cells // 3 % 11, cells // 33 % 9], 1)
    found = defaultdict(list)
    for i, (b, z, y, x) in enumerate(coords.tolist()):
        moved = [v + s for v, s in zip((x, y, z), shift)]
        found[(b, *(m // w for m, w in zip(moved, window)))].append((i, [m % w for m, w in zip(moved, window)]))
    windows = V.voxel_windows(coords, grid, window, shift)
    assert windows.count.tolist() == [len(found[k]) for k in sorted(found)]
    for number, key in enumerate(sorted(found)):
        for i, place in found[key]: assert windows.index[i] == number and windows.place[i].tolist() == place[::-1]


def test_bev_there_and_back():
    cells = torch.randperm(2 * 6 * 5 * 3, generator=torch.Generator().manual_seed(0))[:50]
    coords, x = torch.stack([cells // 90, cells % 3, cells // 3 % 5, cells // 15 % 6], 1), torch.randn(50, 4)
    dense = V.to_bev(x, coords, (6, 5, 3))
    assert dense.shape == (2, 12, 5, 6)
    for row, (b, z, y, col) in zip(x, coords.tolist()): assert_close(dense[b, z::3, y, col], row)
    assert_close(dense.square().sum(), x.square().sum())
    assert (dense != 0).sum() == x.numel()
    assert V.to_bev(x, coords, (6, 5, 3), scenes=4).shape[0] == 4 and not V.to_bev(x, coords, (6, 5, 3), scenes=4)[2:].any()
    x.requires_grad_()
    V.to_bev(x, coords, (6, 5, 3)).square().sum().backward()
    assert_close(x.grad, 2 * x.detach())


def reference_vfe(vfe, points):
    "Voxel by voxel, with plain means and maxima."
    voxels = V.voxelize(points, vfe.voxel_size, vfe.point_range, vfe.grid, vfe.ignore_z)
    points, out = points[voxels.inside], []
    rows = torch.zeros(len(points), vfe.layers[0].linear.in_features)
    for number, (_, z, y, x) in enumerate(voxels.coords.tolist()):
        mine = points[voxels.of_point == number]
        xyz, centre = mine[:, 1:4], torch.tensor([low + (c + .5) * s for low, c, s in zip(vfe.point_range, (x, y, z), vfe.voxel_size)])
        parts = [mine[:, 1:] if vfe.absolute else mine[:, 4:], xyz - xyz.mean(0), xyz - centre] + ([xyz.square().sum(1, keepdim=True).sqrt()] if vfe.distance else [])
        rows[voxels.of_point == number] = torch.cat(parts, 1)
    for layer in vfe.layers:
        rows = layer.norm(layer.linear(rows)).relu()
        tops = torch.stack([rows[voxels.of_point == i].amax(0) for i in range(len(voxels.coords))])
        if not layer.last: rows = torch.cat([rows, tops[voxels.of_point]], 1)
    return tops


@pytest.mark.parametrize('options', [dict(), dict(norm=False), dict(absolute=False), dict(distance=True), dict(dims=(16,)), dict(dims=(8, 8, 12), ignore_z=True), dict(in_chans=3), dict(in_chans=3, absolute=False)])
@pytest.mark.parametrize('training', [False, True])
def test_vfe(options, training):
    vfe = V.DynamicVFE(SIZE, RANGE, **dict(dims=(16, 16)) | options).train(training)
    points = cloud(chans=options.get('in_chans', 5))
    with torch.no_grad():
        for layer in vfe.layers:
            if options.get('norm', True): layer.norm.running_mean.normal_(), layer.norm.running_var.uniform_(.5, 2)
        want = reference_vfe(vfe, points)
        x, coords = vfe(points)
        assert_close(x, want, atol=1e-5, rtol=1e-4)
        assert torch.equal(coords, V.voxelize(points, SIZE, RANGE, ignore_z=options.get('ignore_z', False)).coords)
        order = torch.randperm(len(points))
        assert_close(vfe(points[order])[0], x, atol=1e-5, rtol=1e-4)                       # the order of points means nothing


def test_vfe_learns_and_runs_low():
    vfe, points = V.DynamicVFE(SIZE, RANGE, dims=(16, 16)), cloud()
    vfe(points)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in vfe.parameters())
    with torch.autocast('cpu', torch.bfloat16): x, _ = vfe(points)
    assert x.isfinite().all()
    assert vfe.double()(points.double())[0].dtype == torch.float64


@pytest.mark.parametrize('call, message', [
    (lambda: V.grid_size((.5, .5), RANGE), 'voxel_size'), (lambda: V.grid_size((.5, 0., .5), RANGE), 'voxel_size'), (lambda: V.grid_size(SIZE, RANGE[::-1]), 'point_range'),
    (lambda: V.voxelize(torch.zeros(3, 3), SIZE, RANGE), 'points.*3'), (lambda: V.voxel_windows(torch.tensor([[0, 0, 0, 9]]), (9, 9, 1), (3, 3, 1)), 'coords.*9x9x1'),
    (lambda: V.voxel_windows(torch.tensor([[0, -1, 0, 0]]), (9, 9, 1), (3, 3, 1)), 'coords'), (lambda: V.voxel_windows(torch.zeros(1, 4).long(), (9, 9, 1), (3, 0, 1)), 'window'),
    (lambda: V.voxel_windows(torch.zeros(1, 4).long(), (9, 9, 1), (3, 3, 1), (1, 1)), 'shift'), (lambda: V.to_bev(torch.zeros(1, 2), torch.tensor([[0, 1, 0, 0]]), (3, 3, 1)), 'coords'),
    (lambda: V.to_bev(torch.zeros(1, 2), torch.tensor([[2, 0, 0, 0]]), (3, 3, 1), 2), 'scenes.*3'), (lambda: V.DynamicVFE(SIZE, RANGE, 2), 'in_chans'), (lambda: V.DynamicVFE(SIZE, RANGE, dims=()), 'dims'),
    (lambda: V.DynamicVFE(SIZE, RANGE, dims=(5, 4)), 'dims'), (lambda: V.DynamicVFE(SIZE, RANGE)(torch.zeros(4, 5)), 'points.*6.*5')])
def test_errors(call, message, unchecked):
    with pytest.raises(ValueError, match=message): call()
