"""What is published: sdist and wheel are built, the wheel goes into a clean environment without any extra, is imported and used from the command line."""
import sys, tarfile, zipfile

import pytest

from tools import ROOT, bare_environment, dotted, modules, run, settings

pytestmark = pytest.mark.wheel


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    "A clean environment with the wheel in it; its folder of programs."
    python = bare_environment(tmp_path_factory.mktemp('clean')/'env')
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', '--quiet', built[1], PYTHONPATH='')
    return python.parent


def test_names_and_contents(built):
    sdist, wheel = built
    version = settings()['version']
    assert wheel.name == f'vitbook-{version}-py3-none-any.whl' and sdist.name == f'vitbook-{version}.tar.gz'
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f'{dotted(path).replace(".", "/")}.py' if path.name != '__init__.py' else str(path.relative_to(ROOT)) for path in modules()} <= inside, 'a module is missing'
    assert {'vitbook/py.typed', 'vitbook/_data/manifest.json', 'vitbook/_models.py', 'vitbook/_data/scoreboard/histoformer.json', 'vitbook/_data/scoreboard/long/histoformer.json'} <= inside
    assert not [name for name in inside if name.endswith('.ipynb') or 'tests/' in name or 'nbs/' in name or '__pycache__' in name or '/downloads/' in name]
    assert {name.split('/')[0] for name in inside} == {'vitbook', f'vitbook-{version}.dist-info'}
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 5e6, 'the wheel is for code and small files'
    source = {name.split('/', 1)[-1] for name in tarfile.open(sdist).getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'data/manifest.json'} <= source


def test_metadata(built):
    wheel = zipfile.ZipFile(built[1])
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))).decode()
    needs = [line.removeprefix('Requires-Dist: ') for line in text.splitlines() if line.startswith('Requires-Dist: ')]
    always = sorted(need for need in needs if 'extra ==' not in need)
    assert sorted(word.split('>')[0] for word in always) == ['einops', 'jaxtyping', 'numpy', 'safetensors', 'torch'], always
    for extra in ('book', 'train', 'gpu', 'data', 'dev'): assert f'Provides-Extra: {extra}' in text
    assert 'Requires-Python: >=3.10' in text and '# ' in text, 'the README is the description'


def test_the_environment_is_clean(installed):
    for name in ('matplotlib', 'pandas', 'sklearn', 'accelerate', 'nbdev', 'rich', 'typer', 'yaml'):
        assert run(installed/'python', '-c', f'import {name}', check=False, PYTHONPATH='', cwd=installed).returncode, f'{name} is there'


PROGRAM = '''
import importlib, pkgutil, sys, torch, vitbook
assert 'site-packages' in vitbook.__file__, vitbook.__file__
assert vitbook.__version__ == sys.argv[1]
names = [module.name for module in pkgutil.walk_packages(vitbook.__path__, 'vitbook.')]
for name in names: importlib.import_module(name)
from vitbook.registry import create_model, list_models, model_info
for name in list_models():
    info = model_info(name)
    model = create_model(name, **info['example']).eval()
    if info['input_shape']: model(torch.rand(1, *info['input_shape']))
from vitbook.data import manifest
assert manifest(), 'the manifest of data sets came with the wheel'
print(len(names), 'modules')
'''


def test_the_wheel_is_imported_and_used(installed):
    "Every module is imported, every model built and run, with torch, einops, numpy, jaxtyping and safetensors alone."
    assert 'modules' in run(installed/'python', '-c', PROGRAM, settings()['version'], PYTHONPATH='', cwd=installed).stdout


def test_models_are_listed(installed):
    done = run(installed/'vitbook', 'models', PYTHONPATH='', cwd=installed)
    assert 'vit_base_patch16_224' in done.stdout and '2010.11929' in done.stdout
    assert 'vit_tiny_patch16_224' in done.stdout and 'deit' not in run(installed/'vitbook', 'models', 'vit_*', PYTHONPATH='', cwd=installed).stdout


@pytest.mark.parametrize('words, status', [([], 0), (['modles'], 2), (['models', '--part'], 2), (['run', 'no_such_chapter'], 2), (['data', 'fetch', 'no_such_data'], 2), (['--help'], 0)])
def test_mistakes_give_a_sentence_and_status_2(installed, words, status):
    done = run(installed/'vitbook', *words, check=False, PYTHONPATH='', cwd=installed)
    assert done.returncode == status, f'{done.stdout}\n{done.stderr}'
    assert 'Traceback' not in done.stdout + done.stderr
    if status: assert len([line for line in done.stderr.strip().splitlines() if not line.startswith(('usage:', ' '))]) == 1, done.stderr


def test_what_needs_an_extra_says_which(installed):
    "Running the book is what the extra [book] is for."
    done = run(installed/'vitbook', 'run', 'all', '--root', ROOT, '--out', installed/'out', check=False, PYTHONPATH='', cwd=installed)
    assert done.returncode == 2 and "vitbook[book]" in done.stderr and 'Traceback' not in done.stderr
