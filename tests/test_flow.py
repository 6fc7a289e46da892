"""flow: paths, predictions, losses, samplers and guidance, where the notebook does not show it."""
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from vitbook import data, flow as F

names = st.sampled_from(sorted(F.PATHS))
times = st.lists(st.floats(.02, .98), min_size=2, max_size=5)


def pair(t, seed=0, dim=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(t), dim, generator=g, dtype=torch.double), torch.randn(len(t), dim, generator=g, dtype=torch.double), torch.tensor(t, dtype=torch.double)


def gaussian(s, path='linear', kind='velocity'):
    "What the best model predicts for data of standard deviation s, in closed form."
    def model(x, t):
        a, da, sigma, ds = F.get_path(path).at(t, x)
        noise, clean = (k * x / (a ** 2 * s ** 2 + sigma ** 2) for k in (sigma, a * s ** 2))
        return dict(velocity=da * clean + ds * noise, score=-noise / sigma, noise=noise, data=clean)[kind]
    return model


# ---- paths and predictions

@given(name=names, t=times)
def test_every_prediction_gives_every_other(name, t):
    noise, clean, t = pair(t)
    path = F.get_path(name)
    x = path.mix(noise, clean, t)
    truth = dict(velocity=path.velocity(noise, clean, t), score=-noise / path.at(t, x)[2], noise=noise, data=clean)
    for have in truth:
        for want in truth: assert_close(F.convert(truth[have], x, t, have, want, name), truth[want], atol=1e-6, rtol=1e-6)


@given(name=names, t=times)
def test_velocity_is_the_slope_of_the_path(name, t):
    noise, clean, t = pair(t)
    path, h = F.get_path(name), 1e-5
    assert_close(path.velocity(noise, clean, t), (path.mix(noise, clean, t + h) - path.mix(noise, clean, t - h)) / (2 * h), atol=1e-6, rtol=1e-6)


@given(name=names, t=times)
def test_drift_and_noise_rate_are_those_of_the_path(name, t):
    "alpha and sigma solve the moment equations of dx = f ds + g dw, s = 1 - t."
    _, clean, t = pair(t)
    path = F.get_path(name)
    a, da, s, ds = path.at(t, clean)
    f, half = path.drift(clean, t)
    assert_close(f, -da / a * clean)
    assert_close(-2 * s * ds, -2 * (da / a) * s ** 2 + 2 * half)         # d var / ds = 2 (f/x) var + g²
    assert (half > 0).all()


def test_vp_is_the_limit_of_ddpm():
    "The product of 1 - beta over a thousand steps from 1e-4 to 0.02."
    beta = torch.linspace(1e-4, .02, 1000, dtype=torch.double)
    kept = (1 - beta).cumprod(0).sqrt()
    t = 1 - torch.arange(1, 1001, dtype=torch.double) / 1000
    assert (F.vp_path().alpha(t)[0] - kept).abs().max() < .002


def test_ends_of_the_paths_in_single_precision():
    ends, x = torch.tensor([0., 1.]), torch.randn(2, 3)
    noise = torch.randn(2, 3)
    for name in F.PATHS: assert_close(F.get_path(name).mix(noise, x, ends)[1], x[1], atol=1e-6, rtol=1e-6)
    for name in ('linear', 'cosine'):
        assert_close(F.get_path(name).mix(noise, x, ends)[0], noise[0], atol=1e-6, rtol=1e-6)
        for want in ('noise', 'data'): assert F.convert(x, noise, ends, 'velocity', want, name).isfinite().all()


def test_custom_paths():
    path = F.vp_path(beta_min=.5, beta_max=5.)
    assert F.get_path(path) is path and path.alpha(torch.zeros(1))[0] > F.vp_path().alpha(torch.zeros(1))[0]


# ---- losses

@given(name=names, seed=st.integers(0, 9))
def test_losses_of_equivalent_models_agree(name, seed):
    noise, clean, t = pair([.1, .4, .8], seed)
    model = lambda x, t: torch.tanh(x) * (1 + t[:, None])
    of = lambda kind: lambda x, t: F.convert(model(x, t), x, t, 'noise', kind, name)
    loss = lambda kind, weighting=None: F.flow_loss(of(kind), clean, t, noise, path=name, prediction=kind, weighting=weighting)
    assert_close(loss('velocity'), loss('noise', 'velocity'))
    for weighting in F.WEIGHTINGS: assert_close(loss('score', weighting), loss('noise', weighting))
    half, s = F.get_path(name).drift(clean, t)[1][:, 0], F.get_path(name).at(t, clean)[2][:, 0]
    assert_close(loss('noise', 'likelihood'), loss('noise') * half / s ** 2)


