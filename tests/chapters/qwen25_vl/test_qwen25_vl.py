"""Qwen2.5-VL: sizes and order of patches, windows, packing, rotary positions along three axes, the language model with its cache; and transformers' own code on the same weights."""
import copy, inspect, itertools, math, pickle, random

import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook.layers.position import frequencies, rotate_halves
from vitbook.multimodal import qwen25_vl as Q
from vitbook.multimodal.qwen25_vl import (Cache, Qwen25Decoder, Qwen25Vision, Qwen25VL, axial_angles, check_grids, frame_ends, frame_pixels, from_patches, mrope_angles, mrope_ids,
                                          patch_positions, prepare, sample_frames, smart_resize, to_patches, window_order)

TOWER = dict(patch_size=4, window_size=16, embed_dim=32, depth=4, num_heads=2, mlp_hidden=40, out_dim=24, full_blocks=(1, 3))
TEXT = dict(vocab_size=100, embed_dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_hidden=48, sections=(2, 3, 3))
WHOLE = TEXT | dict(vision={k: v for k, v in TOWER.items() if k != 'out_dim'}, image_token=91, video_token=92)
GRIDS = [(1, 6, 10), (2, 4, 4), (1, 12, 6)]


def noisy(module, size=.2):
    "All parameters moved, so that no zero hides a mistake."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters(): p.add_(size * torch.randn(p.shape, generator=g))
    return module.eval()


def patches_of(grids, dim=96, seed=1): return torch.randn(sum(math.prod(g) for g in grids), dim, generator=torch.Generator().manual_seed(seed))
def fill(*counts): return [t for token, n in counts for t in [token] * n]


# ---- native resolution

def test_sizes_of_the_processor():
    for size, want in {(480, 640): (476, 644), (1080, 1920): (728, 1316), (30, 30): (56, 56), (100, 2000): (112, 1988)}.items():
        assert smart_resize(*size, min_pixels=56 ** 2, max_pixels=1280 * 28 ** 2) == want


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_are_inside_the_limits(h, w):
    if max(h, w) / min(h, w) > 200: return
    a, b = smart_resize(h, w)
    assert a % 28 == b % 28 == 0 and 4 * 28 ** 2 <= a * b
    assert a * b <= 16384 * 28 ** 2 or min(a, b) == 28                      # a thin strip cannot be thinner than a token
    if 4 * 28 ** 2 <= round(h / 28) * round(w / 28) * 28 ** 2 <= 16384 * 28 ** 2: assert abs(a - h) <= 14 and abs(b - w) <= 14


def test_sizes_that_are_refused(unchecked):
    with pytest.raises(ValueError, match='ratio.*200'): smart_resize(10, 2001)
    assert smart_resize(10, 2000)
    with pytest.raises(ValueError, match='at least 1'): smart_resize(0, 20)
    with pytest.raises(ValueError, match='min_pixels'): smart_resize(20, 20, min_pixels=900, max_pixels=800)
    with pytest.raises(ValueError, match='merge_size.*28'): to_patches(torch.rand(2, 3, 30, 28))
    with pytest.raises(ValueError, match='temporal_patch_size'): to_patches(torch.rand(3, 3, 28, 28))


def test_patches_stand_cell_by_cell():
    p, m = 3, 2
    x = torch.randn(4, 2, 6 * p, 8 * p)
    tokens = to_patches(x, p, 2, m)
    assert tokens.shape == (2 * 6 * 8, 2 * 2 * p * p)
    assert torch.equal(from_patches(tokens, (2, 6, 8), p, 2, m), x)
    for t, s, r in itertools.product(range(2), range(12), range(4)):
        y, c = 2 * (s // 4) + r // 2, 2 * (s % 4) + r % 2
        want = x[2 * t:2 * t + 2, :, y * p:(y + 1) * p, c * p:(c + 1) * p]                                     # frame, channel, row, column
        assert torch.equal(tokens[t * 48 + s * 4 + r], want.transpose(0, 1).flatten())                        # channel first
    conv = torch.nn.Conv3d(2, 5, (2, p, p), (2, p, p), bias=False)
    maps = conv(x.transpose(0, 1)[None])[0]                                                                    # channel, time, row, column
    assert_close(from_patches((tokens @ conv.weight.flatten(1).T), (2, 6, 8), 1, 1, m), maps.transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_patches_of_three_to_a_cell():
    x = torch.randn(1, 3, 12, 18)
    assert torch.equal(from_patches(to_patches(x, 2, 1, 3), (1, 6, 9), 2, 1, 3), x)


def test_prepare():
    x = torch.rand(3, 30, 50)
    tokens, grid = prepare(x)
    assert grid == (1, 4, 6) and tokens.shape == (24, 1176)                                                    # 56 x 84
    frames = from_patches(tokens, grid)
    assert torch.equal(frames[0], frames[1])                                                                   # a still picture stands twice
    clip, grid = prepare(torch.rand(3, 3, 56, 56))
    frames = from_patches(clip, grid)
    assert grid == (2, 4, 4) and torch.equal(frames[2], frames[3]) and not torch.equal(frames[0], frames[1])   # the last frame repeated
    exact = torch.rand(3, 56, 56)
    back = from_patches(*prepare(exact))[0] * torch.tensor(Q.PIXEL_STD)[:, None, None] + torch.tensor(Q.PIXEL_MEAN)[:, None, None]
    assert_close(back, exact, atol=1e-6, rtol=1e-5)


def test_frames_of_a_video():
    frames, rate = sample_frames(300, 30.)                                                                     # ten seconds
    assert len(frames) == 20 and frames[0] == 0 and frames[-1] == 299 and rate == 2.
    assert len(sample_frames(30, 30.)[0]) == 4 and len(sample_frames(100_000, 25.)[0]) == 768
    frames, rate = sample_frames(9, 3., fps=100)
    assert len(frames) == 8 and abs(rate - 8 / 3) < 1e-9
    with pytest.raises(ValueError, match='at least 2'): sample_frames(1, 30.)
    assert frame_pixels(8) == (128 * 784, 768 * 784) and frame_pixels(768)[1] == 235200 and frame_pixels(10_000)[1] == int(128 * 784 * 1.05)


# ---- windows

def naive_window_order(grids, window, merge):
    "Cells by padded windows, one after the other."
    order, sizes, first = [], [], 0
    for t, h, w in grids:
        gy, gx = h // merge, w // merge
        for k, a, b in itertools.product(range(t), range(0, gy + window, window), range(0, gx + window, window)):
            cells = [first + (k * gy + y) * gx + x for y in range(a, a + window) for x in range(b, b + window) if y < gy and x < gx]
            order += cells
            if cells: sizes.append(len(cells) * merge ** 2)
        first += t * gy * gx
    return order, [0, *itertools.accumulate(sizes)]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3))
