"vitbook.data.timeseries: tables, splits, windows, calendar, errors."
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vitbook import data
from vitbook.data import timeseries as S
from vitbook.train import batches


def table(rows=200, n=3): return S.generated(rows, n)


# ---- tables

def write(path, lines): path.write_text('\n'.join(lines) + '\n', encoding='utf-8'); return path


def test_csv_round_trip(tmp_path):
    t = table(30)
    lines = ['a,date,b,c'] + [f'{r[0]!r},{d},{r[1]!r},{r[2]!r}' for d, r in zip((str(d).replace('T', ' ') for d in t.dates()), t.values.tolist())]
    back = S.read_csv(write(tmp_path/'t.csv', lines))                                        # the dates need not come first
    assert back.columns == ('a', 'b', 'c') and torch.equal(back.times, t.times) and torch.equal(back.values, t.values)
    some = S.read_csv(tmp_path/'t.csv', columns=['c', 'a'])
    assert some.columns == ('c', 'a') and torch.equal(some.values, t.values[:, [2, 0]])
    write(tmp_path/'bom.csv', ['\ufeffdate,v', '2020-01-01,1', '', '2020-01-02,2'])          # as spreadsheets write it
    assert S.read_csv(tmp_path/'bom.csv').times.diff().tolist() == [86400]


@pytest.mark.parametrize('lines,words', [(['date,a', '2020-01-01,1', '2020-01-02,x'], 'line 3'), (['date,a', '2020-01-01,1', '2020-01-02'], 'line 3'), (['date,a', '2020-01-02,1', '2020-01-01,1'], 'line 3.*not later'),
                                         (['date,a', '2020-01-01,1', '2020-01-01,1'], 'not later'), (['date,a', 'yesterday,1'], 'line 2'), (['date,a', ',1'], 'line 2.*no date'), (['date,a', 'NaT,1'], 'line 2.*no date'), (['date,a,a', '2020-01-01,1,2'], "more than one column 'a'"), (['day,a', '2020-01-01,1'], "'date'.*day, a"), (['date,a'], 'no rows'), ([''], "'date'")])
def test_what_is_wrong_in_a_csv_is_named(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words): S.read_csv(write(tmp_path/'t.csv', lines))


def test_unknown_columns(tmp_path):
    write(tmp_path/'t.csv', ['date,a', '2020-01-01,1'])
    with pytest.raises(ValueError, match="'b'.*a"): S.read_csv(tmp_path/'t.csv', columns=['b'])
    with pytest.raises(ValueError, match="'b'"): S.read_csv(tmp_path/'t.csv').only('b')


def test_the_function_series_is_still_a_function():
    "A module called series would have taken the name of the function in vitbook.data."
    assert callable(data.series) and torch.equal(S.generated(100, 4, seed=3).values, data.series(100, 4, seed=3).values)


def test_ett_comes_by_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv('VITBOOK_DATA', str(tmp_path))
    monkeypatch.setattr(data, 'places', lambda: [tmp_path])
    with pytest.raises(FileNotFoundError, match='vitbook data fetch ett'): S.ett_table()
    (tmp_path/'ETT-small').mkdir()
    write(tmp_path/'ETT-small'/'ETTh1.csv', ['date,a', '2020-01-01,1'])
    with pytest.raises(ValueError, match='cut off or altered'): S.ett_table()
    monkeypatch.setattr(S, 'find', lambda name, path: tmp_path/path)
    assert S.ett_table().columns == ('a',)
    with pytest.raises(ValueError, match='ETTm1'): S.ett_table('ETTm1')


def test_real_table_when_it_is_here():
    if data.locate('ett', 'ETT-small/ETTh1.csv') is None: pytest.skip('ETTh1 is not on this machine')
    t = S.ett_table()
    assert t.columns == ('HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT') and len(t) == 17420 and str(t.dates()[0]) == '2016-07-01T00:00:00' and (t.times.diff() == 3600).all()
    assert torch.equal(t.values, data.ett().values)
    sets = S.forecasting_sets(t, S.ett_parts(), 96, 96, freq='h')
    assert [len(s) for s in sets[:3]] == [8449, 2785, 2785] and sets.train[0].x_mark.shape == (96, 4)
    last = S.evaluate(S.last_value(96), sets.test)
    assert abs(last.mse - 1.2952) < 2e-3 and abs(last.mae - .7132) < 2e-3                    # published for repeating the last value: 1.295 and 0.713 (arXiv:2205.13504, table 2: "Repeat")


# ---- parts and scale

