"""The site, mostly without Quarto: it says only WARN for a broken link and nothing for a missing page, so that links, anchors, figures and the sidebar are
checked here from the notebooks themselves. Where Quarto is installed the site is rendered too, and any WARN fails."""
import html, importlib.util, re, shutil
from functools import cache

import pytest
import yaml

from tools import NBS, ROOT, Notebook, copy_of_repo, notebooks, plain, run, settings

pytestmark = pytest.mark.site
BOOK = notebooks()
each = pytest.mark.parametrize('notebook', BOOK, ids=lambda notebook: notebook.name)


@cache
def quarto(): return yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))


def pages(contents):
    "(section, page) of everything a sidebar lists, in order."
    for item in contents:
        if isinstance(item, str): yield '', item
        elif 'contents' in item:
            if 'href' in item or 'file' in item: yield item.get('section', ''), item.get('href') or item['file']
            yield from ((item.get('section') or section, page) for section, page in pages(item['contents']))
        elif 'href' in item or 'file' in item: yield '', item.get('href') or item['file']


def sidebar():
    bar = quarto()['website']['sidebar']
    return [found for one in (bar if isinstance(bar, list) else [bar]) for found in pages(one['contents'])]


# ---- the project

def test_project():
    project = quarto()['project']
    assert project['type'] == 'website' and project['output-dir'] == settings()['doc_path']
    assert project['render'][0] == 'nbs/index.ipynb', 'the first file of the render list is where the root redirects to'
    listed = {path for pattern in project['render'] for path in ROOT.glob(pattern) if '_site' not in path.parts}
    assert {notebook.path for notebook in BOOK} <= listed
    steps = project.get('post-render', [])
    assert 'nbs/_site/offline.py' in (steps if isinstance(steps, list) else [steps])
    assert quarto()['ipynb-filters'] == ['nbdev_filter'] and 'FrontmatterProc' in settings()['skip_procs'].split(',')
    assert quarto()['execute']['enabled'] is False, 'pages come from saved outputs'


def test_format():
    form = quarto()['format']['html']
    assert form['html-math-method'] == 'mathml' and form['code-copy'] and form['toc']
    files = {shade: name if isinstance(name, list) else [name] for shade, name in form['theme'].items()}
    light, dark = 'nbs/_site/light.scss', 'nbs/_site/dark.scss'          # named themes would load a font from another host
    assert files == dict(light=[light], dark=[light, dark]) and list(files) == ['light', 'dark'], 'the first is what a reader without a preference gets'
    remote = [value for value in strings(form) if re.match(r'(https?:)?//', value) and not value.startswith(settings()['doc_host'])]
    assert not [value for value in remote if re.search(r'\.(js|css|woff2?)\b', value)], remote


def strings(value):
    if isinstance(value, dict): yield from (text for part in value.values() for text in strings(part))
    elif isinstance(value, list): yield from (text for part in value for text in strings(part))
    elif isinstance(value, str): yield value


def test_website():
    site = quarto()['website']
    assert site['search'] and site['title']
    config = settings()
    url = config['git_url'] % config if '%(' in config['git_url'] else config['git_url']
    assert site['repo-url'].rstrip('/') == url.rstrip('/')


def test_sidebar_and_notebooks_agree():
    listed = [page for _, page in sidebar()]
    assert len(listed) == len(set(listed)), 'a page is listed twice'
    missing, unknown = {f'nbs/{notebook.name}' for notebook in BOOK} - set(listed), {page for page in listed if not (ROOT/page).is_file()}
    assert not missing, f'notebooks that the sidebar does not list: {sorted(missing)}'
    assert not unknown, f'pages of the sidebar that are not there: {sorted(unknown)}'


def test_sidebar_goes_by_part():
    parts = [(section, page) for section, page in sidebar() if page.count('/') == 2]
    assert [page for _, page in parts] == sorted(page for _, page in parts), 'parts and chapters in the order of their numbers'
    sections = {}
    for section, page in parts: sections.setdefault(page.split('/')[1], set()).add(section)
    assert all(len(names) == 1 and '' not in names for names in sections.values()), f'one section a part: {sections}'
    assert len({*map(tuple, sections.values())}) == len(sections), f'two parts share a section: {sections}'


# ---- the pages

def identifier(heading):
    "The id that pandoc gives a heading."
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    text = re.sub(r'[^\w\s.-]', '', re.sub(r'\$[^$]*\$', lambda math: math[0].strip('$'), text).replace('`', '').replace('*', ''))
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', text.strip().lower())) or 'section'


