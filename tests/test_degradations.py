"vitbook.data.degradations: same seed same weather, severity 0 changes nothing, more of it hides more; metrics, padding, pairs, and the page that needs no kernel."
import html, itertools, math, os, re, shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from vitbook.data import degradations as D
from vitbook.data import pictures, square

VEILS = {'rain': D.rain, 'snow': D.snow, 'haze': D.haze}
kind, veil = pytest.mark.parametrize('kind', D.KINDS), pytest.mark.parametrize('name', VEILS)


@pytest.fixture(scope='module')
def photo(): return pictures(64)['chelsea']


# ---- weather

@kind
def test_nothing_happens_at_severity_0(kind, photo):
    batch = photo.expand(2, -1, -1, -1)
    out = D.degrade(batch, kind, 0)
    assert out.equal(batch) and out.data_ptr() != batch.data_ptr()


@kind
def test_seeded(kind, photo):
    batch = photo.expand(2, -1, -1, -1).clone()
    a, b, c = (D.degrade(batch, kind, .5, seed) for seed in (3, 3, 4))
    assert a.equal(b) and batch.equal(photo.expand(2, -1, -1, -1))
    if kind != 'blur': assert not a.equal(c) and not a[0].equal(a[1]), 'every picture has weather of its own'
    assert a.shape == batch.shape and a.dtype == batch.dtype and 0 <= a.min() and a.max() <= 1 and not a.equal(batch)


@kind
def test_more_severe_is_further_away(kind, photo):
    batch = torch.stack([pictures(64)[k] for k in ('chelsea', 'coffee', 'astronaut')])
    found = [D.psnr(D.degrade(batch, kind, s, 1), batch).mean() for s in (.1, .3, .5, .7, 1.)]
    assert all(a > b for a, b in zip(found, found[1:])) and found[0] > 15 and found[-1] < 26, found


@veil
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2 ** 32 - 1))
@settings(max_examples=15)
def test_veils_are_veils(name, y, x, severity, seed):
    v = VEILS[name]((y, x), severity, seed)
    assert v.alpha.shape == v.light.shape == (y, x) and v.alpha.dtype == torch.float32
    assert 0 <= v.alpha.min() and v.alpha.max() <= 1 and 0 <= v.light.min() and v.light.max() <= 1
    image = torch.rand(3, y, x, generator=torch.Generator().manual_seed(1))
    assert_close(D.behind(image, v), (1 - v.alpha) * image + v.alpha * v.light)


@pytest.mark.parametrize('name', ['snow', 'haze'])
def test_more_severe_adds_to_the_same_weather(name):
    steps = [VEILS[name]((48, 40), s, 5).alpha for s in (.1, .4, .8, 1.)]
    assert all((b >= a - 1e-6).all() and b.sum() > a.sum() for a, b in itertools.pairwise(steps))


def test_snow_is_what_the_text_says():
    v = D.snow((200, 200), .5)
    assert .09 < (v.alpha > .45).float().mean() < .17 and v.alpha.max() <= .9 + 1e-6
    seen = v.light[v.alpha > .5]
    assert .85 <= seen.min() and seen.max() <= .95 + 1e-6
    wide = D.snow((200, 200), .5, scale=3.)
    assert abs(wide.alpha.mean() - v.alpha.mean()) < .05 and (wide.alpha.diff(dim=1) != 0).sum() < .6 * (v.alpha.diff(dim=1) != 0).sum()


def test_rain_is_slanted_alike():
    "The gradient of the veil across the streaks is larger than along them, in one direction for the whole picture."
    v = D.rain((160, 160), .5, 2).alpha
    dy, dx = v.diff(dim=0)[:, :-1], v.diff(dim=1)[:-1]
    tensor = torch.tensor([[(dy * dy).mean(), (dy * dx).mean()], [(dy * dx).mean(), (dx * dx).mean()]])
    low, high = torch.linalg.eigvalsh(tensor)
    assert high > 3 * low


def test_haze_follows_a_given_depth():
    depth = torch.linspace(0, 1, 30)[:, None].expand(30, 20)
    v = D.haze((30, 20), .5, 0, depth)
    assert_close(v.alpha, 1 - torch.exp(-1.5 * depth))
    assert v.light.unique().numel() == 1
    far = D.haze((60, 40), .5)
    assert far.alpha[:10].mean() > far.alpha[-10:].mean()


def test_hills_of_the_haze_reach_the_edges():
    "Drawn on a grid of 4x4 whose corners are those of the picture, smooth between."
    rng = np.random.RandomState(3)
    rng.uniform(.75, .95)
    hills = torch.from_numpy(rng.uniform(-1, 1, (4, 4))).float()
    depth = -torch.log1p(-D.haze((7, 10), .5, 3).alpha) / 1.5
    assert_close(depth[::2, ::3], torch.linspace(1, .3, 7)[::2, None] + .25 * hills, atol=1e-5, rtol=0)


