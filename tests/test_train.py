"""Training: killed and resumed, on two processes, with a loss that breaks, with checkpoints that are damaged, foreign or cannot be written."""
import collections, functools, json, math, os, random, signal, sys
from typing import NamedTuple

import numpy as np
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


def train(model, *, data=None, **more):
    from accelerate import Accelerator
    from vitbook.train import batches, fit
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    if 'accelerator' not in more: more['accelerator'] = Accelerator(cpu=True)      # accelerate keeps one state for all: another one made now would undo the given one's
    return fit(model, batches(x, (x.sum(1) > 0).long(), batch_size=8) if data is None else data, **{**dict(steps=6, progress=False, checkpoint_every=2), **more})


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


# ---- numbers that are not finite

class Spiked(nn.Module):
    "A finite loss whose gradient is nan at one step: 0 times the slope of a root at 0. Counts what its batch norm has seen."
    def __init__(self, at):
        super().__init__()
        self.at, self.calls, self.norm, self.w = at, 0, nn.BatchNorm1d(4), nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.calls += 1
        bad = (self.w.sum() * 0).clamp(min=0).sqrt() if self.calls == self.at else 0.
        return self.norm(x).square().mean() + self.w.square().mean() + bad


@pytest.mark.parametrize('clip', [1., None])
@pytest.mark.parametrize('at', [1, 3, 6])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, clip, at):
    "Weights, statistics and checkpoint are those before the step, the last one too."
    from vitbook.train import NonFiniteLoss, read_checkpoint
    model, path, states = Spiked(at), tmp_path/'run.safetensors', []
    copied = lambda: {name: value.clone() for name, value in model.state_dict().items()}
    states.append(copied())
    with pytest.raises(NonFiniteLoss, match=f'gradient is nan.*step {at - 1}') as caught:
        train(model, loss=lambda m, b: m(b[0]), clip=clip, checkpoint=path, checkpoint_every=1, callbacks=[lambda moment: states.append(copied())])
    assert (caught.value.step, math.isnan(caught.value.grad_norm)) == (at - 1, True)
    assert all(torch.equal(value, states[-1][name]) for name, value in model.state_dict().items()) and len(states) == at
    saved = read_checkpoint(path)
    assert saved['step'] == at - 1 and all(torch.equal(value, states[-1][name]) for name, value in saved['model'].items())
    assert all(p.grad is None for p in model.parameters()), 'a broken gradient is not left for the next step'


def test_statistics_are_put_back_when_the_loss_breaks():
    from vitbook.train import NonFiniteLoss
    model = Spiked(at=0)
    before = model.norm.running_mean.clone()
    with pytest.raises(NonFiniteLoss): train(model, loss=lambda m, b: m(b[0]) * math.nan)
    assert torch.equal(model.norm.running_mean, before) and model.norm.num_batches_tracked == 0


def test_weights_that_a_step_broke_are_not_saved(tmp_path):
    "Adam without eps divides 0 by 0 where the gradient is 0: loss and gradient are finite, the weights are not."
    from vitbook.train import NonFiniteLoss, read_checkpoint
    model = small()
    with pytest.raises(NonFiniteLoss, match='0.weight has become'):
        train(model, loss=lambda m, b: (m(b[0]) * 0).sum(), steps=1, checkpoint=tmp_path/'run.safetensors', optimizer=torch.optim.Adam(model.parameters(), eps=0.))
    assert read_checkpoint(tmp_path/'run.safetensors')['step'] == 0


def test_the_gradient_norm_is_told_without_clipping_and_changes_nothing():
    one, other = small(), small()
    told = train(one, clip=None)['grad_norm']
    assert told == train(other, clip=1e9)['grad_norm'] and all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    from vitbook.train import fit
    sparse = nn.Embedding(5, 3, sparse=True)
    rows = fit(sparse, lambda step: torch.tensor([1, 1, 4]), steps=1, loss=lambda m, i: m(i).sum(), clip=None, optimizer=torch.optim.SGD(sparse.parameters(), lr=.1), progress=False).rows
    assert rows[0]['grad_norm'] == pytest.approx((3 * (4 + 1))**.5), 'a row that comes twice has twice the gradient'