@cache
def anchors(path):
    "Ids on the page that this notebook becomes."
    notebook, found, headings = Notebook(path), set(), {}
    for cell in notebook.markdown:
        text = re.sub(r'^(```+|~~~+).*?^\1\s*$', '', cell['source'], flags=re.S | re.M)
        found |= set(re.findall(r'\{[^}\n]*#([\w:.-]+)[^}\n]*\}', text)) | set(re.findall(r'<[^>]+\bid="([^"]+)"', text))
        for line in text.splitlines():
            if match := re.match(r'(#{1,6})\s+(.*)', line):
                if '{#' in match[2]: continue
                name = identifier(re.sub(r'\s*\{[^}]*\}\s*$', '', match[2]))
                count = headings.setdefault(name, 0)
                headings[name] += 1
                found.add(f'{name}-{count}' if count else name)
    return found | {cell['directives']['label'] for cell in notebook.code if 'label' in cell['directives']}


LINK = re.compile(r'(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|<a\b[^>]*\bhref="([^"]+)"|^\[[^\]]+\]:\s*(\S+)', re.M)


def broken_links(path, text):
    "Sentences about links in `text`, prose of the notebook at `path`, that lead nowhere."
    for match in LINK.finditer(plain(text)):
        target = next(filter(None, match.groups()))
        if re.match(r'(https?|mailto):', target): continue
        name, _, anchor = target.partition('#')
        page = (path.parent/name).resolve() if name else path
        if not page.is_file(): yield f'{target}: no such file'
        elif not page.is_relative_to(NBS): yield f'{target}: outside of the site; link to the repository instead'
        elif anchor and page.suffix == '.ipynb' and anchor not in anchors(page): yield f'{target}: no such anchor, there are {sorted(anchors(page))}'


@each
def test_links_and_anchors(notebook): assert not list(broken_links(notebook.path, notebook.prose))


@each
def test_cross_references(notebook):
    wanted = set(re.findall(r'(?<![\w@])@((?:fig|eq|tbl|sec|lst)-[\w-]*\w)', plain(notebook.prose)))
    assert wanted <= anchors(notebook.path), 'a reference reaches labels of its own page only'


@each
def test_labels_are_unique_and_options_are_yaml(notebook):
    labels = [cell['directives']['label'] for cell in notebook.code if 'label' in cell['directives']]
    labels += re.findall(r'\{#((?:eq|tbl|sec|fig)-[\w-]+)', notebook.prose)
    assert len(labels) == len(set(labels)), f'used twice: {sorted({name for name in labels if labels.count(name) > 1})}'
    for cell in notebook.code:
        options = [line[2:].strip() for line in cell['source'].splitlines() if re.match(r'#\|\s*[\w-]+:( |$)', line)]
        try: values = yaml.safe_load('\n'.join(options)) or {}
        except yaml.YAMLError as error: raise AssertionError(f'{options}: put the value in quotation marks ({error.problem})')
        for key in ('label', 'fig-cap', 'fig-alt'): assert isinstance(values.get(key, ''), str) and values.get(key, 'x').strip(), f'{key} of {options}'


@each
def test_figures_have_alt_text(notebook):
    for cell in notebook.code:
        pictures = [output for output in cell['outputs'] if any(kind.startswith('image/') for kind in output.get('data', {}))]
        if not pictures: continue
        alt = cell['directives'].get('fig-alt', '')
        assert len(alt.split()) >= 5, f'no fig-alt that says what the picture shows in the cell\n{cell["source"][:300]}'
        assert cell['directives'].get('label', '').startswith('fig-') and cell['directives'].get('fig-cap'), f'no label or fig-cap in the cell\n{cell["source"][:300]}'
    for output in (output for cell in notebook.code for output in cell['outputs']):
        for frame in re.findall(r'<iframe\b[^>]*>', text_of(output)): assert re.search(r'\btitle="[^"]+"', frame), 'an iframe without a title'
    for alt in re.findall(r'!\[([^\]]*)\]\(', plain(notebook.prose)): assert alt.strip(), 'a picture in markdown without alt text'
    for tag in re.findall(r'<img\b[^>]*>', plain(notebook.prose)): assert re.search(r'\balt="[^"]+"', tag), tag


def text_of(output):
    "All that an output may put on a page as text."
    data = output.get('data', {})
    return '\n'.join(''.join(data[kind]) for kind in data if kind in ('text/html', 'text/markdown', 'image/svg+xml', 'application/javascript') and isinstance(data[kind], (str, list)))