def test_the_best_model_has_the_least_loss():
    g = torch.Generator().manual_seed(0)
    clean, noise, t = .3 * torch.randn(4000, 2, generator=g), torch.randn(4000, 2, generator=g), F.logit_normal(4000, generator=g)
    best = F.flow_loss(gaussian(.3), clean, t, noise).mean()
    for other in (.25, .36): assert F.flow_loss(gaussian(other), clean, t, noise).mean() > best


@given(n=st.integers(1, 6), pad=st.integers(0, 5))
def test_masked_loss(n, pad):
    g = torch.Generator().manual_seed(n)
    clean, noise, t = torch.randn(2, n, 3, generator=g), torch.randn(2, n, 3, generator=g), torch.tensor([.2, .9])
    model = lambda x, t: x.cos()
    more = lambda x: torch.cat([x, 100 * torch.ones(2, pad, 3)], 1)
    mask = torch.tensor([[2] * n + [0] * pad] * 2, dtype=torch.uint8)     # ids of packed pictures count like ones
    assert_close(F.flow_loss(model, more(clean), t, more(noise), mask=mask), F.flow_loss(model, clean, t, noise))


def test_gradients_reach_the_model():
    w = torch.randn(3, 3, requires_grad=True)
    F.flow_loss(lambda x, t: x @ w, torch.randn(4, 3), torch.rand(4), torch.randn(4, 3)).mean().backward()
    assert w.grad.abs().sum() > 0


def test_walks_to_the_data_keep_no_graph():
    w = torch.randn(3, 3, requires_grad=True)
    for out in (F.sample_ode(lambda x, t: x @ w, torch.randn(2, 3), steps=3), F.sample_sde(lambda x, t: x @ w, torch.randn(2, 3), steps=3), F.sample_ode(lambda x, t: x @ w, torch.randn(2, 3), method='dopri5')): assert not out.requires_grad


# ---- times

def test_logit_normal_median_and_quantiles():
    t = F.logit_normal(400_000, generator=torch.Generator().manual_seed(0))
    assert abs(t.median() - .5) < .003 and abs(((t > .268941) & (t < .731059)).float().mean() - .682689) < .003
    assert (torch.tensor([-15., 15.]).sigmoid() % 1 != 0).all()
    assert_close(F.logit_normal(5, generator=torch.Generator().manual_seed(1)), F.logit_normal(5, generator=torch.Generator().manual_seed(1)))


# ---- samplers

@pytest.mark.parametrize('name', sorted(F.PATHS))
@pytest.mark.parametrize('kind', F.PREDICTIONS)
def test_all_paths_and_predictions_reach_the_same_end(name, kind):
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for method in F.METHODS:
        x = F.sample_ode(gaussian(.3, name, kind), z, steps=400 if method == 'euler' else 100, method=method, path=name, prediction=kind, rtol=1e-5)
        assert_close(x, .3 * z, atol=.01, rtol=.02)


def test_orders_of_convergence_and_calls():
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    gap = lambda **how: (F.sample_ode(gaussian(.3), z, **how) - .3 * z).abs().max().item()
    for method, order in (('euler', 1), ('heun', 2)):
        assert abs(math.log2(gap(steps=100, method=method) / gap(steps=200, method=method)) - order) < .15
        assert F.sample_ode(gaussian(.3), z, steps=10, method=method, walk=True).calls == 10 * order


def test_dopri5_is_of_fifth_order_with_an_estimate_of_fourth():
    "With tolerances too wide to matter it takes three steps, of 1/50, 10/50 and 39/50: what they must give is known."
    loose, tight = (dict(method='dopri5', rtol=r, atol=r, walk=True) for r in (1e9, 1e-10))
    power = lambda n: lambda x, t: (n + 1) * t[:, None] ** n + 0 * x
    zero = torch.zeros(1, 1, dtype=torch.double)
    for n in range(6):                                                  # the integral of (n + 1) t^n is 1
        walk = F.sample_ode(power(n), zero, **loose)
        assert walk.calls == 1 + 6 * 3 and ((walk.states[-1] - 1).abs() < 1e-13) == (n < 5)   # the seventh call of a step is the first of the next
        assert (F.sample_ode(power(n), zero, **tight).calls == 1 + 6 * 3) == (n < 4)          # the estimate is blind to what fourth order integrates
    grow = lambda h: sum(h ** k / math.factorial(k) for k in range(6)) + h ** 6 / 600         # of x' = x in one step
    got = F.sample_ode(lambda x, t: x, zero + 1, t1=2., **loose).states[-1].item()
    assert abs(got - grow(.04) * grow(.4) * grow(1.56)) < 1e-13


