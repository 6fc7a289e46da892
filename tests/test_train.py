"""Training: killed and resumed, on two processes, with a loss that breaks, with checkpoints that are damaged, foreign or cannot be written."""
import json, os, signal, sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from tools import ROOT, run

pytest.importorskip('accelerate', reason='training needs accelerate')
WORKER = ROOT/'tests'/'worker.py'


def worker(out, *words, check=True, launcher=(sys.executable,)):
    out.mkdir(exist_ok=True)
    return run(*launcher, WORKER, out, *words, PYTHONPATH=str(ROOT), check=check, cwd=out, VITBOOK_DEVICE='cpu')


def weights(out): return load_file(out/'weights.safetensors')


# ---- killed and resumed

@pytest.mark.train
def test_killed_and_resumed_is_bit_identical(tmp_path):
    "SIGKILL after step 5 and again after step 9, between checkpoints; with dropout and stochastic depth the random numbers must go on as well."
    words = ['--dropout', .2]
    worker(tmp_path/'whole', *words)
    for at in (5, 9):
        done = worker(tmp_path/'killed', *words, '--kill-at', at, check=False)
        assert done.returncode == -signal.SIGKILL and not (tmp_path/'killed'/'weights.safetensors').exists(), done.stderr
    worker(tmp_path/'killed', *words)
    one, other = weights(tmp_path/'whole'), weights(tmp_path/'killed')
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert json.loads((tmp_path/'whole'/'losses.json').read_text()) == json.loads((tmp_path/'killed'/'losses.json').read_text()), 'the history goes on too'
    assert not [path for path in (tmp_path/'killed').iterdir() if path.name.startswith('.')], 'half a checkpoint was left'


@pytest.mark.train
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    worker(tmp_path/'one', '--batch', 16)
    worker(tmp_path/'two', '--batch', 8, launcher=(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'))
    one, two = (torch.tensor(json.loads((tmp_path/name/'losses.json').read_text())) for name in ('one', 'two'))
    assert len(one) == 12 and one[-1] < one[0]
    assert_close(two, one, atol=1e-5, rtol=1e-5)
    a, b = weights(tmp_path/'one'), weights(tmp_path/'two')
    for name in a: assert_close(b[name], a[name], atol=1e-4, rtol=1e-3)


# ---- in this process: a model of two layers

def small(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 3))


def train(model, **more):
    from accelerate import Accelerator
    from vitbook.train import batches, fit
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return fit(model, batches(x, (x.sum(1) > 0).long(), batch_size=8), **{**dict(steps=6, accelerator=Accelerator(cpu=True), progress=False, checkpoint_every=2), **more})


def test_it_learns_and_says_what_happened():
    history = train(small(), steps=60, lr=3e-2, warmup=5)
    losses, rates = history['loss'], history['lr']
    assert len(losses) == 60 and sum(losses[-8:]) < .5 * sum(losses[:8])
    assert rates.index(max(rates)) == 5 and max(rates) == pytest.approx(3e-2, rel=1e-6) and rates[-1] < 1e-3 and rates[0] == pytest.approx(3e-2 / 6), 'warm-up, then cosine'


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    "With step, loss and learning rate; the weights are those of the step before, and so is the checkpoint."
    from vitbook.train import NonFiniteLoss, cross_entropy, read_checkpoint
    seen, kept = [], {}
    def loss(model, batch):
        seen.append(1)
        if len(seen) == 5: kept.update({name: value.clone() for name, value in model.state_dict().items()})
        return cross_entropy(model, batch) * (bad if len(seen) == 5 else 1.)
    model = small()
    with pytest.raises(NonFiniteLoss) as caught: train(model, loss=loss, checkpoint=tmp_path/'run.safetensors', lr=.25, schedule='constant')
    text = str(caught.value)
    assert 'step 4' in text and str(bad) in text and '0.25' in text and (caught.value.step, caught.value.lr) == (4, .25)
    assert all(torch.equal(kept[name], value) and value.isfinite().all() for name, value in model.state_dict().items())
    assert read_checkpoint(tmp_path/'run.safetensors')['step'] == 4


def test_gradients_are_clipped():
    history = train(small(), loss=lambda model, batch: 1e4 * model(batch[0]).square().mean(), clip=1., optimizer=None)
    assert min(history['grad_norm']) > 10, 'the norm before clipping is what is told'
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, loss=lambda model, batch: 1e4 * model(batch[0]).square().mean(), clip=1., steps=1, schedule='constant', optimizer=torch.optim.SGD(model.parameters(), lr=1.))
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before)]).norm()
    assert moved == pytest.approx(1., rel=1e-3), 'with plain SGD at rate 1 the step is as long as the clipped gradient'