LOADED = re.compile(r'''<(?:script|img|iframe|video|audio|source|track|embed|object|input)\b[^>]*\b(?:src|srcset|data)\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]+
    |<link\b(?![^>]*\brel\s*=\s*["']?(?:canonical|author|license|alternate|next|prev|shortlink|help|me)\b)[^>]*\bhref\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]+
    |@import\s+(?:url\()?\s*["']?(?:https?:)?//[^"')\s]+|url\(\s*["']?(?:https?:)?//[^"')\s]+
    |!\[[^\]]*\]\(\s*(?:https?:)?//[^)\s]+
    |\b(?:fetch|importScripts|import|require)\s*\(\s*\[?\s*["'](?:https?:)?//[^"']+|\bfrom\s+["'](?:https?:)?//[^"']+''', re.I | re.X)


def loaded(text):
    "What a page with this text would load from another host; a player's page inside srcdoc=\"…\" is looked into as well."
    return LOADED.findall(text) + [found for inner in re.findall(r'\bsrcdoc\s*=\s*"([^"]*)"', text) for found in loaded(html.unescape(inner))]


@each
def test_nothing_is_loaded_from_another_host(notebook):
    assert not loaded(plain(notebook.prose))
    for cell in notebook.code:
        for output in cell['outputs']: assert not loaded(text_of(output)), cell['source'][:200]


def divs(text):
    "Fenced divs that are open at the end of `text`, or a closing fence too many."
    opened = []
    for line in re.sub(r'^(```+|~~~+).*?^\1\s*$', '', text, flags=re.S | re.M).splitlines():
        if re.match(r'\s*:{3,}\s*$', line):
            if not opened: return ['a closing ::: without an opening one']
            opened.pop()
        elif re.match(r'\s*:{3,}\s*\S', line): opened.append(line)
    return opened


@each
def test_divs_and_fences_are_closed(notebook):
    assert not divs(notebook.prose)
    for cell in notebook.markdown:
        assert len(re.findall(r'^\s*(?:```|~~~)', cell['source'], re.M)) % 2 == 0, f'a code fence stays open\n{cell["source"][:300]}'
        for tag in ('details', 'summary', 'div', 'table'):
            assert len(re.findall(f'<{tag}\\b', plain(cell['source']))) == len(re.findall(f'</{tag}>', plain(cell['source']))), f'<{tag}> stays open\n{cell["source"][:300]}'


@each
def test_one_title(notebook):
    assert len(notebook.headings(1)) == 1 and notebook.markdown[0]['source'].startswith('# '), 'one `# Title`, in the first markdown cell'


# ---- the checks themselves

def test_the_checks_see_faults(tmp_path):
    page = NBS/'index.ipynb'
    assert list(broken_links(page, '[a](no_such_file.ipynb)')) and list(broken_links(page, 'see [b](#no-such-anchor)')) and list(broken_links(page, '[c](../README.md)'))
    assert not list(broken_links(page, '`[a](gone.ipynb)` and [d](https://arxiv.org/abs/2303.06296)'))
    assert identifier('Scan and snap: *what* `p_i` does (2)') == 'scan-and-snap-what-p_i-does-2' and identifier('3 ways out') == 'ways-out'
    assert divs('::: {.callout-tip}\ntext') and divs(':::') and not divs('::: {.x}\n:::: y\n::::\n:::')
    for bad in ('<script src="https://cdn.example/x.js"></script>', '<link rel="stylesheet" href="//fonts.example/a.css">', '![x](https://a.example/b.png)',
                '<style>@import url(https://fonts.example/css)</style>', 'background: url("https://a.example/b.png")', "<script>import('https://x.example/a.js')</script>",
                '<iframe srcdoc="&lt;script src=&quot;https://cdn.example/x.js&quot;&gt;"></iframe>'): assert loaded(bad), bad
    for good in ('<a href="https://arxiv.org">x</a>', '<svg xmlns="http://www.w3.org/2000/svg">', '<img src="data:image/png;base64,//aa">', '<link rel="canonical" href="https://a.example/">'):
        assert not loaded(good), good


# ---- style and post-render step

FILTER = '''
import json, sys
from nbdev.cli import nbdev_filter
for path in sys.argv[1:]:
    cells = [c for c in json.loads(nbdev_filter(fname=path, printit=False))['cells'] if c['cell_type'] == 'code' and 'show_doc(' in ''.join(c['source'])]
    print(path, len(cells), sum(bool(c['outputs']) for c in cells), sep='|')
'''