# ---- resumed with other settings

def paused(path, **more):
    "A model trained for 4 of 8 steps."
    train(model := small(), steps=8, checkpoint=path, checkpoint_every=4, callbacks=[lambda moment: moment.step == 4], **more)
    return model


def test_what_is_asked_for_now_holds(tmp_path):
    "Learning rate, weight decay and betas of the second call; what was not said anew goes on."
    asked = dict(lr=1e-4, weight_decay=.3)
    paused(tmp_path/'a.st', lr=1e-1, schedule='constant')
    assert train(small(), steps=8, checkpoint=tmp_path/'a.st', schedule='constant', **asked)['lr'] == 4 * [1e-1] + 4 * [1e-4]
    train(other := small(), steps=8, checkpoint=tmp_path/'b.st', checkpoint_every=4, callbacks=[lambda moment: moment.step == 4], optimizer=torch.optim.AdamW(other.parameters(), lr=.1))
    model, seen = small(), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(.5, .6), **asked)
    train(model, steps=8, checkpoint=tmp_path/'b.st', optimizer=optimizer, callbacks=[lambda moment: seen.append(dict(optimizer.param_groups[0]))])
    assert len(seen) == 4 and all(g['betas'] == (.5, .6) and g['weight_decay'] == .3 and g['lr'] <= 1e-4 for g in seen)
    assert optimizer.state[model[0].weight]['step'] == 8, 'and the moments go on'


def test_an_optimizers_own_state_in_its_groups_goes_on(tmp_path):
    "A number that an optimizer itself changes in its groups is not put back to what it was at the start."
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for g in self.param_groups: g['count'] = g.get('count', 0) + 1
            return super().step(closure)
    def run(path, **more):
        optimizer = Counting((model := small()).parameters(), lr=.1)
        for g in optimizer.param_groups: g['count'] = 0
        train(model, steps=8, optimizer=optimizer, checkpoint=path, checkpoint_every=4, **more)
        return optimizer.param_groups[0]['count']
    assert run(tmp_path/'a.st', callbacks=[lambda moment: moment.step == 4]) == 4 and run(tmp_path/'a.st') == 8


@pytest.mark.parametrize('words, change', [
    ('AdamW.*SGD', lambda m: dict(optimizer=torch.optim.SGD(m.parameters(), lr=.1))),
    ('other groups', lambda m: dict(optimizer=torch.optim.AdamW(reversed(list(m.parameters())), lr=.1))),
    ('other parameters', lambda m: dict(optimizer=torch.optim.AdamW(m[2].parameters(), lr=.1))),
    ('4 steps already', lambda m: dict(steps=3))])
def test_a_checkpoint_that_does_not_fit_the_call_is_refused(tmp_path, words, change):
    from vitbook.train import CheckpointError
    path = tmp_path/'a.st'
    train(other := small(), steps=4, checkpoint=path, optimizer=torch.optim.AdamW(other.parameters(), lr=.1))
    model, before = small(1), path.read_bytes()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words): train(model, **dict(steps=8, checkpoint=path) | change(model))
    assert path.read_bytes() == before and all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_folder_or_a_checkpoint_of_something_else(tmp_path):
    from vitbook.train import CheckpointError, save_checkpoint
    with pytest.raises(CheckpointError, match='is a folder'): train(small(), checkpoint=tmp_path)
    save_checkpoint(tmp_path/'a.st', small(), note='by hand')
    with pytest.raises(CheckpointError, match='holds no run of fit, only model, note'): train(small(), checkpoint=tmp_path/'a.st')


def test_an_optimizer_used_twice_starts_at_its_peak_again():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=.5)
    rates = [train(model, optimizer=optimizer)['lr'] for _ in range(2)]
    assert rates[0] == rates[1] and rates[0][0] == .5 and optimizer.param_groups[0]['lr'] == .5


