"""dynamics.scan_and_snap: properties over random models, data and rates, and what it answers to bad input."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from vitbook.dynamics import scan_and_snap as S
from vitbook.probe import recording

rate = st.floats(.05, 20.)


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=rng(seed), dtype=torch.double)


def overlapping(K=4, common=1, seed=None, common_prob=.6):
    "Classes with one query; with a seed, every class has its own distinct distribution."
    data = S.sequence_classes(1, K, num_common=common, num_unique_per_next=5, common_prob=common_prob, unique_prob=(.2, 1.), vocab_size=100)
    if seed is None: return data
    prob = data.prob.double() * (torch.rand(data.prob.shape, generator=rng(seed), dtype=torch.double) + .2)
    prob[:, :common] = data.prob[:, :common]
    return S.SequenceClasses(prob / prob.sum(1, keepdim=True), data.query, data.target)


# the model and its gradient

@given(st.integers(2, 15), st.integers(1, 6), st.integers(2, 12), st.integers(0, 10_000), st.floats(.1, 3.))
def test_gradient_flow_is_autograd(M, b, T, seed, size):
    tokens, target = torch.randint(0, M, (b, T), generator=rng(seed)), torch.randint(0, M, (b,), generator=rng(seed + 1))
    model = S.YZTransformer(M).double()
    model.Y.data, model.Z.data = size * normal(M, M, seed=seed), size * normal(M, M, seed=seed + 1)
    loss = F.cross_entropy(model(tokens), target)
    loss.backward()
    counts = F.one_hot(tokens[:, :-1], M).sum(1).double()
    dY, dZ, ours = S.gradient_flow(counts, tokens[:, -1], target, model.Y.data, model.Z.data)
    for a, b_ in [(dY, -model.Y.grad), (dZ, -model.Z.grad), (ours, loss.detach())]: torch.testing.assert_close(a, b_, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([dY.sum(1), dZ.sum(1)]), torch.zeros(2 * M).double(), rtol=0, atol=1e-11)
    assert (dZ[[m for m in range(M) if m not in tokens[:, -1]]] == 0).all()


@given(st.integers(0, 10_000))
def test_invariances(seed):
    M, tokens = 9, torch.randint(0, 9, (3, 8), generator=rng(seed))
    model = S.YZTransformer(M).double()
    model.Y.data, model.Z.data = normal(M, M, seed=seed), normal(M, M, seed=seed + 1)
    want = model(tokens).log_softmax(-1)
    order = torch.randperm(7, generator=rng(seed))
    torch.testing.assert_close(model(torch.cat([tokens[:, order], tokens[:, -1:]], 1)).log_softmax(-1), want)
    model.Z.data += normal(M, 1, seed=seed + 2)
    model.Y.data += normal(M, 1, seed=seed + 3)
    torch.testing.assert_close(model(tokens).log_softmax(-1), want)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % M
    model.Z.data[:] = 0                                        # with equal logits the query has no say at all: it is no key
    torch.testing.assert_close(model(other), model(tokens))


def test_token_mix_is_finite():
    c = S.token_mix(torch.tensor([1., 0., 3.]), torch.tensor([1e4, 1e5, -1e4]))
    assert c.tolist() == [1, 0, 0]


# the data

@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 4), st.integers(1, 8), st.integers(0, 99))
def test_generator(num_last, per, common, per_last, unique, seed):
    if common + per_last == 0 and num_last * per == 1: unique = max(unique, 2)
    data = S.sequence_classes(num_last, per, num_common=common, num_common_per_last=per_last, num_unique_per_next=unique)
    K = num_last * per
    assert data.num_classes == K and data.vocab_size == common + per_last * num_last + unique * K + num_last + K
    torch.testing.assert_close(data.prob.sum(1), torch.ones(K))
    assert [len(data.support(n)) for n in range(K)] == [common + per_last + unique] * K
    tokens, label = data.sample(16, 9, rng(seed))
    assert (tokens[:, -1] == data.query[label]).all() and (data.prob[label].gather(1, tokens[:, :-1]) > 0).all()
    counts, label = data.sample_counts(16, 9, np.random.default_rng(seed))
    assert (counts.sum(1) == 8).all() and ((counts > 0) <= (data.prob[label] > 0)).all()
    assert len(set(data.target.tolist())) == K and not set(data.target.tolist()) & set(data.query.tolist())
    assert (data.prob[:, data.query] == 0).all() and (data.prob[:, data.target] == 0).all()


def test_target_spread_of_common_and_distinct():
    data = S.syn_small()
    tokens, label = data.sample(4000, 3, rng(0))               # token, query, then the target
    text = torch.cat([tokens[:, :1], data.target[label, None]], 1).flatten()
    spread = S.target_spread(torch.cat([text]), data.vocab_size, window=1)
    assert (spread[:10] > 1.9).all() and (spread[10:30] < 1.01).all()


# the decoder

@given(st.integers(2, 5000), rate, st.floats(0, 1e6))
def test_height_solves_its_equation(M, eta, t):
    x = M * S.height(torch.tensor(t, dtype=torch.double), M, eta).item()
    right = M * eta * t
    assert abs(math.expm1(x) + (M - 1) * x - right) <= 1e-9 * (1 + right)


@given(st.integers(2, 400), st.floats(.05, 5.))
def test_twins_stay_together(M, eta):
    lag = S.naive_height(400, M, eta) - S.height(torch.arange(401.).double(), M, eta)
    assert lag.min() >= -1e-12 and lag.max() <= 2 * eta / M


@given(st.integers(3, 3000), st.integers(1, 20), rate)
def test_speed_has_one_peak_and_its_integral(M, K, eta):
    at, top = S.speed_peak(M, K, eta)
    t = torch.linspace(0, 3 * at, 3001).double()
    gamma = S.speed(t, M, K, eta)
    up = gamma.diff() > 0
    assert gamma[0] == 0 and up[:999].all() and not up[1001:].any()
    assert abs(gamma.max().item() - top) < 1e-5 * top
    numeric = eta * torch.trapezoid(gamma, t).item()           # eta_z = eta_y
    assert S.total_speed(t[-1], M, K, eta, eta).item() == pytest.approx(numeric, rel=1e-5)


@given(st.integers(2, 60), st.floats(.1, 5.), st.integers(0, 99))
def test_decoder_alone_follows_lemma_5(M, eta, seed):
    f = F.normalize(normal(M, seed=seed).abs() + .01, dim=0)
    n = seed % M
    Y, star = torch.zeros(M, M).double(), S.naive_height(30, M, eta)
    zeta = M / (M - 1) * (F.one_hot(torch.tensor(n), M).double() - 1 / M)
    for s in range(30):
        torch.testing.assert_close(Y.T @ f, (M - 1) * star[s] * zeta, rtol=1e-9, atol=1e-11)
        Y += eta * torch.outer(f, F.one_hot(torch.tensor(n), M) - (Y.T @ f).softmax(0))


# the attention equation

@settings(max_examples=8)
@given(st.integers(2, 5), st.integers(0, 1000), st.floats(.3, 5.), st.floats(.1, 3.))
def test_theorems_2_and_3(K, seed, eta_y, eta_z):
    data, times = overlapping(K, seed=seed), torch.arange(0, 40.1, 1.).double()
    path = S.attention_ode(data, times, eta_y, eta_z, method='rk4')
    assert (path.xi[1:] > 0).all()
    assert (path.z[:, 0, 0].diff() < 0).all()
    own = [data.support(n)[1:] for n in range(K)]
    assert (path.z[:, 0, torch.cat(own)].diff(dim=0) > 0).all()
    chi, B = S.growth_factor(path.z[:, 0]), S.drive_budget(path.xi, times, eta_z)
    for n in range(K):
        gain = S.relative_gain(path.c[:, n, own[n]])
        i, j = torch.triu_indices(5, 5, 1)
        torch.testing.assert_close(gain[-1, i, j] / gain[0, i, j], chi[-1, own[n][i]], rtol=2e-3, atol=0)
        top = own[n][path.c[0, n, own[n]].argmax()]
        f0 = path.c[0, n, top] / path.c[0, n].norm()
        assert (2 * f0 ** 2 * B[-1, n]).exp() <= chi[-1, top] * (1 + 1e-3) and chi[-1, top] <= (2 * B[-1, n]).exp() * (1 + 1e-3)


def test_several_common_tokens_shrink_in_the_symmetric_case():
    data = overlapping(4, common=3, common_prob=.3)
    path = S.attention_ode(data, torch.arange(0, 200.1, .5).double(), 1., 2.)
    assert (path.z[:, 0, :3].diff(dim=0) < 0).all()


def test_nothing_moves_without_overlap():
    path = S.attention_ode(S.sequence_classes(1, 4, num_common=0), torch.arange(0, 50.).double(), 1., 5.)
    assert path.z.abs().max() < 1e-12 and path.xi.abs().max() < 1e-12


def test_prior_decides_the_winner():
    data = overlapping(4)
    own, z0 = data.support(0)[1:], torch.zeros(1, 100)
    z0[0, own[0]] = 3.
    path = S.attention_ode(data, torch.arange(0, 200.).double(), 1., 2., z0=z0)
    assert path.c[-1, 0, own[0]] / path.c[-1, 0, own[-1]] > path.c[0, 0, own[0]] / path.c[0, 0, own[-1]] > 1


@pytest.mark.parametrize('method, order', [('euler', 1), ('midpoint', 2), ('rk4', 4)])
def test_order_of_the_integrators(method, order):
    error = [abs(S.integrate(lambda z: -z, torch.ones(1).double(), torch.linspace(0, 2, n + 1).double(), method)[-1].item() - math.exp(-2)) for n in (20, 40)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=.15)


# the phase transition

@given(st.integers(10, 3000), st.integers(2, 12), rate, rate, st.floats(.1, 10.))
def test_attention_budget(M, K, eta_y, eta_z, c0):
    B = lambda t, y=eta_y, z=eta_z, **kw: S.attention_budget(torch.tensor(t, dtype=torch.double), M, K, y, z, c0, **kw).item()
    start = S.transition_times(M, K, eta_y)[1]
    assert B(0.) == 0 and 0 < B(start / 10) < B(start) < B(10 * start)
    assert B(2 * start, 2 * eta_y, 2 * eta_z) > B(2 * start)                  # both faster: more
    assert B(50 * start, 2 * eta_y) < B(50 * start)                           # decoder faster: less in the end …
    assert B(1e-4 * start, 2 * eta_y) > B(1e-4 * start)                       # … and more at the start
    assert B(S.transition_times(M, K, 3 * eta_y)[1], 3 * eta_y, 3 * eta_z) == pytest.approx(B(start), rel=1e-9)   # at t0 only K, M and the ratio matter


# training

@pytest.fixture(scope='module')
def small(): return S.syn_small()


def test_population_is_the_limit_of_long_sequences(small):
    run = lambda length: S.simulate(small, 1., 1., steps=20, length=length, batch_size=64, seed=1).c[-1]
    limit = S.simulate(small, 1., 1., steps=20).c[-1]
    gaps = [(run(T) - limit).abs().sum().item() for T in (33, 513, 8193)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_one_clock_for_small_steps(small):
    H = [S.distinct_entropy(S.simulate(small, e, e, steps=s, momentum=0., record_every=s).c[-1], small.distinct).mean().item() for e, s in [(1., 300), (3., 100)]]       # the slowest clock, 0.1 for 3000 steps, runs in the chapter
    assert max(H) - min(H) < .002 and H == pytest.approx([2.0695, 2.0706], abs=.0005)


def test_entropies_of_the_population(small):
    pairs = torch.tensor([(1., 1.), (2., 1.), (5., 1.), (10., 1.), (3., 3.)])
    run = S.sweep(small, pairs[:, 0], pairs[:, 1], record_every=100)
    H = S.distinct_entropy(run.c[:, 0, -1], small.distinct).mean(-1)
    torch.testing.assert_close(H, torch.tensor([1.979, 2.029, 2.081, 2.099, 1.856]), rtol=0, atol=.001)
    assert S.distinct_entropy(run.c[:, 0, 0], small.distinct).mean().item() == pytest.approx(2.151, abs=.001)
    assert run.steps.tolist() == [0, 100] and run.Z.sum(-1).abs().max() < 1e-4 and run.Y.sum(-1).abs().max() < 1e-3


@pytest.mark.parametrize('length', [None, 64])
@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_a_run_in_a_sweep_is_the_run_alone(small, length, optimizer):
    kw = dict(steps=6, length=length, batch_size=16, optimizer=optimizer, zero_init=False)
    grid = S.sweep(small, torch.tensor([1., .2]), torch.tensor([.5, .1]), seeds=[0, 5], **kw)
    alone = S.simulate(small, .2, .1, seed=5, **kw)
    for a, b in zip(alone, S.Trajectory(grid.z[1, 1], grid.c[1, 1], grid.steps, grid.loss[1, 1], grid.Y[1, 1], grid.Z[1, 1])):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert not torch.equal(grid.Y[0, 0], grid.Y[0, 1])


@pytest.mark.parametrize('optimizer, momentum', [('sgd', .9), ('sgd', 0.), ('adam', .9)])
def test_the_optimizers_are_torchs(small, optimizer, momentum):
    "Both, at two rates, over steps enough for Adam's corrections to matter."
    model, opt_data = S.YZTransformer(34).double(), np.random.default_rng(7)
    groups = [dict(params=[model.Y], lr=.7), dict(params=[model.Z], lr=.3)]
    opt = torch.optim.SGD(groups, lr=0, momentum=momentum) if optimizer == 'sgd' else torch.optim.Adam(groups, lr=0)
    for _ in range(8):
        counts, label = small.sample_counts(32, 40, opt_data)
        opt.zero_grad()
        F.cross_entropy(model.forward_counts(counts.double(), small.query[label]), small.target[label]).backward()
        opt.step()
    run = S.simulate(small, .7, .3, steps=8, length=40, batch_size=32, momentum=momentum, optimizer=optimizer, seed=7, dtype=torch.double)
    torch.testing.assert_close(run.Y, model.Y.data, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(run.Z, model.Z.data, rtol=1e-5, atol=1e-7)


# the language model and the probe

def test_language_model_is_causal_and_finite():
    torch.manual_seed(0)
    model, ids = S.OneLayerLM(50, 16), torch.randint(0, 50, (2, 12), generator=rng(0))
    later = ids.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 50
    assert torch.equal(model(ids)[:, :7], model(later)[:, :7])
    seen = model.attend(ids)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(2, 1, 12))
    assert (seen.weights.triu(1) == 0).all() and (seen.entropy[..., 0] == 0).all()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_reading_goes_on_and_starts_again():
    read = S.reading(torch.arange(4 * 11), 4, 5)
    x, y = read(0)
    assert torch.equal(y, x + 1) and torch.equal(read(1)[0], x + 5) and torch.equal(read(2)[0], x)


def test_lift_in_a_hugging_face_model():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    ids = torch.randint(0, 50, (4, 16), generator=rng(0))
    with recording(model) as rec: model(ids)
    lifts = torch.stack([S.lift(w, ids < 25, mask=torch.ones(16, 16, dtype=torch.bool).tril()) for w in rec.weights])
    assert lifts.shape == (2, 2) and (lifts - 1).abs().max() < .1

# the symmetric trainer, and the picture of the machine

@settings(max_examples=4)
@given(st.integers(2, 5), st.integers(0, 20), st.floats(.1, 2.), st.floats(.1, 3.),
       st.sampled_from([0., .9]))
def test_train_alike_is_sweep(K, spare, common_prob, eta_y, momentum):
    M = 6 * K + 2 + spare
    data = S.sequence_classes(1, K, num_common=1, num_unique_per_next=5, common_prob=common_prob,
                              unique_prob=(.2, 1.), vocab_size=M)
    pair = torch.tensor([eta_y, .3]).double()
    full = S.sweep(data, pair, pair.flip(0), steps=15, momentum=momentum, dtype=torch.double)
    both = [torch.full((2,), float(x)) for x in (K, M, common_prob)]
    alike = S.train_alike(*both, pair, pair.flip(0), steps=15, momentum=momentum)
    for n in range(K):
        torch.testing.assert_close(alike.z, full.z[:, 0, :, n, data.support(n)], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(alike.c, full.c[:, 0, :, n, data.support(n)], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(alike.loss[:, 1:], full.loss[:, 0, 2:], rtol=1e-3, atol=1e-5)
    f = F.normalize(full.c[0, 0, -1], dim=-1)                  # what the last decoder sends back
    g = (S.one_hot(data.target, M, f) - (f @ full.Y[0, 0]).softmax(-1)) @ full.Y[0, 0].T
    more = S.train_alike(*both, pair, pair.flip(0), steps=16, momentum=momentum)
    first, second = data.support(0)[-1], data.support(1)[-1]
    want = torch.stack([g[0, first] / f[0, first], -g[0, second] / f[1, second]])
    torch.testing.assert_close(torch.stack([more.own[0, -1], more.other[0, -1]]), want, rtol=1e-3, atol=1e-5)


def test_train_alike_in_half_the_precision_given():
    "Rates and sizes may come in any dtype; it computes in float64."
    args = [torch.tensor([x]) for x in (3., 40., .6, 1., .5)]
    want = S.train_alike(*args, steps=5)
    assert want.z.dtype == torch.double
    exact = [x.to(torch.bfloat16) for x in args[:2] + args[3:]]    # all but 0.6, which bfloat16 rounds
    half = S.train_alike(*exact[:2], args[2], *exact[2:], steps=5)
    torch.testing.assert_close(half.z, want.z)


def story_cells():
    path = Path(__file__).resolve().parents[3]/'nbs/01_dynamics/02_scan_and_snap.ipynb'
    return [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells']]


def test_the_picture_agrees_with_the_model():
    diagram = pytest.importorskip('vitbook.diagram')
    cell = next(source for source in story_cells() if 'def schematic' in source)
    space = {'Diagram': diagram.Diagram}
    exec(cell.rsplit('\n\n', 1)[0], space)
    d = space['schematic']()
    model, tokens = S.YZTransformer(11).double(), torch.randint(0, 11, (3, 8), generator=rng(0))
    model.Y.data, model.Z.data = normal(11, 11), normal(11, 11, seed=1)
    layers = {name for name, thing in d.things.items() if thing.kind == 'layer'}
    assert layers == {name for name, _ in model.named_parameters()} == {'Y', 'Z'}
    context, query = tokens[:, :-1], tokens[:, -1]
    row = model.Z[query]
    score = row.gather(1, context)
    b = score.softmax(-1)
    v = model.attend(tokens)
    f = F.normalize(v, dim=-1)
    logits = model.decode(v)
    seen = {('context', 'score'): context, ('query', 'Z'): query, ('Z', 'score'): row, ('score', 'b'): score,
            ('b', 'v'): b, ('v', 'f'): v, ('f', 'Y'): f, ('Y', 'alpha'): logits,
            ('alpha', 'error'): logits.softmax(-1)}
    assert d.sizes(seen) == dict(b=3, n=7, M=11)
    assert set(d.shapes) == {*seen, ('error', 'Y'), ('error', 'Z')}
    torch.testing.assert_close(v, torch.zeros(3, 11).double().scatter_add(1, context, b))
    torch.testing.assert_close(f @ model.Y, model(tokens))


def test_the_exercises_run_what_they_show():
    "Each solution's code stands, with an assertion, in a hidden cell of the notebook."
    cells = story_cells()
    told = next(c for c in cells if c.startswith('## Exercises'))
    solutions = re.findall(r'```python\n(.*?)```', told, re.S)
    hidden = [c for c in cells if c.startswith('#| hide\n')]
    assert len(solutions) == 4
    for solution in solutions:
        assert any(solution in c and 'assert' in c.split(solution)[1] for c in hidden), solution


# bad input

@pytest.mark.parametrize('call, word', [
    (lambda: S.YZTransformer(1), 'vocab_size'),
    (lambda: S.YZTransformer(4)(torch.zeros(2, 1, dtype=torch.long)), 'tokens'),
    (lambda: S.SequenceClasses(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1, 2])), 'prob'),
    (lambda: S.sequence_classes(2, 1, vocab_size=10), 'vocab_size'),
    (lambda: S.height(torch.tensor([-1.]), 10, 1.), 't must'),
    (lambda: S.integrate(lambda z: z, torch.ones(1), torch.ones(2), 'heun'), 'method'),
    (lambda: S.attention_budget(torch.ones(1), 10, 2, 1., 1., form='late'), 'form'),
    (lambda: S.attention_ode(S.syn_small(), torch.arange(3.).double(), 1., 1., z0=torch.zeros(1, 34)), 'z0'),
    (lambda: S.sweep(S.syn_small(), torch.ones(2), torch.ones(3)), 'eta_y'),
    (lambda: S.simulate(S.syn_small(), optimizer='lion'), 'optimizer'),
    (lambda: S.simulate(S.syn_small(), steps=0), 'steps'),
    (lambda: S.simulate(S.syn_small(), length=1), 'length'),
    (lambda: S.recall(torch.ones(2, 3) / 3, S.SequenceClasses(torch.ones(2, 3) / 3, torch.tensor([0, 1]), torch.tensor([1, 2])), torch.ones(1)), 'distinct'),
    (lambda: S.train_alike(*[torch.ones(1)] * 5, steps=1), 'num_classes'),
    (lambda: S.OneLayerLM(10, 8, max_len=4)(torch.zeros(1, 5, dtype=torch.long)), 'ids'),
    (lambda: S.reading(torch.arange(10), 4, 5), 'ids'),
])
def test_bad_input_names_the_argument(call, word):
    with pytest.raises((ValueError, TypeError), match=word): call()
