"""The lock: what a kernel opens is seen, each kind of change makes exactly the right notebooks stale, and nothing that is written by hand vouches for anything."""
import json, random, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from test_book import go, notebook
from tools import ROOT, run
from vitbook import lock
from vitbook.book import find_chapters, source_hash, unvouched

# One chapter a kind of use; every module of the toy library is used by one of them only, two floors below the import.
CHAPTERS = dict(imports='from vitbook.top import x',
                data='open("data/numbers.txt").read()',
                listing='import os\nprint(len(os.listdir("data/pictures")))',
                dynamic='import importlib\nimportlib.import_module("vitbook." + "".join(["na", "med"]))',
                program='import subprocess, sys\nsubprocess.run([sys.executable, "-c", "import vitbook.started; open(\'data/started.txt\')"], check=True)',
                copied='import shutil, subprocess\nsubprocess.run(["cat", "data/shown.txt"], check=True)',
                package='import numpy',
                absent='import contextlib\nwith contextlib.suppress(FileNotFoundError): open("data/later.txt")',
                nothing='1 + 1')


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A book in which every chapter was run in place, so that the lock vouches for each."
    root = tmp_path_factory.mktemp('toy')/'checkout'
    (root/'vitbook').mkdir(parents=True)
    for name, text in {'__init__': '', 'top': 'from .middle import x', 'middle': 'from .below import x', 'below': 'x = 1', 'named': 'y = 1', 'started': 'z = 1', 'unused': 'u = 1'}.items():
        (root/'vitbook'/f'{name}.py').write_text(text)
    (root/'data'/'pictures').mkdir(parents=True)
    for name in ('numbers.txt', 'started.txt', 'shown.txt', 'pictures/a.png', 'unused.txt'): (root/'data'/name).write_text('1')
    import numpy
    (root/'settings.ini').write_text(f'[DEFAULT]\nconstraints = numpy=={numpy.__version__} torch==1.0\n')
    for name, code in CHAPTERS.items(): notebook(root/'nbs'/'01_p'/f'{name}.ipynb', code)
    assert all(r.status == 'ran' for r in go(root, inplace=True).values())
    assert not unvouched(root)
    return root


def stale(root): return {label.split('/')[-1] for label in unvouched(root)}


def put(name, text):
    def change(root):
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_text(text)
    return change


def edit(name, old, new):
    def change(root):
        text = (root/name).read_text()
        assert old in text
        (root/name).write_text(text.replace(old, new))
    return change


CHANGES = {'a comment two floors down': (put('vitbook/below.py', 'x = 1   # one'), set()),
           'a module two floors down': (put('vitbook/below.py', 'x = 2'), {'imports'}),
           'the module between': (put('vitbook/middle.py', 'from .below import x\ny = 2'), {'imports'}),
           'a data file': (put('data/numbers.txt', '2'), {'data'}),
           'a file in a listed folder': (put('data/pictures/b.png', '2'), {'listing'}),
           'the bytes of a listed file': (put('data/pictures/a.png', '2'), set()),
           'a module imported by a computed name': (put('vitbook/named.py', 'y = 2'), {'dynamic'}),
           'a module of a program that was started': (put('vitbook/started.py', 'z = 2'), {'program'}),
           'a file that a started program read': (put('data/started.txt', '2'), {'program'}),
           'a file in the arguments of a program': (put('data/shown.txt', '2'), {'copied'}),
           'a file that was looked for': (put('data/later.txt', '2'), {'absent'}),
           'what nobody uses': (put('vitbook/unused.py', 'u = 2'), set()),
           'a data file that nobody uses': (put('data/unused.txt', '2'), set()),
           'the package every module is in': (put('vitbook/__init__.py', 'v = 2'), {'imports', 'dynamic', 'program'}),
           'a cell': (edit('nbs/01_p/nothing.ipynb', '1 + 1', '1 + 2'), {'nothing'}),
           'a saved output': (edit('nbs/01_p/nothing.ipynb', '"2"', '"3"'), {'nothing'}),
           'the run time': (edit('nbs/01_p/nothing.ipynb', 'run time | ', 'run time | 1'), set())}


