"""detection.dsvt: what the card says must hold, a plain-Python reference over many configurations, geometry of boxes, and what it answers to bad input."""
import copy, math, pickle, random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.data import lidar_scene
from vitbook.detection import dsvt as D
from vitbook.kernels.set_attention import naive_set_attention
from vitbook.layers.voxels import voxel_windows
from vitbook.registry import create_model, list_models, model_info

SMALL = dict(grid=(24, 24, 1), embed_dim=16, num_heads=2, depths=(2,), set_size=5, windows=((6, 6, 1),), shifts=(((0, 0, 0), (3, 3, 0)),))
DEEP = dict(grid=(14, 12, 8), embed_dim=16, num_heads=2, depths=(1, 2, 1), set_size=(5, 4, 3), windows=((6, 5, 8), (4, 4, 2), (3, 3, 1)), shifts=(((0, 0, 0), (3, 2, 4)), ((1, 0, 0), (3, 3, 1)), ((0, 0, 0), (1, 1, 0))),
            pool_strides=((1, 1, 4), (2, 2, 2)))


def scene(n=120, grid=(24, 24, 1), scenes=2, seed=0, c=16):
    g, (x, y, z) = torch.Generator().manual_seed(seed), grid
    cells = torch.randperm(scenes * x * y * z, generator=g)[:n]
    return torch.randn(n, c, generator=g), torch.stack([cells // (x * y * z), cells % z, cells // z % y, cells // z // y % x], 1)


def noisy(module, size=.2, seed=0):
    "Every parameter and running statistic moved off its start, so that zero biases hide nothing."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn(p.shape, generator=g).to(p) * size)
        for name, b in module.named_buffers():
            if name.endswith('running_mean'): b.add_(torch.randn(b.shape, generator=g) * .3)
            if name.endswith('running_var'): b.mul_(torch.rand(b.shape, generator=g) + .5)
    return module


def small(**more): return noisy(D.DSVT(**SMALL | more)).eval()


# ---- the partition, window by window in plain Python

def naive_partition(coords, window, shift, size, order):
    "List of sets in the order of windows, each a list of slots; rows of coords are scene, z, y, x."
    cells = defaultdict(list)
    for i, (b, z, y, x) in enumerate(coords.tolist()):
        u = [v + s for v, s in zip((x, y, z), shift)]
        px, py, pz = (v % w for v, w in zip(u, window))
        cells[(b, *(v // w for v, w in zip(u, window)))].append(((py, px, pz) if order == 0 else (px, py, pz), i))
    return [[sorted(cells[w])[p][1] for p in row] for w in sorted(cells) for row in D.naive_set_positions(len(cells[w]), size)]


@given(st.integers(0, 10 ** 6), st.integers(1, 13), st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3)), st.tuples(*[st.integers(0, 5)] * 3))
def test_fast_partition_equals_the_loop(seed, size, window, shift):
    _, coords = scene(90, (9, 11, 3), seed=seed)
    windows = voxel_windows(coords, (9, 11, 3), window, shift)
    sets = D.set_partition(windows, D.rotated_keys(windows.place, window), size)
    for order in (0, 1):
        want = naive_partition(coords, window, shift, size, order)
        assert sets.inds[order].tolist() == want
        assert sets.mask[order].tolist() == [[k > 0 and row[k] == row[k - 1] for k in range(size)] for row in want]
        flat = [i for row in want for i in row]
        assert sets.slots[order].tolist() == [flat.index(i) for i in range(len(coords))]


@pytest.mark.parametrize('config', [0, 1])
@pytest.mark.parametrize('order', [0, 1])
@pytest.mark.parametrize('size', [1, 4, 7])
def test_every_voxel_is_in_one_set(config, order, size):
    "Unmasked slots are a permutation of the voxels; windows of 1, tau - 1, tau, tau + 1 voxels among them."
    rows = [(0, 0, i // 6, i % 6) for i in range(1)] + [(0, 0, i // 6, 6 + i % 6) for i in range(size - 1)] + [(0, 0, 6 + i // 6, i % 6) for i in range(size)] + [(0, 0, 6 + i // 6, 6 + i % 6) for i in range(size + 1)]
    rows += [(1, 0, *divmod(int(i), 24)) for i in torch.randperm(576)[:150]]
    coords = torch.tensor(rows)
    model = small(set_size=size)
    cut = model.partition(coords)[0].configs[config]
    inds, mask, n = cut.sets.inds[order], cut.sets.mask[order], cut.windows.count
    if config == 0: assert {1, size, size + 1} | ({size - 1} if size > 1 else set()) <= set(n.tolist())
    assert sorted(inds[~mask].tolist()) == list(range(len(coords))) and not mask[:, 0].any()
    assert len(inds) == sum(math.ceil(c / size) for c in n.tolist())
    window = cut.windows.index[inds]
    assert (window == window[:, :1]).all()                                                # no set mixes windows,
    assert (coords[inds, 0] == coords[inds[:, :1], 0]).all()                              # nor scenes
    distinct = (~mask).sum(1)
    for w in range(len(n)):
        mine = distinct[window[:, 0] == w]
        assert mine.max() - mine.min() <= 1 and set(mine.tolist()) <= {n[w].item() // len(mine), -(-n[w].item() // len(mine))}
    repeats = torch.cat([torch.zeros(len(inds), 1, dtype=torch.bool), inds[:, 1:] == inds[:, :-1]], 1)
    assert torch.equal(mask, repeats) and all(len(set(row)) == d for row, d in zip(inds.tolist(), distinct.tolist()))    # repeats stand side by side


@given(st.integers(1, 3 * 10 ** 5), st.integers(1, 5000))
def test_positions_are_exact(n, size):
    "Where float32 would be off: the sets of a huge window hold the positions floor(j n / S) … floor((j + 1) n / S) - 1."
    window, position = D.set_positions(torch.tensor([2, n]), size)
    sets = -(-n // size)
    mine = position[window == 1]
    assert len(mine) == sets and position[window == 0].unique().tolist() == [0, 1] and mine.shape[1] == size
    j = torch.arange(sets)
    assert torch.equal(mine[:, 0], j * n // sets) and torch.equal(mine[:, -1], (j + 1) * n // sets - 1)
    step = mine.flatten().diff()
    assert step.numel() == 0 or (step.min() >= 0 and step.max() <= 1)                   # every position comes up, in order
    if n * size < 10 ** 5: assert mine.tolist() == D.naive_set_positions(n, size)


def test_windows_that_are_not_square():
    "The keys' strides are those of the other axis: in a window of 2x5 every order is that of the coordinates."
    place = torch.tensor([[z, y, x] for x in range(2) for y in range(5) for z in range(3)])
    for key, axes in zip(D.rotated_keys(place, (2, 5, 3)), ((1, 2, 0), (2, 1, 0))):
        assert sorted(key.tolist()) == list(range(30))
        assert key.argsort().tolist() == sorted(range(30), key=lambda i: [place[i, a].item() for a in axes])


# ---- layers and the model against a reference that goes set by set

def reference_layer(layer, x, pos, sets):
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((x + pos, x + pos, x), layer.attn.qkv.weight.chunk(3), layer.attn.qkv.bias.chunk(3)))
    members = [torch.tensor(sorted(set(row))) for row in sets]
    out = torch.empty_like(v)
    for m in members: out[m] = naive_set_attention(q[m], k[m], v[m], torch.arange(len(m))[None], torch.zeros(1, len(m), dtype=torch.bool), layer.attn.num_heads)
    y = layer.norm1(x + layer.attn.proj(out))
    y = layer.norm2(y + layer.mlp.fc2(layer.mlp.act(layer.mlp.fc1(y))))
    return layer.norm(x + y)


def reference_model(model, x, coords, pooling='attention', normalize=False, pos_bug=False):
    number = 0
    for s, blocks in enumerate(model.stages):
        grid, cuts = model.grids[s], list(zip(model.windows[s], model.shifts[s]))
        cuts = [(w, (*sh[:2], 0 if w[2] == grid[2] else sh[2])) for w, sh in cuts]
        for block in blocks:
            start = x
            for i in (0, 1):
                window, shift = cuts[number % 2]
                told, told_shift = cuts[i] if pos_bug else (window, shift)
                place = torch.tensor([[(c + d) % w for c, d, w in zip(row[:0:-1], told_shift, told)] for row in coords.tolist()]).float() - torch.tensor(told) / 2       # x, y, z
                if normalize: place = place / torch.tensor(told) * 6.283
                net = block.pos[i].net
                x = reference_layer(block.layers[i], x, net(place[:, :net[0].in_features]), naive_partition(coords, window, shift, model.set_sizes[s], i))
            x, number = block.norm(start + x), number + 1
        if s < len(model.pools):
            stride, pool = model.pool_strides[s], model.pools[s]
            cells = defaultdict(lambda: torch.zeros(math.prod(stride), x.shape[1]))
            for row, (b, z, y, col) in zip(x, coords.tolist()):
                dx, dy, dz = (v % t for v, t in zip((col, y, z), stride))
                cells[(b, *(v // t for v, t in zip((col, y, z), stride)))][(dx * stride[1] + dy) * stride[2] + dz] = row
            keys = sorted(cells)
            coords = torch.tensor([[b, z, y, col] for b, col, y, z in keys])
            children = torch.stack([cells[k] for k in keys])
            if pooling == 'maxpool': x = children.max(1).values
            elif pooling == 'linear': x = pool.norm(children.flatten(1) @ pool.linear.weight.T)
            else:
                mha = nn.MultiheadAttention(x.shape[1], pool.num_heads, batch_first=True)
                mha.load_state_dict({'in_proj_weight': torch.cat([pool.q.weight, pool.kv.weight]), 'in_proj_bias': torch.cat([pool.q.bias, pool.kv.bias]), 'out_proj.weight': pool.proj.weight, 'out_proj.bias': pool.proj.bias})
                query = children.max(1, keepdim=True).values
                x = pool.norm((query + mha(query, children + pool.pos, children)[0])[:, 0])
    return x, coords


@pytest.mark.parametrize('options', [dict(), dict(pooling='maxpool'), dict(pooling='linear', embed_dim=(16, 8, 24), num_heads=(2, 1, 4)), dict(normalize_pos=True), dict(pos_bug=True), dict(pos_bug=True, normalize_pos=True),
                                     dict(activation='relu', mlp_ratio=(1, 3, .5)), dict(hybrid_factor=(1, 3, 2)), dict(pool_heads=4), dict(set_size=1), dict(set_size=99)])
def test_model_against_the_reference(options):
    model = noisy(D.DSVT(**DEEP | options)).eval()
    x, coords = scene(90, DEEP['grid'])
    with torch.no_grad():
        y, out = model(x, coords)
        want, where = reference_model(model, x, coords, options.get('pooling', 'attention'), options.get('normalize_pos', False), options.get('pos_bug', False))
    assert torch.equal(out, where)
    assert_close(y, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_set_attention_is_dense_attention_of_the_distinct():
    "And the last copy of a voxel instead of the first changes nothing."
    x, coords = scene()
    layer, pos = noisy(D.SetLayer(16, 2)).eval(), torch.randn(120, 16)
    sets = small().partition(coords)[0].configs[0].sets
    for o in (0, 1):
        out = layer(x, pos, sets.inds[o], sets.mask[o], sets.slots[o])
        assert_close(out, reference_layer(layer, x, pos, sets.inds[o].tolist()), atol=1e-5, rtol=1e-5)
        flat = sets.inds[o].flatten().tolist()
        last = torch.tensor([len(flat) - 1 - flat[::-1].index(i) for i in range(120)])
        assert not torch.equal(last, sets.slots[o])
        assert_close(layer(x, pos, sets.inds[o], sets.mask[o], last), out, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_are_not_in_the_values():
    "Constant features in, constant features out: attention can neither count nor locate."
    layer, (_, coords) = noisy(D.SetLayer(16, 2)).eval(), scene()
    sets = small().partition(coords)[0].configs[0].sets
    out = layer(torch.ones(120, 16), torch.randn(120, 16), sets.inds[0], sets.mask[0], sets.slots[0])
    assert_close(out, out[:1].expand(120, -1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('deep', [False, True])
def test_order_and_company_of_voxels_mean_nothing(deep):
    model = noisy(D.DSVT(**DEEP)).eval() if deep else small()
    x, coords = scene(100, model.grids[0])
    y, out = model(x, coords)
    order = torch.randperm(100)
    permuted, where = model(x[order], coords[order])
    if deep:
        assert torch.equal(where, out)
        assert_close(permuted, y, atol=1e-5, rtol=1e-4)
    else: assert_close(permuted, y[order], atol=1e-5, rtol=1e-4)
    for b in (0, 1):
        alone, _ = model(x[coords[:, 0] == b], coords[coords[:, 0] == b])
        assert_close(alone, y[out[:, 0] == b], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_order_one_is_order_zero_with_x_and_y_exchanged():
    _, coords = scene()
    swapped = coords[:, [0, 1, 3, 2]]
    for config in (0, 1):
        a, b = (small().partition(c)[0].configs[config] for c in (coords, swapped))
        sets = lambda cut, order: {frozenset(row) for row in cut.sets.inds[order].tolist()}
        assert sets(a, 1) == sets(b, 0) and sets(a, 0) == sets(b, 1) and sets(a, 0) != sets(a, 1)


@torch.no_grad()
def test_large_sets_are_windows():
    "With tau at least the largest count a layer is plain window attention, and both orders agree."
    x, coords = scene()
    cut = small(set_size=36).partition(coords)[0].configs[0]
    assert len(cut.sets.inds[0]) == len(cut.windows.count)
    layer, pos = noisy(D.SetLayer(16, 2)).eval(), torch.randn(120, 16)
    outs = [layer(x, pos, cut.sets.inds[o], cut.sets.mask[o], cut.sets.slots[o]) for o in (0, 1)]
    assert_close(*outs, atol=1e-5, rtol=1e-5)
    assert_close(outs[0], reference_layer(layer, x, pos, [(cut.windows.index == w).nonzero()[:, 0].tolist() for w in range(len(cut.windows.count))]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_translation_by_the_larger_window():
    model, (x, coords) = small(grid=(60, 60, 1)), scene()
    y, _ = model(x, coords)
    for move in ([0, 0, 12, 0], [0, 0, 24, 36]): assert_close(model(x, coords + torch.tensor(move))[0], y, atol=1e-5, rtol=1e-4)
    assert (model(x, coords + torch.tensor([0, 0, 6, 0]))[0] - y).abs().max() > .01               # half of it is not enough


# ---- pooling

@torch.no_grad()
def test_pooling():
    pool, c = noisy(D.AttentionPooling(16, 6)), torch.randn(4, 16)
    nn.init.zeros_(pool.pos)
    value = F.linear(c, pool.kv.weight[16:], pool.kv.bias[16:])
    assert_close(pool(c[:, None].expand(-1, 6, -1)), pool.norm(c + pool.proj(value)))
    negative = torch.zeros(1, 6, 16)
    negative[0, :2] = -torch.rand(2, 16) - 1
    seen = {}
    pool.q.register_forward_pre_hook(lambda m, given: seen.update(query=given[0]))
    pool(negative)
    assert not seen['query'].any() and not D.MaxPooling()(negative).any()                         # empty slots count as zeros
    _, coords = scene(90, DEEP['grid'])
    pooled = D.pool_cells(coords, DEEP['grid'], (2, 3, 4))
    want = {(b, z // 4, y // 3, x // 2) for b, z, y, x in coords.tolist()}
    assert len(pooled.coords) == len(want) and {tuple(r) for r in pooled.coords.tolist()} == want
    assert torch.equal(pooled.coords[pooled.parent], coords.div(torch.tensor([1, 4, 3, 2]), rounding_mode='floor'))
    x = torch.randn(90, 16)
    assert_close(D.gather_children(x, pooled, 24)[pooled.parent, pooled.child], x)
    assert len(set(zip(pooled.parent.tolist(), pooled.child.tolist()))) == 90
    assert D.gather_children(x, pooled, 24).count_nonzero() == x.numel()


# ---- positions

@torch.no_grad()
@pytest.mark.parametrize('flat, normalize', [(True, False), (True, True), (False, False), (False, True)])
def test_position_table(flat, normalize):
    "Embedding the places of a window once gives what embedding every voxel gives; in training all voxels count for the norm."
    mlp = noisy(D.PositionMlp(8, flat, normalize)).eval()
    place = torch.stack([torch.zeros(300).long() if flat else torch.randint(3, (300,)), torch.randint(4, (300,)), torch.randint(5, (300,))], 1)
    assert_close(mlp(place, (5, 4, 1 if flat else 3)), mlp.embed(place, (5, 4, 1 if flat else 3)))
    calls = []
    mlp.net.register_forward_pre_hook(lambda m, given: calls.append(len(given[0])))
    mlp(place, (5, 4, 1 if flat else 3)), mlp.train()(place, (5, 4, 1 if flat else 3))
    assert calls == [20 if flat else 60, 300]


@torch.no_grad()
def test_pos_bug():
    "The published version: the second layer of an even block, and the first of an odd one, hear of places in the other windows."
    x, coords = scene()
    right, wrong = small(), small(pos_bug=True)
    assert (right(x, coords)[0] - wrong(x, coords)[0]).abs().max() > 1e-3
    told = []
    for block in wrong.stages[0]:
        for mlp in block.pos: mlp.register_forward_pre_hook(lambda m, given: told.append(given[1]))
    for block in right.stages[0]:
        for mlp in block.pos: mlp.register_forward_pre_hook(lambda m, given: told.append(given[1]))
    wrong(x, coords), right(x, coords)
    assert told == [(6, 6, 1), (12, 12, 1)] * 2 + [(6, 6, 1)] * 2 + [(12, 12, 1)] * 2


# ---- the model as a piece of software

@pytest.mark.parametrize('name, count', [('dsvt_waymo_pillar', 2_684_928), ('dsvt_nuscenes_pillar', 1_200_128), ('dsvt_waymo_voxel', 3_133_824), ('dsvt_waymo_pillar_detector', 8_653_292), ('dsvt_waymo_voxel_detector', 9_102_188)])
def test_registered(name, count):
    info = model_info(name)
    assert info['paper'] == 'arXiv:2301.06051' and name in list_models('dsvt_*', part='detection') and info['parameters'] == count


def test_published_settings():
    with torch.device('meta'): models = {name: create_model(name) for name in ('dsvt_waymo_pillar', 'dsvt_waymo_voxel', 'dsvt_nuscenes_pillar')}
    pillar, voxel, nuscenes = models.values()
    assert pillar.windows == [[(12, 12, 1), (24, 24, 1)]] and nuscenes.windows == [[(30, 30, 1)] * 2] and nuscenes.shifts[0][1] == (15, 15, 0)
    assert voxel.grids == [(468, 468, 32), (468, 468, 8), (468, 468, 2), (468, 468, 1)] and [w[1] for w in voxel.windows] == [(24, 24, 32), (24, 24, 8), (24, 24, 2), (24, 24, 1)]
    assert [b.pos[0].net[0].in_features for stage in voxel.stages for b in stage] == [3, 3, 3, 2]


@pytest.mark.parametrize('options', [dict(), dict(grad_checkpointing=True), dict(attn_drop_rate=.2)])
def test_training_reaches_everything(options):
    model = noisy(D.DSVT(**DEEP | options)).train()
    x, coords = scene(90, DEEP['grid'])
    y, _ = model(x.requires_grad_(), coords)
    (y.square().sum() + y.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()) and x.grad.abs().sum() > 0


def test_checkpointing_changes_nothing():
    x, coords = scene(90, DEEP['grid'])
    grads = []
    for on in (False, True):
        torch.manual_seed(1)
        model = noisy(D.DSVT(**DEEP, grad_checkpointing=on)).train()
        model(x, coords)[0].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()))  # the norms of the positions see a batch once
    for name in grads[0]: assert_close(grads[0][name], grads[1][name])


def test_dropout_acts_in_training_only():
    model, (x, coords) = small(attn_drop_rate=.5), scene()
    assert_close(model(x, coords)[0], model(x, coords)[0], atol=0, rtol=0)
    for m in model.modules():
        if isinstance(m, D.SetAttention): m.train()
    assert (model(x, coords)[0] - model(x, coords)[0]).abs().max() > .01


@torch.no_grad()
def test_precomputed_tables_copies_and_types():
    model, (x, coords) = small(), scene()
    y, _ = model(x, coords)
    assert_close(model(x, coords, model.partition(coords))[0], y, atol=0, rtol=0)
    assert_close(model(x, coords.int())[0], y, atol=0, rtol=0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert_close(twin(x, coords)[0], y, atol=0, rtol=0)
    assert_close(model.double()(x.double(), coords)[0].float(), y, atol=1e-4, rtol=1e-4)
    one, _ = small()(x[:1], coords[:1])
    assert one.isfinite().all() and small()(x[:0], coords[:0])[0].shape == (0, 16)


@torch.no_grad()
def test_compiles_with_its_tables(unchecked):
    "Given the index tables, the graph is caught whole."
    import warnings
    torch._dynamo.reset()
    model, (x, coords) = small(), scene()
    stages = model.partition(coords)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        out, _ = torch.compile(model, backend='aot_eager', fullgraph=True)(x, coords, stages)
    assert_close(out, model(x, coords)[0], atol=1e-5, rtol=1e-4)


def test_initial_weights():
    torch.manual_seed(0)
    model = D.DSVT(**DEEP | dict(embed_dim=64, num_heads=4))
    layer, pool = model.stages[0][0].layers[0], model.pools[0]
    edge = lambda w: w.abs().max().item()
    for w, rows in ((layer.attn.qkv.weight, 192), (layer.mlp.fc1.weight, 128), (pool.kv.weight, 192), (pool.q.weight, 192), (pool.pos, 4)): assert .9 < edge(w) / math.sqrt(6 / (rows + 64)) <= 1
    assert not layer.attn.qkv.bias.any() and not layer.attn.proj.bias.any() and not pool.kv.bias.any() and layer.mlp.fc1.bias.any()


def official_layout(model):
    "The state of a backbone of ours under the official names."
    back = {}
    for name, v in model.state_dict().items():
        parts = name.split('.')
        if parts[0] == 'stages' and parts[3] == 'pos':
            name = f'input_layer.posembed_layers.{parts[1]}.{parts[2]}.{parts[4]}.position_embedding_head.' + '.'.join(parts[6:])
        elif parts[0] == 'stages' and parts[3] == 'norm':
            name = f'residual_norm_stage_{parts[1]}.{parts[2]}.{parts[4]}'
        elif parts[0] == 'stages':
            inner = '.'.join(parts[5:]).replace('attn.qkv.', 'win_attn.self_attn.in_proj_').replace('attn.proj', 'win_attn.self_attn.out_proj').replace('mlp.fc', 'win_attn.linear')
            name = f'stage_{parts[1]}.{parts[2]}.encoder_list.{parts[4]}.' + (
                'win_attn.' + inner if inner.startswith(('norm1', 'norm2')) else inner)
        else:
            if parts[2] == 'q': v = torch.cat([v, model.state_dict()[name.replace('.q.', '.kv.')]])
            if parts[2] == 'kv': continue
            name = f'stage_{parts[1]}_reduction.' + {'pos': 'pos_embedding',
                                                     'q': f'self_attn.in_proj_{parts[-1]}',
                                                     'proj': f'self_attn.out_proj.{parts[-1]}',
                                                     'norm': f'norm.{parts[-1]}'}[parts[2]]
        back[name] = v
    return back


def test_official_names_round_trip():
    "What the names say of the official layout, by a state under those names."
    model = noisy(D.DSVT(**DEEP))
    back = official_layout(model)
    twin, (x, coords) = D.DSVT(**DEEP).from_official(back), scene(90, DEEP['grid'])
    assert_close(twin(x, coords)[0], model.eval()(x, coords)[0], atol=0, rtol=0)
    assert D.DSVT.official_arguments(back, num_heads=1)['pos_bug']      # published weights have learned with it
    D.DSVT(**DEEP).from_official({f'backbone_3d.{k}': v
                                  for k, v in back.items()} | {'dense_head.x': torch.zeros(1)})
    with pytest.raises(ValueError, match='missing'):
        D.DSVT(**DEEP).from_official({k: v for k, v in back.items() if 'linear1' not in k})


@pytest.mark.parametrize('more', [
    {}, dict(in_chans=4, num_classes=5, head_width=12), dict(vfe_dims=(16,), mlp_ratio=3.),
    dict(bev_depths=(2, 0), bev_dims=(8, 12), up_strides=(.5, 1), up_dims=(6, 10)), dict(bev_strides=(1, 1), up_strides=(), up_dims=())],
    ids=lambda m: ' '.join(m) or 'plain')
def test_a_detector_is_made_from_its_weights(more):
    "Sizes are read off a state under the official names; strides, windows and the range are said."
    size = dict(voxel_size=(1., 1., 6.), point_range=(-12., -12., -2., 12., 12., 4.), set_size=6, windows=((6, 6, 1),),
                shifts=(((0, 0, 0), (3, 3, 0)),), bev_strides=(1, 2), up_strides=(1, 2))
    told = dict(vfe_dims=(16, 16), embed_dim=16, depths=(2,), num_heads=2, bev_depths=(1, 1), bev_dims=(8, 8),
                up_dims=(8, 8), head_width=8)
    said = {k: more.get(k, v) for k, v in size.items()}
    model = noisy(D.DSVTDetector(**said | told | more, pos_bug=True)).eval()      # as published models have it
    state = {f'backbone_3d.{k}': v
             for k, v in official_layout(model.backbone).items()} | {'global_step': torch.zeros(1)}
    for name, v in model.state_dict().items():
        for ours, theirs in (('vfe.layers.', 'vfe.pfn_layers.'), ('bev.', 'backbone_2d.'),
                             ('head.outputs.', 'dense_head.heads_list.0.'), ('head.', 'dense_head.')):
            if name.startswith(ours):
                state[theirs + name.removeprefix(ours)] = v
                break
    twin = D.DSVTDetector.from_official(state, num_heads=2, **said)
    points = torch.cat(
        [torch.zeros(90, 1), torch.rand(90, 3) * 20 - 10, torch.rand(90, twin.in_chans - 3)], 1)
    points[:, 3] = points[:, 3].clamp(-1.9, 3.9)
    for name, want in model(points).items(): assert_close(twin(points)[name], want, atol=0, rtol=0)
    with pytest.raises(ValueError, match='num_heads'): D.DSVTDetector.from_official(state, **said)
    with pytest.raises(ValueError, match='no DSVT'):
        D.DSVTDetector.from_official({'conv.weight': torch.zeros(1)})


@pytest.mark.parametrize('options, message', [
    (dict(num_heads=3), 'num_heads.*16.*3'), (dict(set_size=0), 'set_size.*0'), (dict(depths=()), 'depths'), (dict(windows=((6, 6, 1), (6, 6, 1))), 'windows.*1 stages.*2'), (dict(shifts=(((0, 0, 0),),)), 'shifts'),
    (dict(windows=((6, 0, 1),)), 'windows'), (dict(grid=(24, 24)), 'grid'), (dict(pool_strides=((1, 1, 2),)), 'pool_strides'), (dict(embed_dim=(16, 16)), 'embed_dim.*2'), (dict(pooling='mean'), 'pooling'),
    (dict(activation='glu'), 'activation'), (dict(hybrid_factor=(0, 1, 1)), 'hybrid_factor')])
def test_constructor_errors(options, message, unchecked):
    with pytest.raises(ValueError, match=message): D.DSVT(**SMALL | options)


def test_more_errors(unchecked):
    with pytest.raises(ValueError, match="embed_dim.*'linear'"): D.DSVT(**DEEP | dict(embed_dim=(16, 16, 8)))
    with pytest.raises(ValueError, match='pool_heads'): D.DSVT(**DEEP | dict(pool_heads=3))
    x, coords = scene()
    for bad in ([0, 0, 24, 0], [0, 1, 0, 0], [0, 0, 0, -1], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match='coords.*24x24x1'): small()(x[:1], torch.tensor([bad]))
    with pytest.raises(ValueError, match='x must have embed_dim=16.*8'): small()(x[:, :8], coords)
    with pytest.raises(ValueError, match='one row a voxel.*119 and 120'): small()(x[1:], coords)
    with pytest.raises(ValueError, match='set_size'): D.set_partition(voxel_windows(coords, (24, 24, 1), (6, 6, 1)), [coords[:, 3]], 0)


# ---- boxes

def polygon_area(a, b):
    "Common area by clipping one polygon by the other's edges, in plain Python."
    p, q = ([tuple(v) for v in D.corners(t[None])[0].double().tolist()] for t in (a, b))
    for (x0, y0), (x1, y1) in zip(q, q[1:] + q[:1]):
        side, out = (lambda v: (x1 - x0) * (v[1] - y0) - (y1 - y0) * (v[0] - x0)), []
        for u, v in zip(p, p[1:] + p[:1]):
            su, sv = side(u), side(v)
            if su >= 0: out.append(u)
            if su * sv < 0: out.append(tuple(i + su / (su - sv) * (j - i) for i, j in zip(u, v)))
        p = out
    return abs(sum(u[0] * v[1] - u[1] * v[0] for u, v in zip(p, p[1:] + p[:1]))) / 2 if p else 0.


def boxes(m, seed=0, spread=2.):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(m, 3, generator=g) * spread, torch.rand(m, 3, generator=g) * 3 + .3, torch.rand(m, 1, generator=g) * 7 - 3], 1)


def test_overlaps():
    a, b = boxes(200), boxes(200, 1)
    assert_close(D.overlap_area(a, b), torch.tensor([polygon_area(*pair) for pair in zip(a, b)]), atol=2e-3, rtol=1e-3)
    assert_close(D.box_iou(a, a), torch.ones(200), atol=1e-3, rtol=1e-3)
    unit = torch.tensor([[0., 0, 0, 2, 2, 2, 0]])
    for move, want in (([1, 0, 0], 1 / 3), ([0, 0, 1], 1 / 3), ([1, 1, 1], 1 / 15), ([3, 0, 0], 0.), ([0, 0, 3], 0.)):
        assert_close(D.box_iou(unit, unit + torch.tensor([*move, 0, 0, 0, 0.])), torch.tensor([want]), atol=1e-4, rtol=1e-4)
    assert_close(D.box_iou(unit, unit + torch.tensor([0, 0, 0, 0, 0, 0, math.pi / 4]), flat=True), torch.tensor([8 * (2 ** .5 - 1) / (8 - 8 * (2 ** .5 - 1))]), atol=1e-4, rtol=1e-4)
    assert_close(D.box_ious(a[:3], b[:4])[1, 2], D.box_iou(a[1:2], b[2:3])[0])


def test_suppression():
    a = torch.tensor([[0., 0, 0, 4, 2, 2, 0], [.2, 0, 0, 4, 2, 2, 0], [0, 10, 0, 4, 2, 2, 0], [.1, 0, 0, 4, 2, 2, .05], [.2, 0, 0, 4, 2, 2, 0]])
    kept = D.suppress(D.Detections(a, torch.tensor([.5, .9, .3, .4, .7]), torch.tensor([0, 0, 0, 1, 1])), (.5, .95))
    assert kept.scores.tolist() == pytest.approx([.9, .7, .4, .3]) and kept.labels.tolist() == [0, 1, 1, 0]
    assert len(D.suppress(D.Detections(a, torch.rand(5), torch.zeros(5).long()), (2.,), post=3).scores) == 3


def test_targets_are_decoded_to_boxes():
    "Maps that say exactly what the targets say give the boxes back; the losses of such maps are nothing but those of the heat."
    cell, low, b, labels = (.5, .4), (-8., -6.), boxes(5, 3), torch.tensor([0, 2, 1, 0, 2])
    b[:, 3:6] += .5
    t = D.center_targets(b, labels, 3, (30, 32), cell, low)
    at = lambda i: divmod(int(t.at[i]), 32)
    assert all(t.heat[labels[i]][at(i)] == 1 for i in range(5)) and t.heat.max() == 1 and (t.heat == 1).sum() == 5
    maps = {name: torch.zeros(1, c, 30, 32) for name, c in D.HEADS.items()} | dict(hm=torch.logit(t.heat.clamp(1e-6, 1 - 1e-6))[None])
    maps['iou'] += 1
    for i, code in enumerate(t.codes):
        for name, part in zip(('center', 'center_z', 'dim', 'rot'), code.split([2, 1, 3, 2])): maps[name][(0, slice(None), *at(i))] = part
    found = D.decode(maps, cell, low, score=.9)[0]
    assert len(found.boxes) == 5
    for box, label in zip(b, labels):
        i = (found.boxes[:, :3] - box[:3]).norm(dim=1).argmin()
        turned = (found.boxes[i, 6] - box[6] + math.pi) % (2 * math.pi) - math.pi
        assert_close(found.boxes[i, :6], box[:6], atol=1e-4, rtol=1e-4)
        assert found.labels[i] == label and abs(turned) < 1e-4
    losses = D.center_loss(maps, [t], cell, low)
    assert losses['codes'] < 1e-4 and losses['diou'] < 1e-4 and losses['iou'] < .01 and losses['heat'] < D.focal_loss(torch.zeros_like(maps['hm']), t.heat[None])


def test_rectified_scores():
    maps = {name: torch.zeros(1, c, 4, 4) for name, c in D.HEADS.items()} | dict(hm=torch.full((1, 3, 4, 4), -9.))
    maps['hm'][0, 0, 1, 1], maps['hm'][0, 2, 2, 3], maps['iou'][0, 0, 1, 1] = 2., 2., .6
    p, (a, b, c) = torch.tensor(2.).sigmoid(), (.68, .71, .65)
    found = D.decode(maps, (1, 1), (0, 0))[0]
    assert_close(found.scores, torch.stack([p ** (1 - a) * .8 ** a, p ** (1 - c) * .5 ** c]))
    assert found.labels.tolist() == [0, 2]
    assert_close(D.decode(maps, (1, 1), (0, 0), rectify=None)[0].scores, torch.stack([p, p]))
    assert len(D.decode(maps, (1, 1), (0, 0), limits=(0, 0, -1, 2, 2, 1))[0].scores) == 1
    with pytest.raises(ValueError, match='rectify'): D.decode(maps, (1, 1), (0, 0), rectify=(.5,))


def test_losses_by_hand():
    heat, logits = torch.zeros(1, 1, 1, 3), torch.tensor([[[[0., 2., -1.]]]])
    heat[..., 1], heat[..., 2] = 1, .5
    p = logits.sigmoid().flatten()
    want = -(p[1].log() * (1 - p[1]) ** 2 + (1 - p[0]).log() * p[0] ** 2 + (1 - p[2]).log() * p[2] ** 2 * .5 ** 4)
    assert_close(D.focal_loss(logits, heat), want)
    length, width = torch.tensor([10.]), torch.tensor([4.])
    official = torch.tensor([(65.44 ** .5 - 2.8) / 2])      # the third of the three cases, undivided
    assert_close(D.gaussian_radius(length, width, .1, official=True), official)
    a = torch.tensor([[0., 0, 0, 2, 2, 2, 1]])
    assert_close(D.upright_diou(a, a + torch.tensor([1., 0, 0, 0, 0, 0, 0])), torch.tensor([1 / 3 - 1 / (9 + 4 + 4)]))
    with pytest.raises(ValueError, match='labels'): D.center_targets(a, torch.tensor([3]), 3, (4, 4), (1, 1), (0, 0))



def test_the_overlap_to_be_predicted_is_a_target():
    "Its loss moves the predicted overlap alone, by its sign a box; that of the overlap itself moves the boxes."
    cell, low, b, labels = (.5, .4), (-8., -6.), boxes(5, 3), torch.tensor([0, 2, 1, 0, 2])
    b[:, 3:6] += .5
    t = D.center_targets(b, labels, 3, (30, 32), cell, low)
    torch.manual_seed(0)
    maps = {name: torch.randn(1, c, 30, 32) * .1 for name, c in D.HEADS.items()} | dict(hm=torch.randn(1, 3, 30, 32))
    for i, code in enumerate(t.codes):                                                  # near the boxes, so that they overlap
        for name, part in zip(('center', 'center_z', 'dim', 'rot'), code.split([2, 1, 3, 2])): maps[name][0].flatten(1)[:, t.at[i]] += part
    maps = {name: m.requires_grad_() for name, m in maps.items()}
    losses = D.center_loss(maps, [t], cell, low)
    iou = dict(zip(maps, torch.autograd.grad(losses['iou'], [*maps.values()], allow_unused=True, retain_graph=True)))
    assert [name for name, g in iou.items() if g is not None and g.any()] == ['iou']
    assert_close(iou['iou'].flatten()[t.at].abs(), torch.full((5,), 1 / 5))
    assert iou['iou'].count_nonzero() == 5
    diou = dict(zip(maps, torch.autograd.grad(losses['diou'], [*maps.values()], allow_unused=True)))
    assert {name for name, g in diou.items() if g is not None and g.any()} == {'center', 'center_z', 'dim'}


def test_detections_carry_no_graph():
    model = create_model('dsvt_waymo_pillar_detector', **model_info('dsvt_waymo_pillar_detector')['example']).eval()
    scene = lidar_scene(0, extent=12., azimuths=180, rings=16)
    found = model.detect(torch.cat([torch.zeros(len(scene.points), 1), scene.points], 1), score=0.)
    assert len(found[0].boxes) and not any(x.requires_grad for x in found[0] if isinstance(x, torch.Tensor))


# ---- the detector

@pytest.mark.parametrize('name', ['dsvt_waymo_pillar_detector', 'dsvt_waymo_voxel_detector'])
def test_detector(name):
    model = create_model(name, **model_info(name)['example'])
    scenes = [lidar_scene(i, extent=12., azimuths=180, rings=16) for i in (0, 1)]
    points = torch.cat([torch.cat([torch.full((len(s.points), 1), float(i)), s.points], 1) for i, s in enumerate(scenes)])
    maps = model(points)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {k: (2, c, 24, 24) for k, c in (D.HEADS | dict(hm=3)).items()} and model.cell == (1., 1.)
    targets = [model.targets(s.boxes, s.labels, maps['hm'].shape[2:]) for s in scenes]
    sum(model.loss(maps, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    found = model.eval().detect(points, score=.05)
    assert len(found) == 2 and all(torch.equal(f.scores, f.scores.sort(descending=True).values) for f in found)
    assert model(points, scenes=3)['hm'].shape[0] == 3
    empty = [D.Targets(torch.zeros(3, 24, 24), torch.zeros(0).long(), torch.zeros(0, 8), torch.zeros(0, 7))] * 2
    assert all(v.isfinite() for v in model.loss(model(points), empty).values())


def test_detector_errors(unchecked):
    example = model_info('dsvt_waymo_voxel_detector')['example']
    with pytest.raises(ValueError, match='vfe_dims'): create_model('dsvt_waymo_voxel_detector', **example | dict(vfe_dims=(8, 8)))
    with pytest.raises(ValueError, match='one cell in z, got 2'): create_model('dsvt_waymo_voxel_detector', **example | dict(pool_strides=((1, 1, 4),)))
    with pytest.raises(ValueError, match='points.*6'): create_model('dsvt_waymo_voxel_detector', **example)(torch.zeros(5, 5))
    with pytest.raises(ValueError, match='depths, strides and dims'): D.BEVBackbone(8, (1, 1), (1,), (8,))
    with pytest.raises(ValueError, match='up_strides'): D.BEVBackbone(8, (1,), (1,), (8,), (1, 2, 3), (8,))


@torch.no_grad()
def test_bev_sizes():
    x = torch.randn(1, 6, 16, 12)
    for arguments, size in (((6, (1, 1), (1, 2), (4, 8), (1, 2), (4, 4)), (8, 16, 12)), ((6, (1, 1), (1, 2), (4, 8), (.5, 1), (4, 4)), (8, 8, 6)), ((6, (1,), (2,), (4,), (), ()), (4, 8, 6)), ((6, (1, 1), (1, 2), (4, 8), (.5, 1, 2), (4, 4)), (8, 16, 12))):
        bev = D.BEVBackbone(*arguments).eval()
        assert bev(x).shape[1:] == size and bev.num_features == size[0]
    assert D.CenterHead(6, 2, 8, upsample=2).eval()(x)['hm'].shape == (1, 2, 32, 24)
    assert_close(D.CenterHead(6).outputs['hm'][-1].bias, torch.full((3,), -2.19))


@pytest.mark.parametrize('length, width', [(9., 4.), (10., 4.), (3., 3.), (40., 1.)])
@pytest.mark.parametrize('overlap', [.1, .5, .7])
def test_radius_leaves_the_overlap(length, width, overlap):
    "Moved, shrunk or grown by the radius, a box overlaps the old one by no less than asked."
    r = D.gaussian_radius(torch.tensor([length]), torch.tensor([width]), overlap).item()
    assert 0 < 2 * r < width
    area, common = length * width, (length - r) * (width - r)
    moved, shrunk = common / (2 * area - common), (length - 2 * r) * (width - 2 * r) / area
    grown = area / ((length + 2 * r) * (width + 2 * r))
    assert min(moved, shrunk, grown) == pytest.approx(overlap, abs=1e-4)


def test_boxes_that_count_for_nothing_and_labels_that_are_none(unchecked):
    "Padding, flat boxes and boxes far outside leave the targets as they are; what cannot be meant is named."
    target = lambda boxes, labels: D.center_targets(boxes, labels, 3, (24, 24), (1., 1., 6.),
                                                    (-12., -12., -2.))
    good, label = torch.tensor([[1.2, 1.6, 0, 2, 1, 1, .3]]), torch.tensor([1])
    want = target(good, label)
    assert want.heat[1, 13, 13] == 1 and want.at.tolist() == [13 * 24 + 13] and not want.heat[[0, 2]].any()
    assert_close(want.codes, torch.tensor([[.2, .6, 0, math.log(2), 0, 0, math.cos(.3), math.sin(.3)]]))
    flat, away = good * torch.tensor([1, 1, 1, 1, 1, 0, 1.]), good + torch.tensor([300., 0, 0, 0, 0, 0, 0])
    for nothing in (torch.zeros(1, 7), flat, away, good * torch.tensor([1, 1, 1, -1., 1, 1, 1])):
        for boxes in (torch.cat([good, nothing]), torch.cat([nothing, good])):
            got = target(boxes, torch.tensor([1, 1]))
            for a, b in zip(got, want, strict=True): assert_close(a, b)
        assert not target(nothing, label).heat.any()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match='boxes must be finite'):
            target(torch.cat([good, good * bad]), torch.tensor([1, 1]))
    for labels in (torch.tensor([True]), torch.tensor([1.]), torch.tensor([1, 1]), torch.tensor([3]),
                   torch.tensor([-1])):
        with pytest.raises(ValueError, match='labels must be'): target(good, labels)


def test_the_mlp_of_a_set_layer_is_called():
    "So that a hook or an adapter on the whole of it acts; its dropout falls on the hidden layer alone."
    layer = D.SetLayer(8, 2, proj_drop=.5).train()
    seen, x, sets = [], torch.randn(6, 8), torch.arange(6).view(2, 3)
    hook = layer.mlp.register_forward_hook(lambda module, given, out: seen.append(out) or out * 0)
    out = layer.inner(x, None, sets)
    assert len(seen) == 1 and seen[0].shape == (6, 8)
    assert_close(out, layer.norm2(layer.norm1(x + layer.attn(x, None, sets))))
    hook.remove()
    with torch.no_grad():
        layer.mlp.fc2.weight.fill_(1.), layer.mlp.fc2.bias.zero_()
        first, second = layer.mlp(x), layer.mlp(x)
    # a dropped output would be 0 beside others that are not
    assert_close(first, first[:, :1].expand(-1, 8))
    assert first.all() and not torch.equal(first, second)
