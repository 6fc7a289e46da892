"""Pages as they are seen: contrast, width and players in headless Chromium, light and dark, on a desk and on a phone.

Two kinds of pages: those that `vitbook run` makes, and the site's styles on a page built like Quarto's."""
import importlib.util, os, re, shutil

import nbformat
import pytest

from tools import NBS, ROOT
from vitbook.book import find_chapters, make_page

CHROMIUM = next(filter(None, [os.environ.get('VITBOOK_CHROMIUM'), *map(shutil.which, ('chromium', 'chromium-browser'))]), None)
MISSING = ('no Chromium on PATH (Debian: apt install chromium; or name one in VITBOOK_CHROMIUM)' if not CHROMIUM else
           'playwright is not installed' if not importlib.util.find_spec('playwright') else '')
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
DESK, PHONE = dict(width=1280, height=900), dict(width=390, height=800)
SHADES = pytest.mark.parametrize('shade', ['light', 'dark'])

# Every element with text of its own: WCAG's contrast between its colour and the nearest background that is not transparent.
FAINT = '''() => {
  const channels = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [found[0] * 255, found[1] * 255, found[2] * 255, found[3] ?? 1] : [found[0], found[1], found[2], found[3] ?? 1];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const back = channels(getComputedStyle(e).backgroundColor);
      if (back[3] > .5) return back;
    }
    return [255, 255, 255, 1];
  };
  const faint = [];
  for (const element of document.querySelectorAll('body, body *')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => n.textContent.trim()).join(' ');
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!own || !box.width || !box.height || style.visibility === 'hidden' || element.closest('script, style, .skip')) continue;
    const [high, low] = [light(channels(style.color)), light(behind(element))].sort((a, b) => b - a);
    const ratio = (high + .05) / (low + .05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)}: ${element.tagName}.${element.className} ${own.slice(0, 40)}`);
  }
  return faint;
}'''
WIDER = '() => document.scrollingElement.scrollWidth - innerWidth'
OUTSIDE = '''() => [...document.querySelectorAll('main *')].filter(e => {
  let frame = e;
  while (frame && !['auto', 'scroll', 'hidden'].includes(getComputedStyle(frame).overflowX)) frame = frame.parentElement;
  return (!frame || frame === document.body || frame.tagName === 'HTML') && e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => `${e.tagName}.${e.className}: ${Math.round(e.getBoundingClientRect().right)}`).slice(0, 5)'''


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'])
        yield found
        found.close()


def opened(browser, path, shade, size):
    page = browser.new_page(color_scheme=shade, viewport=size)
    page.goto(f'file://{path}')
    return page


# ---- the site's styles, as Quarto puts them on a page

def css(shade):
    "The rules of a theme as the browser gets them: SCSS's variables put in, its `//` comments gone."
    files = ['light'] if shade == 'light' else ['light', 'dark']
    texts = [(NBS/'_site'/f'{name}.scss').read_text(encoding='utf-8') for name in files]
    values = {name: value for text in texts for name, value in re.findall(r'^\$([\w-]+):\s*(.*?)\s*!default;', text, re.M)}   # the last file's win
    rules = '\n'.join(text.split('/*-- scss:rules --*/')[1] for text in texts)
    plain = re.sub(r'(?m)(^|\s)//.*$', '', rules)
    return values, re.sub(r'\$([\w-]+)', lambda found: values[found[1]], plain)


def like_quarto(shade):
    "A page with a chapter's kinds of things in Quarto's markup; Bootstrap's and Pandoc's colours first, which do not know the theme."
    values, rules = css(shade)
    line = 'x = attention(queries, keys, values, mask=None, scale=1.)  # b h n d, and then a comment that goes on and on and on'
    tokens = ''.join(f'<span class="{kind}">{kind}_token </span>' for kind in 'co kw cf im st ch vs dv fl bn cn fu bu at op va ot do an wa in pp'.split())
    wide = '<mrow>' + '<mi>W</mi><mo>+</mo>' * 60 + '</mrow>'
    cells = ''.join(f'<td>a cell with words {i} <code>a_name_without_spaces_{i}</code></td>' for i in range(8))
    return f'''<!DOCTYPE html><html><head><meta name="viewport" content="width=device-width"><style>
    * {{ box-sizing: border-box }} body {{ margin: 0; background: {values['body-bg']}; color: {values['body-color']} }}
    a {{ color: {values['link-color']} }} code {{ color: {values['code-color']}; background: {values['code-bg']} }}
    pre {{ color: #000; margin: 0; white-space: pre }} pre code {{ color: inherit; background: none }} div.sourceCode {{ background: {values['code-block-bg']} }}
    code span {{ color: #003B4F }} pre > code.sourceCode > span {{ color: #003B4F }} code span.co {{ color: #5E5E5E; font-style: italic }} code span.st {{ color: #20794D }}
    table {{ width: 100%; border-collapse: collapse }}</style><style>{rules}</style></head>
    <body><main class="content"><h1>A title</h1><blockquote><p>The blurb of a chapter.</p></blockquote><p>Words, <a href="#x">a link</a>, and
    <code>inline_code_that_is_long(because, of=its, many=arguments, and_never=ends, or_so='it seems')</code>.</p>
    <div class="cell"><div class="sourceCode cell-code"><pre class="sourceCode python"><code class="sourceCode python"><span id="cb1-1">{line} {tokens}</span></code></pre></div>
    <div class="cell-output cell-output-stdout"><pre><code>printed output, {'and more of it ' * 20}</code></pre></div></div>
    <p><math display="block">{wide}</math></p><table class="table"><tbody><tr>{cells}</tr></tbody></table>
    <figure><img alt="" width="640" height="90" src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="><figcaption>A caption.</figcaption></figure>
    <iframe width="640" height="80" title="a player" srcdoc="<p>player</p>"></iframe><details><summary>Solution</summary><p>words</p></details>
    <div class="cards"><a class="card-link" href="#y"><strong>A chapter</strong><br><span class="needs">needs patches</span></a></div></main></body></html>'''


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
    (tmp_path/'page.html').write_text(like_quarto('dark').replace('<body>', '<style>main.content pre, main.content pre code { color: #000 }</style><body>'), encoding='utf-8')
    assert any('printed output' in line and float(line.split(':')[0]) < 1.5 for line in opened(browser, tmp_path/'page.html', 'dark', DESK).evaluate(FAINT))


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
        wide, high = inside.evaluate('() => [document.scrollingElement.scrollWidth - innerWidth, document.scrollingElement.scrollHeight - innerHeight]')
        assert wide <= 0 and high <= 0, f'{frame.get_attribute("title")}: cut by {wide} x {high} pixels'
        picture = 'img[id^="_anim_img"]'
        if not inside.query_selector(picture): continue
        before = inside.evaluate(f"() => document.querySelector('{picture}').src")
        inside.evaluate("() => document.querySelector('button[title=\"Play\"]').click()")
        inside.wait_for_function(f"old => document.querySelector('{picture}').src !== old", arg=before, timeout=5000)
    page.close()