def test_noise_blur_and_darkness_are_what_the_text_says(photo):
    grey = torch.full((3, 64, 64), .5)
    assert abs(D.noise(grey, .4).std() - .1) < .01
    dark = D.low_light(photo, 1.)
    assert abs((dark ** 2.2).mean() / (photo ** 2.2).mean() - 1 / 16) < .01
    dot = torch.zeros(1, 41, 41)
    dot[0, 20, 20] = 1
    spread = D.blur(dot, .5)
    assert_close(spread.sum(), torch.tensor(1.))
    assert spread.argmax() == 20 * 41 + 20
    assert abs((spread[0].sum(0) * (torch.arange(41.) - 20) ** 2).sum().sqrt() - 2) < .05
    assert_close(D.blur(grey, 1.), grey)
    assert D.blur(torch.rand(3, 2, 5), 1.).shape == (3, 2, 5)


def test_several_kinds_in_order(photo):
    both = D.degrade(photo[None], 'haze+rain', .5, 7)[0]
    by_hand = D.behind(D.behind(photo, D.haze((64, 64), .5, [7, 0, 0])), D.rain((64, 64), .5, [7, 0, 1]))
    assert both.equal(by_hand) and not both.equal(D.degrade(photo[None], 'rain+haze', .5, 7)[0])


# ---- pairs

def test_crops_come_from_the_pictures():
    marked = [torch.arange(30 * 40.).view(1, 30, 40) + 10_000 * i for i in range(3)]
    found = D.crops(marked, 60, 8, seed=1, turn=False)
    assert found.shape == (60, 1, 8, 8) and {int(c.min() // 10_000) for c in found} == {0, 1, 2}
    for c in found:
        start = int(c[0, 0, 0]) % 10_000
        y, x = divmod(start, 40)
        assert c.equal(marked[int(c[0, 0, 0]) // 10_000][:, y:y + 8, x:x + 8])
    turned = D.crops(marked, 60, 8, seed=1)
    assert all(a.flatten().sort()[0].equal(b.flatten().sort()[0]) for a, b in zip(found, turned)), 'turning moves pixels within the same square'
    assert len({tuple(torch.sign(torch.stack([c[0, 0, -1] - c[0, 0, 0], c[0, -1, 0] - c[0, 0, 0]])).tolist()) + (bool((c[0, 0, 1] - c[0, 0, 0]).abs() == 1),) for c in turned}) == 8, 'all eight ways to lie'
    assert D.crops({'a': marked[0]}, 1, 30).shape == (1, 1, 30, 30)


def test_pairs_give_any_step_again(photo):
    make = lambda **more: D.Pairs([photo], ['snow', 'haze+rain'], size=16, batch_size=3, **more)
    a, b = make(), make()
    for step in (0, 5):
        for x, y in zip(a.at(step), b.at(step)): assert x.equal(y) and x.shape == (3, 3, 16, 16)
    bad, clean = a.at(1)
    assert not bad.equal(clean) and not a.at(1)[1].equal(a.at(2)[1]) and not make(seed=1).at(1)[1].equal(clean)
    assert not a.at(1, 0, 2)[1].equal(a.at(1, 1, 2)[1]), 'processes see other squares'


def test_pairs_train_a_model(photo):
    from vitbook.train import fit
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, padding=1)
    history = fit(model, D.Pairs([photo], ['noise'], size=16, batch_size=4), steps=30, loss=lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), lr=1e-2, progress=False)
    assert np.mean(history['loss'][-5:]) < np.mean(history['loss'][:3])


# ---- metrics

def test_psnr_by_hand():
    a, b = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0)), torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    assert_close(D.psnr(a, b), -10 * (a - b).square().mean((1, 2, 3)).log10())
    y = lambda t: (65.481 * t[:, 0] + 128.553 * t[:, 1] + 24.966 * t[:, 2] + 16) / 255
    assert_close(D.psnr(a, b, channel='y'), -10 * (y(a) - y(b)).square().mean((1, 2)).log10())
    assert_close(D.psnr(a, b, border=2), -10 * (a - b)[..., 2:-2, 2:-2].square().mean((1, 2, 3)).log10())
    assert_close(D.psnr(a + 5, a), D.psnr(torch.ones_like(a), a))
    assert D.psnr(a, a).isinf().all()
    assert_close(D.psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), .1)), torch.tensor([20.]))
    white, black = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    assert_close(D.y_channel(white).max(), torch.tensor(235 / 255))
    assert abs(D.y_channel(black).max() - 16 / 255) < 1e-6