def test_windows(cells, window, merge):
    grids = [(t, y * merge, x * merge) for t, y, x in cells]
    order, ends = window_order(grids, window, merge)
    want, bounds = naive_window_order(grids, window, merge)
    assert order.tolist() == want and list(ends) == bounds
    n = sum(math.prod(g) for g in grids)
    assert sorted(order.tolist()) == list(range(n // merge ** 2)) and ends[-1] == n
    assert all(0 < b - a <= (window * merge) ** 2 for a, b in zip(ends, ends[1:]))
    assert torch.equal(order[order.argsort()], torch.arange(n // merge ** 2))
    assert frame_ends(grids) == tuple(itertools.accumulate([0] + [h * w for t, h, w in grids for _ in range(t)]))


def test_positions_follow_the_patches():
    grids = [(1, 6, 10), (2, 4, 8)]
    at = patch_positions(grids)
    for (t, h, w), part in zip(grids, at.split([math.prod(g) for g in grids])):
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        frames = torch.stack([rows, cols])[None].float().repeat(2 * t, 1, 1, 1)
        assert torch.equal(to_patches(frames, 1, 2, 2)[:, ::2].long(), part)


def test_positions_go_with_their_patches_into_the_windows():
    "Pictures whose pixels are their own coordinates: what the tower puts into its order must be what it turns by."
    model = Qwen25Vision(patch_size=1, in_chans=2, temporal_patch_size=1, window_size=4, embed_dim=8, depth=1, num_heads=1, mlp_hidden=4, out_dim=4, full_blocks=())
    sizes, pictures = [(1, 6, 10), (2, 4, 6)], []
    for t, h, w in sizes: pictures.append(to_patches(torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij'))[None].float().repeat(t, 1, 1, 1), 1, 1))
    at = model.layout(sizes)
    assert torch.equal(torch.cat(pictures).unflatten(0, (-1, 4))[at.order].flatten(0, 1).long(), at.positions)
    for a, b in zip(at.windows, at.windows[1:]): assert (at.positions[a:b] // 4 == at.positions[a] // 4).all()      # a window is a square of 2 x 2 cells


def test_identity_blocks_give_cells_in_raster_order():
    model = noisy(Qwen25Vision(**TOWER))
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.out): torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    x = patches_of(GRIDS)
    assert_close(model(x, GRIDS), model.merger(model.patch_embed(x)))


def test_block_diagonal_masks():
    "Every block against full attention over the whole pack with everything outside of the segment masked."
    model, x = noisy(Qwen25Vision(**TOWER)).double(), patches_of(GRIDS).double()
    states, at = model.forward_blocks(x, GRIDS), model.layout(GRIDS)
    angles = axial_angles(at.positions, 16)[:, None]
    cos, sin = angles.cos(), angles.sin()
    for i, block in enumerate(model.blocks):
        ends = at.frames if i in (1, 3) else at.windows
        ids = torch.bucketize(torch.arange(len(x)), torch.tensor(ends[1:]), right=True)
        h = block.norm1(states[i])
        q, k, v = block.attn.qkv(h).view(-1, 3, 2, 16).unbind(1)
        s = torch.einsum('nhd,mhd->hnm', rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)) / 4
        out = torch.einsum('hnm,mhd->nhd', s.masked_fill(ids[:, None] != ids, -math.inf).softmax(-1), v).flatten(1)
        y = states[i] + block.attn.proj(out)
        assert_close(y + block.mlp(block.norm2(y)), states[i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('backend', ['grouped', 'padded', 'masked', 'loop'])
def test_backends_agree(backend):
    model, x = noisy(Qwen25Vision(**TOWER)), patches_of(GRIDS)
    want = model(x, GRIDS)
    assert_close(model.set_backend(backend)(x, GRIDS), want, atol=1e-5, rtol=1e-4)


def test_pictures_in_a_pack_are_alone():
    model, x = noisy(Qwen25Vision(**TOWER)), patches_of(GRIDS)
    together = model(x, GRIDS)
    alone = torch.cat([model(part, [g]) for part, g in zip(x.split([math.prod(g) for g in GRIDS]), GRIDS)])
    assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert_close(model(x, torch.tensor(GRIDS)), together)
    swapped = model(torch.cat([x[92:], x[:92]]), [GRIDS[2], GRIDS[0], GRIDS[1]])
    assert_close(swapped, torch.cat([together[23:], together[:23]]), atol=1e-5, rtol=1e-4)


def test_steps_of_time_are_alone():
    model, x = noisy(Qwen25Vision(**TOWER)), patches_of([(3, 8, 8)])
    before = model(x, [(3, 8, 8)]).view(3, 16, -1)
    x[64:128] += 3
    after = model(x, [(3, 8, 8)]).view(3, 16, -1)
    assert_close(after[[0, 2]], before[[0, 2]])
    assert (after[1] - before[1]).abs().max() > .1


def test_receptive_field():
    "A change in one window: without full blocks it stays there, with one it reaches the whole frame, and no other frame."
    grid = (2, 12, 12)                                                                  # 6 x 6 cells, windows of 2 x 2 cells
    def reached(full):
        model, x = noisy(Qwen25Vision(**TOWER | dict(full_blocks=full))), patches_of([grid])
        before = model(x, [grid])
        x[:4] += 1                                                                      # the first cell
        return ((model(x, [grid]) - before).abs().amax(-1) > 1e-5).view(2, 6, 6)
    near = reached(())
    assert near[0, :2, :2].all() and near.sum() == 4
    for full in [(0,), (2,), (3,)]:
        far = reached(full)
        assert far[0].all() and not far[1].any()


def test_one_window_is_the_whole_picture():
    for grid, same in {(1, 4, 4): True, (1, 2, 4): True, (1, 4, 6): False}.items():
        x = patches_of([grid])
        near, far = (noisy(Qwen25Vision(**TOWER | dict(full_blocks=full))) for full in ((), (0, 1, 2, 3)))
        far.load_state_dict(near.state_dict())
        a, b = near(x, [grid]), far(x, [grid])
        apart = ((a - b).abs().max() / a.abs().max()).item()
        assert apart < 1e-5 if same else apart > 1e-3


def test_windows_of_an_odd_number_of_cells():
    model = noisy(Qwen25Vision(**TOWER | dict(window_size=27)))                         # 27 // 2 // 4 = 3 cells
    assert model.window == 3 and model(patches_of([(1, 10, 14)]), [(1, 10, 14)]).shape == (35, 24)


# ---- rotary positions of patches

def test_rotation_knows_offsets_only():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.double)
    def score(a, b):
        turn = [axial_angles(torch.tensor([p]), 16).double() for p in (a, b)]
        return (rotate_halves(q[0], turn[0].cos(), turn[0].sin()) * rotate_halves(k[0], turn[1].cos(), turn[1].sin())).sum().item()
    assert abs(score((3, 5), (1, 9)) - score((13, 25), (11, 29))) < 1e-6
    assert abs(score((3, 5), (1, 9)) - score((5, 3), (9, 1))) > 1e-3 and abs(score((3, 5), (1, 9)) - score((1, 9), (3, 5))) > 1e-3
    with pytest.raises(ValueError, match='multiple of 4'): axial_angles(torch.tensor([[0, 0]]), 6)


def test_rotation_by_the_equation():
    "Pair k is channels k and k + d/2; the first half of the pairs turns with the row, the second with the column."
    x, angles = torch.randn(7, 2, 16, dtype=torch.double), axial_angles(torch.randint(0, 9, (7, 2)), 16).double()[:, None]
    got = rotate_halves(x, angles.cos(), angles.sin())
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
    assert_close(got, torch.cat([z.real, z.imag], -1))
    at = torch.tensor([[3, 7]])
    want = [p * 10000 ** (-k / 4) for p in (3, 7) for k in range(4)]
    assert_close(axial_angles(at, 16)[0], torch.tensor(want))
    assert rotate_halves(x.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16


def test_merger_takes_four_in_order():
    merger = noisy(Q.PatchMerger(8, 5))
    x = torch.randn(12, 8)
    out = merger(x)
    assert out.shape == (3, 5)
    assert_close(out, merger.fc2(torch.nn.functional.gelu(merger.fc1(merger.norm(x).view(3, 32)))))
    turned = merger(x.view(3, 4, 8)[:, [1, 0, 2, 3]].flatten(0, 1))
    assert (turned - out).abs().min() > 1e-5                                            # laid end to end, not averaged
    scaled = x.clone()
    scaled[1] *= 10
    assert_close(merger(scaled), out, atol=1e-4, rtol=1e-4)                             # normed patch by patch, before they are joined


# ---- positions in time

def naive_ids(tokens, grids, seconds, merge, per_second):
    "Token by token, for one sequence; image 91, video 92."
    out, start, grids, seconds, i = [], 0, iter(grids), iter(seconds), 0
    while i < len(tokens):
        if tokens[i] not in (91, 92):
            out.append((start, start, start))
            start, i = start + 1, i + 1
            continue
        (t, h, w), kind = next(grids), tokens[i]
        step = next(seconds) if kind == 92 else 0
        first = len(out)
        for k, y, x in itertools.product(range(t), range(h // merge), range(w // merge)):
            assert tokens[i] == kind
            out.append((start + math.floor(k * step * per_second), start + y, start + x))
            i += 1
        start = max(max(o) for o in out[first:]) + 1
    return torch.tensor(out).view(-1, 3).T, start


@given(st.integers(0, 10 ** 6))
def test_ids_are_those_of_the_loop(seed):
    rng = random.Random(seed)
    rows, grids, kinds, seconds = [], [], [], []
    for _ in range(2):
        row = []
        for _ in range(rng.randint(0, 3)):
            row += [rng.randint(1, 80) for _ in range(rng.randint(0, 3))]
            kind, grid = rng.choice([91, 92]), (rng.randint(1, 3), 2 * rng.randint(1, 3), 2 * rng.randint(1, 3))
            row += [kind] * (math.prod(grid) // 4)
            grids.append(grid), kinds.append((len(rows), kind)), seconds.append(rng.choice([.5, 1., 1.5, .25, 2 / 3]))
        rows.append(row + [5] * rng.randint(0, 3))
    n = max(map(len, rows)) or 1
    tokens = torch.tensor([[0] * (n - len(r)) + r for r in rows])
    mask = torch.tensor([[False] * (n - len(r)) + [True] * len(r) for r in rows])
    pick = lambda want: [g for g, (_, kind) in zip(grids, kinds) if kind == want]
    per = rng.choice([2., 4., 3.])
    ids, after = mrope_ids(tokens, pick(91), pick(92), [s for s, (_, kind) in zip(seconds, kinds) if kind == 92], image_token=91, video_token=92, tokens_per_second=per, mask=mask)
    for b, row in enumerate(rows):
        mine = [i for i, (where, _) in enumerate(kinds) if where == b]
        want, start = naive_ids(row, [grids[i] for i in mine], [seconds[i] for i in mine if kinds[i][1] == 92], 2, per)
        assert after[b] == start
        if row: assert torch.equal(ids[:, b, mask[b]], want)
        assert (ids[:, b, ~mask[b]] == 1).all()


IDS = dict(image_token=91, video_token=92, merge_size=2, tokens_per_second=2.)


def test_the_example():
    tokens = torch.tensor([[1, 2, 90, *fill((91, 6)), 93, 3, 90, *fill((92, 12)), 93, 4]])
    ids, after = mrope_ids(tokens, [(1, 4, 6)], [(3, 4, 4)], [1.], **IDS)
    t, y, x = ids[:, 0].tolist()
    assert t[:3] == y[:3] == x[:3] == [0, 1, 2]
    assert (t[3:9], y[3:9], x[3:9]) == ([3] * 6, [3, 3, 3, 4, 4, 4], [3, 4, 5] * 2)
    assert t[9] == y[9] == x[9] == 6 and t[11] == 8
    assert t[12:24] == [9] * 4 + [11] * 4 + [13] * 4 and y[12:24] == [9, 9, 10, 10] * 3 and x[12:24] == [9, 10] * 6
    assert t[24] == 14 and after.tolist() == [16]


def test_text_counts_up():
    ids, after = mrope_ids(torch.randint(0, 80, (2, 7)), **IDS)
    assert torch.equal(ids, torch.arange(7).expand(3, 2, 7)) and after.tolist() == [7, 7]


def test_a_wide_picture_can_outlast_a_clip():
    for grid, seconds, want in [((2, 2, 12), 1., 6), ((2, 2, 4), 5., 11)]:
        n = math.prod(grid) // 4
        ids, after = mrope_ids(torch.tensor([fill((92, n), (7, 1))]), [], [grid], [seconds], **IDS)
        assert ids[:, 0, -1].tolist() == [want] * 3 and after[0] == want + 1
    ids, _ = mrope_ids(torch.tensor([fill((92, n), (7, 1))]), [], [grid], [seconds], **IDS, skip_time=True)
    assert ids[:, 0, -1].tolist() == [2] * 3                                            # as transformers 5 goes on: behind the clip's own time


def test_ids_count_seconds_at_any_rate():
    "The same eight seconds at 1 and at 2 frames a second: what shows the same second has the same id."
    at = {}
    for fps in (1, 2, 4):
        steps = 8 * fps // 2                                                            # two frames make one step of the grid
        ids, after = mrope_ids(torch.tensor([fill((92, steps))]), [], [(steps, 2, 2)], [2 / fps], **IDS)
        at[fps] = {2 * k / fps: ids[0, 0, k].item() for k in range(steps)}
    for fps in (2, 4):
        assert set(at[1]) < set(at[fps])
        for second, t in at[1].items(): assert at[fps][second] == t == int(2 * second)
    frames = torch.tensor([fill((92, 8))])
    assert torch.equal(mrope_ids(frames, [], [(8, 2, 2)], [.5], **IDS)[0][0, 0], torch.arange(8))
    assert (mrope_ids(frames, [], [(8, 2, 2)], [.5], **IDS, whole_seconds=True)[0][0, 0] == 0).all()           # all steps at one time: the fault of transformers before 5
    assert torch.equal(mrope_ids(frames, [], [(8, 2, 2)], [.75], **IDS)[0][0, 0], torch.tensor([0, 1, 3, 4, 6, 7, 9, 10]))   # rounded down after multiplying


def test_speeds_that_change_with_the_length():
    base = frequencies(16, 1e4, torch.float)
    dynamic = dict(type='dynamic', factor=3., original_max_position_embeddings=20)
    assert_close(Q.rope_speeds(16, 1e4, dynamic, 20)[0], base)                          # as long as it was trained for, nothing changes
    assert_close(Q.rope_speeds(16, 1e4, dynamic, 50)[0], frequencies(16, 1e4 * (3 * 50 / 20 - 2) ** (16 / 14), torch.float))
    far = dict(rope_type='longrope', factor=4., original_max_position_embeddings=20, short_factor=[1.] * 8, long_factor=[2.] * 8)
    assert_close(Q.rope_speeds(16, 1e4, far, 20)[0], base)
    assert_close(Q.rope_speeds(16, 1e4, far, 21)[0], base / 2)
    assert abs(Q.rope_speeds(16, 1e4, far)[1] - math.sqrt(1 + math.log(4) / math.log(20))) < 1e-12 and Q.rope_speeds(16, 1e4, far | dict(attention_factor=1.5))[1] == 1.5
    with pytest.raises(ValueError, match='each of the 8 pairs, got 3'): Q.rope_speeds(16, 1e4, far | dict(short_factor=[1.] * 3))
    plain, x, ids = Qwen25Decoder(**TEXT), torch.randn(1, 6, 32), torch.arange(6).expand(3, 1, -1)
    scaled = Qwen25Decoder(**TEXT, rope_scaling=dynamic)
    noisy(plain), scaled.load_state_dict(plain.state_dict())
    assert_close(scaled.eval()(x, ids), plain(x, ids))
    assert (scaled(x, ids + 30) - plain(x, ids + 30)).abs().max() > 1e-4      # relative positions: without scaling a shift would change nothing


def test_equal_ids_are_ordinary_positions():
    speeds = frequencies(16, 1e6, torch.float)
    ids = torch.randint(0, 500, (1, 2, 9)).expand(3, -1, -1)
    assert_close(mrope_angles(ids, speeds, (2, 3, 3)), ids[0, ..., None] * speeds)
    own = mrope_angles(torch.tensor([[[1]], [[10]], [[100]]]), torch.ones(8), (2, 3, 3))
    assert own.flatten().tolist() == [1, 1, 10, 10, 10, 100, 100, 100]
    with pytest.raises(ValueError, match='sum is 8'): mrope_angles(ids, speeds, (2, 3, 4))


# ---- the language model

def text(*rows): return torch.tensor(rows)


@pytest.mark.parametrize('sliding', [None, 3])
def test_cache_is_the_same_model(sliding):
    model = noisy(Qwen25Decoder(**TEXT, sliding_window=sliding, sliding_blocks=(1,)))
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :2] = False
    for m in (None, mask):
        want, cache = model(x, mask=m), Cache()
        got = torch.cat([model(x[:, a:b], mask=None if m is None else m[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))], 1)
        real = mask if m is not None else torch.ones_like(mask)
        assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
        assert len(cache) == 9 and cache.keys[0].shape == (2, 1, 9, 16) and cache.rope_delta.tolist() == [0, 0]


def test_causal_and_padded():
    model, x = noisy(Qwen25Decoder(**TEXT)), torch.randn(1, 8, 32)
    before = model(x)
    changed = x.clone()
    changed[:, 5] += 1
    assert_close(model(changed)[:, :5], before[:, :5])
    assert (model(changed)[:, 5:] - before[:, 5:]).abs().min() > 0
    padded = torch.cat([torch.randn(1, 3, 32), x], 1)
    mask = torch.tensor([[False] * 3 + [True] * 8])
    ids = torch.cat([torch.ones(3), torch.arange(8)]).long().expand(3, 1, -1)
    assert_close(model(padded, ids, mask)[:, 3:], before, atol=1e-5, rtol=1e-4)


def test_sliding_window_forgets():
    model = noisy(Qwen25Decoder(**TEXT, sliding_window=3))
    x = torch.randn(1, 12, 32)
    y = x.clone()
    y[:, 0] += 1
    moved = (model(y) - model(x)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [True] * 5 + [False] * 7                                   # two blocks, each two tokens back
    one = noisy(Qwen25Decoder(**TEXT, sliding_window=3, sliding_blocks=(1,)))           # the first block sees everything
    assert ((one(y) - one(x)).abs().amax((0, 2)) > 1e-6).all() and one.sliding_blocks == (1,) and model.sliding_blocks == (0, 1)


def test_packed_conversations():
    "Several texts in one row, each with positions of its own, as each alone."
    model, x = noisy(Qwen25Decoder(**TEXT)), torch.randn(1, 10, 32)
    ids = torch.cat([torch.arange(4), torch.arange(6)]).expand(3, 1, -1)
    assert_close(model(x, ids, ends=[0, 4, 10]), torch.cat([model(x[:, :4]), model(x[:, 4:])], 1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='pack in one row'): model(x.expand(2, -1, -1), ends=[0, 4, 10])


def test_grouped_heads_share_keys():
    torch.manual_seed(0)
    few = noisy(Q.GroupedAttention(32, 4, 2))
    many = Q.GroupedAttention(32, 4, 4)
    state = few.state_dict()
    for name in ('k.weight', 'k.bias', 'v.weight', 'v.bias'): state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(state)
    x, angle = torch.randn(2, 5, 32), torch.rand(2, 1, 5, 4)
    assert_close(few(x, angle.cos(), angle.sin()), many(x, angle.cos(), angle.sin()))
    assert few.k.weight.shape == (16, 32) and few.proj.bias is None and few.q.bias is not None


SAMPLE = dict(tokens=text([1, 2, 90, *fill((91, 6)), 93, 3, 90, *fill((92, 8)), 93, 4]), image_grids=[(1, 4, 6)], video_grids=[(2, 4, 4)], seconds=[1.5])


def sample(): return SAMPLE | dict(images=patches_of([(1, 4, 6)]), videos=patches_of([(2, 4, 4)], seed=2))


def test_placeholders_are_filled():
    model, given = noisy(Qwen25VL(**WHOLE)), sample()
    x = model.embed(*(given[k] for k in ('tokens', 'images', 'image_grids', 'videos', 'video_grids')))
    assert_close(x[0, 3:9], model.visual(given['images'], [(1, 4, 6)]))
    assert_close(x[0, 12:20], model.visual(given['videos'], [(2, 4, 4)]))
    words = (given['tokens'][0] < 91) | (given['tokens'][0] == 93)
    assert torch.equal(x[0, words], model.language.embed(given['tokens'][0, words]))
    assert model(**given).shape == (1, given['tokens'].shape[1], 100) and model(**given, last=True).shape == (1, 1, 100)
    moved = given | dict(images=given['images'] + 1)
    change = (model(**moved) - model(**given)).abs().amax(-1)[0]
    assert change[:3].max() == 0 and change[3:].min() > 0                               # causal: nothing before the picture


def test_generation_is_the_same_without_a_cache():
    model, given = noisy(Qwen25VL(**WHOLE)), sample()
    got = model.generate(**given, max_new_tokens=5)
    tokens = given['tokens']
    ids, after = mrope_ids(tokens, given['image_grids'], given['video_grids'], given['seconds'], **model.ids)
    for i in range(5):
        new = model(**given | dict(tokens=tokens), ids=ids)[:, -1:].argmax(-1)
        assert new[0, 0] == got[0, i]
        tokens, ids, after = torch.cat([tokens, new], 1), torch.cat([ids, after.expand(3, 1, 1)], 2), after + 1
    cache = Cache()
    model(**given, cache=cache)
    assert cache.rope_delta.tolist() == [ids[0, 0, tokens.shape[1] - 5].item() - given['tokens'].shape[1]] and cache.rope_delta[0] < 0
    stopped = model.generate(**given, max_new_tokens=5, stop=[got[0, 1].item()])
    assert stopped.shape[1] == 2 or got[0, 0] == got[0, 1]
    assert model.generate(**given, max_new_tokens=3, temperature=1., generator=torch.Generator().manual_seed(0)).shape == (1, 3)


def test_a_second_picture_later():
    "Two turns, the second with a picture of its own, as all of it at once."
    model, first, second = noisy(Qwen25VL(**WHOLE)), [1, *fill((91, 6)), 3], [4, 5, *fill((91, 4)), 6]
    x, grids, cache = patches_of([(1, 4, 6), (1, 4, 4)]), [(1, 4, 6), (1, 4, 4)], Cache()
    want = model(text(first + second), x, grids)
    got = torch.cat([model(text(first), x[:24], grids[:1], cache=cache), model(text(second), x[24:], grids[1:], cache=cache)], 1)
    assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert cache.next_ids.tolist() == [mrope_ids(text(first + second), grids, **IDS)[1].item()]


def test_a_generated_placeholder_is_a_word():
    model, tokens = noisy(Qwen25VL(**WHOLE)), text([*fill((91, 6)), 3])
    cache = Cache()
    with torch.no_grad():
        model(tokens, patches_of([(1, 4, 6)]), [(1, 4, 6)], cache=cache)
        assert model(text([91]), cache=cache).isfinite().all()


def test_a_batch_answers_as_each_alone():
    model, image = noisy(Qwen25VL(**WHOLE)), patches_of([(1, 4, 6), (1, 4, 4)])
    rows = [[1, 90, *fill((91, 6)), 93, 3], [1, 2, 3, 4, 90, *fill((91, 4)), 93, 5, 6, 7]]
    n = max(map(len, rows))
    tokens, mask = text(*([0] * (n - len(r)) + r for r in rows)), torch.tensor([[False] * (n - len(r)) + [True] * len(r) for r in rows])
    both = model.generate(tokens, image, [(1, 4, 6), (1, 4, 4)], mask=mask, max_new_tokens=6)
    for row, part, grid, got in zip(rows, image.split([24, 16]), [(1, 4, 6), (1, 4, 4)], both):
        assert torch.equal(model.generate(text(row), part, [grid], max_new_tokens=6)[0], got)
    with pytest.raises(ValueError, match='to the left'): model.generate(tokens, image, [(1, 4, 6), (1, 4, 4)], mask=mask.flip(1))


def test_tied_embeddings():
    model = noisy(Qwen25VL(**WHOLE, tie_embeddings=True))
    assert model.head is None and not any('head' in k for k in model.state_dict())
    x = model.language(model.language.embed(text([1, 2, 3])))
    assert_close(model(text([1, 2, 3])), x @ model.language.embed.weight.T)


# ---- sizes, errors, copies

def vision_formula(d, f, o, depth): return 1176 * d + depth * (4 * d * d + 4 * d + 3 * d * f + 2 * f + d + 2 * d) + d + (4 * d) ** 2 + 4 * d + 4 * d * o + o


def test_published_sizes():
    from vitbook.registry import create_model, list_models
    assert [n for n in list_models('qwen25_vl*')] == sorted(f'qwen25_vl_{s}{v}' for s in ('3b', '7b', '72b') for v in ('', '_vision'))
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device('meta'):
        for name, f, o, want in (('3b', 3420, 2048, None), ('7b', 3420, 3584, 676_550_144), ('72b', 3456, 8192, None)):
            tower, whole = create_model(f'qwen25_vl_{name}_vision'), create_model(f'qwen25_vl_{name}')
            assert count(tower) == vision_formula(1280, f, o, 32) == count(whole.visual) and want in (None, count(tower))
            d, layers, kv, m, vocab = {'3b': (2048, 36, 256, 11008, 151936), '7b': (3584, 28, 512, 18944, 152064), '72b': (8192, 80, 1024, 29568, 152064)}[name]
            block = d * d + d + 2 * (d * kv + kv) + d * d + 3 * d * m + 2 * d
            assert count(whole) == {'3b': 3_754_622_976, '7b': 8_292_166_656, '72b': 73_410_777_344}[name]              # the published checkpoints
            assert count(whole) - count(tower) == vocab * d * (1 if name == '3b' else 2) + layers * block + d
            assert whole.visual.full_blocks == (7, 15, 23, 31) and whole.visual.window == 4 and sum(whole.language.sections) == 64 and whole.language.rope[0] == 128


def test_refused(unchecked):
    for bad, message in [(dict(full_blocks=(4,)), r'full_blocks.*0 … 3.*4'), (dict(full_blocks=(-1,)), 'full_blocks'), (dict(num_heads=3), 'num_heads'), (dict(embed_dim=24, num_heads=4), 'multiple of 4'), (dict(window_size=7), 'window_size.*8.*7')]:
        with pytest.raises(ValueError, match=message): Qwen25Vision(**TOWER | bad)
    model = Qwen25Vision(**TOWER)
    for grids, patches, message in [([(1, 5, 4)], 20, r'merge_size=2.*\(1, 5, 4\)'), ([(1, 4, 7)], 28, 'merge_size'), ([(0, 4, 4)], 0, 'at least 1'), ([(4, 4)], 16, 'time, rows, columns'), ([(1, 4, 4)], 15, 'patches must be the 16')]:
        with pytest.raises(ValueError, match=message): model(torch.zeros(patches, 96), grids)
    with pytest.raises(ValueError, match='96 numbers, got 95'): model(torch.zeros(16, 95), [(1, 4, 4)])
    for bad, message in [(dict(num_kv_heads=3), 'num_kv_heads'), (dict(sections=(2, 3, 4)), 'sum is 8'), (dict(padded_queries='no'), 'padded_queries'), (dict(rope_scaling=dict(type='ntk', factor=2.)), "longrope, got 'ntk'"),
                         (dict(rope_scaling=dict(type='yarn', factor=2.)), 'yarn.*got no original_max'), (dict(sliding_window=3, sliding_blocks=(2,)), 'sliding_blocks.*0 … 1')]:
        with pytest.raises(ValueError, match=message): Qwen25Decoder(**TEXT | bad)
    whole, given = Qwen25VL(**WHOLE), sample()
    for bad, message in [(dict(images=given['images'][:16], image_grids=[(1, 4, 4)]), 'must hold 4 placeholders 91.*6'), (dict(images=None), '6 placeholders 91'), (dict(seconds=[1., 2.]), 'seconds.*1 clip'),
                         (dict(tokens=text([1, 2])), 'must hold 6 placeholders 91.*got 0')]:
        with pytest.raises(ValueError, match=message): whole(**given | bad)
    for tokens, grids, message in [([91] * 5, [(1, 4, 6)], '6 placeholders 91'), ([91] * 6 + [3] + [91] * 6, [(1, 4, 6)], 'more'), ([3], [(1, 4, 6)], 'no placeholders'), ([91, 91, 92, 91, 91, 91], [(1, 4, 6)], 'placeholders')]:
        with pytest.raises(ValueError, match=message): mrope_ids(text(tokens), grids, **IDS)
    with pytest.raises(ValueError, match='nonsense'): Q.from_official({}, dict(vocab_size=10), nonsense=3)
    with pytest.raises(ValueError, match='missing'): Q.from_official({}, dict(depth=1, hidden_size=32, num_heads=2, fullatt_block_indexes=()))


def test_copies_and_pickles():
    model, given = noisy(Qwen25VL(**WHOLE)), sample()
    want = model(**given)
    assert torch.equal(copy.deepcopy(model)(**given), want) and torch.equal(pickle.loads(pickle.dumps(model))(**given), want)


def test_low_precision():
    model, given = noisy(Qwen25VL(**WHOLE), .05), sample()
    want, low = model(**given), copy.deepcopy(model).bfloat16()
    got = low(**given | dict(images=given['images'].bfloat16(), videos=given['videos'].bfloat16()))
    assert got.dtype == torch.bfloat16 and (got.float() - want).square().mean().sqrt() < .05 * want.square().mean().sqrt()
    with torch.inference_mode(): inside = model(**given)
    assert_close(inside, want)
    model(**given).sum().backward()                                                     # nothing kept from inference mode


def test_parts_compile(unchecked):
    torch._dynamo.reset()
    tower, x = noisy(Qwen25Vision(**TOWER)), patches_of(GRIDS)
    assert_close(torch.compile(tower, backend='aot_eager', fullgraph=True)(x, GRIDS), tower(x, GRIDS), atol=1e-5, rtol=1e-4)
    decoder, y = noisy(Qwen25Decoder(**TEXT)), torch.randn(1, 6, 32)
    assert_close(torch.compile(decoder, backend='aot_eager', fullgraph=True)(y), decoder(y), atol=1e-5, rtol=1e-4)


# ---- transformers' own code on the same weights

def theirs(kind, config):
    transformers = pytest.importorskip('transformers', minversion='4.50', reason='transformers is not installed: these tests compare with it')
    module = __import__('transformers.models.qwen2_5_vl.modeling_qwen2_5_vl', fromlist=['x'])
    configs = __import__('transformers.models.qwen2_5_vl.configuration_qwen2_5_vl', fromlist=['x'])
    torch.manual_seed(0)
    config = getattr(configs, {'Qwen2_5_VisionTransformerPretrainedModel': 'Qwen2_5_VLVisionConfig', 'Qwen2_5_VLTextModel': 'Qwen2_5_VLTextConfig'}.get(kind, 'Qwen2_5_VLConfig'))(**copy.deepcopy(config))
    config._attn_implementation = 'eager'
    model = noisy(getattr(module, kind)._from_config(config, attn_implementation='eager'), .1)
    return transformers, model


VISION = dict(depth=4, hidden_size=32, intermediate_size=40, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2, window_size=16, out_hidden_size=32, fullatt_block_indexes=[1, 3], hidden_act='silu', in_channels=3, tokens_per_second=2)
WORDS = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1e6, bos_token_id=None, eos_token_id=None, pad_token_id=0,
             rope_scaling=dict(type='default', rope_type='default', mrope_section=[2, 3, 3]))
BOTH = dict(vision_config=VISION, text_config=WORDS, image_token_id=91, video_token_id=92, vision_start_token_id=90, vision_end_token_id=93)


@torch.no_grad()
@pytest.mark.parametrize('grids', [GRIDS, [(1, 4, 4)], [(3, 2, 14)]])
@pytest.mark.parametrize('more', [{}, dict(window_size=24, spatial_merge_size=1, fullatt_block_indexes=[]), dict(patch_size=2, window_size=11, hidden_act='gelu', temporal_patch_size=1, num_heads=4, in_channels=1)])
def test_transformers_tower(grids, more):
    config = VISION | more
    _, model = theirs('Qwen2_5_VisionTransformerPretrainedModel', config)
    ours = Q.from_official(model.state_dict(), config)
    x = patches_of(grids, config['in_channels'] * config['temporal_patch_size'] * config['patch_size'] ** 2)
    out = model(x, grid_thw=torch.tensor(grids))
    if isinstance(out, torch.Tensor): assert_close(ours(x, grids), out, atol=1e-4, rtol=1e-4)
    else: assert_close(ours(x, grids), out.pooler_output, atol=1e-4, rtol=1e-4) or assert_close(ours.forward_blocks(x, grids)[-1], out.last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('more', [{}, dict(num_attention_heads=4, num_key_value_heads=2, rope_scaling=dict(type='default', rope_type='default', mrope_section=[1, 1, 2]), rope_theta=100.),
                                  dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), dict(use_sliding_window=True, sliding_window=4, layer_types=['sliding_attention', 'full_attention']),
                                  dict(hidden_act='quick_gelu', rope_scaling=dict(rope_type='dynamic', factor=4., mrope_section=[2, 3, 3]), max_position_embeddings=16, rope_theta=100.),
                                  dict(rope_scaling=dict(rope_type='linear', factor=4., mrope_section=[2, 3, 3])),
                                  dict(rope_scaling=dict(rope_type='yarn', factor=4., original_max_position_embeddings=64, mrope_section=[2, 3, 3]), max_position_embeddings=256, rope_theta=100.),
                                  dict(rope_scaling=dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64, mrope_section=[2, 3, 3]), rope_theta=100.)])
def test_transformers_language_model(more):
    config = WORDS | more
    _, model = theirs('Qwen2_5_VLTextModel', config)
    ours = Q.from_official(model.state_dict(), config)
    x, ids = torch.randn(2, 11, 32), torch.randint(0, 40, (3, 2, 11))
    assert_close(ours(x, ids), model(inputs_embeds=x, position_ids=ids, use_cache=False).last_hidden_state, atol=1e-4, rtol=1e-4)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    got, want = ours(x, ids, mask.bool()), model(inputs_embeds=x, position_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)
    if 'use_sliding_window' not in more: assert_close(Q.from_official(model.state_dict(), config, padded_queries='mean')(x, ids, mask.bool()), want, atol=1e-4, rtol=1e-4)


def their_ids(model, tokens, kinds, **given):
    "get_rope_index with the arguments this version takes."
    known = inspect.signature(model.get_rope_index).parameters
    return model.get_rope_index(input_ids=tokens, **{k: v for k, v in (given | dict(mm_token_type_ids=kinds)).items() if k in known and v is not None})


@torch.no_grad()
def test_transformers_whole_model():
    _, model = theirs('Qwen2_5_VLForConditionalGeneration', BOTH)
    ours = Q.from_official(model.state_dict(), BOTH)
    rows = [[1, 2, 90, *fill((91, 6)), 93, 3, 90, *fill((92, 12)), 93, 4, 5], [0] * 9 + [6, 90, *fill((91, 8)), 93, *range(10, 17)]]
    tokens = text(*(r[:27] for r in rows))
    mask = (tokens != 0).long()
    kinds = (tokens == 91).int() + 2 * (tokens == 92).int()
    images, videos, igrids, vgrids = patches_of([(1, 4, 6), (1, 8, 4)]), patches_of([(3, 4, 4)], seed=2), [(1, 4, 6), (1, 8, 4)], [(3, 4, 4)]
    given = dict(image_grid_thw=torch.tensor(igrids), video_grid_thw=torch.tensor(vgrids), attention_mask=mask)
    for seconds in (1., 3.):
        want, _ = their_ids(model.model, tokens, kinds, second_per_grid_ts=torch.tensor([seconds]), **given)
        found = [mrope_ids(tokens, igrids, vgrids, [seconds], mask=mask.bool(), **ours.ids | dict(skip_time=skip))[0] for skip in (False, True)]
        assert any(torch.equal(ids[:, mask.bool()], want[:, mask.bool()]) for ids in found), 'neither as the paper has it, nor as transformers 5'
    ids = found[0]
    logits = model(input_ids=tokens, pixel_values=images, pixel_values_videos=videos, position_ids=ids, **given).logits
    got = ours(tokens, images, igrids, videos, vgrids, [3.], mask.bool())
    assert_close(got[mask.bool()], logits[mask.bool()], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_transformers_generates_the_same():
    _, model = theirs('Qwen2_5_VLForConditionalGeneration', BOTH)
    ours = Q.from_official(model.state_dict(), BOTH)
    tokens, grids = text([1, 2, 90, *fill((91, 6)), 93, 3, 4]), [(1, 4, 6)]
    images = patches_of(grids)
    given = dict(input_ids=tokens, pixel_values=images, image_grid_thw=torch.tensor(grids), attention_mask=torch.ones_like(tokens))
    if 'mm_token_type_ids' in inspect.signature(model.forward).parameters: given['mm_token_type_ids'] = (tokens == 91).int()
    out = model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(ours.generate(tokens, images, grids, max_new_tokens=8), out[:, tokens.shape[1]:])


def test_transformers_sizes_and_patches():
    pytest.importorskip('transformers')
    import numpy as np
    try: from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor, smart_resize as theirs
    except ImportError: from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor, smart_resize as theirs
    rng = random.Random(0)
    for _ in range(300):
        h, w = rng.randint(30, 4000), rng.randint(30, 4000)
        assert smart_resize(h, w, min_pixels=3136, max_pixels=1003520) == theirs(h, w)
    for size, far in {(56, 84): 1e-5, (61, 130): .1}.items():                            # exactly where nothing is resized; PIL resizes whole grey levels
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0)), size, mode='bicubic').clamp(0, 1)[0]
        levels = (smooth * 255).round()
        got = Processor()(images=[levels.permute(1, 2, 0).numpy().astype(np.uint8)], return_tensors='pt')
        patches, grid = prepare(levels / 255, min_pixels=56 ** 2, max_pixels=1280 * 28 ** 2)
        assert got['image_grid_thw'].tolist() == [list(grid)]
        assert (got['pixel_values'] - patches).abs().max() < far


WORDS = dict(image_token=91, video_token=92)


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_the_mask_of_truths(dtype):
    "Places are counted from the first real word, by hand and around a picture of 2 x 3 places."
    ids, after = mrope_ids(torch.tensor([[0, 0, 1, 2, 3]]), mask=torch.tensor([[0, 0, 1, 1, 1]]).to(dtype),
                           **WORDS)
    assert ids[:, 0, 2:].tolist() == [[0, 1, 2]] * 3 and after.tolist() == [3]
    tokens, mask = torch.tensor([[0, 0, 1, 90, *[91] * 6, 93, 3]]), torch.tensor([[0, 0] + [1] * 10])
    ids, after = mrope_ids(tokens, [(1, 4, 6)], mask=mask.to(dtype), **WORDS)
    assert ids[:, 0, 2:].tolist() == [[0, 1, *[2] * 6, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
                                      [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]] and after.tolist() == [7]
    with pytest.raises(ValueError, match='mask'): mrope_ids(tokens, [(1, 4, 6)], mask=mask * 2, **WORDS)


def test_the_ends_of_generating(unchecked):
    model, tokens = noisy(Qwen25VL(**WHOLE)), torch.tensor([[1, 2, 3]])
    for n in (0, 1): assert model.generate(tokens, max_new_tokens=n).shape == (1, n)
    for words, wrong in (('max_new_tokens', dict(max_new_tokens=-1)),
                         ('temperature', dict(max_new_tokens=1, temperature=-1.)),
                         ('temperature', dict(max_new_tokens=1, temperature=float('nan')))):
        with pytest.raises(ValueError, match=words): model.generate(tokens, **wrong)
    with pytest.raises(ValueError, match='at least one token'):
        model.generate(tokens[:, :0], max_new_tokens=2)
    for outside in (100, -1):
        with pytest.raises(ValueError, match=rf'vocab_size - 1 = 99.*{outside}'):
            model(torch.tensor([[1, outside]]))
        with pytest.raises(ValueError, match='vocab_size'):
            model.generate(torch.tensor([[1, outside]]), max_new_tokens=1)
    for rate in (0., -1., float('nan')):
        with pytest.raises(ValueError, match='video_fps'): sample_frames(100, rate)