def test_the_filter_takes_every_notebook():
    "What Quarto does first with each notebook: nbdev_filter, which documents every exported name from its module."
    lines = run('python', '-c', FILTER, *(notebook.path for notebook in BOOK), cwd=ROOT, timeout=300).stdout.splitlines()
    found = {line.split('|')[0]: tuple(map(int, line.split('|')[1:])) for line in lines if line.count('|') == 2}
    assert set(found) == {str(notebook.path) for notebook in BOOK}
    for notebook in BOOK:
        names, documented = found[str(notebook.path)]
        assert names == documented, f'{notebook.name}: {names - documented} of {names} exported names have no documentation'
        if notebook.part: assert names, f'{notebook.name} exports nothing that is documented'


def step(name='offline'):
    spec = importlib.util.spec_from_file_location(name, NBS/'_site'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = '''<head>
<script src="../site_libs/quarto-html/quarto.js"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-c3Nl8" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" integrity="sha512-bLT0Q" crossorigin="anonymous" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script>document.title = "kept";</script>
</head><body>jquery.js and require.js are named here</body>
'''


def test_post_render_takes_the_two_scripts_out(tmp_path):
    short = step().clean(PAGE)
    assert not loaded(short) and 'define(' not in short
    assert short == ''.join(line for line in PAGE.splitlines(keepends=True) if 'https:' not in line and 'define(' not in line), 'nothing else may change'
    assert step().clean(short) == short
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/'a.html').write_text(PAGE)
    (tmp_path/'b.html').write_text('<p>untouched</p>')
    run('python', NBS/'_site'/'offline.py', QUARTO_PROJECT_OUTPUT_DIR=str(tmp_path))
    assert (tmp_path/'sub'/'a.html').read_text() == short and (tmp_path/'b.html').read_text() == '<p>untouched</p>'
    assert run('python', NBS/'_site'/'offline.py', check=False, QUARTO_PROJECT_OUTPUT_DIR='').returncode


def test_post_render_adds_the_links_once():
    page = '<header id="title-block-header" class="x"><h1>A</h1></header><p>text</p>'
    for notebook in BOOK:
        line = step('links').links(notebook.path.relative_to(NBS))
        assert f"colab.research.google.com/github/{settings()['user']}/{settings()['repo']}/blob/" in line and f'nbs/{notebook.name}' in line
        more = step('links').add(page, line)
        assert more == page.replace('</header>', f'</header>\n{line}') and step('links').add(more, line) == more
        for target in re.findall(r'href="([^":]+)#', line): assert (notebook.path.parent/target).with_suffix('.ipynb').resolve().is_file(), target


def test_colours_have_contrast():
    "Text on its background by WCAG's formula: at least 4.5 to 1, in both themes."
    def brightness(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= .04045 else ((p + .055) / 1.055)**2.4) for w, p in zip((.2126, .7152, .0722), parts))
    for shade in ('light', 'dark'):
        text = (NBS/'_site'/f'{shade}.scss').read_text()
        colours = dict(re.findall(r'^\$([\w-]+):\s*(#[0-9a-f]{6})', text, re.M))
        assert not re.search(r'@import|url\(|https?:', text), 'fonts and pictures are the reader\'s own'
        for front, back in (('body-color', 'body-bg'), ('link-color', 'body-bg'), ('code-color', 'code-bg'), ('body-color', 'code-block-bg'), ('sidebar-fg', 'sidebar-bg'),
                            ('sidebar-hl', 'sidebar-bg'), ('navbar-fg', 'navbar-bg'), ('navbar-hl', 'navbar-bg'), ('footer-fg', 'footer-bg'), ('toc-color', 'body-bg')):
            high, low = sorted((brightness(colours[front]), brightness(colours[back])), reverse=True)
            assert (high + .05) / (low + .05) >= 4.5, f'{shade}: {front} on {back}'


# ---- with Quarto

@pytest.mark.skipif(not shutil.which('quarto'), reason='no quarto on PATH: `make docs` says how to get it; the checks above need none')
def test_quarto_renders_without_a_warning(tmp_path):
    copy = copy_of_repo(tmp_path/'repo')
    done = run('quarto', 'render', cwd=copy, timeout=900, XDG_CACHE_HOME=str(tmp_path/'cache'), PYTHONPATH=str(copy))   # the filter caches pages by time
    said = done.stdout + done.stderr
    assert not [line for line in said.splitlines() if re.search(r'\bWARN(ING)?\b|\bERROR\b', line)], said[-4000:]
    site = copy/settings()['doc_path']
    for notebook in BOOK: assert (site/'nbs'/notebook.name).with_suffix('.html').is_file(), notebook.name
    assert (site/'index.html').is_file()
    for path in [*site.rglob('*.html'), *site.rglob('*.css')]:
        assert not loaded(path.read_text(encoding='utf-8')), f'{path.relative_to(site)} loads something from another host'
