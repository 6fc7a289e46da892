"""The library is what the notebooks export, the notebooks are clean, and imports go down only."""
import ast, filecmp, re, sys
from pathlib import Path

import pytest

from tools import CHAPTERS, NEEDED, ROOT, copy_of_repo, dotted, exported, imports, modules, notebooks, run

MIDDLE = {'bench', 'book', 'lab', 'vit', 'registry', 'backbone', 'weights', 'train', 'see', 'measure', 'data', 'flow'}
TOP = {'cli'}


def tree(folder, suffix): return {str(path.relative_to(folder)) for path in folder.rglob(f'*{suffix}') if '__pycache__' not in path.parts}


@pytest.fixture(scope='module')
def copy(tmp_path_factory): return copy_of_repo(tmp_path_factory.mktemp('export')/'repo')


@pytest.mark.export
def test_exported_code_is_in_step_with_the_notebooks(copy):
    for path in (copy/'vitbook').rglob('*.py'):
        if exported(path) or path.name == '_modidx.py': path.unlink()
    run('nbdev_export', cwd=copy, PYTHONPATH='')
    ours, fresh = tree(ROOT/'vitbook', '.py'), tree(copy/'vitbook', '.py')
    assert ours - fresh == set(), 'modules that no notebook exports'
    assert fresh - ours == set(), 'exports that are not in vitbook/: run nbdev_export'
    differ = [name for name in sorted(fresh) if not filecmp.cmp(ROOT/'vitbook'/name, copy/'vitbook'/name, shallow=False)]
    assert not differ, f'{differ} differ from what the notebooks export: change the notebook, then run nbdev_export'
    assert filecmp.cmp(ROOT/'pyproject.toml', copy/'pyproject.toml', shallow=False), 'nbdev_export would change pyproject.toml'


@pytest.mark.export
def test_notebooks_are_clean(copy):
    run('nbdev_clean', cwd=copy, PYTHONPATH='')
    changed = [name for name in sorted(tree(copy/'nbs', '.ipynb')) if not filecmp.cmp(ROOT/'nbs'/name, copy/'nbs'/name, shallow=False)]
    assert not changed, f'nbdev_clean would change {changed}'


def test_nothing_in_vitbook_is_written_by_hand():
    hand = [path for path in modules() if not exported(path)]
    assert not [path for path in hand if path.name != '__init__.py'], 'not exported from a notebook'
    for path in hand: assert re.fullmatch(r'(__version__ = "[^"]+"\s*)?', path.read_text(encoding='utf-8')), f'{path} holds code that no notebook exports'


def floor(name):
    "0 kernels, 1 layers, 2 vit … data, 3 chapters, 4 the command line; with the chapter's part and slug."
    parts = name.removesuffix('.__init__').split('.')[1:]
    if not parts: return 0, None
    if parts[0] in CHAPTERS: return 3, '.'.join(parts[:2]) if len(parts) > 1 else None
    if parts[0] in TOP: return 4, None
    if parts[0] in MIDDLE: return 2, None
    if parts[0] == 'layers': return 1, None
    if parts[0] in ('kernels', '__version__', '_models'): return 0, None   # _models is a table without code
    if not ((ROOT/'vitbook'/parts[0]).exists() or (ROOT/'vitbook'/f'{parts[0]}.py').exists()): return 4, None   # a name that the package itself offers
    raise AssertionError(f'{name} stands on no floor of the house (HOUSE.md)')


def wrong_imports(name, source, package):
    "Sentences about imports in `source`, a module called `name`, that go up or sideways."
    own, chapter = floor(name)
    for target, line, _, _ in imports(ast.parse(source), package):
        if target.split('.')[0] != 'vitbook': continue
        if target == 'vitbook.*': yield f'{name}:{line} imports everything from vitbook'; continue
        level, other = floor(target)
        if level > own: yield f'{name}:{line} imports {target}, which stands on a higher floor'
        elif level == 3 and other != chapter: yield f'{name}:{line} imports {target}, another chapter'


@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_imports_go_down_only(path):
    name = dotted(path)
    assert not list(wrong_imports(name, path.read_text(encoding='utf-8'), name if path.name == '__init__.py' else name.rpartition('.')[0]))


@pytest.mark.parametrize('notebook', [notebook for notebook in notebooks() if notebook.module], ids=lambda notebook: notebook.name)
def test_notebooks_import_down_only(notebook):
    "The same for the cells that are not exported; a foundations notebook may show a model of its own floor or below, or the command line."
    for cell in notebook.code:
        lines = '\n'.join('' if line.lstrip().startswith(('%', '!')) else line for line in cell['source'].split('\n'))
        found = [text for text in wrong_imports(f'vitbook.{notebook.module}', lines, 'vitbook') if floor(f'vitbook.{notebook.module}')[0] == 3 or 'another chapter' in text]
        assert not found


def test_the_floors_are_watched():
    "Each forbidden direction, in a line."
    for name, source in {'vitbook.layers.block': 'from vitbook.vit import VisionTransformer', 'vitbook.kernels.scan': 'def f():\n    import vitbook.layers.attention',
                         'vitbook.tokens.ats': 'from vitbook.tokens.nvit import prune', 'vitbook.train': 'from vitbook import cli',
                         'vitbook.mixers.vir': 'from ..dynamics import urpe'}.items():
        assert list(wrong_imports(name, source, name.rpartition('.')[0])), f'{name}: {source}'
    assert not list(wrong_imports('vitbook.tokens.ats', 'from ..layers.attention import attention\nfrom .. import see', 'vitbook.tokens'))


@pytest.mark.parametrize('path', [path for path in modules() if path.stem not in TOP], ids=dotted)
def test_module_level_imports_are_the_few_needed(path):
    name = dotted(path)
    allowed = {*NEEDED, 'vitbook', *sys.stdlib_module_names}
    for target, line, top, guarded in imports(ast.parse(path.read_text(encoding='utf-8')), name if path.name == '__init__.py' else name.rpartition('.')[0]):
        package = target.split('.')[0]
        if top and not (package in allowed or (package == 'triton' and guarded and name.startswith('vitbook.kernels'))):
            raise AssertionError(f'{name}:{line} imports {package} at module level; import it inside the function that needs it')


def test_source_is_python_3_10():
    for path in modules(): ast.parse(path.read_text(encoding='utf-8'), str(path), feature_version=(3, 10))


def test_import_is_quick():
    "`import vitbook` takes at most half a second of a core in a fresh interpreter, and brings no torch; nor does `vitbook models`."
    program = """import sys, time
start = time.process_time()
import vitbook
took = time.process_time() - start
from vitbook.cli import main
main(['models', 'vit_*'])
print(took, *({'torch', 'numpy'} & set(sys.modules)))"""
    seconds, *brought = run(sys.executable, '-c', program, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1].split()
    assert float(seconds) <= .5 and not brought, (seconds, brought)


def test_mechanisms_need_only_the_few(bare):
    "Every module but the command line, imported in an environment that has nothing else."
    names = [dotted(path) for path in modules() if path.stem not in TOP]
    program = f'import importlib\nfor name in {names}: importlib.import_module(name)\nprint("imported", len({names}))'
    done = run(bare, '-c', program, PYTHONPATH=str(ROOT), cwd=Path(bare).parent)
    assert f'imported {len(names)}' in done.stdout
    assert run(bare, '-c', 'import matplotlib', check=False).returncode, 'the clean environment is not clean'
