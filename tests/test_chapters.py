"""The chapter contract: what every notebook of parts 01 to 09 must have, and the lighter one of the foundations."""
import ast, json, re

import pytest

from tools import CHAPTERS, ROOT, chapters, foundations, notebooks, plain

BOOK, GROUND = chapters(), foundations()
each_chapter = pytest.mark.parametrize('notebook', BOOK, ids=lambda notebook: notebook.name)
each_foundation = pytest.mark.parametrize('notebook', GROUND, ids=lambda notebook: notebook.name)
each = pytest.mark.parametrize('notebook', BOOK + GROUND, ids=lambda notebook: notebook.name)
STORY = ['Experiment', 'Play', 'To remember', 'Exercises', 'In the library']          # the order of `make chapter`
LIBRARY = ['Fast path', 'The model', 'Use it in your own model', 'Checks', 'What differs from the paper']
AFTER_MECHANISMS = ['The model', 'Experiment', 'Play', 'Fast path', 'Use it in your own model', 'Exercises', 'What differs from the paper']


def in_order(wanted, found):
    "Is `wanted` a subsequence of `found`?"
    rest = iter(found)
    return all(any(heading == other for other in rest) for heading in wanted)


# ---- chapters

@each_chapter
def test_headings(notebook):
    found = notebook.headings()
    assert found[0] == 'The problem', 'the first section is "The problem"'
    if 'In the library' in found:                                       # a story first, then what is looked things up in
        assert found[1] == 'The machine in one picture' and found[-5:] == STORY and len(found) > 7, f'{STORY} in this order, got {found}'
        assert in_order(LIBRARY, notebook.headings(3)) and 'arxiv.org' in notebook.prose.split('### What differs from the paper')[1]
        return
    assert in_order(['The problem', *AFTER_MECHANISMS], found), f'{AFTER_MECHANISMS} in this order, got {found}'
    mechanisms = found[1:found.index('The model')]
    assert mechanisms, 'no section for a mechanism between "The problem" and "The model"'
    assert set(found[found.index('The model'):]) <= {*AFTER_MECHANISMS, 'References'}, f'other sections: {found}'
    assert 'References' in found + notebook.headings(3) or 'arxiv.org' in notebook.prose.split('## What differs from the paper')[1], 'references'
    assert not [heading for heading in found if re.match(r'[\d.]+\s', heading)], 'headings carry no numbers'


@each_chapter
def test_facts_table(notebook):
    table = notebook.table()
    assert {'paper', 'official code', 'module', 'run time'} <= set(table), f'rows of the facts table: {list(table)}'
    assert re.search(r'arxiv\.org/abs/\d{4}\.\d{4,5}', table['paper']), 'the paper with its arXiv link'
    assert f'vitbook.{notebook.module}' in table['module']


@each_chapter
def test_module_mirrors_the_path(notebook):
    part = re.sub(r'^\d+_', '', notebook.part)
    assert part in CHAPTERS and notebook.module == f'{part}.{notebook.slug}', f'{notebook.name} exports {notebook.module}'
    assert (ROOT/'vitbook'/part/f'{notebook.slug}.py').is_file()


@each_chapter
def test_mechanisms_show_their_source(notebook):
    assert any('exports' in cell['directives'] for cell in notebook.code), 'no `#| exports` cell: the source of a mechanism is the point'
    assert re.search(r'^\s*def naive_', notebook.program, re.M), 'no naive_… form of an equation'
    tests = [cell for cell in notebook.code if not {'export', 'exports'} & set(cell['directives']) and re.search(r'\bassert\b|assert_close|gradcheck|with raises', cell['source'])]
    assert len(tests) >= 3, 'test cells beside the mechanisms'


@each_chapter
def test_experiment_is_recorded(notebook):
    assert re.search(r'(?<!def )\brecord\(', notebook.program), 'no record(…): the figures go to the scoreboard'
    committed = ROOT/'data'/'scoreboard'
    found = [line for path in committed.glob('*.json') for line in (lambda data: data if isinstance(data, list) else data.get('records', [data]))(json.loads(path.read_text(encoding='utf-8')))]
    assert any(line['chapter'] == notebook.slug for line in found), f'nothing of {notebook.slug} in data/scoreboard: `vitbook run {notebook.slug} --inplace` writes it'


