"vitbook.data: what the generators promise, and everything that can go wrong between a server and a file."
import contextlib, errno, hashlib, http.server, importlib.util, inspect, json, math, os, re, shutil, socket, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vitbook import data

ROOT = Path(__file__).parents[1]


# --- what is always there ---

@pytest.mark.parametrize('size', [1, 5, 8, 16, 33])
def test_digits_shapes_and_range(size):
    d = data.digits('test', size=size)
    assert d.images.shape == (len(d), 1, size, size) and d.images.dtype == torch.float32 and d.labels.dtype == torch.int64
    assert 0 <= d.images.min() and d.images.max() <= 1 and d.classes == tuple('0123456789')


def test_enlarged_digits_have_their_cells_in_place():
    "Each cell of 8x8 becomes four, between the centres linear: at the edge as it was, a quarter of the way to the neighbour else."
    small, large = data.digits('test').images, data.digits('test', size=16).images
    index = torch.arange(16)
    near, other = index // 2, (index // 2 + index % 2 * 2 - 1).clamp(0, 7)
    mixed = lambda x: .75 * x[..., near] + .25 * x[..., other]
    assert_close(large, mixed(mixed(small).mT).mT.clamp(0, 1), atol=1e-5, rtol=0)
    assert_close(data.digits('test', size=4).images[..., 1:3, 1:3], small_to_4(small), atol=1e-5, rtol=0)


def small_to_4(x):
    "Halved, away from the edge: triangles four cells wide."
    weights = torch.zeros(4, 8)
    for i in range(1, 3): weights[i, 2 * i - 1:2 * i + 3] = torch.tensor([1., 3., 3., 1.]) / 8
    return (weights @ x @ weights.T)[..., 1:3, 1:3]


def test_digits_split_is_a_fixed_partition():
    train, test, everything = (data.digits(s) for s in ('train', 'test', 'all'))
    assert len(train) + len(test) == len(everything) == 1797
    rows = lambda d: {(*x.flatten().tolist(), int(k)) for x, k in zip(d.images, d.labels)}
    assert not rows(train) & rows(test) and rows(train) | rows(test) == rows(everything)
    assert torch.equal(data.digits('test', size=16).labels, test.labels)              # the split does not depend on the size
    assert not torch.equal(data.digits('test', seed=1).images[:300], test.images[:300])
    # written down once: a change of this line changes every figure in the book that was trained on the split
    assert hashlib.sha256(test.labels.numpy().astype('<i8').tobytes()).hexdigest()[:12] == '7d108ee8fe30'
    train.images.zero_()
    assert data.digits('train').images.max() == 1                                      # callers get their own copy


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2 ** 32 - 1))
def test_stratified_keeps_every_class_share(labels, share, seed):
    labels = torch.tensor(labels)
    chosen = data.stratified(labels, share, seed)
    for k in labels.unique():
        assert chosen[labels == k].sum() == round(share * int((labels == k).sum()))
    assert torch.equal(chosen, data.stratified(labels, share, seed))


def test_pictures_class(unchecked):
    d = data.digits('test')
    assert torch.equal(d[:7].images, d.images[:7]) and len(d[d.labels == 3]) == int((d.labels == 3).sum()) and d[torch.tensor([5, 1])].labels.tolist() == d.labels[[5, 1]].tolist()
    with pytest.raises(ValueError, match='labels: got 2 for 3 images'): data.Pictures(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.long), ('a',))


