"""Lists of chapters are made, in step with notebooks, settled after a merge; a new chapter is laid out."""
import hashlib, importlib.util, io, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from tools import NBS, ROOT, Notebook, chapters, environment, run
from vitbook import registry
from vitbook.book import find_chapters

spec = importlib.util.spec_from_file_location('contents', NBS/'_site'/'contents.py')
contents = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contents)
PARTS = contents.parts()
each = pytest.mark.parametrize('notebook', chapters(), ids=lambda notebook: notebook.name)


def small_repo(target):
    "A checkout with two chapters and all made lists, under git, in which `make` has this environment."
    shutil.copytree(ROOT/'nbs'/'_site', target/'nbs'/'_site', ignore=shutil.ignore_patterns('__pycache__'))
    names = ('settings.ini', 'pyproject.toml', 'setup.py', 'Makefile', 'README.md', '_quarto.yml',
             'CHANGELOG.md', '.gitattributes', '.gitignore', 'data/parts.json', 'data/scoreboard/hornet.json',
             'vitbook/__init__.py', 'nbs/index.ipynb', 'nbs/reference.ipynb', 'nbs/scoreboard.ipynb',
             'nbs/02_mixers/04_hornet.ipynb', 'nbs/03_backbones/01_cvt.ipynb')
    for name in names:
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, target/name)
    (target/'.venv').symlink_to(sys.prefix)
    git(target, 'init', '-q', '-b', 'main')
    make(target, 'export')
    commit(target, 'start')
    return target