@each_chapter
def test_it_can_be_played_with(notebook):
    assert re.search(r'\bsee\.slider\(|\binteract(ive)?\(', notebook.program) and re.search(r'\bsee\.player\(|to_jshtml', notebook.program), 'a control, and a player that needs no kernel'
    assert any('<iframe' in ''.join(output.get('data', {}).get('text/html', '')) for cell in notebook.code for output in cell['outputs']), 'the saved player'


STORIES = [notebook for notebook in BOOK if 'In the library' in notebook.headings()]      # the chapters told anew
each_story = pytest.mark.parametrize('notebook', STORIES, ids=lambda notebook: notebook.name)


def story_of(notebook):
    "The cells before the library half."
    heads = ['## In the library' in cell['source'] and cell['cell_type'] == 'markdown' for cell in notebook.cells]
    return notebook.cells[:next(i for i, head in enumerate(heads) if head)]


def words_read(cells):
    "Words of the prose; what a folded solution, a fence or a formula holds does not count."
    prose = '\n\n'.join(cell['source'] for cell in cells if cell['cell_type'] == 'markdown')
    return len(re.findall(r'\w[^\s]*', plain(re.sub(r'<details.*?</details>', '', prose, flags=re.S))))


def lines_shown(cell):
    "The code a page shows unfolded: no plumbing (`#| export`), nothing hidden, no blank lines."
    told = cell.get('directives', {})
    away = {'hide', 'export', 'default_exp'} & set(told) or 'false' in (told.get('echo'), told.get('include'))
    if cell['cell_type'] != 'code' or away or told.get('code-fold') == 'true': return []
    return [line for line in cell['source'].splitlines() if line.strip() and not line.startswith('#|')]


@each_story
def test_a_story_is_read_within_the_hour(notebook):
    cells = story_of(notebook)
    shown = [lines_shown(cell) for cell in cells]
    words, lines = words_read(cells), sum(map(len, shown))
    told = f'{words} words of 2,500, {lines} shown lines of 350 before "In the library"'
    assert words <= 2500 and lines <= 350, told
    for found in shown:
        assert len(found) <= 40, f'{len(found)} lines in a cell of the story: {found[:3]}'
        wide = [line for line in found if len(line) > 100]
        assert not wide, 'over 100 columns:\n' + '\n'.join(wide)
    program = [cell['source'] for cell in cells if cell['cell_type'] == 'code']
    assert any('.draw(' in source for source in program), 'no schematic (`vitbook.diagram`)'


def test_the_count_of_a_story_sees_what_is_read():
    def markdown(text): return dict(cell_type='markdown', source=text)
    def code(text, **told): return dict(cell_type='code', source=text, directives=told)
    folded = '<details><summary>Solution</summary>\nfour more words here\n</details>'
    assert words_read([markdown('Two words.'), code('x = 1'), markdown(f'One\n{folded}')]) == 3
    assert lines_shown(code('#| label: a\nx = 1\n\ny = 2', label='a')) == ['x = 1', 'y = 2']
    for told in (dict(hide=''), dict(export=''), {'code-fold': 'true'}, dict(echo='false')):
        assert lines_shown(code('x = 1', **told)) == []
    assert lines_shown(code('x = 1', exports='')) == ['x = 1'] and not lines_shown(markdown('x'))


# ---- foundations

@each_foundation
def test_foundation_sections(notebook):
    found = notebook.headings()
    assert len(found) >= 4 and in_order(['Exercises', 'References'], found), f'got {found}'
    assert set(found[found.index('Exercises'):]) <= {'Exercises', 'References'}, 'Exercises and References come last'
    table = notebook.table()
    assert {'module', 'run time'} <= set(table) and f"vitbook.{notebook.module.removesuffix('.__init__')}" in table['module'], f'rows of the table: {table}'


# ---- both

@each
def test_opening(notebook):
    first = notebook.markdown[0]['source']
    assert re.match(r'# [^\n]+\n\s*\n> [^\n]+', first), '`# Title`, then a one-line `> blurb`, in the first markdown cell'
    head = plain(notebook.prose.split('\n## ')[0])
    assert len(re.findall(r'^[*-] ', head, re.M)) == 3, 'three bullets before the first section'
    assert notebook.cells[0]['cell_type'] == 'markdown' and notebook.module, 'title first, then `#| default_exp`'


