"""The library is what the notebooks export, the notebooks are clean, and imports go down only."""
import ast, filecmp, importlib, re, sys
from pathlib import Path

import pytest

from tools import CHAPTERS, NEEDED, ROOT, copy_of_repo, dotted, exported, imports, modules, notebooks, run

MIDDLE = {'bench', 'book', 'diagram', 'lab', 'lock', 'weights', 'vit', 'registry', 'backbone', 'train', 'probe', 'see',
          'measure', 'judge', 'data', 'flow', 'names'}
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


NAMED_OTHERWISE = {'lab': 'lab_module', 'timeseries': 'series'}     # test_lab.py is JupyterLab's


@pytest.mark.parametrize('path', [path for path in modules() if exported(path) and dotted(path) != 'vitbook' and dotted(path).split('.')[1] not in CHAPTERS], ids=dotted)
def test_each_module_outside_the_chapters_has_a_test_file_of_its_own(path):
    "One obvious place: tests/test_MODULE.py, which imports it."
    name = dotted(path)
    word = name.rpartition('.')[2]
    home = ROOT/'tests'/f'test_{NAMED_OTHERWISE.get(word, word)}.py'
    assert home.exists(), f'{name} has no tests/{home.name}'
    source = ast.parse(home.read_text(encoding='utf-8'))
    used = {target for target, *_ in imports(source, 'tests')}
    assert any(target == name or target.startswith(f'{name}.') for target in used), f'tests/{home.name} does not import {name}'


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
    if name == 'vitbook': own = 4           # what the package offers by name it imports when asked: `test_import_is_quick`
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


def round_trips(graph):
    "Modules from which imports lead back to themselves, each with the way."
    def ways(name, way):
        for target in graph[name]:
            if target == way[0]: yield [*way, target]
            elif target not in way: yield from ways(target, [*way, target])
    return {name: way for name in graph if (way := next(ways(name, [name]), None))}


def graph_of(sources):
    """Module -> modules it imports, also inside functions.

    What only type checkers read does not count."""
    graph = {}
    for name, (source, package) in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            said = isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
            if said: node.body = [ast.Pass()]
        found = {target for target, *_ in imports(ast.parse(ast.unparse(tree)), package)}
        homes = {next((m for m in (t, t.rpartition('.')[0]) if m in sources), None) for t in found}
        graph[name] = homes - {None, name, 'vitbook'}
    return graph


def test_no_import_comes_back():
    "Whoever is imported never imports back, not even inside a function, where Python would not mind."
    def package(path):
        return dotted(path) if path.name == '__init__.py' else dotted(path).rpartition('.')[0]
    sources = {dotted(path): (path.read_text(encoding='utf-8'), package(path))
               for path in modules()}
    ways = round_trips(graph_of(sources))
    assert not ways, '; '.join(' -> '.join(way) for way in ways.values())


def test_a_round_trip_is_seen():
    a, b = 'vitbook.a', 'vitbook.b'
    for one, other in (('from . import b', 'from .a import x'),
                       ('def f(): from vitbook.b import y', 'import vitbook.a')):
        assert set(round_trips(graph_of({a: (one, 'vitbook'), b: (other, 'vitbook')}))) == {a, b}
    only_said = 'from typing import TYPE_CHECKING\nif TYPE_CHECKING: from .a import x'
    assert not round_trips(graph_of({a: ('from . import b', 'vitbook'), b: (only_said, 'vitbook')}))


def private_imports(source):
    "Lines that take another module's private name: `from .x import _y`, or `x._y` of an imported module x."
    tree, aliases = ast.parse(source), set()
    ours = lambda node: node.level or (node.module or '').split('.')[0] == 'vitbook'
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and ours(node):
            named = [a.name for a in node.names]
            aliases |= {a.asname or a.name for a in node.names}
            yield from (f'line {node.lineno} imports {name}' for name in named
                        if re.match('_[^_]', name))
    for node in ast.walk(tree):
        private = isinstance(node, ast.Attribute) and re.match('_[^_]', node.attr)
        if private and isinstance(node.value, ast.Name) and node.value.id in aliases and node.value.id.islower():
            yield f'line {node.lineno} reads {node.value.id}.{node.attr}'


@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_no_module_takes_a_private_name(path):
    assert not list(private_imports(path.read_text(encoding='utf-8')))


@pytest.mark.parametrize('notebook', [book for book in notebooks() if book.module],
                         ids=lambda book: book.name)
def test_no_notebook_takes_a_private_name(notebook):
    for cell in notebook.code:
        lines = ['' if line.lstrip().startswith(('%', '!')) else line
                 for line in cell['source'].split('\n')]
        assert not list(private_imports('\n'.join(lines)))


def test_private_names_are_seen():
    for source in ('from .x import _y', 'from vitbook.x import y, _z', 'from . import x\nx._y()',
                   'from ..a import b as c\nc._d'):
        assert list(private_imports(source)), source
    for source in ('from .x import y', 'from torch import _C', 'from .x import __version__', 'self._y',
                   'from vitbook._models import MODELS'):
        assert not list(private_imports(source)), source


