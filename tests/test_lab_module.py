"""`vitbook.lab`: what is left out of a Run All, the first cell of every notebook, the chapters' helpers."""
import json, re, sys

import pytest
import torch
from torch import nn

from tools import ROOT, notebooks, run
from vitbook import lab
from vitbook.data import NotHere


class Shell:
    "What an extension sees of IPython."
    def __init__(self):
        self.input_transformers_cleanup, self.magics = [], {}

    def register_magic_function(self, function, kind, name): self.magics[name] = function

    def seen(self, source):
        "The source as the kernel would compile it."
        lines = source.splitlines(keepends=True)
        for step in self.input_transformers_cleanup: lines = step(lines)
        return ''.join(lines)


@pytest.fixture
def shell(monkeypatch):
    for name in ('VITBOOK_RUN', 'VITBOOK_SLOW', 'VITBOOK_OFFICIAL'): monkeypatch.delenv(name, raising=False)
    return Shell()


SLOW = '#| label: fig-a\n#| slow\nx = 1\n'


ORDINARY = ('x = 1', '', '#| label: fig-a\n#| fig-cap: A slow walk\nx = 1', 'x = 1\n#| slow',
            "s = '''\n#| slow\n'''", '# slow\nx = 1', '#| eval: true\nx = 1')
OTHER = (('#| slow\nx', False, ['slow', '%slow on', 'VITBOOK_SLOW=1', '--slow']),
         ('#| slow: 2 hours\nx', False, ['2 hours']),
         ('\n#|slow\nx', False, ['slow']), ('#| eval: false\nx', True, ['eval: false']),
         ('#| slow\n#| eval: false\nx', True, ['eval: false']))


@pytest.mark.parametrize('source', ORDINARY)
def test_ordinary_cells_stay_as_they_are(shell, source):
    lab.load_ipython_extension(shell)
    assert lab.left_out(source) is None and shell.seen(source) == source


@pytest.mark.parametrize('source, slow, words', OTHER)
def test_what_is_left_out_says_so_in_a_line(source, slow, words):
    line = lab.left_out(source, slow)
    assert all(word in line for word in words) and '\n' not in line