@each
def test_exercises(notebook):
    part = notebook.prose.split('\n## Exercises')[1].split('\n## ')[0]
    wanted = 4 if 'In the library' in notebook.headings() else 3
    assert len(re.findall(r'<details', part)) == wanted, f'{wanted} exercises, each with a folded solution'
    for solution in re.findall(r'<details[^>]*>(.*?)</details>', part, re.S):
        assert re.match(r'\s*<summary>[^<]+</summary>', solution) and len(re.sub(r'<summary>.*?</summary>', '', solution, flags=re.S).split()) >= 10, f'a summary and a solution: {solution[:200]}'


@each
def test_run_time_is_recorded(notebook):
    shown, meta = notebook.table().get('run time', ''), notebook.meta.get('vitbook', {})
    assert re.search(r'\d', shown), f'the header table says {shown!r}: `vitbook run {notebook.slug} --inplace` fills it in'
    assert 0 < meta.get('seconds', 0) <= 90, f'metadata vitbook.seconds is {meta.get("seconds")}'


@each
def test_outputs_are_good(notebook):
    assert any(cell['outputs'] for cell in notebook.code), 'a notebook without outputs gives a page without pictures'
    assert any(kind.startswith('image/') for cell in notebook.code for output in cell['outputs'] for kind in output.get('data', {})) or notebook in GROUND, 'no figure'
    for cell in notebook.code:
        assert not [output for output in cell['outputs'] if output['output_type'] == 'error'], f'a saved error in\n{cell["source"][:300]}'
        size = len(json.dumps(cell['outputs']))
        assert size <= 1.5e6, f'{size / 1e6:.1f} MB of output in\n{cell["source"][:300]}'
        kept = [output for output in cell['outputs'] if output['output_type'] == 'stream' and output.get('name') == 'stderr']
        assert not kept, f'saved warnings or progress in\n{cell["source"][:300]}\n{"".join(kept[0]["text"])[:500] if kept else ""}'


@pytest.mark.parametrize('notebook', notebooks(), ids=lambda notebook: notebook.name)
def test_a_notebook_is_light(notebook):
    "Git keeps every version of it. Pictures are palette PNGs already: fewer, smaller ones are the way out."
    size = notebook.path.stat().st_size
    outputs = [json.dumps(cell.get('outputs', [])) for cell in notebook.cells]
    weights = sorted(((len(output), i) for i, output in enumerate(outputs)), reverse=True)
    allowed = 600_000
    assert size <= allowed, f'{size:,} bytes of {allowed:,}; the heaviest outputs (bytes, cell): {weights[:5]}'


def lines_told(source):
    "Lines of signatures and docstrings: a parameter a line, each with its comment, is documentation."
    try: tree = ast.parse(source)
    except SyntaxError: return 0                                        # a magic
    total = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef): continue
        first = node.body[0]
        told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        total += max((first.end_lineno if told else first.lineno - 1) - node.lineno, 0)
    return total


@each
def test_text_is_finished(notebook):
    for word in ('TODO', 'FIXME', 'XXX', 'lorem', 'in this section we will', 'In this section we will'): assert word not in notebook.prose + notebook.program, word
    for cell in notebook.code:                                          # plumbing (`#| export`) may be long
        if 'export' in cell['directives']: continue
        long = len(cell['source'].splitlines()) - lines_told(cell['source'])
        assert long <= 120, f'one idea a cell: {long} lines\n{cell["source"][:200]}'


def test_signatures_and_docstrings_are_not_counted():
    assert lines_told('x = 1\ny = 2') == 0 and lines_told('%load_ext a') == 0
    assert lines_told('def f(a,  # one\n      b,  # two\n     ):\n    "Told."\n    return a') == 3
    assert lines_told('class A:\n    """Told\n    twice."""\n    def f(self): return 1') == 2


def test_the_order_check_sees_faults():
    assert in_order(['a', 'c'], ['a', 'b', 'c']) and not in_order(['c', 'a'], ['a', 'b', 'c']) and not in_order(['a', 'd'], ['a', 'b', 'c'])
