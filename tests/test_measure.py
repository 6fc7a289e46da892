"""measure: counts by hand, frozen parts told from trained ones, measurements of calls whose cost is known, and what goes on the scoreboard. Modes put back: test_train.py."""
import json, math, time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitbook import measure
from vitbook.layers.attention import Attention, attention


def some(): return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 3, bias=False))


def test_parameters():
    model = some()
    assert measure.parameters(model) == measure.parameters(model, trainable=True) == 4 * 6 + 6 + 6 + 6 + 6 * 3      # buffers are none
    model[0].requires_grad_(False)
    assert (measure.parameters(model), measure.parameters(model, trainable=True)) == (60, 30)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert measure.parameters(tied) == 16 + 4 + 4, 'shared ones once'


@pytest.mark.parametrize('batch', [1, 5])
def test_flops_by_hand(batch):
    assert measure.flops(nn.Linear(4, 6), torch.zeros(batch, 4)) == 2 * batch * 4 * 6
    assert measure.flops(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.zeros(batch, 4, 5, 7)) == 2 * batch * 5 * 7 * 6 * 2 * 9
    q, k, v = torch.zeros(batch, 3, 5, 8), torch.zeros(batch, 3, 7, 8), torch.zeros(batch, 3, 7, 8)
    for call in (F.scaled_dot_product_attention, attention, lambda *a: attention(*a, backend='naive')): assert measure.flops(call, q, k, v) == 2 * batch * 3 * 5 * 7 * (8 + 8)
    assert measure.flops(Attention(12, 3), torch.zeros(batch, 5, 12)) == 2 * batch * (5 * 12 * 48 + 2 * 5 * 5 * 12)


def test_counting_flops_changes_nothing():
    "No gradient, no dropout, no new statistics; a frozen part stays frozen and is counted like the others."
    model, x = some().train(), torch.randn(5, 4)
    model[1].eval()
    model[0].requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda m, given, out: seen.append((torch.is_grad_enabled(), out.requires_grad, [l.training for l in m.modules()])))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert measure.flops(model, x) == 2 * 5 * (4 * 6 + 6 * 3)
    assert seen == [(False, False, [False] * 5)]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and [m.training for m in model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True] and all(p.grad is None for p in model.parameters())


def test_times_are_seconds_a_call():
    calls = []
    found = measure.latency({'short': lambda: time.sleep(.002), 'long': lambda: (calls.append(0), time.sleep(.008))}, rounds=3, min_time=.001)
    assert [*found] == ['short', 'long'] and len(calls) == 2 + 3, 'one call to warm up, one to choose, one a round'
    for name, least in (('short', .002), ('long', .008)): assert least <= found[name].low <= found[name].median <= found[name].high < 20 * least
    counted = []
    measure.latency({'quick': lambda: counted.append(0)}, rounds=2, min_time=.002)
    assert len(counted) > 20, 'what is quick is repeated'
    with pytest.raises(ValueError, match='rounds.*0'): measure.latency({'a': int}, rounds=0)


def test_rounds_change_the_order():
    seen = []
    measure.latency({n: (lambda n=n: (seen.append(n), time.sleep(1e-4))) for n in 'abc'}, rounds=3, min_time=1e-6)
    assert ''.join(seen[6:]) == 'abc' 'bca' 'cab'


def test_peak_memory_is_of_the_fullest_moment():
    def call():
        a = torch.zeros(1000)
        b = torch.zeros(3000)
        del a, b
        return torch.zeros(2000)
    held = torch.zeros(10_000)
    assert measure.peak_memory(call) == 4 * 4000
    assert measure.peak_memory(lambda: held.neg_()) == 0, 'what was there before is not counted'