def test_photographs():
    raw, small = data.pictures(), data.pictures(24)
    assert {'astronaut', 'chelsea', 'coffee', 'rocket'} <= set(small) == set(raw)
    for name, image in small.items():
        assert image.shape == (3, 24, 24) and 0 <= image.min() and image.max() <= 1
        y, x = raw[name].shape[1:]
        s, (top, left) = min(y, x), ((y - min(y, x)) // 2, (x - min(y, x)) // 2)
        crop = raw[name][:, top:top + s, left:left + s]
        assert (image.mean((1, 2)) - crop.mean((1, 2))).abs().max() < .01             # averaging keeps the mean colour; striding does not
    with pytest.raises(ValueError, match='size: got 0'): data.pictures(0)


def test_photographs_without_scikit_image_say_what_to_install(monkeypatch):
    monkeypatch.setattr(data.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'vitbook[data]'")): data.pictures()


@given(st.text(max_size=200))
def test_tokenize_loses_only_blanks(t):
    tokens = data.tokenize(t)
    assert ''.join(tokens) == re.sub(r'\s', '', t.lower())
    assert data.tokenize(' '.join(tokens)) == tokens


@given(st.text(max_size=200), st.none() | st.integers(1, 30))
def test_vocabulary_round_trip(t, size):
    tokens = data.tokenize(t)
    v = data.Vocabulary(tokens, size)
    ids = v.encode(t)
    assert len(v) <= (size or len(v)) and ids.dtype == torch.int64 and len(ids) == len(tokens)
    assert torch.equal(v.encode(v.decode(ids)), ids)
    assert [v.words[i] for i in ids] == [w if w in v else '<unk>' for w in tokens]
    assert data.Vocabulary(tokens[::-1], size).words == v.words                        # order of the text does not matter


def test_vocabulary_by_hand():
    v = data.Vocabulary(['b', 'a', 'b', 'c', 'a', '<unk>', '<unk>', '<unk>'], 3)
    assert v.words == ['<unk>', 'a', 'b'] and v.unknown == 0 and 'c' not in v
    assert v.encode(['c', 'b', '<unk>']).tolist() == [0, 2, 0] and v.decode([2, 1, 0]) == 'b a <unk>'
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match='ids: got'): v.decode(bad)
    with pytest.raises(ValueError, match='tokens: got one string'): data.Vocabulary('a b c', 3)
    with pytest.raises(ValueError, match='size: got 0'): data.Vocabulary(['a'], 0)


@pytest.mark.parametrize('topics', ['there', 'absent', 'a list', 'empty'])
def test_english_on_every_python(monkeypatch, topics):
    if topics == 'absent': monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
    if topics in ('a list', 'empty'):
        module = type(sys)('pydoc_data.topics')
        module.topics = ['x'] if topics == 'a list' else {}
        monkeypatch.setitem(sys.modules, 'pydoc_data.topics', module)
    tokens = data.tokenize(data.text())
    assert 80_000 < len(tokens) < 400_000 and {'the', 'is', 'of'} < set(data.Vocabulary(tokens, 40).words)
    assert data.text() == data.text()


def test_series():
    s = data.series(24 * 7 * 6, 5, seed=3)
    assert s.values.shape == (24 * 7 * 6, 5) and len(s.columns) == 5 and s.values.isfinite().all()
    x = s.values.numpy()
    x = x - x.mean(0)
    again = lambda k: (x[k:] * x[:-k]).mean() / (x * x).mean()
    assert again(24) > again(12) + .3                                                  # a day later it looks alike, half a day later it does not
    assert data.series(48, 1).values.shape == (48, 1) and data.series(1, 2).values.shape == (1, 2)


@given(st.floats(0, 10), st.floats(-25, 25), st.integers(1, 40))
def test_bounce_is_a_walk_between_two_walls(start, step, frames):
    place, speed, want = start, step, []
    for _ in range(frames):
        want.append(place)
        place += speed
        while not 0 <= place <= 10: place, speed = (-place, -speed) if place < 0 else (20 - place, -speed)
    got = data.bounce(torch.tensor([start], dtype=torch.double), torch.tensor([step], dtype=torch.double), frames, 10)
    assert torch.allclose(got[0], torch.tensor(want, dtype=torch.double), atol=1e-6)


@pytest.mark.parametrize('size', [8, 32, 45])
def test_moving_digits_stay_whole_and_move(size):
    one = data.moving_digits(20, 8, size, 1, seed=2)
    assert one.shape == (20, 8, 1, size, size) and 0 <= one.min() and one.max() <= 1
    light = one.sum((2, 3, 4))
    assert torch.allclose(light, light[:, :1].expand_as(light), rtol=1e-4)             # nothing is cut off at a border
    assert (one[:, 0] != one[:, 4]).flatten(1).any(1).float().mean() > .9
    assert (data.moving_digits(3, 4, size, 3, seed=2) >= 0).all()


def test_shapes_boxes_masks_labels_agree():
    s = data.shapes(60, 48, seed=1)
    assert s.images.shape == (60, 3, 48, 48) and s.boxes.shape == (60, 4, 4) and s.masks.shape == (60, 4, 48, 48) and s.labels.shape == (60, 4)
    assert 0 <= s.images.min() and s.images.max() <= 1
    assert s.masks.sum(1).max() == 1                                                   # no pixel belongs to two objects
    assert (s.labels[:, 0] >= 0).all() and set(s.labels.flatten().tolist()) == {-1, *range(len(s.classes))}
    for box, mask, label in zip(s.boxes.flatten(0, 1), s.masks.flatten(0, 1), s.labels.flatten()):
        assert mask.any() == (label >= 0)
        if label < 0: assert (box == 0).all()
        else:
            ys, xs = mask.nonzero().T
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    for image, mask in zip(s.images, s.masks[:, 0]):                                   # an object is seen: one colour, unlike its surroundings
        inside = image[:, mask]
        assert inside.std(1).max() < .08
    for size in (16, 17): assert data.shapes(30, size).masks.flatten(2).any(-1)[:, 0].all()


def test_textures_differ_in_pattern_not_in_colour():
    t = data.textures(320, 24, seed=5)
    assert t.images.shape == (320, 3, 24, 24) and 0 <= t.images.min() and t.images.max() <= 1 and t.labels.bincount().tolist() == [40] * 8
    assert (t.images.flatten(2).std(-1).amax(1) > .02).all()                           # none is one flat colour

    def nearest_centroid(x):
        even, odd = x[:160], x[160:]
        centres = torch.stack([even[t.labels[:160] == k].mean(0) for k in range(8)])
        return (torch.cdist(odd, centres).argmin(1) == t.labels[160:]).float().mean()

    spectrum = torch.fft.fft2(t.images.mean(1) - t.images.mean((1, 2, 3))[:, None, None]).abs().flatten(1)
    assert nearest_centroid(t.images.mean((2, 3))) < .25 < nearest_centroid(spectrum / spectrum.norm(dim=1, keepdim=True))


GENERATORS = {'series': lambda seed: data.series(100, 3, seed=seed).values, 'moving_digits': lambda seed: data.moving_digits(2, 4, 24, seed=seed),
              'shapes': lambda seed: data.shapes(3, 32, seed).images, 'textures': lambda seed: data.textures(8, 16, seed).images,
              'digits': lambda seed: data.digits('test', seed=seed).images}

@pytest.mark.parametrize('name', GENERATORS)
def test_generators_depend_on_the_seed_only(name):
    torch.manual_seed(1), np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = GENERATORS[name](7)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()  # nobody else's numbers are used up
    torch.manual_seed(2), np.random.seed(2)
    other = GENERATORS[name](8)
    assert torch.equal(first, GENERATORS[name](7)) and (other.shape != first.shape or not torch.equal(first, other))
    for bad in (-1, 2 ** 32):
        with pytest.raises(ValueError, match='seed: got'): GENERATORS[name](bad)


@pytest.mark.parametrize('call, says', [
    (lambda: data.digits('trian'), "split: got 'trian', wanted one of 'train', 'test', 'all' \\(did you mean 'train'"),
    (lambda: data.digits(size=0), 'size: got 0, wanted at least 1'),
    (lambda: data.stratified(torch.zeros(3, dtype=torch.long), 1.5), 'share: got 1.5'),
    (lambda: data.text('shakespear'), "did you mean 'shakespeare'"),
    (lambda: data.wikitext2('train'), "split: got 'train', wanted one of 'valid', 'test'"),
    (lambda: data.ett('etth1'), "did you mean 'ETTh1'"),
    (lambda: data.cifar10('valid'), "split: got 'valid'"),
    (lambda: data.cifar10(limit=0), 'limit: got 0'),
    (lambda: data.series(0), 'steps: got 0'), (lambda: data.series(channels=0), 'channels: got 0'), (lambda: data.series(noise=-1.), 'noise: got -1'),
    (lambda: data.moving_digits(0), 'n: got 0'), (lambda: data.moving_digits(1, 0), 'frames: got 0'), (lambda: data.moving_digits(1, size=7), 'size: got 7, wanted at least 8'),
    (lambda: data.moving_digits(1, digits=0), 'digits: got 0'),
    (lambda: data.shapes(0), 'n: got 0'), (lambda: data.shapes(1, 15), 'size: got 15, wanted at least 16'), (lambda: data.shapes(1, most=0), 'most: got 0'),
    (lambda: data.textures(0), 'n: got 0'), (lambda: data.textures(1, 7), 'size: got 7'),
    (lambda: data.fetch('cifar-10'), "name: got 'cifar-10', wanted one of .* \\(did you mean 'cifar10'"),
    (lambda: data.verify('wikitext-2'), "did you mean 'wikitext2'"), (lambda: data.locate('etth1'), "did you mean 'ett'"),
    (lambda: data.find('ett', 'ETT-small/ETTh3.csv'), "path: got 'ETT-small/ETTh3.csv', wanted one of .*did you mean"),
])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says): call()