@pytest.mark.parametrize('path', [path for path in modules() if path.stem not in TOP], ids=dotted)
def test_module_level_imports_are_the_few_needed(path):
    name = dotted(path)
    allowed = {*NEEDED, 'vitbook', *sys.stdlib_module_names}
    for target, line, top, guarded in imports(
        ast.parse(path.read_text(encoding='utf-8')),
        name if path.name == '__init__.py' else name.rpartition('.')[0]):
        package = target.split('.')[0]
        if top and not (
            package in allowed
            or (package == 'triton' and guarded and name.startswith('vitbook.kernels'))):
            raise AssertionError(f'{name}:{line} imports {package} at module level; import it '
                                 'inside the function that needs it')


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


def test_names_of_the_package():
    "In a fresh interpreter every module and part is there after `import vitbook`, as are a module of a part and the docstring; a typo is no attribute."
    program = """import vitbook
assert vitbook.__doc__.startswith('A workbook on vision Transformers'), vitbook.__doc__
names = [n for n in dir(vitbook) if not n.startswith('_')]
print(*(n for n in names if getattr(vitbook, n) is not None))
print(vitbook.layers.attention.attention.__name__, vitbook.tokens.token_routing.routed.__name__)
for at, name in (vitbook, 'atention'), (vitbook, '_missing'), (vitbook.layers, 'atention'):
    try: getattr(at, name)
    except AttributeError as e: assert f'{at.__name__!r} has no attribute {name!r}' in str(e), e
    else: raise AssertionError(name)"""
    names, parts = run(sys.executable, '-c', program, PYTHONPATH=str(ROOT)).stdout.splitlines()
    ours = {dotted(path).split('.')[1] for path in modules() if path != ROOT/'vitbook'/'__init__.py'}
    assert ours | {'create_model', 'list_models', 'load_checkpoint', 'model_info'} <= set(names.split()) and parts == 'attention routed'
    lazy = {path.parent.name for path in (ROOT/'vitbook').glob('*/__init__.py') if not exported(path)}
    assert all(f"'{name}'" in (ROOT/'vitbook'/'__init__.py').read_text(encoding='utf-8') for name in lazy), 'a package whose modules are not found after `import vitbook`'


def test_types_are_told():
    "The mark is there, overloads say what comes back, and type checkers are told of the names that `vitbook` finds when asked."
    assert (ROOT/'vitbook'/'py.typed').is_file()
    def returns(module, name):
        tree = ast.parse((ROOT/'vitbook'/module).read_text(encoding='utf-8'))
        return [ast.unparse(f.returns) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == name and [ast.unparse(d) for d in f.decorator_list] == ['overload']]
    assert [('Tensor' in r, 'Attended' in r) for r in returns('layers/attention.py', 'attention')] == [(True, False), (False, True), (False, True), (True, True)]
    assert returns('registry.py', 'create_model') == ['FeatureMaps', 'nn.Module', 'nn.Module']
    tree = ast.parse((ROOT/'vitbook'/'__init__.py').read_text(encoding='utf-8'))
    block, = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING')
    told = {alias.name: node.module for node in block.body for alias in node.names}
    import vitbook
    assert {name for name, module in told.items() if module} == set(vitbook.__all__)
    for name, module in told.items(): assert getattr(vitbook, name) is getattr(importlib.import_module(f'vitbook.{module}'), name) if module else importlib.import_module(f'vitbook.{name}')


def undocumented(tree):
    "Public functions, classes and methods without a docstring; a class speaks for its `forward`, a model's builder is told its own by `register_model`."
    def is_(node, *names): return any(name in ast.unparse(d) for d in node.decorator_list for name in names)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith('_') or is_(node, 'overload', 'register_model'): continue
        if not ast.get_docstring(node): yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f'{node.name}.{m.name}' for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith('_') and m.name != 'forward' and not ast.get_docstring(m))


@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_every_public_name_says_what_it_gives(path):
    assert not list(undocumented(ast.parse(path.read_text(encoding='utf-8')))), 'without a docstring'


def test_docstrings_are_watched():
    source = 'def f(): pass\n@overload\ndef g(): pass\ndef _h(): pass\nclass A:\n    "An A."\n    def forward(self): pass\n    def m(self): return 1\nclass B: pass'
    assert list(undocumented(ast.parse(source))) == ['f', 'A.m', 'B']


def test_every_model_says_what_it_is():
    "By a docstring of its own, or one that names its class and its paper."
    from vitbook.registry import _entry, list_models
    for name in list_models(): assert _entry(name).build.__doc__, name
    entry = _entry('cvt_13')
    assert entry.build.__doc__ == f'CvT in the size of cvt_13; takes the arguments of CvT. Source: arXiv:{entry.paper}.'


def test_mechanisms_need_only_the_few(bare):
    "Every module but the command line, imported in an environment that has nothing else."
    names = [dotted(path) for path in modules() if path.stem not in TOP]
    program = f'import importlib\nfor name in {names}: importlib.import_module(name)\nprint("imported", len({names}))'
    done = run(bare, '-c', program, PYTHONPATH=str(ROOT), cwd=Path(bare).parent)
    assert f'imported {len(names)}' in done.stdout
    assert run(bare, '-c', 'import matplotlib', check=False).returncode, 'the clean environment is not clean'