@given(st.integers(10, 5000), st.floats(.1, .8), st.floats(0, .2))
def test_shares_cover_the_rows_in_order(rows, train, test):
    p = S.share_parts(rows, train, test)
    assert [*p.train, *p.val, *p.test] == list(range(rows)) and len(p.train) == int(rows * train) and len(p.test) == int(rows * test)


def test_ett_rows():
    assert S.ett_parts() == (range(0, 8640), range(8640, 11520), range(11520, 14400))
    assert S.ett_parts(4) == (range(0, 34560), range(34560, 46080), range(46080, 57600))
    for bad in (lambda: S.ett_parts(0), lambda: S.share_parts(10, .9, .2), lambda: S.share_parts(10, 0.)):
        with pytest.raises(ValueError): bad()


def test_scaler():
    v = torch.randn(1000, 4) * torch.tensor([1., 10., 1e-3, 0.]) + torch.tensor([0., 1e4, -1., 7.])
    s = S.Scaler.fit(v)
    z = s.apply(v)
    assert_close(z.mean(0), torch.zeros(4), atol=1e-2, rtol=0)
    assert_close(z.std(0, correction=0), torch.tensor([1., 1., 1., 0.]), rtol=1e-3, atol=1e-6)
    assert_close(s.undo(z), v)
    batch = torch.randn(2, 5, 4)
    assert_close(s.undo(s.apply(batch)), batch, atol=1e-3, rtol=1e-3)
    sk = pytest.importorskip('sklearn.preprocessing').StandardScaler().fit(v.double().numpy())
    assert_close(z, torch.from_numpy(sk.transform(v.double().numpy())).float(), rtol=1e-3, atol=1e-3)
    few = S.Scaler.fit(torch.tensor([[1.], [3.]]))
    assert few.std == 1 and few.mean == 2                                                     # of the population: a sample's would be the root of two
    with pytest.raises(ValueError, match='1 numbers'): S.Scaler.fit(torch.tensor([[1., math.inf]]))
    with pytest.raises(ValueError, match='no rows'): S.Scaler.fit(torch.zeros(0, 2))


# ---- windows

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12))
def test_windows_are_the_slices(t, s, more):
    rows = torch.arange((t + s + more) * 2.).view(-1, 2)
    w = S.Windows(rows, t, s, rows[:, :1] * 10)
    assert len(w) == more + 1 == len(w.x) == len(w.y) == len(w.x_mark) == len(w.y_mark)
    for i in range(len(w)):
        assert torch.equal(w[i].x, rows[i:i + t]) and torch.equal(w[i].y, rows[i + t:i + t + s])
        assert torch.equal(w[i].x_mark, rows[i:i + t, :1] * 10) and torch.equal(w[i].y_mark, rows[i + t:i + t + s, :1] * 10)
    index = torch.randint(len(w), (7,))
    assert torch.equal(w[index].x, w.x[index])


def test_windows_share_the_table_s_memory():
    rows = torch.randn(1000, 7)
    w = S.Windows(rows, 96, 96, torch.zeros(1000, 4))
    for v in (w.x, w.y): assert v.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() and v.untyped_storage().nbytes() == rows.numel() * 4
    got = batches(w.x, w.y, w.x_mark, batch_size=16, seed=1).at(3)
    assert [tuple(g.shape) for g in got] == [(16, 96, 7), (16, 96, 7), (16, 96, 4)]
    assert all(g.untyped_storage().nbytes() == g.numel() * 4 for g in got)                  # a batch is a copy of itself only
    assert w.to('meta').x.device.type == 'meta' and w.to('meta').values.shape == rows.shape
    assert torch.equal(w.variates([3, 1]).x, w.x[..., [3, 1]]) and torch.equal(w.variates(slice(2)).y, w.y[..., :2])


def test_bad_windows(unchecked):
    rows = torch.zeros(20, 2)
    for given_, words in (((rows, 15, 6), '20 rows.*21'), ((rows, 0, 6), 'seq_len: got 0'), ((rows, 5, -1), 'pred_len: got -1'), ((rows, 5, 5, torch.zeros(19, 1)), 'marks: got 19')):
        with pytest.raises(ValueError, match=words): S.Windows(*given_)


