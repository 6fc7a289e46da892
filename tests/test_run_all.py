"""Run All as a stranger has it: a notebook alone, an installed wheel, plain nbconvert, no data.

An ordinary run takes a toy notebook with a cell of each kind, the index, and a chapter with slow cells.
VITBOOK_ALL=1 takes every notebook of the book (half an hour on one core)."""
import json, os, shutil, sys

import pytest
import torch

from tools import ROOT, notebooks, run
from vitbook.book import directives
from vitbook.lab import left_out, with_setup

pytestmark = pytest.mark.runall
EVERY = os.environ.get('VITBOOK_ALL', '') not in ('', '0')
SAMPLE = ('index.ipynb', '06_restoration/02_histoformer.ipynb')
CHOSEN = [notebook for notebook in notebooks() if EVERY or notebook.name in SAMPLE]


@pytest.fixture(scope='session')
def site(built, tmp_path_factory):
    "A folder that holds the installed wheel."
    folder = tmp_path_factory.mktemp('site')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet',
        '--target', folder, built[1], PYTHONPATH='')
    return folder


def run_alone(notebook, folder, site):
    "The cells of a notebook after plain nbconvert ran it in `folder`; no checkout and no data is in reach."
    own = [name for name in os.environ if name.startswith('VITBOOK_') and name != 'VITBOOK_OFFLINE_TEST']
    kept = {name: os.environ.pop(name) for name in own}
    try:
        path = os.pathsep.join(map(str, (site, ROOT/'tests'/'offline')))
        run(sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output', 'out.ipynb',
            notebook, cwd=folder, PYTHONPATH=path, XDG_CACHE_HOME=str(folder/'cache'), timeout=1800)
    finally:
        os.environ.update(kept)
    return json.loads((folder/'out.ipynb').read_text(encoding='utf-8'))['cells']


def printed(cell):
    return ''.join(''.join(o.get('text', '')) for o in cell['outputs'])


def toy(folder, *sources):
    "A notebook with a title, the first cell of all notebooks, and these code cells."
    code = dict(cell_type='code', metadata={}, outputs=[], execution_count=None)
    cells = [dict(cell_type='markdown', id='title', metadata={}, source='# A toy'),
             *(code | dict(id=f'c{i}', source=source) for i, source in enumerate(sources))]
    nb = with_setup(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    (folder/'toy.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    return 'toy.ipynb'


WHERE = 'import os, vitbook\nprint(vitbook.__file__, os.listdir())'
OUTSIDE = 'from vitbook.lab import *\nprint(checkout(), (shipped()/"scoreboard").is_dir())'
DATA = 'from vitbook.data import cifar10\n'
MISSING = 'try: {}\nexcept FileNotFoundError: get_ipython().showtraceback()'


def test_a_cell_of_each_kind(site, tmp_path):
    "What is left out says so in a line, `%slow on` is obeyed, what is missing is told in a sentence."
    name = toy(tmp_path, WHERE, '#| slow: about an hour\nwhile True: pass', '#| cuda\nprint("on a GPU")',
               '#| eval: false\nraise SystemExit', "print('ordinary')",
               "#| label: fig-a\n#| slow\nprint('not wanted')",
               '%slow on', "#| label: fig-a\n#| slow\nprint('wanted')",
               OUTSIDE, MISSING.format("official_code('model.py')"), DATA + MISSING.format('cifar10()'))
    cells = run_alone(name, tmp_path, site)[2:]
    where, slow, cuda, shown, ordinary, again, _, wanted, outside, official, data = cells
    assert str(site) in printed(where) and "['toy.ipynb'" in printed(where)
    for cell, word in ((slow, 'about an hour'), (shown, 'eval: false'), (again, '%slow on')):
        assert printed(cell).startswith('Left out: ') and word in printed(cell)
        assert printed(cell).count('\n') == 1
    assert printed(cuda) == ('on a GPU\n' if torch.cuda.is_available() else left_out('#| cuda') + '\n')
    assert (printed(ordinary), printed(wanted), printed(outside)) == ('ordinary\n', 'wanted\n', 'None True\n')
    for cell, word in ((official, 'VITBOOK_OFFICIAL'), (data, 'vitbook data fetch cifar10')):
        (error,) = cell['outputs']
        (line,) = error['traceback']
        assert word in line and 'Traceback' not in line and '\n' not in line


@pytest.mark.parametrize('notebook', CHOSEN, ids=lambda notebook: notebook.name)
def test_notebook_runs_alone(site, tmp_path, notebook):
    shutil.copy(notebook.path, tmp_path)
    for cell in run_alone(notebook.path.name, tmp_path, site):
        if cell['cell_type'] != 'code':
            continue
        told = directives(''.join(cell['source']))[0]
        if 'slow' in told or told.get('eval') == 'false':
            assert printed(cell).startswith('Left out: '), ''.join(cell['source'])[:200]


def test_the_sample_is_in_the_book():
    chapter = next(n for n in notebooks() if n.name == SAMPLE[1])
    assert any('slow' in cell['directives'] for cell in chapter.code) and 'official_code(' in chapter.program