def test_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'CUDA' in lab.left_out('#| cuda\nx') and 'CUDA' in lab.left_out('#| slow\n#| cuda\nx', slow=True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert lab.left_out('#| cuda\nx') is None and 'slow' in lab.left_out('#| cuda\n#| slow\nx')


def test_the_magic(shell, capsys):
    lab.load_ipython_extension(shell)
    magic = shell.magics['slow']
    line = shell.seen(SLOW)
    exec(line)
    assert capsys.readouterr().out == lab.left_out(SLOW) + '\n'
    magic(' on ')
    assert shell.seen(SLOW) == SLOW
    magic('')
    magic('off')
    assert shell.seen(SLOW) == line
    said = capsys.readouterr().out.splitlines()
    assert said == ['slow cells run', 'slow cells run', 'slow cells are left out']
    from IPython.core.error import UsageError
    with pytest.raises(UsageError, match="got 'yes'"):
        magic('yes')
    assert shell.seen(SLOW) == line


@pytest.mark.parametrize('value, runs', [('1', True), ('0', False), ('', False)])
def test_the_environment(shell, monkeypatch, value, runs):
    monkeypatch.setenv('VITBOOK_SLOW', value)
    lab.load_ipython_extension(shell)
    assert (shell.seen(SLOW) == SLOW) == runs


def test_loading_twice_and_unloading(shell):
    other = lambda lines: lines
    shell.input_transformers_cleanup.append(other)
    for _ in range(2):
        lab.load_ipython_extension(shell)
    assert len(shell.input_transformers_cleanup) == 2
    shell.magics['slow']('on')
    assert shell.seen(SLOW) == SLOW, 'the magic belongs to the step that is there'
    lab.unload_ipython_extension(shell)
    assert shell.input_transformers_cleanup == [other]


def test_under_vitbook_run_nothing_changes(shell, monkeypatch):
    monkeypatch.setenv('VITBOOK_RUN', '1')
    lab.load_ipython_extension(shell)
    assert not shell.input_transformers_cleanup and not shell.magics and shell.seen(SLOW) == SLOW


def test_in_a_real_ipython():
    "The first cell as it stands, then cells; what is missing is one sentence."
    cells = [lab.SETUP, '#| slow\nprint("unwanted")', '%slow', '%slow on', '#| slow\nprint("wanted")',
             'from vitbook.lab import *\nofficial_code("a.py")', '%slow perhaps']
    program = ('import json, os, sys\n'
               'from IPython.core.interactiveshell import InteractiveShell\n'
               'os.environ.pop("VITBOOK_RUN", None)\n'
               'ip = InteractiveShell.instance(colors="NoColor")\n'
               'for cell in json.loads(sys.argv[1]): ip.run_cell(cell)')
    extra = dict(PYTHONPATH=str(ROOT), VITBOOK_SLOW='', VITBOOK_OFFICIAL='')
    done = run(sys.executable, '-c', program, json.dumps(cells), **extra)
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert lines[0].startswith('Left out: a slow cell')
    assert lines[1:4] == ['slow cells are left out', 'slow cells run', 'wanted']
    assert lines[4].startswith('NotHere: this cell needs a.py')
    assert lines[5].startswith('UsageError: %slow takes on or off') and len(lines) == 6


# ---- the first cell

@pytest.mark.parametrize('notebook', notebooks(), ids=lambda notebook: notebook.name)
def test_every_notebook_has_the_first_cell(notebook):
    title, cell = notebook.cells[:2]
    assert title['cell_type'] == 'markdown' and cell['cell_type'] == 'code' and cell['id'] == 'setup'
    assert cell['source'] == lab.SETUP, 'vitbook.lab.with_setup renews it'
    rest = ''.join(c['source'] for c in notebook.code[1:])
    assert notebook.slug == 'lab' or '%load_ext vitbook' not in rest
    raw = json.loads(notebook.path.read_text(encoding='utf-8'))
    assert lab.with_setup(raw)['cells'] == raw['cells'], 'with_setup changes nothing more'


def test_the_first_cell_is_put_in_and_renewed():
    cells = [dict(cell_type='markdown', id='a', metadata={}, source=['# T']),
             dict(cell_type='code', id='b', metadata={}, source=['x'], outputs=[], execution_count=None)]
    nb = dict(cells=cells, metadata=dict(m=1), nbformat=4, nbformat_minor=5)
    new = lab.with_setup(nb)
    assert [c['id'] for c in new['cells']] == ['a', 'setup', 'b'] and new['metadata'] == dict(m=1)
    assert len(nb['cells']) == 2, 'the given notebook stays as it is'
    assert ''.join(new['cells'][1]['source']) == lab.SETUP
    old = dict(nb, cells=[cells[0], cells[1], dict(new['cells'][1], source=['import os'])])
    assert lab.with_setup(old) == new == lab.with_setup(new)


def test_the_library_is_installed_only_where_it_is_missing(monkeypatch):
    "The first cell without its magic line: pip is asked for exactly when there is no vitbook."
    import builtins, importlib.util
    asked = []
    class Ip:
        def run_line_magic(self, *words): asked.append(words)
    monkeypatch.setattr(builtins, 'get_ipython', Ip, raising=False)
    code = re.sub(r'^%.*$', '', lab.SETUP, flags=re.M)
    exec(code, {})
    assert not asked
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    exec(code, {})
    assert asked == [('pip', 'install -q "vitbook[book]"')]


# ---- what may be missing

def test_official_code(shell, monkeypatch, tmp_path):
    two = ('a.py', 'b.py')
    for files, words in ((two, 'a.py, b.py of the official code'), ((), "the papers' official code")):
        with pytest.raises(NotHere, match=re.escape(words)) as e: lab.official_code(*files)
        assert 'VITBOOK_OFFICIAL' in str(e.value) and '\n' not in str(e.value)
    monkeypatch.setenv('VITBOOK_OFFICIAL', str(tmp_path))
    (tmp_path/'a.py').touch()
    assert lab.official_code() == lab.official_code('a.py') == tmp_path
    with pytest.raises(NotHere, match=f'{tmp_path}, where b.py of') as e: lab.official_code('a.py', 'b.py')
    assert isinstance(e.value, FileNotFoundError) and e.value._render_traceback_() == [f'NotHere: {e.value}']


def test_checkout_and_what_is_shipped(monkeypatch, tmp_path):
    assert lab.checkout() == ROOT and lab.shipped() == ROOT/'data'
    other = tmp_path/'clone'
    (other/'nbs'/'part').mkdir(parents=True)
    (other/'settings.ini').touch()
    monkeypatch.chdir(other/'nbs'/'part')
    assert lab.checkout() == other, 'the one around the working folder comes first'
    monkeypatch.chdir(tmp_path)
    assert lab.checkout() == ROOT, 'then the one around the library'
    monkeypatch.setattr(lab, '__file__', str(tmp_path/'site'/'vitbook'/'lab.py'))
    assert lab.checkout() is None and lab.shipped() == tmp_path/'site'/'vitbook'/'_data'


# ---- the helpers

def test_gen():
    plain = torch.Generator().manual_seed(3)
    assert torch.randn(5, generator=lab.gen(3)).equal(torch.randn(5, generator=plain))
    assert not torch.randn(5, generator=lab.gen(3)).equal(torch.randn(5, generator=lab.gen(4)))


def test_noisy():
    def zeros():
        net = nn.Sequential(nn.Linear(40, 50), nn.Linear(40, 50))
        for p in net.parameters(): nn.init.zeros_(p)
        return net
    net = zeros()
    assert lab.noisy(net, .5, seed=1) is net and net.training
    values = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert (values != 0).all() and abs(values.std().item() - .5) < .02
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())
    assert not net[0].weight.equal(net[1].weight), 'like shapes get numbers of their own'
    same, other = lab.noisy(zeros(), .5, seed=1), lab.noisy(zeros(), .5, seed=2)
    assert same[0].weight.equal(net[0].weight) and not other[0].weight.equal(net[0].weight)
    assert not lab.noisy(zeros().eval()).training