def test_sets_have_targets_in_their_part_and_no_leak():
    t = table(400)
    parts = S.share_parts(400)
    sets = S.forecasting_sets(t, parts, 24, 12, freq='h')
    z = sets.scaler.apply(t.values)
    for windows, part in zip(sets[:3], parts):
        assert torch.equal(windows[-1].y[-1], z[part.stop - 1])
        assert torch.equal(windows[0].y[0], z[part.start + (24 if part is parts.train else 0)])
    altered = S.TimeSeries(t.columns, torch.cat([t.values[:parts.train.stop], t.values[parts.train.stop:] * 5]), t.times)
    assert torch.equal(S.forecasting_sets(altered, parts, 24, 12).train.values, sets.train.values)
    assert len(S.forecasting_sets(t, parts, 24, 12, reach_back=False).test) == len(sets.test) - 24
    assert torch.equal(S.forecasting_sets(t, parts, 24, 12, scale=False).train.values, t.values[:280])
    with pytest.raises(ValueError, match='14400.*400'): S.forecasting_sets(t, S.ett_parts(), 24, 12)
    with pytest.raises(ValueError, match='rows'): S.forecasting_sets(t, parts, 24, 120)


# ---- calendar

DAYS = ['1970-01-01', '1999-12-31 23:59:59', '2000-02-29 12:34:56', '2015-12-31', '2016-01-01', '2016-01-04', '2018-12-31', '2020-12-31 06:00', '2021-01-03', '2024-12-30 18:15']


