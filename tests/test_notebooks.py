"""The book as a whole: what the lock does not vouch for runs from a fresh kernel, and a sample of the rest, drawn by the commit; records and outputs come out again.

`--all` runs every notebook. The network is closed, two run at a time, in a copy of the repository."""
import ast, difflib, html, json, math, re, shutil, sys

import pytest

from plan import BUDGET, SAMPLE, Plan
from tools import ROOT, copy_of_repo, notebooks, run
from vitbook.measure import agrees

pytestmark = pytest.mark.book
SECONDS = 90
RUN = [sys.executable, '-c', 'import sys; from vitbook.cli import main; sys.exit(main())', 'run']


@pytest.fixture(scope='module')
def plan(request): return Plan(everything=request.config.getoption('--all'), shard=request.config.getoption('--shard'))


@pytest.fixture(scope='module')
def book(tmp_path_factory, plan):
    "A copy of the repository in which the notebooks of the plan were run in place; where it is, and what the run said."
    root = copy_of_repo(tmp_path_factory.mktemp('book')/'copy')
    for slug in plan.slugs: (root/'data'/'scoreboard'/f'{slug}.json').unlink(missing_ok=True)     # what is not recorded again is missed
    if not plan.todo: return root, None
    with pytest.MonkeyPatch.context() as patch:   # the tests' interpreter is not the book's
        patch.delenv('TRITON_INTERPRET', raising=False)
        done = run(*RUN, *plan.todo, '--jobs', '2', '--fresh', '--inplace', '--no-tests', '--root', root,
                   timeout=4500, check=False, PYTHONPATH=f'{root}:{ROOT/"tests"/"offline"}')
    print(done.stdout, done.stderr)
    return root, done


def state(root, notebook): return json.loads((root/'_book'/'.state'/notebook.part/f'{notebook.slug}.json').read_text(encoding='utf-8'))


def test_what_is_stale_fits_into_the_budget(plan):
    "A check may take so long and no longer: whoever changes more runs it in place and commits what came out."
    assert plan.stale_seconds <= BUDGET or plan.everything, (f'{len(plan.stale)} notebooks are stale and would take {plan.stale_seconds:.0f} s of a core; {BUDGET} are allowed. '
                                          f'Run them and commit the results: vitbook run {" ".join(plan.stale)} --inplace\n' + '\n'.join(f'{k}: {v}' for k, v in plan.stale.items()))


@pytest.mark.parametrize('notebook', notebooks(), ids=lambda notebook: notebook.name)
def test_notebook_runs(book, plan, notebook):
    if plan.label(notebook) not in plan.todo: pytest.skip('the lock vouches for it, and it was not drawn')
    root, done = book
    assert (root/'_book'/'.state'/notebook.part/f'{notebook.slug}.json').is_file(), f'{notebook.name} was not run:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    last = state(root, notebook)
    assert last['status'] == 'ran', f"{notebook.name} {last['status']}: {last['error']}\n{text_of_page(root/'_book'/last['page'])}"
    took = last.get('cpu_seconds') or last['seconds']      # seconds of the core; what a notebook waited for its neighbours is not its own
    assert took <= 1.5 * SECONDS, f"{notebook.name} took {took} s of one core; {SECONDS} are allowed where it was written (test_chapters), and half as much again elsewhere"


def text_of_page(path):
    "The end of an error page, without its tags."
    return html.unescape(re.sub(r'<[^>]+>', '', path.read_text(encoding='utf-8')))[-3000:] if path.is_file() else ''


def test_exit_status_and_pages(book, plan):
    root, done = book
    if done is None: return
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    index = (root/'_book'/'index.html').read_text(encoding='utf-8')
    for notebook in notebooks():
        if plan.label(notebook) in plan.todo: assert f"href=\"{state(root, notebook)['page']}\"" in index and (root/'_book'/state(root, notebook)['page']).is_file()
    assert not list(root.rglob('*.tmp')), 'half a page was left'


def test_pages_load_nothing_from_another_host(book):
    from test_site import loaded
    root, _ = book
    for page in (root/'_book').rglob('*.html'): assert not loaded(page.read_text(encoding='utf-8')), page.relative_to(root)


# ---- saved outputs

NUMBER = re.compile(r'[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?%?|\binf\b|\bnan\b')


def shape_of(cell):
    "What of a cell's outputs does not hang on a clock or a last bit: kinds, and words with the numbers taken out."
    for output in cell['outputs']:
        data = output.get('data', {'stream': output.get('text', '')})
        yield sorted(data)
        yield re.sub(r'[\s|:─-]+', ' ', NUMBER.sub('#', ''.join(data.get('text/markdown', data.get('text/plain', data.get('stream', ''))))))


def unlike(old, new):
    "Cells of two notebooks, or of two runs of one, whose outputs are not of the same shape."
    pairs = [(a, b) for a, b in zip(old, new) if a['cell_type'] == 'code']
    return [i for i, (a, b) in enumerate(pairs) if difflib.SequenceMatcher(None, str(list(shape_of(a))), str(list(shape_of(b))), autojunk=False).ratio() < .9]


@pytest.mark.parametrize('notebook', notebooks(), ids=lambda notebook: notebook.name)
def test_saved_outputs_come_out_again(book, plan, notebook):
    "Whoever writes into the lock by hand that a notebook was run is found when it is drawn: kinds of outputs and words are those of a run."
    if plan.label(notebook) not in plan.drawn: pytest.skip('not drawn')
    fresh = json.loads((book[0]/'nbs'/notebook.name).read_text(encoding='utf-8'))['cells']
    for cell in fresh: cell['source'] = ''.join(cell['source'])
    assert [c['source'] for c in fresh if c['cell_type'] == 'code'] == [c['source'] for c in notebook.code]
    wrong = unlike(notebook.cells, fresh)
    assert not wrong, f'{notebook.name}: code cells {wrong} give other outputs than the saved ones'


def test_other_outputs_are_seen():
    def cell(*texts): return dict(cell_type='code', outputs=[dict(output_type='stream', text=t) for t in texts])
    assert not unlike([cell('took 3.2 s, loss 0.41')], [cell('took 11 s, loss 4.1e-1')]) and not unlike([cell()], [cell()])
    for old, new in ((cell('trained'), cell('1/0')), (cell(), cell('more')), (cell('a'), cell('a', 'b')), (cell('x'), dict(cell_type='code', outputs=[dict(output_type='display_data', data={'image/png': 'x'})]))):
        assert unlike([old], [new]) == [0]


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
    committed, fresh = records(ROOT/'data'/'scoreboard'), records(book[0]/'data'/'scoreboard')      # of what was not run, the copy holds the committed ones
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