def git(folder, *words, check=True):
    own = ('user.name=a', 'user.email=a@b.invalid', 'commit.gpgsign=false', 'core.hooksPath=/dev/null')
    command = ['git', *(word for setting in own for word in ('-c', setting)), *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 or not check, f'git {words}: {done.stdout}{done.stderr}'
    return done.stdout


def make(folder, *words):
    "`make` without installing anything."
    old = ('-o', '.venv/.dev', '-o', '.venv/constraints.txt')
    return run('make', *old, *words, cwd=folder, PYTHONPATH=str(ROOT))


def commit(folder, message):
    git(folder, 'add', '-A')
    git(folder, 'commit', '-q', '-m', message)


def add_chapter(folder, slug):
    "What a branch does that adds a chapter: files, records, a line of the change log, `make export`."
    git(folder, 'checkout', '-q', '-b', slug, 'main')
    make(folder, 'chapter', f'SLUG={slug}')
    record = dict(chapter=slug, claim='a claim', ours=1, paper='', unit='', note='',
                  holds=True, rtol=0., atol=0., timed=False)
    (folder/'data'/'scoreboard'/f'{slug}.json').write_text(json.dumps([record]), encoding='utf-8')
    with open(folder/'CHANGELOG.md', 'a', encoding='utf-8') as log: log.write(f'- A chapter: {slug}.\n')
    make(folder, 'export')
    commit(folder, slug)


# ---- in step

def test_the_table_of_parts():
    assert [part['number'] for part in PARTS] == list(range(11))
    assert all(part['folder'] == f"{part['number']:02}_{part['slug']}" for part in PARTS)
    planned = [chapter for part in PARTS for chapter in part['chapters']]
    assert len(planned) == 67
    for key in ('slug', 'title', 'arxiv'): assert len({chapter[key] for chapter in planned}) == 67, key
    assert all(re.fullmatch(r'\d{4}\.\d{4,5}', chapter['arxiv']) for chapter in planned)
    assert all(re.fullmatch(r'[a-z]\w*', chapter['slug']) for chapter in planned)
    assert all(part['title'] and re.fullmatch(r'[A-Z].*\.', part['sentence']) for part in PARTS)
    assert tuple(part['slug'] for part in PARTS if part['chapters']) == tuple(registry.PARTS)


@each
def test_a_chapter_stands_where_the_table_says(notebook):
    part = next(part for part in PARTS if part['folder'] == notebook.part)
    planned = {chapter['slug']: (number, chapter) for number, chapter in enumerate(part['chapters'], 1)}
    number, chapter = planned[notebook.slug]
    assert notebook.path.name == f'{number:02}_{notebook.slug}.ipynb'
    assert notebook.headings(1) == [chapter['title']]
    assert f"arxiv.org/abs/{chapter['arxiv']}" in notebook.table()['paper']


def test_every_notebook_belongs_to_a_part():
    assert {chapter.part for chapter in find_chapters(ROOT)} <= {part['folder'] for part in PARTS} | {''}


def test_the_lists_are_up_to_date():
    "What `make export` would write stands there."
    for name, lists in contents.LISTS.items():
        text = (ROOT/name).read_text(encoding='utf-8')
        for key, lines in lists.items():
            new = contents.between(text, key, lines(ROOT), Path(name).suffix)
            assert new == text, f'{key} of {name}: run make export'


def test_the_gallery_is_up_to_date():
    "One small picture a chapter, made of its first figure as saved; together at most what a page may weigh."
    from PIL import Image
    folder = NBS/'_site'/'gallery'
    found = {notebook.slug: contents.first_figure(notebook.path)[0] for notebook in chapters()}
    assert {path.stem for path in folder.iterdir()} == set(found)
    for slug, picture in found.items():
        made_of = Image.open(folder/f'{slug}.png').info['source']
        assert made_of == hashlib.sha256(picture).hexdigest(), f'{slug}: run make export'
    assert max(path.stat().st_size for path in folder.iterdir()) <= 20_000
    index = Notebook(NBS/'index.ipynb')
    assert all(f'_site/gallery/{slug}.png' in index.prose for slug in found)


# ---- what writes them

def test_between_replaces_whatever_stands_there():
    start, end = 'a\n<!-- x: made by make export -->\n', '<!-- x: end -->\nz\n'
    text = f'{start}<<<<<<< HEAD\nold\n=======\nother\n>>>>>>> b\n{end}'
    assert contents.between(text, 'x', ['1', '2']) == f'{start}1\n2\n{end}'
    cell = '''   "source": [
    "<!-- x: made by make export -->\\n",
    "old\\n",
    "<!-- x: end -->"
   ]
'''
    made = json.loads('{' + contents.between(cell, 'x', ['a "b"', r'c\d'], '.ipynb') + '}')['source']
    assert made[1:3] == ['a "b"\n', 'c\\d\n']
    for bad in ('no markers', text + text, text.replace('end', 'gone')):
        with pytest.raises(ValueError, match="'x'"): contents.between(bad, 'x', [])


def test_a_small_picture_says_what_it_was_made_of():
    from PIL import Image
    tall = io.BytesIO()
    Image.new('RGB', (20, 200), 'black').save(tall, 'PNG')
    card = Image.open(io.BytesIO(contents.small(tall.getvalue(), 'mark')))
    assert card.size == contents.PICTURE and card.info['source'] == 'mark'
    assert [card.convert('RGB').getpixel(at) for at in ((0, 0), (108, 70))] == [(255,) * 3, (0,) * 3]


@pytest.mark.parametrize('timed, rtol, atol, words', [
    (True, None, None, 'clock'), (False, .05, None, '5%'), (False, .01, 1e-6, '1% or 1e-6'), (False, 0., 0., 'exact')])
def test_tolerances_in_words(timed, rtol, atol, words):
    assert contents.tolerance(dict(timed=timed, rtol=rtol, atol=atol)) == words


# ---- new chapters

LAID_OUT = ['nbs/02_mixers/05_svt.ipynb', 'tests/chapters/svt/parity.py', 'tests/chapters/svt/test_svt.py']


@pytest.fixture(scope='module')
def merged(tmp_path_factory):
    "A repository in which two branches added neighbouring chapters and were merged; what conflicted."
    if not shutil.which('git') or not shutil.which('make'): pytest.skip('needs git and make')
    repo = small_repo(tmp_path_factory.mktemp('merged')/'repo')
    assert git(repo, 'status', '--short') == '', 'make export leaves nothing that git does not know'
    for slug in ('svt', 'dsm'): add_chapter(repo, slug)
    git(repo, 'merge', '-q', '--no-edit', 'svt', check=False)             # into the branch of the other
    conflicts = set(git(repo, 'diff', '--name-only', '--diff-filter=U').split())
    make(repo, 'export')
    commit(repo, 'merged')
    return repo, conflicts


def test_two_branches_that_add_a_chapter_each(merged):
    "The only conflicts are in made lists, and `make export` settles them."
    repo, conflicts = merged
    assert conflicts and conflicts <= set(contents.LISTS), conflicts
    for name in contents.LISTS:
        text = (repo/name).read_text(encoding='utf-8')
        assert not re.search(r'^\W*(<{7}|={7}|>{7})', text, re.M), name
        if name.endswith('.ipynb'): json.loads(text)
        places = [text.index(f'{slug}.ipynb') for slug in ('svt', 'dsm')]
        assert places == sorted(places), f'{name}: in the order of the table of parts'
    log = (repo/'CHANGELOG.md').read_text(encoding='utf-8')
    assert all(log.count(f'- A chapter: {slug}.\n') == 1 for slug in ('svt', 'dsm'))
    modules = {}
    exec((repo/'vitbook'/'_modidx.py').read_text(encoding='utf-8'), modules)
    assert {f'vitbook.mixers.{name}' for name in ('svt', 'dsm', 'hornet')} <= set(modules['d']['syms'])
    make(repo, 'export')
    assert git(repo, 'status', '--short') == '', 'a second make export changes nothing'


def test_a_chapter_is_laid_out_whole(merged):
    "Its files; they export, import and pass their own test; the notebook follows the order of a chapter."
    repo, _ = merged
    added = git(repo, 'diff', '--name-only', '--diff-filter=A', 'main', 'svt').split()
    assert added == sorted([*LAID_OUT, 'data/scoreboard/svt.json', 'vitbook/mixers/svt.py'])
    changed = set(git(repo, 'diff', '--name-only', '--diff-filter=M', 'main', 'svt').split())
    assert changed == {*contents.LISTS, 'CHANGELOG.md', 'vitbook/_modidx.py'}
    for name in LAID_OUT:
        assert not re.search(r'\{\{|TODO|FIXME|XXX', (repo/name).read_text(encoding='utf-8')), name
    notebook = Notebook(repo/LAID_OUT[0])
    assert len({cell['id'] for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.headings() == ['The problem', 'The machine in one picture', 'The mechanism', 'Experiment',
                                   'Play', 'To remember', 'Exercises', 'In the library']
    own = os.pathsep.join([str(repo), str(ROOT)])
    run(sys.executable, '-c', NEW_AND_OLD, cwd=repo, PYTHONPATH=own)


NEW_AND_OLD = """
import runpy, vitbook.mixers, pathlib
vitbook.mixers.__path__.append(str(pathlib.Path('vitbook/mixers').resolve()))
test = runpy.run_path('tests/chapters/svt/test_svt.py')['test_every_token_gets_the_mean']
for n in (1, 4): test(n)
"""


def test_a_chapter_is_not_laid_out_twice():
    with pytest.raises(ValueError, match="'no_such'"): contents.lay_out('no_such')
    with pytest.raises(ValueError, match='hornet stands already'): contents.lay_out('hornet')