@pytest.mark.parametrize('what', CHANGES)
def test_a_change_makes_exactly_the_right_notebooks_stale(toy, tmp_path, what):
    root = shutil.copytree(toy, tmp_path/'copy')
    change, right = CHANGES[what]
    change(root)
    assert stale(root) == right, unvouched(root)


def test_another_version_makes_stale_who_imported_it(toy, monkeypatch):
    real = lock.metadata.version
    monkeypatch.setattr(lock.metadata, 'version', lambda name: '0.1' if name == 'numpy' else real(name))
    assert stale(toy) == {'package'}
    monkeypatch.setattr(lock.metadata, 'version', lambda name: '0.1' if name == 'torch' else real(name))
    assert not stale(toy)


def test_a_program_that_cannot_be_watched_counts_as_the_whole_library(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path/'copy')
    notebook(root/'nbs'/'01_p'/'lost.ipynb', 'import subprocess, sys\nsubprocess.run([sys.executable, "-I", "-c", ""], check=True)')
    assert go(root, 'lost', inplace=True)['lost'].status == 'ran'
    put('vitbook/unused.py', 'u = 2')(root)
    assert stale(root) == {'lost'}


def test_what_runs_again_is_what_is_stale(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path/'copy')
    put('vitbook/below.py', 'x = 3')(root)
    assert {slug for slug, r in go(root, inplace=True).items() if r.status == 'ran'} == {'imports'} and not unvouched(root)


def test_a_fresh_clone_has_every_page_before_anything_runs(toy, tmp_path, monkeypatch):
    "Pages of what the lock vouches for are there, marked as made elsewhere; then the chapters run."
    root = shutil.copytree(toy, tmp_path/'copy', ignore=shutil.ignore_patterns('_book'))
    edit('nbs/01_p/data.ipynb', 'open(', 'print(6 * 7)\\nopen(')(root)
    from vitbook.book import Run
    seen = []
    first = Run.chapter

    async def chapter(self, c):
        if not seen: seen.append((self.out/'index.html').read_text())
        return await first(self, c)
    monkeypatch.setattr(Run, 'chapter', chapter)
    assert all(r.status == 'ran' for r in go(root).values())
    assert seen[0].count('saved outputs, of a run on') == len(CHAPTERS) - 1 and seen[0].count('>not run yet<') == 1
    for c in find_chapters(root): assert (c.slug == 'data') != (f'href="{c.page}"' in seen[0])
    index = (root/'_book'/'index.html').read_text()
    assert index.count('>ran here<') == len(CHAPTERS) and 'saved outputs' not in index
    assert all(r.status == 'unchanged' for r in go(root).values())


def test_the_lock_is_written_in_place_only(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path/'copy', ignore=shutil.ignore_patterns('_book'))
    before = (root/lock.LOCK).read_bytes()
    go(root, fresh=True)
    assert (root/lock.LOCK).read_bytes() == before
    notebook(root/'nbs'/'01_p'/'bad.ipynb', '1/0')
    assert go(root, 'bad', inplace=True)['bad'].status == 'failed' and (root/lock.LOCK).read_bytes() == before
    (root/'nbs'/'01_p'/'nothing.ipynb').unlink()
    put('data/numbers.txt', '3')(root)
    go(root, 'data', inplace=True)
    assert 'nothing' not in {label.split('/')[-1] for label in lock.read_lock(root)}, 'entries of notebooks that are gone'