def test_calendar_against_the_standard_library():
    import datetime
    moments = [datetime.datetime.fromisoformat(d) for d in DAYS]
    times = torch.tensor([int(np.datetime64(d.replace(' ', 'T'), 's').astype(np.int64)) for d in DAYS])
    want = dict(second=lambda m: m.second / 59, minute=lambda m: m.minute / 59, hour=lambda m: m.hour / 23, weekday=lambda m: m.weekday() / 6, day=lambda m: (m.day - 1) / 30,
                dayofyear=lambda m: (m.timetuple().tm_yday - 1) / 365, month=lambda m: (m.month - 1) / 11, week=lambda m: (m.isocalendar()[1] - 1) / 52)
    for freq, names in dict(s='second minute hour weekday day dayofyear', t='minute hour weekday day dayofyear', h='hour weekday day dayofyear', d='weekday day dayofyear', b='weekday day dayofyear', w='day week', m='month').items():
        assert_close(S.calendar(times, freq), torch.tensor([[want[n](m) - .5 for n in names.split()] for m in moments]), rtol=1e-5, atol=1e-6)
    assert S.calendar(times, 't', whole=True).tolist() == [[m.month, m.day, m.weekday(), m.hour, m.minute // 15] for m in moments]
    assert S.calendar(times, 'h', whole=True).shape == (10, 4)
    with pytest.raises(ValueError, match="'y'"): S.calendar(times, 'y')


# ---- errors

@given(st.integers(0, 10**6))
def test_errors_against_numpy(seed):
    g = torch.Generator().manual_seed(seed)
    p, t = torch.randn(4, 6, 3, generator=g).double(), torch.randn(4, 6, 3, generator=g).double()
    a, b = p.numpy(), t.numpy()
    for ours, want in ((S.mse, ((a - b) ** 2).mean()), (S.mae, abs(a - b).mean()), (S.rmse, ((a - b) ** 2).mean() ** .5), (S.mape, (abs(a - b) / np.maximum(abs(b), 1e-3)).mean()), (S.smape, (2 * abs(a - b) / (abs(a) + abs(b))).mean())):
        assert abs(ours(p, t).item() - want) < 1e-9
        assert ours(t, t) == 0
    assert_close(S.mape(p, t, floor=10.), (p - t).abs().mean() / 10)


def test_mase_is_one_for_the_seasonal_forecast_on_its_own_history():
    h = table(300).values
    pred, true = h[:-24][None], h[24:][None]
    assert_close(S.mase(pred, true, h, 24), torch.tensor(1.))
    assert_close(S.mase(pred * 1000, true * 1000, h * 1000, 24), torch.tensor(1.))
    walk = torch.arange(10.)[:, None] * torch.tensor([1., 100.])                             # rises by 1 and by 100 a step
    assert S.mase(walk[1:4] + torch.tensor([1., 0.]), walk[1:4], walk) == .5                 # each variate against its own
    for season in (0, 300):
        with pytest.raises(ValueError, match=f'season: got {season}'): S.mase(pred, true, h, season)


@pytest.mark.parametrize('batch', (1, 7, 64, 1000))
def test_evaluate_counts_every_window_once(batch):
    w = S.forecasting_sets(table(400), S.share_parts(400), 24, 12, freq='h').test
    f = lambda x, m: x[:, -12:] * .9 + m[:, :1, :1]
    e, out = S.evaluate(f, w, batch), f(w.x, w.x_mark)
    assert abs(e.mse - S.mse(out, w.y).item()) < 1e-5 and abs(e.mae - S.mae(out, w.y).item()) < 1e-5 and e.windows == len(w)
    assert_close(e.by_step.float(), (out - w.y).square().mean((0, 2)))
    assert_close(e.by_variate.float(), (out - w.y).square().mean((0, 1)))


def test_evaluate_leaves_the_module_as_it_was(unchecked):
    w = S.Windows(torch.randn(60, 2), 8, 4)
    class Half(torch.nn.Module):
        def forward(self, x, mark=None):
            assert not self.training and not torch.is_grad_enabled()
            return x[:, -4:] / 2
    for mode in (True, False):
        m = Half().train(mode)
        S.evaluate(m, w)
        assert m.training is mode
    m = Half().train()
    with pytest.raises(ValueError, match='forecast'): S.evaluate(lambda x, mark: x, w)


def test_untrained_forecasts(unchecked):
    x = torch.arange(10.)[None, :, None]
    assert S.last_value(3)(x)[0, :, 0].tolist() == [9, 9, 9] and S.last_season(7, 3)(x)[0, :, 0].tolist() == [7, 8, 9, 7, 8, 9, 7]
    with pytest.raises(ValueError, match='season: got 11'): S.last_season(3, 11)(x)


@pytest.mark.parametrize('moment', ['0', '2016', '1467331200', '1467331200000', '2016070100', '201607', 'today', 'now', '01/07/2016', '2016-07-01T00:00:00Z', '2016-13-01'])
def test_what_is_not_written_as_a_date_is_none(tmp_path, moment):
    "numpy would take row numbers and seconds since 1970 for years."
    with pytest.raises(ValueError, match='line 3'): S.read_csv(write(tmp_path/'t.csv', ['date,a', '0001-01-01,1', f'{moment},2']))


@pytest.mark.parametrize('moment, seconds', [('1970-01-02', 86400), (' 1970-01-01 00:01:00 ', 60), ('1970-01-01T01:00', 3600), ('1970-02', 31 * 86400), ('1970-01-01 00:00:05.7', 5)])
def test_ways_to_write_a_date(tmp_path, moment, seconds):
    assert S.read_csv(write(tmp_path/'t.csv', ['date,a', f'{moment},2'])).times.tolist() == [seconds]


@pytest.mark.parametrize('row, words', [('1,2', 'it has 3'), ('1e39', 'a: .1e39'), ('inf', 'no finite'), ('-Infinity', 'no finite'), ('1_000', '1_000'), ('', 'line 2')])
def test_cells_that_are_no_finite_numbers(tmp_path, row, words):
    with pytest.raises(ValueError, match=words): S.read_csv(write(tmp_path/'t.csv', ['date,a', f'2020-01-01,{row}']))


def test_other_encodings(tmp_path):
    (tmp_path/'t.csv').write_bytes('date,Größe\n2020-01-01,1\n'.encode('cp1252'))
    with pytest.raises(ValueError, match='line 1 is not utf-8.*cp1252'): S.read_csv(tmp_path/'t.csv')
    assert S.read_csv(tmp_path/'t.csv', encoding='cp1252').columns == ('Größe',)
    (tmp_path/'t.csv').write_bytes('date,a\n2020-01-01,1\n'.encode('utf-16'))
    with pytest.raises(ValueError, match='utf-16'): S.read_csv(tmp_path/'t.csv')


@pytest.mark.parametrize('row, part', [(5, 'train'), (450, 'val'), (599, 'test')])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_gaps_are_named_when_the_sets_are_made(row, part, bad):
    t = S.generated(600, 2)
    values = t.values.clone()
    values[row:, 1] = bad
    with pytest.raises(ValueError, match=f"{part} rows.*'channel 1' in row {row} .{str(t.dates()[row])}"):
        S.forecasting_sets(S.TimeSeries(t.columns, values, t.times), S.share_parts(600), 24, 12)
    with pytest.raises(ValueError, match='windows'): S.evaluate(S.last_value(12), S.Windows(values, 24, 12))
    with pytest.raises(ValueError, match='season'): S.last_season(12, 0)
    with pytest.raises(ValueError, match='batch_size'): S.evaluate(S.last_value(12), S.Windows(t.values, 24, 12), 0)


@pytest.mark.parametrize('name', ['mse', 'mae', 'rmse', 'mape', 'smape'])
def test_errors_of_other_shapes_are_refused(name, unchecked):
    "A forecast without its axis of variates would be spread over all of them."
    measure, true = getattr(S, name), torch.rand(2, 4, 3)
    for pred in (true[..., :1], true[0], true.mT):
        with pytest.raises(ValueError, match='pred must have the shape'): measure(pred, true)
    with pytest.raises(ValueError, match='pred must have the shape'):
        S.mase(true[:, :1], true, torch.rand(9, 3))
    assert measure(true, true) == 0
