"""Benchmarks: what is on the list, that its ways compute the same, what a result says, and the files and the page made of results."""
import json, platform
from pathlib import Path

import pytest, torch
from torch.testing import assert_close

from tools import NBS, ROOT
from vitbook import bench

FAST_PATHS = {'attention', 'entropy_attention', 'packed_attention', 'set_attention'}


@pytest.fixture(scope='module')
def result(): return bench.run_bench('entropy_attention', sizes=(16, 32), rounds=1)


def test_the_list():
    listed = {b.name: b for b in bench.list_benches()}
    assert FAST_PATHS <= set(listed)
    kernels = {p.stem for p in (ROOT/'vitbook'/'kernels').glob('*_attention.py')}
    assert kernels <= set(listed), 'a kernel that no bench times'
    for b in listed.values():
        ways = b.ways('cpu')
        assert b.naive in ways and b.plain in ways and len(ways) > 2 and b.what.endswith('.') and list(b.sizes) == sorted(b.sizes)
        module, name = b.path.rsplit('.', 1)
        assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize('name', sorted(FAST_PATHS))
def test_all_ways_of_a_bench_give_the_same(name):
    b = {b.name: b for b in bench.list_benches()}[name]
    for n in (48, 65):
        calls = {way: make(n) for way, make in b.ways('cpu').items()}
        first = lambda found: found if isinstance(found, torch.Tensor) else found[0]
        want, gradients = first(calls[b.naive]['forward']()), calls[b.naive]['train']()
        for way, call in calls.items():
            assert_close(first(call['forward']()), want, rtol=1e-4, atol=1e-5)
            if name == 'entropy_attention' and way.startswith('sdpa'): continue     # no gradient of the entropy
            for x, y in zip(call['train'](), gradients): assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', sorted(FAST_PATHS))
def test_in_the_numbers_of_a_gpu(name, monkeypatch):
    "bfloat16, which is what is timed on GPUs, goes through every way."
    assert bench.numbers('cuda') == bench.numbers('cuda:1') == torch.bfloat16
    monkeypatch.setattr(bench, 'numbers', lambda device: torch.bfloat16)
    b = {b.name: b for b in bench.list_benches()}[name]
    first = lambda found: found if isinstance(found, torch.Tensor) else found[0]
    calls = {way: make(65) for way, make in b.ways('cpu').items()}
    want = first(calls[b.naive]['forward']())
    for way, call in calls.items():
        got = first(call['forward']())
        assert got.dtype == torch.bfloat16 and all(g.dtype == torch.bfloat16 for g in call['train']())
        assert_close(got.float(), want.float(), rtol=.05, atol=.05)


def test_a_way_that_runs_out_of_memory(monkeypatch):
    "It is left out from that size on, and said; the others keep their figures, and multiples of what is not there are not made up."
    def ways(device):
        "A square of n x n numbers."
        def greedy(n):
            if n > 20: raise torch.OutOfMemoryError('CUDA out of memory')
            return lambda: torch.zeros(n, n)
        both = lambda make: lambda n: dict(forward=lambda: make(n)(), train=lambda: make(n)())
        return dict(naive=both(greedy), sdpa=both(lambda n: lambda: torch.ones(n, n)))
    entry = bench.Bench('squares', ways, 'Squares.', 'torch.ones', (16, 32), (16, 32), 'naive', 'sdpa')
    monkeypatch.setattr(bench, '_entries', dict(squares=entry))
    found = bench.run_bench('squares', sizes=(8, 16, 32, 64), rounds=1)
    for part in (found['forward'], found['train']):
        assert part['out_of_memory'] == dict(naive=32) and {r['n'] for r in part['rows'] if r['way'] == 'naive'} == {8, 16}
        assert set(part['of_plain']) == {'sdpa'} and part['of_naive'] == {} and set(part['time_exponents']) == {'naive', 'sdpa'}
    rows = bench.rows_of(found)
    assert [(r['way'], r['n'], r['of naive']) for r in rows] == [('sdpa', '64', ''), ('naive', '32', '')] * 2 and rows[1]['ms (quartiles)'] == 'out of memory'