def test_a_damaged_or_merged_lock(toy, tmp_path):
    "Two branches' lines under one label count as the last; a damaged file is named; without a lock everything is stale."
    root = shutil.copytree(toy, tmp_path/'copy')
    text = (root/lock.LOCK).read_text()
    line = next(line for line in text.splitlines() if line.startswith('"01_p/data"'))
    (root/lock.LOCK).write_text(text.replace(line, re.sub('"source": "', '"source": "0', line) + '\n' + line))
    assert not stale(root)
    (root/lock.LOCK).write_text(text.replace(line, line + '\n' + re.sub('"source": "', '"source": "0', line)))
    assert stale(root) == {'data'}
    (root/lock.LOCK).write_text(text[:len(text) // 2])
    with pytest.raises(ValueError, match='damaged'): unvouched(root)
    (root/lock.LOCK).unlink()
    assert stale(root) == set(CHAPTERS)


def test_nested_runs_and_hidden_hooks(tmp_path):
    "A run in a run is seen by both, and a sitecustomize that the hook hides is still run."
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'sitecustomize.py').write_text('import os\nos.environ["HIDDEN_RAN"] = "1"')
    (tmp_path/'x.txt').write_text('1')
    outer = lock.trace_environment(tmp_path/'outer', {'PYTHONPATH': str(tmp_path/'other')})
    inner = lock.trace_environment(tmp_path/'inner', outer)
    done = subprocess.run([sys.executable, '-c', 'import os\nopen("x.txt")\nprint(os.environ["HIDDEN_RAN"])'], cwd=tmp_path, env=inner, capture_output=True, text=True)
    assert done.stdout == '1\n', done.stderr
    for name in ('outer', 'inner'): assert 'x.txt' in lock.read_trace(tmp_path/name/'trace', tmp_path).read


def test_pins(tmp_path):
    minor = sys.version_info.minor
    (tmp_path/'settings.ini').write_text(f"[DEFAULT]\nconstraints = torch==2.0 numpy==2.4;python_version>='3.{minor}'\n    numpy==2.2;python_version<'3.{minor}' scipy==1;python_version<'3.9'\nother = a==1\n")
    assert lock.pins(tmp_path) == {'torch': '2.0', 'numpy': '2.4'}
    assert 'torch' in lock.pins(ROOT)


# ---- the book's own lock

def entries(): return lock.read_lock(ROOT)


@pytest.mark.skipif(not (ROOT/lock.LOCK).is_file(), reason='this checkout has no lock yet')
def test_a_constant_changed_anywhere_reaches_everyone_who_opened_it(tmp_path):
    "Of a randomly drawn module: the notebooks that become stale are those whose kernels opened it, and there is no other."
    from tools import copy_of_repo
    root, draw = copy_of_repo(tmp_path/'copy'), random.Random(0)
    before = set(unvouched(root))
    opened = {name for entry in entries().values() for name in entry['opened'] if name.startswith('vitbook/') and name.endswith('.py') and name != 'vitbook/_modidx.py'}
    for name in draw.sample(sorted(opened), 3):
        text = (root/name).read_text()
        (root/name).write_text(text + '\nadded = 1\n')
        right = {label for label, entry in entries().items() if name in entry['opened']}
        assert set(unvouched(root)) - before == right - before, name
        (root/name).write_text(text)


def test_every_notebook_is_in_the_lock_with_what_it_says_it_makes():
    "A notebook that exports a module and uses it opened the module's file, unless its entry is stale."
    known = entries()
    fresh = {c.label for c in find_chapters(ROOT)} - set(unvouched(ROOT))
    for c in find_chapters(ROOT):
        if c.label not in fresh: continue
        nb = json.loads(c.path.read_bytes())
        assert known[c.label]['source'] == source_hash(nb)
        program = '\n'.join(''.join(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'code' and '#| export' not in ''.join(cell['source']))
        for module in re.findall(r'^from vitbook\.([\w.]+) import', program, re.M):
            path = f'vitbook/{module.replace(".", "/")}'
            assert {f'{path}.py', f'{path}/__init__.py'} & set(known[c.label]['opened']), f'{c.label} imports vitbook.{module}'


def test_pages_lead_to_their_neighbours(toy):
    order = find_chapters(toy)
    for one, c, other in zip(order, order[1:], order[2:]):
        page = (toy/'_book'/c.page).read_text(encoding='utf-8')
        for beside in (one, other): assert f'href="../{beside.page}"' in page