def test_refused_and_says(capsys):
    def wrong(): raise ValueError('wanted four, got five')
    assert lab.refused(wrong) == lab.refused(wrong, 'four', 'five') == 'wanted four, got five'
    assert capsys.readouterr().out == ''
    assert lab.says(wrong, 'four') == 'wanted four, got five'
    assert capsys.readouterr().out == 'ValueError: wanted four, got five\n'
    for check in (lab.refused, lab.says):
        with pytest.raises(AssertionError, match='nothing was refused'):
            check(lambda: None)
        with pytest.raises(AssertionError, match='six is not in the message: wanted four'):
            check(wrong, 'four', 'six')
        with pytest.raises(KeyError):
            check(lambda: {}['a'])
        with pytest.raises(ValueError):
            check(wrong, kinds=(KeyError, TypeError))
    assert capsys.readouterr().out == ''
    assert lab.says(lambda: {}['a'], kinds=(KeyError, TypeError)) == "'a'"
    assert capsys.readouterr().out == "KeyError: 'a'\n"


def test_notebooks_define_none_of_them():
    "One home for each: no notebook but this module's own defines what lab offers."
    for notebook in notebooks():
        if notebook.slug == 'lab': continue
        found = re.findall(r'^def (gen|noisy|refused|refuses)\(', notebook.program, re.M)
        assert not found, f'{notebook.name} defines {found}: import it from vitbook.lab'
        assert 'VITBOOK_OFFICIAL' not in notebook.program, f'{notebook.name}: ask official_code'


def test_explain_keeps_the_comments(capsys):
    "Of a function, a method, a class, and what a decorator wraps; one-line functions too."
    from vitbook.lab import explain, gen, noisy
    from vitbook.layers.attention import Attention, attention
    from vitbook.layers.block import DropPath
    text = explain(attention)
    assert capsys.readouterr().out == text + '\n'
    assert "# True = may look; broadcasts to b h n m" in text and '-> Float[Tensor, ' in text and 'Source: arXiv:1706.03762' in text and 'has_torch_function' not in text
    assert text.startswith('def attention(q: Float')
    assert 'class Attention' in (text := explain(Attention)) and '# width of a token' in text and 'super' not in text
    assert '# cos, sin of the last m tokens' in explain(Attention.forward) and 'def gen(seed: int)' in explain(gen) and '# standard deviation' in explain(noisy)
    assert explain(DropPath.forward) == "def forward(self, x: Float[Tensor, 'b *rest']) -> Float[Tensor, 'b *rest']:"
    with pytest.raises(ValueError, match='f must be written in Python'): explain(len)