def test_import_needs_no_extras():
    code = """import sys, torch, jaxtyping, einops
before = {*sys.modules}
import vitbook.data
print({m.split('.')[0] for m in {*sys.modules} - before} & {'matplotlib', 'sklearn', 'skimage', 'PIL', 'pyarrow', 'pandas', 'tqdm', 'rich', 'typer', 'scipy'} or 'none')"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == 'none\n'


# --- the manifest ---

def test_manifest_is_complete():
    m = data.manifest()
    assert set(m['sets']) == {'cifar10', 'ett', 'wikitext2', 'shakespeare'}
    for name, s in m['sets'].items():
        assert all(s[key] for key in ('description', 'homepage', 'licence', 'instead', 'note', 'files')), name
        assert s['instead'].split('(')[0] in m['shipped'] or s['instead'] == "text('english')"
        for f in s['files']:
            assert f['url'].startswith('https://') and not Path(f['path']).is_absolute() and '..' not in Path(f['path']).parts
            for version in (f, f.get('served', f)): assert version['size'] > 0 and re.fullmatch('[0-9a-f]{64}', version['sha256'])
    for name, s in m['shipped'].items(): assert s['description'] and s['licence'] and hasattr(data, 'text' if name == 'english' else name)
    assert eval(m['sets']['ett']['instead'], vars(data)).values.ndim == 2 and len(eval(m['sets']['shakespeare']['instead'], vars(data))) > 1e5


def test_manifest_in_a_checkout_and_in_a_wheel(monkeypatch, tmp_path):
    assert data.manifest() == json.loads((ROOT/'data'/'manifest.json').read_text('utf-8'))
    shutil.copytree(ROOT/'data', tmp_path/'vitbook'/'_data', ignore=shutil.ignore_patterns('downloads'))
    real = data.manifest()
    monkeypatch.setattr(data, '_home', lambda: tmp_path/'vitbook')
    monkeypatch.delenv('VITBOOK_DATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    assert data.manifest() == real and data.places() == [tmp_path/'cache'/'vitbook']   # nothing is ever written beside an installed package


# --- a server to download from ---

CONTENT = np.random.RandomState(0).bytes(200_000)
OTHER = CONTENT[:100_000] + b'!' + CONTENT[100_001:]

class Server:
    "Serves `content` on 127.0.0.1; `cut`: bytes after which it hangs up; `ranges`, `length`: whether it knows Range and says Content-Length."
    def __init__(self, content=CONTENT):
        self.content, self.cut, self.ranges, self.length, self.status, self.requests, self.sent = content, None, True, True, 200, [], 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_): pass

            def do_GET(self):
                asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
                first = int(asked[1]) if asked and server.ranges else 0
                server.requests.append(self.headers.get('Range'))
                if server.status != 200: return self.send_error(server.status)
                if first >= len(server.content): return self.send_error(416)
                body = server.content[first:]
                self.send_response(206 if asked and server.ranges else 200)
                if asked and server.ranges: self.send_header('Content-Range', f'bytes {first}-{len(server.content) - 1}/{len(server.content)}')
                if server.length: self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                if server.cut is not None: body = body[:server.cut]
                server.sent += len(body)
                with contextlib.suppress(OSError): self.wfile.write(body)

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/toy.bin'
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()

    def __enter__(self): return self
    def __exit__(self, *_): self.http.shutdown(), self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    with Server() as s: yield s


def toy_manifest(url, content=CONTENT, **more):
    return {'sets': {'toy': dict(description='d', licence='l', instead='digits()', files=[
        dict(path='toys/toy.bin', url=url, size=len(content), sha256=hashlib.sha256(content).hexdigest(), **more)])}, 'shipped': {}}


@pytest.fixture
def home(monkeypatch, tmp_path, server):
    "A machine of its own: $VITBOOK_DATA, an installed package without checkout, a cache; one set, `toy`."
    monkeypatch.setattr(data, 'manifest', lambda: toy_manifest(server.url))
    monkeypatch.setattr(data, '_checkout', lambda: None)
    monkeypatch.setenv('VITBOOK_DATA', str(tmp_path/'own'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path


def part_of(home): return home/'own'/'toys'/'toy.bin.part'
def file_of(home): return home/'own'/'toys'/'toy.bin'
def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_fetch_find_verify(home, server, capsys):
    assert data.listing() == [dict(name='toy', state='missing', megabytes=.2, licence='l', description='d')]
    assert data.verify('toy') == [dict(name='toy', path='toys/toy.bin', where='', state='missing')]
    assert data.fetch('toy') == [file_of(home)] == [data.find('toy')] and file_of(home).read_bytes() == CONTENT
    assert '0.2 of 0.2 MB  100%\n' in capsys.readouterr().err and not part_of(home).exists()
    assert data.verify() == [dict(name='toy', path='toys/toy.bin', where=str(file_of(home)), state='ok')] and data.listing()[0]['state'] == 'here'
    assert data.fetch('toy', progress=False) == [file_of(home)] and len(server.requests) == 1 and capsys.readouterr().err == ''  # there already


def test_progress_is_told(home):
    told = []
    data.fetch('toy', progress=lambda *now: told.append(now))
    assert {t[0] for t in told} == {'toys/toy.bin'} and [t[1] for t in told] == sorted({t[1] for t in told}) and told[-1][1:] == (len(CONTENT), len(CONTENT))


def test_where_it_looks_and_where_it_puts(home, server, monkeypatch):
    cache = home/'cache'/'vitbook'/'toys'/'toy.bin'
    put(cache, CONTENT)
    assert data.fetch('toy', progress=False) == [cache] and not server.requests         # found in a later place
    assert data.fetch('toy', to=home/'else', progress=False) == [home/'else'/'toys'/'toy.bin'] and len(server.requests) == 1
    put(file_of(home), CONTENT)
    assert data.find('toy') == file_of(home)                                            # $VITBOOK_DATA comes first
    put(file_of(home), CONTENT[:50])
    assert data.find('toy') == cache                                                    # a cut-off file is passed over where there is a whole one
    monkeypatch.setenv('VITBOOK_DATA', '')
    assert data.places() == [home/'cache'/'vitbook']
    cache.unlink()
    assert data.fetch('toy', progress=False) == [cache]


def test_find_refuses_a_file_of_wrong_size(home):
    put(file_of(home), CONTENT[:50])
    with pytest.raises(ValueError, match=r'toy\.bin: has 50 bytes, wanted 200000: cut off or altered; delete it and run `vitbook data fetch toy`'): data.find('toy')
    assert data.locate('toy') is None and data.verify()[0]['state'] == 'altered'


def test_altered_file_is_found_by_verify_and_mended_by_fetch(home):
    put(file_of(home), OTHER)
    assert data.find('toy') == file_of(home) and data.verify()[0]['state'] == 'altered'
    data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == CONTENT and data.verify()[0]['state'] == 'ok'


def test_another_encoding_is_accepted(home, server, monkeypatch):
    served = b'the same pictures as PNG'
    monkeypatch.setattr(data, 'manifest', lambda: toy_manifest(server.url, served=dict(size=len(served), sha256=hashlib.sha256(served).hexdigest())))
    server.content = served
    assert data.fetch('toy', progress=False) == [data.find('toy')] and data.verify()[0]['state'] == 'ok'
    put(file_of(home), CONTENT)
    assert data.find('toy') == file_of(home) and data.verify()[0]['state'] == 'ok'


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(CONTENT) - 1), max_size=4))
def test_any_number_of_cuts_and_nothing_is_sent_twice(home, server, cuts):
    shutil.rmtree(home/'own', ignore_errors=True)
    server.cut, server.sent = None, 0
    have = 0
    for cut in cuts:
        server.cut = cut
        if have + cut >= len(CONTENT): break
        with pytest.raises(ConnectionError, match=f'stopped after {have + cut} of 200000 bytes, which are kept'): data.fetch('toy', progress=False)
        have += cut
        assert part_of(home).read_bytes() == CONTENT[:have] and not file_of(home).exists()
    server.cut = None
    data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == CONTENT and server.sent == len(CONTENT) and not part_of(home).exists()


def test_resume_asks_only_for_the_rest(home, server):
    put(part_of(home), CONTENT[:150_000])
    data.fetch('toy', progress=False)
    assert server.requests == ['bytes=150000-'] and server.sent == 50_000 and file_of(home).read_bytes() == CONTENT


def test_whole_part_needs_no_server(home, server):
    put(part_of(home), CONTENT)
    data.fetch('toy', progress=False)
    assert not server.requests and file_of(home).read_bytes() == CONTENT


@pytest.mark.parametrize('length', [True, False])
def test_server_without_ranges_starts_again(home, server, length):
    server.ranges, server.length = False, length
    put(part_of(home), CONTENT[:150_000])
    data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == CONTENT and server.sent == len(CONTENT)


@pytest.mark.parametrize('old', [OTHER[:150_000], OTHER, CONTENT + b'too much'], ids=['a wrong beginning', 'wrong and whole', 'too long'])
def test_a_bad_part_is_thrown_away_and_fetched_anew(home, server, old):
    put(part_of(home), old)
    data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == CONTENT


@pytest.mark.parametrize('length', [True, False])
@pytest.mark.parametrize('content', [OTHER, CONTENT[:-1], CONTENT + b'!', b'<html>Please log in to this network</html>'], ids=['altered', 'shorter', 'longer', 'log-in page'])
def test_another_content_never_gets_the_name(home, server, content, length):
    server.content, server.length = content, length
    error = ConnectionError if len(content) < len(CONTENT) and not length else ValueError  # without a Content-Length a short file looks like a cut one
    says = 'stopped after' if error is ConnectionError else 'wanted 200000 bytes with sha256 .*not the file that was asked for'
    for _ in range(2):
        with pytest.raises(error, match=says): data.fetch('toy', progress=False)
        assert not file_of(home).exists() and (error is ConnectionError or not part_of(home).exists())
    put(file_of(home), OTHER)
    with pytest.raises((ValueError, ConnectionError)): data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == OTHER                                          # a failed fetch takes nothing away
    server.content = CONTENT
    data.fetch('toy', progress=False)
    assert file_of(home).read_bytes() == CONTENT                                        # and stands in no later one's way


def test_a_log_in_page_does_not_cost_the_part(home, server):
    put(part_of(home), CONTENT[:150_000])
    server.content, server.ranges = b'<html>Please log in to this network</html>', False
    with pytest.raises(ValueError, match='has 42 bytes'): data.fetch('toy', progress=False)
    assert part_of(home).read_bytes() == CONTENT[:150_000]


@pytest.mark.parametrize('status', [403, 404, 500])
def test_server_says_no(home, server, status):
    server.status = status
    put(part_of(home), CONTENT[:10])
    with pytest.raises(ConnectionError, match=f'answers {status} .*vitbook data fetch toy'): data.fetch('toy', progress=False)
    assert part_of(home).read_bytes() == CONTENT[:10]


def one_sentence_three_ways(message):
    assert '\n' not in message and message.endswith('.') and '. ' not in message
    for way in ('run `vitbook data fetch toy`', 'put toys/toy.bin into the folder that $VITBOOK_DATA names', 'use digits(), which needs no download'): assert way in message


def test_offline(home, monkeypatch):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    monkeypatch.setattr(data, 'manifest', lambda: toy_manifest(f'http://127.0.0.1:{port}/toy.bin'))
    put(part_of(home), CONTENT[:10])
    with pytest.raises(ConnectionError) as e: data.fetch('toy', progress=False)
    one_sentence_three_ways(str(e.value))
    assert part_of(home).read_bytes() == CONTENT[:10]
    monkeypatch.setattr(data, 'manifest', lambda: toy_manifest('https://nowhere.invalid/toy.bin'))
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, 'Name or service not known')))
    with pytest.raises(ConnectionError, match='cannot be reached .*Name or service not known') as e: data.fetch('toy', progress=False)
    one_sentence_three_ways(str(e.value))


def test_missing_set(home):
    with pytest.raises(FileNotFoundError) as e: data.find('toy')
    one_sentence_three_ways(str(e.value))


@pytest.mark.parametrize('load, default', [(lambda: data.cifar10('test'), 'digits()'), (lambda: data.ett('ETTh2'), 'series()'), (lambda: data.wikitext2(), "text('english')"),
                                           (lambda: data.text('shakespeare'), "text('english')"), (lambda: data.text('wikitext2'), "text('english')")])
def test_loaders_say_what_to_do_without_their_files(load, default, monkeypatch, tmp_path):
    monkeypatch.setattr(data, 'places', lambda: [tmp_path])
    with pytest.raises(FileNotFoundError) as e: load()
    for way in ('vitbook data fetch', '$VITBOOK_DATA', default): assert way in str(e.value)


def test_a_truncated_set_is_refused_at_load(monkeypatch, tmp_path):
    monkeypatch.setattr(data, 'places', lambda: [tmp_path])
    for path, load in {'cifar10/train.parquet': data.cifar10, 'ETT-small/ETTh1.csv': data.ett, 'wikitext-2/valid.txt': data.wikitext2}.items():
        put(tmp_path/path, b'date,OT\n1,2\n')
        with pytest.raises(ValueError, match='has 12 bytes, wanted .*cut off or altered'): load()


def test_folder_that_cannot_be_written(home, server):
    (home/'own').write_text('a file where the folder should be')
    with pytest.raises(OSError, match=r'cannot write .*toy\.bin\.part') as e: data.fetch('toy', progress=False)
    assert 'choose another folder' in str(e.value) and (home/'own').read_text() == 'a file where the folder should be'
    assert data.fetch('toy', to=home/'else', progress=False)[0].read_bytes() == CONTENT


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write into every folder')
def test_read_only_folder(home):
    (home/'own').mkdir(mode=0o500)
    with pytest.raises(PermissionError, match='cannot write'): data.fetch('toy', progress=False)


def test_full_disk_loses_nothing(home, server, monkeypatch):
    write, left = data._write, [120_000]

    def nearly_full(handle, block):
        write(handle, block[:left[0]])
        left[0] -= len(block[:left[0]])
        if not left[0]: raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(data, '_write', nearly_full)
    with pytest.raises(OSError, match=r'cannot write .*the disk is full.*what had come is kept') as e: data.fetch('toy', progress=False)
    assert e.value.errno == errno.ENOSPC and part_of(home).read_bytes() == CONTENT[:120_000] and not file_of(home).exists()
    monkeypatch.setattr(data, '_write', write)
    data.fetch('toy', progress=False)
    assert server.requests == [None, 'bytes=120000-'] and file_of(home).read_bytes() == CONTENT


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_really_full_device(home):
    part_of(home).parent.mkdir(parents=True)
    part_of(home).symlink_to('/dev/full')
    with pytest.raises(OSError, match='the disk is full'): data.fetch('toy', progress=False)
    assert not file_of(home).exists()


def test_write_finishes_partial_writes():
    class Slow:
        got = b''
        def write(self, block):
            self.got += block[:3]
            return len(block[:3])
    slow = Slow()
    inspect.unwrap(data._write)(slow, b'0123456789')
    assert slow.got == b'0123456789'


# --- the real sets, where they are ---

SHARED = ROOT.parent/'shared'/'data'
REAL = Path(os.environ['VITBOOK_DATA']) if os.environ.get('VITBOOK_DATA') else SHARED

def real(path): return pytest.mark.skipif(not (REAL/path).exists(), reason=f'{path} is neither in $VITBOOK_DATA nor in ../shared/data')

@pytest.fixture
def there(monkeypatch): monkeypatch.setenv('VITBOOK_DATA', str(REAL))


@real('cifar10/test.parquet')
def test_cifar10(there):
    d = data.cifar10('test', limit=1500)
    assert d.images.shape == (1500, 3, 32, 32) and 0 <= d.images.min() and d.images.max() <= 1 and set(d.labels.tolist()) == set(range(10)) and d.classes[3] == 'cat'
    assert torch.equal(data.cifar10('test', limit=40).images, d.images[:40])
    assert abs(d.images.mean() - .473) < .01                                            # the mean brightness known of CIFAR-10
    assert data.cifar10('train', limit=7).images.shape[0] == 7


@real('ETT-small/ETTh1.csv')
def test_ett(there):
    for name in ('ETTh1', 'ETTh2'):
        columns, values = data.ett(name)
        assert columns == ('HUFL', 'HULL', 'MUFL', 'MULL', 'LUFL', 'LULL', 'OT') and values.shape == (17420, 7) and values.isfinite().all()
    assert np.allclose(data.ett('ETTh1').values[0], [5.827, 2.009, 1.599, .462, 4.203, 1.34, 30.531], atol=1e-3)


@real('wikitext-2/valid.txt')
def test_wikitext2(there):
    valid, test = data.wikitext2('valid'), data.wikitext2('test')
    assert valid.startswith(' \n = Homarus gammarus = \n') and len(test) > len(valid) > 1e6 and data.text('wikitext2') == valid
    assert len(valid.split()) == 213886 and data.Vocabulary(data.tokenize(valid), 5).words[1] == 'the'


@real('tinyshakespeare.txt')
def test_shakespeare(there):
    assert data.text('shakespeare').startswith('First Citizen:\n') and len(data.text('shakespeare')) == 1115394


@real('SHA256SUMS')
def test_manifest_says_what_lies_there(there):
    sums = dict(reversed(line.split()) for line in (REAL/'SHA256SUMS').read_text().splitlines())
    files = [f for s in data.manifest()['sets'].values() for f in s['files']]
    assert {f['path']: f['sha256'] for f in files} == sums
    assert all(row['state'] == 'ok' for row in data.verify())


def test_the_list_says_what_needs_a_package(monkeypatch):
    "Data inside a package is shipped where the package is."
    state = lambda: {row['name']: row['state'] for row in data.listing()}
    assert state()['digits'] == state()['pictures'] == state()['shapes'] == 'shipped'
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *more: None if name in ('sklearn', 'skimage') else find(name, *more))
    assert [state()[name] for name in ('digits', 'moving_digits', 'pictures', 'shapes')] == ['needs scikit-learn', 'needs scikit-learn', 'needs scikit-image', 'shipped']


# --- a street and a laser ---

def test_streets_are_geometry():
    s = data.lidar_scene(3)
    assert torch.equal(s.points, data.lidar_scene(3).points)
    assert not torch.equal(s.points[:100], data.lidar_scene(4).points[:100])
    assert len(s.boxes) == len(s.labels) and s.points[:, :2].abs().max() < 40
    assert s.points[:, 3:].min() >= 0 and s.points[:, 3:].max() <= 1
    ground = s.points[s.hit == -1]
    assert ground[:, 2].abs().max() < .1
    cos, sin = s.boxes[:, 6].cos(), s.boxes[:, 6].sin()
    for i, box in enumerate(s.boxes):  # points on a box lie on its surface
        away = s.points[s.hit == i, :3] - box[:3]
        local = torch.stack([cos[i] * away[:, 0] + sin[i] * away[:, 1],
                             cos[i] * away[:, 1] - sin[i] * away[:, 0],
                             away[:, 2]], 1).abs() - box[3:6] / 2
        if len(away): assert local.amax(1).abs().max() < .12
    assert (s.hit >= 0).sum() > 100 and (s.hit == -2).any() and set(s.labels.tolist()) == {0, 1, 2}


def test_one_ray():
    box = torch.tensor([[10., 0., 1., 4., 2., 2., 0.], [20., 0., 1., 4., 2., 2., 0.],
                        [0., 10., 1., 4., 2., 2., math.pi / 2]])
    ways = torch.tensor([[1., 0., 0.], [0., 1., 0.], [-1., 0., 0.], [0., 0., 1.]])
    far, which = data.cast_rays(torch.tensor([0., 0., 1.]), ways, box)
    assert_close(far, torch.tensor([8., 8., math.inf, math.inf]))
    assert which.tolist() == [0, 2, 3, 3]     # the nearer box hides the other