def test_packs_and_their_ends():
    for n in (1, 16, 100, 1000):
        ends = bench.ragged(n)
        assert ends[0] == 0 and ends[-1] == n and all(0 < b - a <= 192 for a, b in zip(ends, ends[1:])) and ends == bench.ragged(n)


def test_a_result(result):
    assert result['bench'] == 'entropy_attention' and result['device'] == 'cpu' and result['sizes'] == [16, 32]
    for which in ('forward', 'train'):
        part = result[which]
        assert {(r['way'], r['n']) for r in part['rows']} == {(w, n) for w in bench._entries['entropy_attention'].ways('cpu') for n in (16, 32)}
        assert all(r['low'] <= r['median'] <= r['high'] and r['memory'] > 0 for r in part['rows'])
        at = {r['way']: r['median'] for r in part['rows'] if r['n'] == 32}
        for way, ratio in part['of_plain'].items(): assert_close(ratio, at[way] / at['sdpa'])
        for way, ratio in part['of_naive'].items(): assert_close(ratio, at[way] / at['naive'])
        assert set(part['time_exponents']) == set(part['memory_exponents']) == set(at)
    assert result['machine']['torch'] == torch.__version__ and result['machine']['threads'] == torch.get_num_threads()
    text = json.dumps(result)
    for secret in (platform.node(), str(Path.home()), str(ROOT)): assert len(secret) < 3 or secret not in text, 'a name or a path of this machine'


def test_rows(result):
    rows = bench.rows_of(result)
    assert len(rows) == 2 * len(result['forward']['of_plain']) and {r['pass'] for r in rows} == {'forward', 'train'} and all(r['n'] == '32' for r in rows)
    assert next(r for r in rows if r['way'] == 'sdpa')['of sdpa'] == '1.00'
    assert result['dtype'] == 'float32'
    alone = bench.run_bench('attention', sizes=(16,), rounds=1)                   # one size: no exponent
    assert {r['time ~ n^'] for r in bench.rows_of(alone)} == {''}


def test_files(result, tmp_path):
    path = bench.save(result, tmp_path)
    assert path == tmp_path/'cpu'/'entropy_attention.json' and bench.saved(tmp_path) == [result | dict(kind='cpu')]
    gpu = result | dict(device='cuda', machine=result['machine'] | dict(gpu='NVIDIA H200 (80GB)'))
    assert bench.save(gpu, tmp_path).parent.name == 'nvidia-h200-80gb' and [r['kind'] for r in bench.saved(tmp_path)] == ['cpu', 'nvidia-h200-80gb']
    for text, match in (('{', 'is no JSON'), ('{}', 'is no result'), ('[]', 'is no result')):
        (tmp_path/'cpu'/'bad.json').write_text(text)
        with pytest.raises(ValueError, match=match): bench.saved(tmp_path)


def test_mistakes():
    with pytest.raises(ValueError, match="no bench named 'atention'.*attention"): bench.run_bench('atention')
    with pytest.raises(ValueError, match='at least 1'): bench.run_bench('attention', sizes=(0,))
    with pytest.raises(ValueError, match="CUDA GPU.*got 'mps'"): bench.run_bench('attention', 'mps')
    with pytest.raises(ValueError, match='needs a docstring'): bench.register_bench('x.y', sizes=(1,))(lambda device: {})
    def attention(device): "Another."
    with pytest.raises(ValueError, match="'attention' is registered by vitbook.bench"): bench.register_bench('x.y', sizes=(1,))(attention)


def test_committed_results():
    "Files under benchmarks/ are results of benches that are still there, and the page says what is not measured."
    results = bench.saved(ROOT/'benchmarks')
    assert {r['bench'] for r in results if r['kind'] == 'cpu'} == {b.name for b in bench.list_benches()}
    for r in results:
        assert set(r['forward']['of_plain']) >= {r['naive'], r['plain']} and (r['device'] == 'cpu') == ('gpu' not in r['machine'])
    outputs = json.dumps(json.loads((NBS/'benchmarks.ipynb').read_text(encoding='utf-8')), ensure_ascii=False)
    assert ('No GPU figure has been measured yet' in outputs) == all(r['device'] == 'cpu' for r in results)
    for r in results:
        for row in bench.rows_of(r): assert row['ms (quartiles)'] in outputs, 'the page is older than the files'
