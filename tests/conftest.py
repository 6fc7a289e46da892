"""Before anything is imported: one thread, no network, figures without a window, Triton interpreted where there is no GPU."""
import os, shutil, sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE/'offline')]
if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')    # without a GPU Python runs the Triton kernels; it must be said before Triton is imported
import sitecustomize  # noqa: F401,E402  (an environment may already have loaded one of its own, see below)

if 'VITBOOK_OFFLINE_TEST' not in os.environ: exec((HERE/'offline'/'sitecustomize.py').read_text())

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile('vitbook', deadline=None, derandomize=True, database=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('vitbook')


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