# ---- orders of an iterable, and batches that run out

X, Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


class ByTorch:
    "Shuffled anew for each pass by a global generator, with noise on each batch."
    def __iter__(self):
        for take in torch.randperm(32).split(8): yield X[take] + .1 * torch.randn(8, 4), Y[take]


class ByPython(ByTorch):
    def __iter__(self):
        order = random.sample(range(32), 32)
        for i in range(0, 32, 8): yield X[order[i:i + 8]] + float(np.random.rand()), Y[order[i:i + 8]]


class ByPass(ByTorch):
    "Knows which pass it is in."
    passes = 0
    def __iter__(self):
        self.passes += 1
        for take in torch.randperm(32, generator=torch.Generator().manual_seed(self.passes)).split(8): yield X[take], Y[take]


def loader(**more):
    from torch.utils.data import DataLoader, TensorDataset
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, **more)


ORDERS = dict(loader=loader, generator=lambda: loader(generator=torch.Generator().manual_seed(3)), list=lambda: [(X[:8], Y[:8]), (X[8:16], Y[8:16])], torch=ByTorch, python=ByPython, passes=ByPass,
              once=lambda: iter([(X[i:i + 4], Y[i:i + 4]) for i in range(0, 32, 3)]))


@pytest.mark.parametrize('stop', [1, 4, 6])
@pytest.mark.parametrize('name', ORDERS)
def test_an_iterables_order_goes_on(tmp_path, name, stop, unchecked):
    "Cut within a pass, at its end and in the second one, with dropout between: the weights are those of the run that was not cut."
    def run(path, data, **more):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.3), nn.Linear(8, 3))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        train(model, steps=9, checkpoint=path, checkpoint_every=100, **more | dict(data=data))
        return model[0].weight.detach()
    def seed(n):
        torch.manual_seed(n), random.seed(n), np.random.seed(n)
    seed(5)
    whole = run(tmp_path/'whole.st', ORDERS[name]())
    seed(5)
    run(tmp_path/'cut.st', ORDERS[name](), callbacks=[lambda moment: moment.step == stop])
    seed(99)
    assert torch.equal(run(tmp_path/'cut.st', ORDERS[name]()), whole)


def test_an_order_that_does_not_come_again_is_refused(tmp_path):
    from vitbook.train import CheckpointError
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [(X[i], Y[i]) for i in torch.randperm(32, generator=generator).split(8)]
    train(small(), data=drawn(0), checkpoint=tmp_path/'a.st', callbacks=[lambda moment: moment.step == 3])
    with pytest.raises(CheckpointError, match='batch 3 is not the one'): train(small(), data=drawn(1), checkpoint=tmp_path/'a.st')


@pytest.mark.parametrize('words, data', [
    ('after 3 of 6', lambda: iter([(X[:8], Y[:8])] * 3)), ('after 3 of 6', lambda: ((X[:8], Y[:8]) for _ in range(3))), ('after 2 of 6', lambda: zip(X.split(16), Y.split(16))), ('after 0 of 6', list)])
def test_batches_that_run_out_are_told(words, data):
    with pytest.raises(ValueError, match=words): train(small(), data=data())


# ---- what evaluate gives, batches of other kinds, labels

@pytest.mark.parametrize('name', ['loss', 'lr', 'step', 'grad_norm'])
def test_evaluate_takes_no_name_of_the_historys(name):
    with pytest.raises(ValueError, match=f"{name}.*val_{name}"): train(small(), evaluate=lambda m: {name: 1.})


@pytest.mark.parametrize('wrong', [None, 3., dict(a=torch.ones(2)), dict(a='x')])
def test_evaluate_gives_numbers_by_name(wrong):
    with pytest.raises(ValueError, match='evaluate'): train(small(), evaluate=lambda m: wrong)


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    extra: list | None = None