def test_dopri5_keeps_its_tolerance():
    "Each step errs by at most the tolerance, and in this field an error grows by at most sqrt(1 + s²) on its way to the end: the sum over steps is a bound at any tolerance."
    z, s = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double), .3
    gaps, steps = {}, {}
    for r in (1e-3, 1e-4, 1e-5, 1e-7, 1e-9, 1e-11):
        walk = F.sample_ode(gaussian(s), z, method='dopri5', rtol=r, atol=r, walk=True)
        gaps[r], steps[r] = (walk.states[-1] - s * z).abs().max().item(), len(walk.times) - 1
        assert gaps[r] < steps[r] * math.sqrt(1 + s ** 2) * math.sqrt(2) * r * (1 + z.abs().max())    # sqrt(2): a mean of squares over two numbers is kept
    # With steps this fine the error is proportional to the tolerance, and steps to its fifth root. (With the four or five steps of 1e-3 to 1e-5 neither holds: one lucky step decides.)
    assert 1 / 2 < gaps[1e-9] / gaps[1e-11] / 100 < 2
    assert abs(steps[1e-11] / steps[1e-9] / 100 ** .2 - 1) < .08        # a step more or less among 25 and 62


def test_dopri5_agrees_with_scipys():
    import numpy as np
    from scipy.integrate import solve_ivp
    f = lambda x, t: torch.stack([x[:, 1], -9 * x[:, 0] + t], 1)
    x = torch.tensor([[1., 0.]], dtype=torch.double)
    ours = F.sample_ode(f, x, method='dopri5', rtol=1e-8, atol=1e-10)
    theirs = solve_ivp(lambda t, y: np.array([y[1], -9 * y[0] + t]), (0, 1), x[0].numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    assert_close(ours[0], torch.from_numpy(theirs), atol=1e-7, rtol=1e-7)


def test_there_and_back_again():
    z = torch.randn(8, 3, dtype=torch.double)
    for method in F.METHODS[1:]:
        x = F.sample_ode(gaussian(.5), z, method=method, steps=200, rtol=1e-7, atol=1e-9)
        assert_close(F.sample_ode(gaussian(.5), x, method=method, steps=200, rtol=1e-7, atol=1e-9, t0=1., t1=0.), z, atol=1e-4, rtol=1e-4)


def test_walks():
    z = torch.randn(3, 2)
    walk = F.sample_ode(gaussian(.3), z, steps=5, walk=True)
    assert walk.states.shape == (6, 3, 2) and torch.equal(walk.states[0], z) and len(walk.times) == 6
    assert_close(walk.states[-1], F.sample_ode(gaussian(.3), z, steps=5))
    own = F.sample_ode(gaussian(.3), z, method='dopri5', walk=True)
    assert len(own.times) == len(own.states) and own.times[-1] == 1 and (own.times.diff() > 0).all()


@pytest.mark.parametrize('method', ['euler', 'heun'])
@pytest.mark.parametrize('form', F.FORMS)
@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_sde_keeps_the_distribution(name, form, method):
    z = torch.randn(8000, 1, generator=torch.Generator().manual_seed(0))
    x = F.sample_sde(gaussian(.3, name), z, steps=80, form=form, method=method, path=name, eps=.02, last_size=.004 if form == 'constant' else .04, generator=torch.Generator().manual_seed(1))
    assert abs(x.std() - .3) < .035 and abs(x.mean()) < .02


@pytest.mark.parametrize('last', ['mean', 'euler', 'tweedie', None])
def test_last_steps(last):
    z = torch.randn(8000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x = F.sample_sde(gaussian(.3), z, steps=150, last=last, generator=torch.Generator().manual_seed(1))
    assert abs(x.std() - .3) < .03
    calls = 0
    def model(x, t):
        nonlocal calls
        calls += 1
        return gaussian(.3)(x, t)
    F.sample_sde(model, z[:2], steps=7, last=last)
    assert calls == 7 + (last is not None)


def test_last_steps_from_the_same_place():
    "Without a last step the walk ends where the last step begins; from there each is known."
    z, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double), torch.full((5,), .96, dtype=torch.double)
    walk = lambda **how: F.sample_sde(gaussian(.3), z, steps=12, generator=torch.Generator().manual_seed(1), **how)
    y = walk(last=None, eps=.04)
    v, score, clean = (gaussian(.3, kind=k)(y, t) for k in ('velocity', 'score', 'data'))
    for last, want in (('euler', y + .04 * v), ('mean', y + .04 * (v + .04 * score)), ('tweedie', clean)): assert_close(walk(last=last, last_size=.04), want)


def test_guidance():
    c, u = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert_close(F.guide(c, u, 2.), 2 * c - u)
    some = F.guide(c, u, 2., 6)
    assert_close(some[..., :6], (2 * c - u)[..., :6])
    assert torch.equal(some[..., 6:], c[..., 6:])
    assert_close(F.guide(c, u, torch.tensor([0., 1., 3.])), torch.stack([u[0], c[1], 3 * c[2] - 2 * u[2]]))
    assert_close(F.falling_scale(torch.tensor([0., .5, 1.]), 4., 1.), torch.tensor([4., 2.5, 1.]))


def test_intervals():
    assert F.interval() == (0, 1) and F.interval('cosine') == (0, 1)
    assert F.interval('linear', 'noise') == (1e-3, 1 - 1e-3) and F.interval('vp') == (0, 1 - 1e-3)
    assert F.interval(form='sigma', last=.04) == (0, .96) and F.interval(form='sbdm', last=.04) == (1e-3, .96) and F.interval(form='sigma', eps=.01) == (0, .99)


# ---- exact fields

def test_exact_data_is_the_posterior_mean():
    "Against a plain count over many pairs."
    g = torch.Generator().manual_seed(0)
    points = torch.tensor([[-1.], [0.], [2.]])
    t = torch.tensor([.4])
    which, noise = torch.randint(0, 3, (400_000,), generator=g), torch.randn(400_000, 1, generator=g)
    x = F.linear_path().mix(noise, points[which], t.expand(400_000))
    near = (x[:, 0] - .3).abs() < .02
    assert_close(F.exact_data(points)(torch.tensor([[.3]]), t)[0, 0], points[which][near].mean(), atol=.03, rtol=0)


def test_exact_fields_end_on_the_data():
    pictures = data.digits('test').images[:50] * 2 - 1
    for name in F.PATHS:
        x = F.sample_ode(F.exact_data(pictures, name), torch.randn(6, 1, 8, 8), steps=60, path=name, prediction='data')
        assert torch.cdist(x.flatten(1), pictures.flatten(1)).min(1).values.max() < .5    # digits are 3 to 9 apart


@pytest.mark.parametrize('call, words', [
    (lambda: F.get_path('straight'), "path.*'straight'"),
    (lambda: F.convert(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), 'eps', 'data'), "have.*'eps'"),
    (lambda: F.linear_path().mix(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), 't must'),
    (lambda: F.flow_loss(lambda x, t: x[:1], torch.ones(2, 3), torch.ones(2), torch.ones(2, 3)), 'shape'),
    (lambda: F.flow_loss(lambda x, t: x, torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), prediction='x0'), 'prediction'),
    (lambda: F.sample_ode(lambda x, t: x / 0, torch.ones(2, 3), method='dopri5'), 'not finite'),
    (lambda: F.sample_ode(lambda x, t: x, torch.ones(2, 3), method='rk45'), 'method'),
    (lambda: F.sample_sde(lambda x, t: x, torch.ones(2, 3), form='SBDM'), 'form'),
    (lambda: F.sample_sde(lambda x, t: x, torch.ones(2, 3), last='Mean'), 'last'),
    (lambda: F.shift(torch.ones(2), -1.), 'factor'),
    (lambda: F.guide(torch.ones(2, 3), torch.ones(2, 3), 2., 4), 'channels'),
])
def test_bad_input_is_named(call, words, unchecked):
    with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize('words, a, b',
                         [('as many features', (5, 2), (5, 3)), ('finite', (5, 3), None),
                          ('two samples', (1, 3), (5, 3))])
def test_a_frechet_distance_of_unlike_sets_is_refused(words, a, b, unchecked):
    other = torch.rand(5, 3).masked_fill(torch.eye(5, 3).bool(), math.nan) if b is None else torch.rand(b)
    with pytest.raises(ValueError, match=words): F.frechet_distance(torch.rand(a), other)