def test_metrics_are_numbers_not_losses():
    a, b = torch.rand(1, 3, 12, 12, requires_grad=True), torch.rand(1, 3, 12, 12)
    assert not any(f(a, b).requires_grad or f(b, a).requires_grad for f in (D.psnr, D.ssim))


def test_ssim_by_hand(photo):
    "Against the definition in valid windows, in skimage's words: Gaussian weights, population variances."
    from skimage.metrics import structural_similarity
    bad = D.noise(photo, .3)
    want = structural_similarity(photo.numpy().astype(np.float64), bad.numpy().astype(np.float64), channel_axis=0, data_range=1., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11)
    assert abs(D.ssim(bad[None], photo[None]).item() - want) < 1e-5
    assert abs(D.ssim(photo[None], photo[None]).item() - 1) < 1e-6 and D.ssim(bad[None], photo[None], channel='y') > D.ssim(bad[None], photo[None])
    assert set(D.quality(bad[None], photo[None])) == {'PSNR rgb', 'SSIM rgb', 'PSNR y', 'SSIM y'} and set(D.quality(bad[None, :1], photo[None, :1])) == {'PSNR rgb', 'SSIM rgb'}


# ---- padding

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 19))
def test_padding(y, x, multiple):
    image = torch.arange(2. * y * x).view(1, 2, y, x)
    out = D.pad_to_multiple(image, multiple)
    assert out.shape[2] % multiple == 0 == out.shape[3] % multiple and out.shape[2] - y < multiple and out.shape[3] - x < multiple
    assert out[..., :y, :x].equal(image)
    down, right = out.shape[2] - y, out.shape[3] - x
    if down < y and right < x: assert out.equal(F.pad(image, (0, right, 0, down), mode='reflect'))


def test_restore_pads_cuts_and_clips():
    class Loud(nn.Module):
        def forward(self, x):
            assert x.shape[2] % 8 == 0 == x.shape[3] % 8 and not self.training and not torch.is_grad_enabled() and len(x) == 1
            return 3 * x - 1
    model, x = Loud().train(), torch.rand(3, 2, 13, 17)
    assert_close(D.restore(model, x), (3 * x - 1).clamp(0, 1))
    assert model.training
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError
    broken = Broken().train()
    with pytest.raises(RuntimeError): D.restore(broken, x)
    assert broken.training and D.restore(lambda t: t, x, multiple=4, batch_size=3).equal(x)


# ---- before and after

def test_wiped(photo):
    other = 1 - photo
    assert D.wiped(photo, other, 0).equal(other) and D.wiped(photo, other, 1).equal(photo)
    half = D.wiped(photo, other)
    assert half[..., :31].equal(photo[..., :31]) and half[..., 33:].equal(other[..., 33:]) and (half[..., 31:33] == 1).all()


def test_the_page_is_whole_by_itself(photo):
    from PIL import Image
    import base64, io
    page = D.before_after(photo, 1 - photo, title='Snow & "more"', labels=('<bad>', 'good'), width=200, at=.25)._repr_html_()
    assert re.match(r'<iframe title="Snow &amp; &quot;more&quot;" srcdoc=', page) and page == D.before_after(photo, 1 - photo, title='Snow & "more"', labels=('<bad>', 'good'), width=200, at=.25)._repr_html_()
    inner = html.unescape(re.search(r'srcdoc="([^"]*)"', page)[1])
    assert not re.search(r'(?:src|href)\s*=\s*["\']?(?!data:)\w+:|<script|<link|url\(|@import', inner), 'loads nothing'
    after, before = (np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for code in re.findall(r'base64,([^"]+)"', inner))
    assert abs(before / 255. - photo.permute(1, 2, 0).numpy()).max() < .003 and abs(after / 255. - 1 + photo.permute(1, 2, 0).numpy()).max() < .003
    slider = re.search(r'<input[^>]*>', inner)[0]
    assert 'type="range"' in slider and 'aria-label="' in slider and "--at" in slider and 'value="25"' in slider and '--at:25%' in inner
    assert '&lt;bad&gt;' in inner and inner.count('alt="') == 2


def test_the_edge_can_be_dragged(photo, tmp_path):
    "In a real browser, without a network: the arrow keys and the mouse move the edge."
    playwright = pytest.importorskip('playwright.sync_api')
    (tmp_path/'page.html').write_text(D.before_after(photo, 1 - photo, title='t', width=200)._repr_html_())
    chromium = next(filter(None, [os.environ.get('VITBOOK_CHROMIUM'), *map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))]), None)
    if not chromium: pytest.skip('no Chromium on PATH (Debian: apt install chromium; or name one in VITBOOK_CHROMIUM)')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        tab = browser.new_page()
        tab.goto((tmp_path/'page.html').as_uri())
        frame = tab.frames[1]
        edge = lambda: frame.evaluate("getComputedStyle(document.getElementById('w')).getPropertyValue('--at')")
        assert edge() == '50%'
        frame.focus('input')
        tab.keyboard.press('ArrowRight')
        assert edge() == '50.5%'
        box = frame.locator('#w').bounding_box()
        tab.mouse.click(box['x'] + .8 * box['width'], box['y'] + 20)
        assert abs(float(edge()[:-1]) - 80) < 2, 'the edge is where the mouse is'
        browser.close()


