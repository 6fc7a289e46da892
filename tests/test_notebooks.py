"""Every notebook runs from a fresh kernel, two at a time, with the network closed, in little more than the 90 s its head may say; the scoreboard's committed figures come out again."""
import ast, html, json, math, re, shutil, sys

import pytest

from tools import ROOT, notebooks, run
from vitbook.measure import agrees

pytestmark = pytest.mark.book
SECONDS = 90
RUN = [sys.executable, '-c', 'import sys; from vitbook.cli import main; sys.exit(main())', 'run']


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "One run of the whole book into an empty folder; what it printed and where it wrote."
    out = tmp_path_factory.mktemp('book')
    done = run(*RUN, 'all', '--jobs', '2', '--fresh', '--root', ROOT, '--out', out, timeout=3600, check=False)
    print(done.stdout, done.stderr)
    return out, done


def state(out, notebook): return json.loads((out/'.state'/notebook.part/f'{notebook.slug}.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('notebook', notebooks(), ids=lambda notebook: notebook.name)
def test_notebook_runs(book, notebook):
    out, done = book
    assert (out/'.state'/notebook.part/f'{notebook.slug}.json').is_file(), f'{notebook.name} was not run:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    last = state(out, notebook)
    assert last['status'] == 'ran', f"{notebook.name} {last['status']}: {last['error']}\n{text_of_page(out/last['page'])}"
    took = last.get('cpu_seconds') or last['seconds']      # seconds of the core; what a notebook waited for its neighbours is not its own
    assert took <= 1.5 * SECONDS, f"{notebook.name} took {took} s of one core; {SECONDS} are allowed where it was written (test_chapters), and half as much again elsewhere"


def text_of_page(path):
    "The end of an error page, without its tags."
    return html.unescape(re.sub(r'<[^>]+>', '', path.read_text(encoding='utf-8')))[-3000:] if path.is_file() else ''


def test_exit_status_and_pages(book):
    out, done = book
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    index = (out/'index.html').read_text(encoding='utf-8')
    for notebook in notebooks(): assert f"href=\"{state(out, notebook)['page']}\"" in index and (out/state(out, notebook)['page']).is_file()
    assert not list(out.rglob('*.tmp')), 'half a page was left'


def test_pages_load_nothing_from_another_host(book):
    from test_site import loaded
    out, _ = book
    for page in out.rglob('*.html'): assert not loaded(page.read_text(encoding='utf-8')), page.relative_to(out)


def test_the_network_is_closed_and_a_failure_is_seen(tmp_path):
    "In a book of three: a connection raises inside the kernel, a chapter that raises fails the run, and the one beside it still runs."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    part = tmp_path/'nbs'/'00_foundations'
    part.mkdir(parents=True)
    for i, (name, code) in enumerate(dict(net='import socket\nsocket.create_connection(("192.0.2.1", 80), timeout=5)', good='print(6 * 7)', bad='raise RuntimeError("on purpose")').items()):
        cells = [dict(cell_type='markdown', id='a', metadata={}, source=f'# {name}\n\n> {name}'),
                 dict(cell_type='code', id='b', metadata={}, source=code, outputs=[], execution_count=None)]
        (part/f'{i:02}_{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    done = run(*RUN, 'all', '--root', tmp_path, '--out', tmp_path/'out', check=False, PYTHONPATH=f'{ROOT/"tests"/"offline"}:{ROOT}')
    states = {path.stem: json.loads(path.read_text()) for path in (tmp_path/'out'/'.state'/'00_foundations').glob('*.json')}
    assert done.returncode == 1 and {name: last['status'] for name, last in states.items()} == dict(net='failed', good='ran', bad='failed')
    assert 'the network is closed' in states['net']['error'] and 'on purpose' in states['bad']['error']


# ---- the scoreboard

def records(folder):
    "(chapter, claim) -> record of every file of a scoreboard folder."
    found = {}
    for path in sorted(folder.glob('*.json')):
        data = json.loads(path.read_text(encoding='utf-8'))
        for line in data if isinstance(data, list) else data.get('records', [data]):
            key = line['chapter'], line['claim']
            assert key not in found, f'{key} is recorded twice'
            found[key] = line
    return found


def differences(committed, fresh):
    "Sentences about what does not agree, both ways."
    for key in sorted(committed.keys() - fresh.keys()): yield f'{key}: committed, but the fresh run does not record it'
    for key in sorted(fresh.keys() - committed.keys()): yield f'{key}: recorded by the fresh run, but not committed (vitbook run --inplace writes data/scoreboard)'
    for key in sorted(committed.keys() & fresh.keys()):
        old, new = committed[key], fresh[key]
        if not agrees(old, new): yield f'{key}: committed {old}, the fresh run gives {new}'
        for name in ('paper', 'unit', 'rtol', 'atol', 'timed'):             # not the note: it may hold a time
            if old[name] != new[name]: yield f'{key}: {name} is {old[name]!r} as committed and {new[name]!r} in the fresh run'


def claims(program):
    "Regular expressions for the claims that calls of `record` in a program can make: what is computed matches anything, but not an empty or unwritten claim."
    def pattern(node):
        if isinstance(node, ast.Constant): return re.escape(str(node.value))
        if isinstance(node, ast.JoinedStr): return ''.join(map(pattern, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add): return pattern(node.left) + pattern(node.right)
        if isinstance(node, ast.IfExp): return f'(?:{pattern(node.body)}|{pattern(node.orelse)})'
        return '.*'
    plain = '\n'.join('' if line.lstrip().startswith(('%', '!', '#|')) else line for line in program.split('\n'))
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', '')) == 'record' and len(node.args) > 1 and pattern(node.args[1]).strip('.*'): yield pattern(node.args[1])


def test_claims_are_found_in_programs():
    found = list(claims("#| slow\nrecord(C, 'plain (a)', ours=1)\nfor n in x: record(C, f'{n:,} pictures: ' + ('best' if n else 'worst') + n, ours=2)\nmeasure.record(C, name)"))
    matches = lambda text: any(re.fullmatch(p, text) for p in found)
    assert len(found) == 2 and matches('plain (a)') and matches('2,000 pictures: best of all') and matches('7 pictures: worst')
    assert not matches('plain a') and not matches('2,000 pictures: bad') and not matches('plain (a) and more')


def test_the_scoreboard_comes_out_again(book):
    committed, fresh = records(ROOT/'data'/'scoreboard'), records(book[0]/'records')
    assert not list(differences(committed, fresh))
    slugs = {notebook.slug for notebook in notebooks()}
    long = records(ROOT/'data'/'scoreboard'/'long')                      # of cells that an ordinary run leaves out: their chapters and claims must still be there
    assert {chapter for chapter, _ in committed.keys() | long.keys()} <= slugs, 'records of chapters that are not there'
    possible = {notebook.slug: list(claims(''.join(c['source'] + '\n' for c in notebook.code if 'slow' in c['directives']))) for notebook in notebooks()}
    assert not [key for key in long if not any(re.fullmatch(p, key[1]) for p in possible[key[0]])], 'records of longer runs that no cell makes any more'


def test_differences_are_seen():
    line = dict(chapter='a', claim='b', ours=2., paper='', unit='', holds=True, rtol=.1, atol=None, timed=False)
    same = {('a', 'b'): line}
    assert not list(differences(same, {('a', 'b'): line | dict(ours=2.19)}))
    for wrong in ({}, same | {('a', 'c'): line}, {('a', 'b'): line | dict(ours=2.3)}, {('a', 'b'): line | dict(holds=False)}, {('a', 'b'): line | dict(ours=math.nan)}):
        assert list(differences(same, wrong)), wrong
    clock = line | dict(rtol=None, timed=True)
    assert not list(differences({('a', 'b'): clock}, {('a', 'b'): clock | dict(ours=.5, holds=False)}))
    for wrong in ({}, {('a', 'b'): clock | dict(timed=False)}, {('a', 'b'): clock | dict(unit='s')}, same): assert list(differences({('a', 'b'): clock}, wrong)), wrong