def test_batches_keep_their_kind():
    seen = []
    def loss(model, batch):
        seen.append(batch)
        return model(batch.x if isinstance(batch, Batch) else batch['x']).mean()
    for batch in (Batch(X, Y), Batch(X, Y, [X]), collections.OrderedDict(x=X, rest=(Y, [X], None, 'text'))):
        train(small(), data=lambda step: batch, loss=loss, steps=1)
        assert type(seen[-1]) is type(batch) and list(seen[-1]) is not batch
    assert seen[1].extra[0].equal(X) and seen[2]['rest'][2:] == (None, 'text')


@pytest.mark.parametrize('words, batch', [
    ('dict .x, y.*loss', dict(x=X, y=Y)), ('3 ?|tuple .Tensor, Tensor, Tensor.', (X, Y, Y)), ('ndarray', (X.numpy(), Y.numpy())), ('Tensor', X), ('labels: got float32', (X, Y.float())),
    ('labels.*shape .31', (X, Y[:31])), ('labels: got classes 0 … 7', (X, torch.arange(32) % 8))])
def test_batches_the_default_loss_cannot_take(words, batch, unchecked):
    with pytest.raises(ValueError, match=words): train(small(), data=lambda step: batch)


def test_labels_of_any_whole_type_and_shares_of_classes():
    from vitbook.train import batches, cross_entropy
    model, shares = small(), torch.nn.functional.one_hot(Y, 3).float()
    want = cross_entropy(model, (X, Y))
    for labels in (Y.int(), Y.to(torch.uint8), shares): assert_close(cross_entropy(model, (X, labels)), want)
    masked = torch.cat([Y[:16], torch.full((16,), -100)])
    assert_close(cross_entropy(model, (X, masked)), cross_entropy(model, (X[:16], Y[:16])))
    numpy = batches(X.numpy(), Y.numpy(), batch_size=8).at(3)
    assert all(torch.equal(a, b) for a, b in zip(numpy, batches(X, Y, batch_size=8).at(3)))


@pytest.mark.parametrize('words, more', [
    ('requires_grad', dict(model=small().requires_grad_(False))), ('tensor of shape .8,', dict(loss=lambda m, b: m(b[0])[:, 0])), ('float', dict(loss=lambda m, b: 1.)), ('does not depend', dict(loss=lambda m, b: b[0].mean())),
    ('every', dict(every=0)), ('checkpoint_every', dict(checkpoint_every=0))])
def test_what_cannot_be_trained_is_said(words, more):
    with pytest.raises(ValueError, match=words): train(**dict(model=small()) | more)


@pytest.mark.parametrize('words, call', [('empty', lambda a: a(small(), X[:0], Y[:0])), ('31 labels', lambda a: a(small(), X, Y[:31])), ('batch_size', lambda a: a(small(), X, Y, 0))])
def test_accuracy_of_what_is_none(words, call):
    from vitbook.train import accuracy
    with pytest.raises(ValueError, match=words): call(accuracy)


# ---- options

def test_a_callback_stops_the_run(tmp_path):
    "All callbacks of that step are called, the checkpoint is of that step, and evaluate has no extra turn."
    from vitbook.train import read_checkpoint
    seen = []
    history = train(small(), checkpoint=tmp_path/'a.st', checkpoint_every=100, callbacks=[lambda m: m.step == 4, lambda m: seen.append((m.step, m.loss, m.lr))])
    assert history.steps() == [1, 2, 3, 4] == [s for s, *_ in seen] and [l for _, l, _ in seen] == history['loss']
    assert read_checkpoint(tmp_path/'a.st')['step'] == 4