# ---- mistakes

@pytest.mark.parametrize('call, words', [
    (lambda x: D.degrade(x, 'sleet'), "rain, snow.*'sleet'"), (lambda x: D.degrade(x, 'rain+'), 'kinds'), (lambda x: D.degrade(x, 'snow', 1.5), 'severity.*1.5'), (lambda x: D.degrade(x, 'snow', math.nan), 'severity'),
    (lambda x: D.degrade(x, 'snow', seed=-1), 'seed'), (lambda x: D.snow((5, 5), scale=0), 'scale'), (lambda x: D.snow((5,)), 'rows and columns'), (lambda x: D.haze((5, 5), depth=torch.zeros(5, 4)), 'depth must be 5x5, got .5, 4'),
    (lambda x: D.crops([], 1, 4), 'at least one picture'), (lambda x: D.crops(x, 1, 9), 'at least 9x9, got .3, 8, 8'), (lambda x: D.crops(x, 0, 4), 'at least 1'), (lambda x: D.Pairs(x, 'snow'), 'list of kinds'),
    (lambda x: D.Pairs(x, ['sleet']), 'sleet'), (lambda x: D.Pairs(x, severity=(.8, .3)), 'severity'), (lambda x: D.psnr(x, x[:1]), 'one shape'), (lambda x: D.psnr(x, x, channel='Y'), "'Y'"),
    (lambda x: D.psnr(x[:, :1], x[:, :1], channel='y'), '3 channels, got 1'), (lambda x: D.psnr(x, x, border=4), 'border.*4'), (lambda x: D.ssim(x, x), '11 pixels, got 8x8'),
    (lambda x: D.pad_to_multiple(x, 0), 'multiple'), (lambda x: D.pad_to_multiple(x[..., :0], 4), 'pixels'), (lambda x: D.wiped(x[0], x[0], 2), 'at must'), (lambda x: D.wiped(x[0], x[0][..., :4]), 'one shape'),
    (lambda x: D.before_after(x[0], x[0][..., :4], title=''), 'one shape'), (lambda x: D.before_after(x[0], x[0], title='', at=-1), 'at must')])
def test_mistakes_are_named(call, words, unchecked):
    with pytest.raises(ValueError, match=words): call(torch.rand(2, 3, 8, 8))


# ---- the range of pictures

TAKES_PICTURES = dict(noise=D.noise, low_light=D.low_light, behind=lambda x: D.behind(x, D.snow((16, 16))), degrade=lambda x: D.degrade(x, 'blur'), psnr=lambda x: D.psnr(x, x), ssim=lambda x: D.ssim(x, x),
                      quality=lambda x: D.quality(x, x), restored=lambda x: D.psnr(x, (x / 255).float()), y_channel=D.y_channel, restore=lambda x: D.restore(lambda y: y, x), pairs=lambda x: D.Pairs(x, size=8),
                      before_after=lambda x: D.before_after(x[0], x[0], title='t'), square=lambda x: square(x[0], 8))


@pytest.mark.parametrize('name', TAKES_PICTURES)
@pytest.mark.parametrize('kind', ['0 … 255', 'uint8'])
def test_pictures_of_another_range_are_refused_by_name(name, kind, unchecked):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    TAKES_PICTURES[name](x if name != 'restored' else 255 * (x / 255))
    wrong = 255 * x if kind == '0 … 255' else (255 * x).to(torch.uint8)
    with pytest.raises(ValueError, match='(images?|clean|restored|before): got (values from|uint8).*0 … 1'): TAKES_PICTURES[name](wrong)


@pytest.mark.parametrize('function', [D.noise, D.low_light, lambda x: D.psnr(x, x)])
def test_pictures_around_zero_are_refused(function):
    with pytest.raises(ValueError, match='values from -'): function(2 * torch.rand(1, 3, 8, 8) - 1)


def test_a_little_outside_is_no_mistake(photo, unchecked):
    x = photo[None] * 1.2 - .1
    assert D.noise(x, .1).shape == x.shape and D.psnr(8 * x, x).isfinite().all() and D.restore(lambda y: y, 1.8 * x - .5).max() <= 1
    with pytest.raises(ValueError, match='batch_size'): D.restore(lambda y: y, x, batch_size=0)
    with pytest.raises(ValueError, match='uint8'): D.blur((255 * photo).to(torch.uint8))
