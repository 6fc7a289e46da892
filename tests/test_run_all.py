"""Run All as a stranger has it: a notebook alone in an empty folder, the library an installed wheel, plain nbconvert, no data.

An ordinary run takes a toy notebook with a cell of each kind, the index, and one chapter with slow cells that want official code.
VITBOOK_ALL=1 takes every notebook of the book (half an hour on one core)."""
import json, os, shutil, sys

import pytest

from tools import ROOT, notebooks, run
from vitbook.book import directives
from vitbook.lab import with_setup

pytestmark = pytest.mark.runall
EVERY = os.environ.get('VITBOOK_ALL', '') not in ('', '0')
SAMPLE = ('index.ipynb', '06_restoration/02_histoformer.ipynb')


@pytest.fixture(scope='session')
def site(built, tmp_path_factory):
    "A folder that holds the installed wheel."
    folder = tmp_path_factory.mktemp('site')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet', '--target', folder, built[1], PYTHONPATH='')
    return folder


def run_alone(notebook, folder, site):
    "The cells of a notebook file in `folder` after plain nbconvert ran it; nothing of this checkout and no data is in reach."
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith('VITBOOK_') and name != 'VITBOOK_OFFLINE_TEST'}
    try:
        path = os.pathsep.join(map(str, (site, ROOT/'tests'/'offline')))
        run(sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output', 'out.ipynb', notebook,
            cwd=folder, PYTHONPATH=path, XDG_CACHE_HOME=str(folder/'cache'), timeout=1800)
    finally: os.environ.update(kept)
    return json.loads((folder/'out.ipynb').read_text(encoding='utf-8'))['cells']


def printed(cell): return ''.join(''.join(o.get('text', '')) for o in cell['outputs'])


def toy(folder, *sources):
    "A notebook with a title, the first cell of all notebooks, and these code cells."
    cells = [dict(cell_type='markdown', id='title', metadata={}, source='# A toy')]
    cells += [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(sources)]
    (folder/'toy.ipynb').write_text(json.dumps(with_setup(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))), encoding='utf-8')
    return 'toy.ipynb'


def test_a_cell_of_each_kind(site, tmp_path):
    "What is left out says so in one line; ordinary cells run; after `%slow on` so do the slow ones; what is missing is one sentence."
    name = toy(tmp_path, 'import os, vitbook\nprint(vitbook.__file__, os.listdir())', '#| slow: about an hour\nwhile True: pass',
               '#| cuda\nimport torch\nassert torch.cuda.is_available()', '#| eval: false\nraise SystemExit', "print('ordinary')",
               "#| label: fig-a\n#| slow\nprint('not wanted')", '%slow on', "#| label: fig-a\n#| slow\nprint('wanted')",
               'import sys\nfrom vitbook.lab import checkout, official_code, shipped\nassert checkout() is None and (shipped()/"scoreboard").is_dir()\n'
               "try: official_code('model.py')\nexcept FileNotFoundError: get_ipython().showtraceback()",
               "from vitbook.data import cifar10\ntry: cifar10()\nexcept FileNotFoundError: get_ipython().showtraceback()")
    cells = run_alone(name, tmp_path, site)[2:]
    where, slow, cuda, shown, ordinary, slow_again, _, wanted, official, data = cells
    assert str(site) in printed(where) and "['toy.ipynb'" in printed(where)
    for cell, word in ((slow, 'about an hour'), (cuda, 'CUDA'), (shown, 'eval: false'), (slow_again, '%slow on')):
        if cell is cuda and not printed(cell): continue                       # there is a GPU
        assert printed(cell).startswith('Left out: ') and word in printed(cell) and printed(cell).count('\n') == 1
    assert printed(ordinary) == 'ordinary\n' and printed(wanted) == 'wanted\n'
    for cell, word in ((official, 'VITBOOK_OFFICIAL'), (data, 'vitbook data fetch cifar10')):
        (error,) = cell['outputs']
        assert error['output_type'] == 'error' and len(error['traceback']) == 1 and word in error['traceback'][0] and 'Traceback' not in error['traceback'][0]


@pytest.mark.parametrize('notebook', [n for n in notebooks() if EVERY or n.name in SAMPLE], ids=lambda notebook: notebook.name)
def test_notebook_runs_alone(site, tmp_path, notebook):
    shutil.copy(notebook.path, tmp_path)
    cells = [cell for cell in run_alone(notebook.path.name, tmp_path, site) if cell['cell_type'] == 'code']
    for cell in cells:
        told = directives(''.join(cell['source']))[0]
        if 'slow' in told or told.get('eval') == 'false': assert printed(cell).startswith('Left out: '), ''.join(cell['source'])[:200]
        else: assert not [o for o in cell['outputs'] if o['output_type'] == 'error']


def test_the_sample_is_in_the_book():
    chapter = next(n for n in notebooks() if n.name == SAMPLE[1])
    assert any('slow' in cell['directives'] for cell in chapter.code) and 'official_code(' in chapter.program
