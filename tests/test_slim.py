"""see.palette_png and see.slim: lighter pictures that look the same; nothing else of a notebook changes."""
import base64, copy, html, io, json, re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vitbook import see


def png(array, mode=None):
    out = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8), mode).save(out, 'PNG')
    return out.getvalue()


def read(data): return np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)


def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape)


def gradient(side=96):
    "More colours than a palette has, a little noisy: red along the rows, green along the columns."
    y, x = np.mgrid[:side, :side] * 240 // (side - 1)
    return np.stack([y, x, np.full_like(x, 128)], -1) + noise(side, side, 3) % 8


def chunk(picture): return base64.b64encode(picture).decode()


# ---- palette_png

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 256), st.integers(0, 99))
def test_up_to_256_colours_lose_nothing(n, seed):
    colours = noise(n, 3, seed=seed)
    picture = png(colours[noise(40, 30, seed=seed + 1) % n])
    assert (read(see.palette_png(picture)) == read(picture)).all()


def test_many_colours_come_close():
    picture = png(gradient())
    light = see.palette_png(picture)
    error = np.abs(read(light) - read(picture))
    assert light != picture and len(np.unique(read(light).reshape(-1, 3), axis=0)) <= 256
    assert 0 < error.max() <= see.LARGEST_ERROR and error.mean() < 8


def test_a_small_mark_keeps_its_colour():
    "One pure blue pixel among more than 256 other colours: a palette of what is frequent would lose it."
    array = gradient()
    array[5, 7] = 0, 0, 255
    light = see.palette_png(png(array))
    assert light != png(array) and tuple(read(light)[5, 7]) == (0, 0, 255)


def test_what_would_lose_too_much_stays(monkeypatch):
    picture = png(gradient())
    lost = np.abs(read(see.palette_png(picture)) - read(picture)).max()
    for limit, stays in ((lost, False), (lost - 1, True)):
        monkeypatch.setattr(see, 'LARGEST_ERROR', limit)
        assert (see.palette_png(picture) == picture) == stays


def test_transparent_grey_and_palette_pictures_stay():
    clear = noise(80, 80, 4) // 64 * 64
    assert see.palette_png(png(clear)) == png(clear)
    assert see.palette_png(png(noise(80, 80))) == png(noise(80, 80))
    clear[..., 3] = 255
    light = see.palette_png(png(clear))
    assert light != png(clear) and (read(light) == read(png(clear))).all() and see.palette_png(light) == light


# ---- slim

@pytest.mark.parametrize('lines', [False, True], ids=['string', 'lines'])
def test_slim_changes_pictures_only(lines):
    picture = png(noise(60, 60, 3) // 64 * 64)
    broken = '\\\n'.join(re.findall('.{1,76}', chunk(picture)))    # as matplotlib's player breaks its frames
    frames = (f'frames[{i}] = "data:image/png;base64,{broken}"' for i in range(2))
    page = html.escape('\n'.join(frames))
    page = f'<iframe title="a" srcdoc="{page}"></iframe>\n<p>data:image/png;base64 is words</p>\n'
    figure = {'image/png': chunk(picture) + '\n', 'text/plain': ['<Figure>']}
    outputs = [dict(output_type='display_data', data=figure, metadata={}),
               dict(output_type='execute_result', data={'text/html': page.splitlines(True) if lines else page}),
               dict(output_type='stream', name='stdout', text=['data:image/png;base64,' + chunk(picture)])]
    prose = dict(cell_type='markdown', source=['![](data:image/png;base64,' + chunk(picture) + ')'])
    nb = dict(cells=[prose, dict(cell_type='code', source=['x'], outputs=outputs)], metadata={})
    before = copy.deepcopy(nb)
    slim = see.slim(nb)
    assert nb == before, 'the notebook that was given stays'
    light = chunk(see.palette_png(picture))
    found = slim['cells'][1]['outputs']
    assert found[0]['data'] == {'image/png': light, 'text/plain': ['<Figure>']}
    text = ''.join(found[1]['data']['text/html'])
    assert isinstance(found[1]['data']['text/html'], list) == lines
    assert text == page.replace(broken, light) and text.count(light) == 2
    assert slim['cells'][0] == before['cells'][0] and found[2] == before['cells'][1]['outputs'][2]
    assert see.slim(slim) == slim and len(json.dumps(slim)) < len(json.dumps(nb))


def test_slim_leaves_what_it_cannot_read():
    data = {'image/png': 'no base64!', 'text/html': '<img src="data:image/png;base64,AAAA">'}
    nb = dict(cells=[dict(cell_type='code', outputs=[dict(data=data)])])
    assert see.slim(nb) == nb


# ---- players

def frame(ax, i): ax.plot([0, i])


@pytest.mark.parametrize('width, height, dpi', [(4.8, 3.2, 100), (2., 2., 80)])
def test_a_player_fits_its_frame(width, height, dpi):
    page = see.player(frame, range(3), title='a & b', width=width, height=height, dpi=dpi).data
    inner = html.unescape(re.search(r'srcdoc="([^"]*)"', page)[1])
    found = re.findall(r'data:image/png;base64,([^"]+)"', inner)
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    size = round(width * dpi), round(height * dpi)
    assert [picture.size for picture in pictures] == [size] * 3
    assert {picture.mode for picture in pictures} == {'P'}
    wide, high = (int(re.search(rf'{name}="(\d+)"', page)[1]) for name in ('width', 'height'))
    assert wide >= max(382, size[0]), 'nine buttons'
    assert high >= size[1] + 90, 'a slider, buttons, three choices'
    assert 'title="a &amp; b"' in page and 'max-width' in inner and '<link' not in inner
