"""Before anything is imported: one thread, no network, figures without a window, Triton interpreted without a GPU.

VITBOOK_THREADS is another number of threads: to find what hangs on the last bit (CONTRIBUTING, Other processors)."""
import os, shutil, sys, zlib
from pathlib import Path

THREADS = os.environ.get('VITBOOK_THREADS', '1')
os.environ.update(OMP_NUM_THREADS=THREADS, MKL_NUM_THREADS=THREADS)
os.environ.update(HF_HUB_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE/'offline')]
if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')    # without a GPU Python runs the Triton kernels; it must be said before Triton is imported
import sitecustomize  # noqa: F401,E402  (an environment may already have loaded one of its own, see below)

if 'VITBOOK_OFFLINE_TEST' not in os.environ: exec((HERE/'offline'/'sitecustomize.py').read_text())

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile('vitbook', deadline=None, derandomize=True, database=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('vitbook')


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run every notebook and every chapter\'s tests, also what the lock vouches for')
    parser.addoption('--chapter', metavar='SLUG', help="only a chapter's own tests: its folder under tests/chapters, and its models in the contract")
    parser.addoption('--shard', metavar='K/N', help='the K-th of N parts of everything')


def pytest_configure(config):
    if slug := config.getoption('--chapter'): os.environ['VITBOOK_CHAPTER'] = slug      # the contract looks at the models of this chapter alone


def name_of(item):
    "The model that a test of the contract is about; '' for other tests, and where a chapter has no models."
    name = item.callspec.params.get('name') if hasattr(item, 'callspec') else None
    return name if isinstance(name, str) else ''


def chapter_of(item):
    "The chapter whose own test this is: by its folder, or, for what is dear in the contract, by its model; '' for everybody's."
    parts = item.path.relative_to(HERE).parts
    if parts[0] == 'chapters': return parts[1]
    if not item.get_closest_marker('dear') or not (name := name_of(item)): return ''
    from vitbook.registry import model_info
    return model_info(name)['chapter']


def pytest_collection_modifyitems(config, items):
    """What the lock vouches for is left out of `make test`, unless all is asked for; of a chapter only what is its own.

    The longest files come first, so that two workers end together."""
    first = ['test_notebooks.py', 'test_api.py', 'test_lab.py', 'test_wheel.py']
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
    shard = config.getoption('--shard')
    if shard:
        k, n = map(int, shard.split('/'))
        mine = [item for item in items if item.path.name == 'test_notebooks.py' or zlib.crc32(str(item.path.relative_to(HERE)).encode()) % n == k - 1]
        config.hook.pytest_deselected(items=[item for item in items if item not in {*mine}])
        items[:] = mine
    slug, left = config.getoption('--chapter'), []
    whole = all(Path(name.partition('::')[0]).resolve() == HERE for name in config.args) and not config.option.keyword
    if slug: left = [item for item in items if chapter_of(item) != slug and not name_of(item)]
    elif whole and not config.getoption('--all'):
        from plan import stale_tests
        left = [item for item in items if (own := chapter_of(item)) and own not in stale_tests()]
    config.hook.pytest_deselected(items=left)
    gone = {*left}
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random numbers, whichever tests ran before it."
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def bare(tmp_path_factory):
    "The Python of a clean environment with torch, einops, numpy, jaxtyping, safetensors and what these need."
    from tools import bare_environment
    return bare_environment(tmp_path_factory.mktemp('bare')/'env')


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "The files of `python -m build`: the sdist, and the wheel made from that sdist."
    from tools import copy_of_repo, run
    copy, out = copy_of_repo(tmp_path_factory.mktemp('wheel')/'repo'), tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, cwd=copy, PYTHONPATH='')
    (sdist,), (wheel,) = out.glob('*.tar.gz'), out.glob('*.whl')
    return sdist, wheel


@pytest.fixture
def unchecked():
    "The shape checks of the test run switched off: what a user sees, who has no import hook."
    from jaxtyping import config
    config.update('jaxtyping_disable', True)
    yield
    config.update('jaxtyping_disable', False)