def test_exponents():
    assert measure.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2) and measure.slope([1, 10], [5, 5]) == pytest.approx(0)
    for sizes, values in (([1], [1]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match='slope'): measure.slope(sizes, values)
    assert measure.growth(lambda n: lambda: torch.zeros(n, n), [10, 20, 40], 'memory') == pytest.approx(2)
    assert .7 < measure.growth(lambda n: lambda: time.sleep(n * 1e-3), [2, 8], rounds=1) < 1.2
    with pytest.raises(ValueError, match="what must be 'time' or 'memory', got 'speed'"): measure.growth(lambda n: int, [1, 2], 'speed')


def test_a_comparison():
    rows = [dict(way=w, n=n, median=n ** p * 1e-3, low=n ** p * 5e-4, high=n ** p * 2e-3, memory=n * 2 ** 20) for n in (2, 4) for w, p in (('slow', 2), ('fast', 1))]
    c = measure.Comparison(rows, 1, 'cpu')
    assert c.ways() == ['slow', 'fast'] and c.of('slow', 'n') == [2, 4] and c.of('fast') == pytest.approx([.002, .004])
    assert c.exponents() == pytest.approx(dict(slow=2, fast=1)) and c.exponents('memory') == pytest.approx(dict(slow=1, fast=1))
    assert c.ratio('slow', 'fast') == pytest.approx(4) and c.ratio('slow', 'fast', 2) == pytest.approx(2) and c.ratio('fast', 'slow', 2) == pytest.approx(.5)
    assert str(c.table()).splitlines()[2] == '| 2 | 4 (2–8) | 2 | 2 (1–4) | 2 |'
    pytest.importorskip('matplotlib')
    axes = c.plot('t', 'tokens').axes
    assert len(axes) == 2 and axes[0].get_xlabel() == 'tokens' and [l.get_label() for l in axes[0].lines] == ['slow  ~ n^2.00', 'fast  ~ n^1.00'] and axes[0].lines[0].get_ydata().tolist() == pytest.approx([4, 16])
    assert len(measure.Comparison([r | dict(memory=None) for r in rows], 1, 'cpu').plot().axes) == 1


def test_compare_measures_each_way_at_each_size():
    made = []
    def way(size): return lambda n: made.append((size, n)) or (lambda: torch.zeros(size * n))
    c = measure.compare({'a': way(1000), 'b': way(3000)}, [1, 2], rounds=1)
    assert made == [(1000, 1), (3000, 1), (1000, 2), (3000, 2)] and c.of('a', 'memory') == [4000, 8000] and c.of('b', 'memory') == [12000, 24000]
    assert c.threads == torch.get_num_threads() and c.device == 'cpu' and measure.compare({'a': way(1)}, [1], memory=False, rounds=1).of('a', 'memory') == [None]


# ---- the scoreboard

@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, '_recorded', {})
    monkeypatch.setenv('VITBOOK_RECORDS', str(tmp_path))
    return tmp_path


def test_records(folder):
    line = measure.record('toy', 'It holds.', ours=1.23456789, paper='2', unit='nats', holds=True, rtol=.1, note='n')
    assert line == dict(chapter='toy', claim='It holds.', paper='2', ours=1.23457, unit='nats', holds=True, rtol=.1, atol=None, timed=False, note='n')
    measure.record('toy', 'Second.', ours=12345678, holds=False, timed=True)
    measure.record('toy', 'It holds.', ours=5, holds=False, atol=0.)
    measure.record('other', 'It holds.', ours=5, holds=True, atol=1.)
    measure.record('toy', 'Long.', ours=5, holds=True, atol=1., long=True)
    read = lambda *path: json.loads(folder.joinpath(*path).read_text())
    assert [(l['claim'], l['ours'], l['holds']) for l in read('toy.json')] == [('Second.', 12345678, False), ('It holds.', 5, False)], 'a claim once, a count whole'
    assert [l['claim'] for l in read('other.json')] == ['It holds.'] and [l['claim'] for l in read('long', 'toy.json')] == ['Long.']


@pytest.mark.parametrize('more, words', [({}, 'rtol or atol, or else timed'), (dict(rtol=.1, timed=True), 'timed=True'), (dict(atol=.1, timed=True), 'timed=True'), (dict(rtol=.1, ours=math.nan), 'ours must be finite')])
def test_what_is_no_record(folder, more, words):
    with pytest.raises(ValueError, match=words): measure.record('toy', 'c', **dict(ours=1., holds=True) | more)
    assert not [*folder.iterdir()]


def test_without_a_folder_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.delenv('VITBOOK_RECORDS', raising=False)
    monkeypatch.chdir(tmp_path)
    assert measure.record('toy', 'c', ours=1., holds=True, atol=1.)['ours'] == 1 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize('old, new, same', [
    (dict(rtol=.1), dict(ours=10.9), True), (dict(rtol=.1), dict(ours=11.1), False), (dict(rtol=.1), dict(ours=8.9), False), (dict(atol=.5), dict(ours=10.5), True), (dict(atol=.5), dict(ours=10.6), False),
    (dict(rtol=.1, atol=.5), dict(ours=11.4), True), (dict(rtol=.1), dict(holds=False), False), (dict(timed=True), dict(timed=True, ours=99., holds=False), True), (dict(timed=True), dict(rtol=1.), False),
    (dict(ours=-10., rtol=.1), dict(ours=-10.9), True), (dict(rtol=.0), dict(rtol=9., ours=11.), False),
])
def test_a_fresh_record_agrees_within_the_old_tolerance(old, new, same):
    line = dict(ours=10., holds=True, timed=False, rtol=None, atol=None)
    assert measure.agrees(line | old, line | new) == same


def test_texts_are_whole(tmp_path):
    path = tmp_path/'a'/'b.txt'
    measure.write_atomically(path, 'é\n')
    assert path.read_bytes() == 'é\n'.encode() and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError):
        with measure.whole_file(path) as place:
            place.write_text('half')
            raise RuntimeError
    assert path.read_text(encoding='utf-8') == 'é\n' and [p.name for p in path.parent.iterdir()] == ['b.txt']
