"""Pages as they are seen: contrast, width and players in headless Chromium, light and dark, desk and phone.

Two kinds of pages: those that `vitbook run` makes, and the site's styles on a page built like Quarto's."""
import importlib.util
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from tools import NBS, ROOT
from vitbook.book import find_chapters, make_page

NAMES = 'chromium', 'chromium-browser'
CHROMIUM = next(filter(None, [os.environ.get('VITBOOK_CHROMIUM'), *map(shutil.which, NAMES)]), None)
APT = "Debian: apt install chromium; or name one in VITBOOK_CHROMIUM"
MISSING = "" if CHROMIUM else f"no Chromium on PATH ({APT})"
if not importlib.util.find_spec('playwright'): MISSING = 'playwright is not installed'
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
DESK, PHONE = dict(width=1280, height=900), dict(width=390, height=800)
SHADES = pytest.mark.parametrize('shade', ['light', 'dark'])
FILES = Path(__file__).parent/'pages'
FAINT, OUTSIDE = ((FILES/f'{name}.js').read_text(encoding='utf-8') for name in ('faint', 'outside'))
WIDER = '() => document.scrollingElement.scrollWidth - innerWidth'
CUT = """() => [document.scrollingElement.scrollWidth - innerWidth,
               document.scrollingElement.scrollHeight - innerHeight]"""


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        arguments = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
        found = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


def opened(browser, path, shade, size):
    page = browser.new_page(color_scheme=shade, viewport=size)
    page.goto(f'file://{path}')
    return page


# ---- the site's styles, as Quarto puts them on a page

def css(shade):
    "A theme's values, and its rules as the browser gets them: values put in, `//` comments gone."
    files = ['light'] if shade == 'light' else ['light', 'dark']
    texts = [(NBS/'_site'/f'{name}.scss').read_text(encoding='utf-8') for name in files]
    pattern = r'^\$([\w-]+):\s*(.*?)\s*!default;'
    found = [pair for text in texts for pair in re.findall(pattern, text, re.M)]
    values = dict(found)                                                # of a name that comes twice, the last
    rules = '\n'.join(text.split('/*-- scss:rules --*/')[1] for text in texts)
    plain = re.sub(r'(?m)(^|\s)//.*$', '', rules)
    return values, re.sub(r'\$([\w-]+)', lambda found: values[found[1]], plain)


def like_quarto(shade, more=''):
    "A chapter's kinds of things in Quarto's markup; before our rules, colours that do not know the theme."
    values, rules = css(shade)
    page = (FILES/'like_quarto.html').read_text(encoding='utf-8').replace('$rules$', rules + more)
    return re.sub(r'\$([\w-]+)\$', lambda found: values[found[1]], page)


@SHADES
def test_the_sites_text_has_contrast(browser, tmp_path, shade):
    (tmp_path/'page.html').write_text(like_quarto(shade), encoding='utf-8')
    assert opened(browser, tmp_path/'page.html', shade, DESK).evaluate(FAINT) == []


@pytest.mark.parametrize('size', [DESK, PHONE], ids=['desk', 'phone'])
def test_the_site_does_not_scroll_sideways(browser, tmp_path, size):
    (tmp_path/'page.html').write_text(like_quarto('light'), encoding='utf-8')
    page = opened(browser, tmp_path/'page.html', 'light', size)
    assert page.evaluate(WIDER) <= 0 and page.evaluate(OUTSIDE) == []


def test_contrast_is_measured(browser, tmp_path):
    "Printed output in black on the dark page, as it once was, is seen."
    black = 'main.content pre, main.content pre code { color: #000 }'
    (tmp_path/'page.html').write_text(like_quarto('dark', black), encoding='utf-8')
    faint = opened(browser, tmp_path/'page.html', 'dark', DESK).evaluate(FAINT)
    assert any('printed output' in line and float(line.split(':')[0]) < 1.5 for line in faint)


def test_width_is_measured(browser, tmp_path):
    loose = '\nfigure img { max-width: none }'
    (tmp_path/'page.html').write_text(like_quarto('light', loose), encoding='utf-8')
    page = opened(browser, tmp_path/'page.html', 'light', PHONE)
    assert page.evaluate(WIDER) > 0 and page.evaluate(OUTSIDE)


# ---- the pages that `vitbook run` makes

PAGES = [chapter for chapter in find_chapters(ROOT) if re.match(r'0[1-9]_', chapter.part) or not chapter.part]


@pytest.fixture(scope='module', params=PAGES, ids=lambda chapter: chapter.slug)
def made(request, tmp_path_factory):
    "A notebook's page from its saved outputs."
    path = tmp_path_factory.mktemp('page')/f'{request.param.slug}.html'
    path.write_text(make_page(nbformat.read(request.param.path, 4), request.param), encoding='utf-8')
    return path


def test_a_page_can_be_read_everywhere(browser, made):
    for shade in ('light', 'dark'):
        page = opened(browser, made, shade, DESK)
        assert page.evaluate(FAINT) == [], shade
        page.close()
    page = opened(browser, made, 'light', PHONE)
    assert page.evaluate(WIDER) <= 0 and page.evaluate(OUTSIDE) == []
    page.close()


def test_players_fit_their_frames_and_play(browser, made):
    page = opened(browser, made, 'light', DESK)
    for frame in page.query_selector_all('iframe[srcdoc]'):
        inside = frame.content_frame()
        wide, high = inside.evaluate(CUT)
        assert wide <= 0 and high <= 0, f'{frame.get_attribute("title")}: cut by {wide} x {high} pixels'
        picture = 'img[id^="_anim_img"]'
        if not inside.query_selector(picture): continue
        before = inside.evaluate(f"() => document.querySelector('{picture}').src")
        inside.evaluate("() => document.querySelector('button[title=\"Play\"]').click()")
        moved = f"old => document.querySelector('{picture}').src !== old"
        inside.wait_for_function(moved, arg=before, timeout=20_000)
    page.close()