# ---- checkpoints

@pytest.mark.parametrize('damage', ['truncated', 'altered', 'empty', 'text', 'foreign'])
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, damage):
    from vitbook.train import CheckpointError
    path = tmp_path/'run.safetensors'
    train(small(), checkpoint=path)
    whole = path.read_bytes()
    if damage == 'foreign': save_file({'a': torch.zeros(3)}, path)
    else: path.write_bytes({'truncated': whole[:len(whole) // 2], 'altered': b'\xff' * 16 + whole[16:], 'empty': b'', 'text': b'{"model": "none"}' * 9}[damage])
    before, model = path.read_bytes(), small(1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='run.safetensors'): train(model, checkpoint=path)
    assert path.read_bytes() == before and all(torch.equal(weights[name], value) for name, value in model.state_dict().items()), 'nothing may be lost'


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    from vitbook.train import CheckpointError
    path = tmp_path/'run.safetensors'
    train(small(), checkpoint=path)
    before, other = path.read_bytes(), small(width=9)
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match='another model'): train(other, checkpoint=path)
    assert path.read_bytes() == before and all(torch.equal(weights[name], value) for name, value in other.state_dict().items())
    train(other, checkpoint=path, resume=False)
    assert path.read_bytes() != before, 'asked for, the old one is replaced'


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='POSIX only')
def test_an_unwritable_folder_is_found_out_before_the_first_step(tmp_path):
    "A file where the folder should be stops root as well as everyone else."
    (tmp_path/'taken').write_text('a file')
    steps = []
    with pytest.raises(OSError, match='checkpoint'): train(small(), checkpoint=tmp_path/'taken'/'run.safetensors', callbacks=[lambda moment: steps.append(moment.step)])
    assert not steps and (tmp_path/'taken').read_text() == 'a file'


FULL = '''
import resource, sys, torch
from pathlib import Path
from torch import nn
from vitbook.train import read_checkpoint, save_checkpoint
path, model = Path(sys.argv[1])/'run.safetensors', nn.Linear(300, 300)
save_checkpoint(path, model, step=1)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))          # as a full disk: a write past this fails
try: save_checkpoint(path, model, step=2)
except OSError as error: print('refused:', error)
print('step', read_checkpoint(path)['step'], sorted(p.name for p in path.parent.iterdir()))
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX only')
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    done = run(sys.executable, '-c', FULL, tmp_path, PYTHONPATH=str(ROOT), check=False)
    assert 'refused:' in done.stdout and "step 1 ['run.safetensors']" in done.stdout, done.stdout + done.stderr


# ---- data

def test_batches_depend_on_seed_and_step_alone():
    from vitbook.train import batches
    x = torch.arange(20)
    one, other = batches(x, batch_size=6, seed=1), batches(x, batch_size=6, seed=1)
    assert torch.equal(one.at(11)[0], other.at(11)[0]) and not torch.equal(one.at(0)[0], batches(x, batch_size=6, seed=2).at(0)[0])
    for epoch in range(3):
        seen = torch.cat([one.at(3 * epoch + i)[0] for i in range(3)])
        assert len(seen.unique()) == 18, 'within a pass nothing comes twice'
    assert torch.equal(torch.cat([batches(x, batch_size=3, seed=1).at(5, rank, 2)[0] for rank in (0, 1)]), one.at(5)[0]), 'two processes see halves of the batch of one'


@pytest.mark.parametrize('what, call', [
    ('batch_size', lambda b, f: b(torch.zeros(4), batch_size=5)), ('tensors', lambda b, f: b(torch.zeros(4), torch.zeros(3), batch_size=2)), ('batch_size', lambda b, f: b(torch.zeros(4), batch_size=0)),
    ('steps', lambda b, f: f(small(), b(torch.zeros(4, 4), batch_size=2), steps=0)), ('schedule', lambda b, f: f(small(), b(torch.zeros(4, 4), batch_size=2), steps=1, schedule='cosin'))])
def test_bad_arguments(what, call, unchecked):
    from vitbook.train import batches, fit
    with pytest.raises(ValueError, match=what): call(batches, fit)