@pytest.mark.parametrize('generator, draw', [('python', random.random), ('numpy', np.random.rand), ('torch', lambda: torch.rand(()).item())])
def test_every_global_generator_goes_on(tmp_path, generator, draw, unchecked):
    def run(path, **more):
        seen = []
        train(small(), checkpoint=path, callbacks=[lambda moment: seen.append(draw()), *more.pop('then', [])], **more)
        return seen
    def seed(n): random.seed(n), np.random.seed(n), torch.manual_seed(n)
    seed(1)
    whole = run(tmp_path/'whole.st')
    seed(1)
    first = run(tmp_path/'cut.st', then=[lambda moment: moment.step == 2])
    seed(2)
    assert first + run(tmp_path/'cut.st') == whole


def test_groups_of_the_default_optimizer():
    "Matrices and kernels are decayed; vectors, biases and norms of any shape, and what the model names, are not; what is frozen is in neither."
    from vitbook.train import decay_groups
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.map, self.conv, self.norm, self.frozen = nn.Parameter(torch.ones(1, 1, 3)), nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.LayerNorm((3, 2)), nn.Linear(3, 3).requires_grad_(False)
            self.wide = nn.Module()
            self.wide.bias = nn.Parameter(torch.ones(2, 2))
        def no_weight_decay(self): return {'token'}
        def forward(self, x): return self.map(x)
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = decay_groups(model, .1)
    assert [g['weight_decay'] for g in (decayed, free)] == [.1, 0.] and {names[id(p)] for p in decayed['params']} == {'map.weight', 'conv.weight'}
    assert {names[id(p)] for p in free['params']} == {'token', 'map.bias', 'conv.bias', 'norm.weight', 'norm.bias', 'wide.bias'}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, steps=1, schedule='constant', lr=.1, weight_decay=.5, data=lambda step: X[:, :3], loss=lambda m, x: sum(0 * p.sum() for p in m.parameters()))
    for name, p in model.named_parameters(): assert_close(p.detach(), before[name] * (.95 if name in ('map.weight', 'conv.weight') else 1))


def test_an_accelerator_that_accumulates_is_refused_and_none_leaves_a_trace():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    model = small()
    try:
        with pytest.raises(ValueError, match='gradient_accumulation_steps=4'): train(model, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4))
        for mixed in ('no', 'bf16', 'no'):
            AcceleratorState._reset_state(True), GradientState._reset_state()
            seen = []
            train(model, accelerator=Accelerator(cpu=True, mixed_precision=mixed), loss=lambda m, b: seen.append(torch.is_autocast_enabled('cpu')) or m(b[0]).mean())
            train(model, accelerator=Accelerator(cpu=True, mixed_precision=mixed), loss=lambda m, b: seen.append(m[0](b[0]).dtype) or m(b[0]).float().mean())
            assert not {'forward', '_original_forward', '_is_accelerate_prepared'} & vars(model).keys() and model(X).dtype == torch.float32
    finally: AcceleratorState._reset_state(True), GradientState._reset_state()


# ---- modes

def half_frozen():
    "In training mode, with a batch norm that was put into eval mode, and a part that is in eval mode but for one layer."
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(.5), nn.Linear(4, 3))).train()
    model[1].eval()
    model[2].eval()
    model[2][1].train()
    return model


def modes(model): return [m.training for m in model.modules()]


def test_fit_keeps_frozen_norms_and_trains_on_after_evaluate():
    "The statistics of a frozen norm stay, the model is in training mode after each evaluation, and evaluate sees eval mode and no gradients."
    model, seen, on = half_frozen(), [], []
    before, was = model[1].running_mean.clone(), modes(model)
    train(model, every=2, evaluate=lambda m: seen.append((any(modes(m)), torch.is_grad_enabled())) or {'n': len(seen)}, loss=lambda m, b: on.append(modes(m)) or m(b[0]).square().mean())
    assert on == 6 * [was] and modes(model) == was and seen == 3 * [(False, False)] and torch.equal(model[1].running_mean, before)
    train(model.eval())
    assert all(modes(model)) and not torch.equal(model[1].running_mean, before), 'a model in eval mode is put into training mode whole'


def test_evaluate_that_raises_leaves_the_modes():
    model = half_frozen()
    was = modes(model)
    def fails(m): raise KeyError('on purpose')
    with pytest.raises(KeyError): train(model, evaluate=fails, every=1)
    assert modes(model) == was


