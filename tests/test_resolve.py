"""What `make` installs can be installed by a stranger: every extra with the pins of the book, from the public index alone, for the oldest and the newest Python.

On a machine with a CPU build of torch at hand, pip cannot tell: that build leaves out what the public one requires. uv reads the public metadata without fetching the wheels."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

from tools import ROOT, settings

UV = Path(sys.executable).with_name('uv')
PYTHONS = '3.10', '3.14'


def constraints(folder, text=None):
    path = folder/'constraints.txt'
    path.write_text('\n'.join((text or settings()['constraints']).split()))
    return path


def resolve(python, constraints, extra='dev'):
    "uv's answer, resolved as on an ordinary Linux by somebody who has configured nothing."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(('PIP_', 'UV_'))}
    bundle = next((str(p) for p in map(Path, ('/etc/ssl/certs/ca-certificates.crt', '/etc/ssl/cert.pem')) if p.is_file()), None)
    if bundle: kept.setdefault('SSL_CERT_FILE', bundle)
    return subprocess.run([UV, 'pip', 'compile', '--no-config', '--quiet', '--no-header', '--no-annotate', '--python-version', python, '--python-platform', 'x86_64-manylinux_2_28',
                           '-c', constraints, '--extra', extra, 'setup.py'], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=570)


@pytest.fixture(scope='module', autouse=True)
def reachable(tmp_path_factory):
    if not UV.is_file(): pytest.skip('uv is not installed')
    done = subprocess.run([UV, 'pip', 'compile', '--no-config', '--quiet', '-'], input='einops', capture_output=True, text=True, env={k: v for k, v in os.environ.items() if not k.startswith(('PIP_', 'UV_'))})
    if done.returncode: pytest.skip('the package index cannot be reached')


@pytest.mark.xdist_group('resolve')
@pytest.mark.parametrize('python', PYTHONS)
def test_every_extra_resolves(python, tmp_path):
    done = resolve(python, constraints(tmp_path))
    assert done.returncode == 0, done.stderr
    found = dict(line.split('==') for line in done.stdout.split() if '==' in line)
    assert found['torch'] == '2.13.0' and {'triton', 'nbdev', 'jupyterlab', 'accelerate'} <= found.keys()
    every = {key.removesuffix('_requirements') for key in settings() if key.endswith('_requirements')} - {'dev'}
    words = {word for extra in (*every, 'dev') for word in settings()[f'{extra}_requirements'].split() if word.startswith('@')}
    assert every - {'book'} <= {word[1:] for word in words} | {'book'}, 'dev takes in every extra, so that one answer is about all'


@pytest.mark.xdist_group('resolve')
def test_a_pin_that_torch_contradicts_is_seen(tmp_path):
    done = resolve('3.11', constraints(tmp_path, 'torch==2.13.0 triton==3.9.0'), extra='gpu')
    assert done.returncode and 'triton' in done.stderr