def mode_of_accuracy(hold):
    from vitbook.train import accuracy
    accuracy(hold(half_frozen()), X, Y)


def mode_of_flops(hold):
    from vitbook.measure import flops
    flops(hold(half_frozen()), X)


def mode_of_restore(hold):
    from vitbook.data.degradations import restore
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.Conv2d(3, 3, 1))).train()
    model[0].eval()
    restore(hold(model), torch.rand(1, 3, 8, 8))


def mode_of_forecasts(hold):
    from vitbook.data.timeseries import Windows, evaluate
    class Forecast(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout()
        def forward(self, x, mark=None): return self.drop(self.norm(x))[:, :2]
    model = Forecast().train()
    model.norm.eval()
    evaluate(hold(model), Windows(torch.randn(20, 3), 6, 2))


def vit():
    from vitbook.vit import VisionTransformer
    model = VisionTransformer(16, 8, in_chans=1, num_classes=3, embed_dim=12, depth=2, num_heads=3, drop_rate=.5).train()
    model.blocks[0].eval()
    model.norm.eval()
    return model


def mode_of_sigma(hold, name):
    from vitbook.dynamics import sigma_reparam as S
    model, x = hold(S.convert(vit())), torch.rand(2, 1, 16, 16)
    {'attention_entropy': lambda: S.attention_entropy(model, x), 'bypassed': lambda: S.bypassed(model, x), 'spectral_norms': lambda: S.spectral_norms(model), 'fold': lambda: S.fold(model)}[name]()


def mode_of_sub_networks(hold):
    from vitbook.dynamics.information_pathways import Sampling, sub_networks
    sub_networks(hold(vit()), torch.rand(2, 1, 16, 16), 2, Sampling(fraction=.5))


def mode_of_sample(hold):
    from vitbook.generation.fitv2 import sample
    from vitbook.registry import create_model, model_info
    model = create_model('fitv2_xl_2', **model_info('fitv2_xl_2')['example']).train()
    model.blocks[0].eval()
    sample(hold(model), torch.tensor([1]), 2, 2, steps=1)


def mode_of_routed(hold):
    from vitbook.tokens.token_routing import routed
    routed(hold(vit()))


@pytest.mark.parametrize('touch', [mode_of_accuracy, mode_of_flops, mode_of_restore, mode_of_forecasts, mode_of_sub_networks, mode_of_sample, mode_of_routed,
                                   *(functools.partial(mode_of_sigma, name=name) for name in ('attention_entropy', 'bypassed', 'spectral_norms', 'fold'))],
                         ids=lambda touch: getattr(touch, '__name__', '') or touch.keywords['name'])
def test_every_module_gets_its_own_mode_back(touch):
    kept = {}
    def hold(model):
        kept.update({id(m): (m, m.training) for m in model.modules()})
        assert {was for _, was in kept.values()} == {True, False}, 'a half-frozen model'
        return model
    touch(hold)
    assert kept and all(m.training == was for m, was in kept.values())


def test_eval_mode_itself():
    from vitbook.measure import eval_mode
    model = half_frozen()
    was = modes(model)
    with eval_mode(model) as same: assert same is model and not any(modes(model))
    assert modes(model) == was
    with pytest.raises(KeyError), eval_mode(model): raise KeyError
    assert modes(model) == was
    with eval_mode(len) as function: assert function is len


def test_a_file_is_whole(tmp_path):
    from vitbook.measure import whole_file
    path = tmp_path/'a'/'b.txt'
    with whole_file(path) as place: place.write_text('old')
    with pytest.raises(KeyError), whole_file(path) as place:
        place.write_text('new')
        assert path.read_text() == 'old'
        raise KeyError
    assert path.read_text() == 'old' and os.listdir(path.parent) == ['b.txt'] and path.stat().st_mode & 0o777 == 0o644
