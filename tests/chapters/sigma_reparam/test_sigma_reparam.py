"""dynamics.sigma_reparam: the power iteration and its gradients, converting and folding any model, the entropy bound, the official code's sheets and state dicts."""
import copy
import json
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from sheets import sheets
from tools import ROOT
from vitbook.diagram import Diagram
from vitbook.dynamics import sigma_reparam as S
from vitbook.layers.attention import entropy
from vitbook.registry import create_model
from vitbook.probe import recording
from vitbook.vit import VisionTransformer

SMALL = dict(img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=24, depth=2, num_heads=3)
SHEETS = {s.name: s for s in sheets('sigma_reparam')}
blocks_and_side = pytest.mark.parametrize('blocks, side', [(None, 'in'), (None, 'out'), ((8, 4), 'in'), ((8, 4), 'out'), ((4, 4, 4), 'in')])


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, dtype=torch.double): return torch.randn(*shape, generator=rng(seed), dtype=dtype)
def svd_norm(W): return torch.linalg.matrix_norm(W.detach().flatten(1), 2)


def small(seed=0, **more):
    torch.manual_seed(seed)
    return VisionTransformer(**{**SMALL, **more})


def batch(): return torch.rand(3, 1, 16, 16, generator=rng(1))


def naive(x, W, u, gamma, bias):
    "The layer by its equation: one iteration without a gradient, sigma with one."
    with torch.no_grad():
        v = W @ u
        v = v / v.norm()
        u = W.T @ v
        u = u / u.norm()
    return x @ (gamma * W / (v @ W @ u)).T + bias, v, u


# the layer

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_output_and_both_gradients_in_closed_form(o, i, seed):
    layer = S.SigmaLinear(i, o, dtype=torch.double)
    layer.weight.data, layer.gamma.data, layer.u = normal(o, i, seed=seed), normal(1, seed=seed + 1), 3 * normal(1, i, seed=seed + 2)   # u of any length
    x, g = normal(4, i, seed=seed + 3), normal(4, o, seed=seed + 4)
    W, gamma = layer.weight.detach().clone().requires_grad_(), layer.gamma.detach().clone().requires_grad_()
    want, v, u = naive(x, W, layer.u[0], gamma, layer.bias.detach())
    out = layer(x)
    assert_close(out, want, rtol=1e-10, atol=1e-10)
    assert_close(layer.u[0], u)
    (out * g).sum().backward()
    (want * g).sum().backward()
    sigma, G = (v @ W @ u).item(), g.T @ x
    dgamma = (G * W).sum() / sigma
    for name, ours, autograd, closed in [('gamma', layer.gamma.grad, gamma.grad, dgamma[None]), ('weight', layer.weight.grad, W.grad, gamma / sigma * (G - dgamma * torch.outer(v, u)))]:
        scale = max(1, closed.abs().max().item())
        assert_close(ours, autograd, rtol=0, atol=1e-10 * scale, msg=lambda m: f'{name}: {m}')
        assert_close(ours, closed, rtol=0, atol=1e-10 * scale, msg=lambda m: f'{name}: {m}')
    assert abs((layer.weight.grad * W).sum()) <= 1e-10 * layer.weight.grad.norm() * W.norm() + 1e-12      # <dL/dW, W> = 0
    assert_close(layer.bias.grad, g.sum(0))


@blocks_and_side
def test_fast_is_the_literal_form(blocks, side):
    a = S.SigmaLinear(6, 12, blocks=blocks, side=side, dtype=torch.double)
    a.gamma.data.uniform_(.5, 2., generator=rng(0))
    b = copy.deepcopy(a)
    b.fast = False
    x, xs = normal(2, 5, 6), []
    for m in (a, b):
        xs.append(x.clone().requires_grad_())
        m(xs[-1]).sin().sum().backward()
    for p, q in zip([xs[0], *a.parameters()], [xs[1], *b.parameters()]): assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
    assert_close(a.u, b.u)
    a.eval()
    parts = a.weight.split(blocks or (12,))
    scaled = torch.cat([c * p / s for c, p, s in zip(a.gamma, parts, a.sigma())])
    assert_close(a(x), F.linear(x, scaled, a.bias))                       # scaling the output equals scaling the weight
    assert len(a.gamma) == len(blocks or (12,)) and all(s <= svd_norm(p) * (1 + 1e-9) for s, p in zip(a.sigma(), parts))


@pytest.mark.parametrize('side', ['in', 'out'])
def test_gamma_at_the_start(side):
    torch.manual_seed(0)
    x = torch.randn(7, 20)
    same = S.SigmaLinear(20, 30, gamma_init='spectral', side=side)
    assert_close(same.eval()(x), F.linear(x, same.weight, same.bias), rtol=0, atol=1e-6)
    assert_close(same.gamma[0].detach(), svd_norm(same.weight))
    one = S.SigmaLinear(20, 30, side=side)
    assert abs(svd_norm(one.effective_weight()) - 1) < 1e-4 and one.gamma.tolist() == [1]
    assert abs(S.SigmaLinear(400, 300, init_gain=.5).weight.std() / .01 - 1) < .02 and abs(S.SigmaLinear(400, 300, init_std=.1).weight.std() / .1 - 1) < .02
    torch.manual_seed(1); a = S.SigmaConv2d(3, 8, 4, gamma_init='spectral')
    torch.manual_seed(1); b = S.SigmaConv2d(3, 8, 4, gamma_init='spectral', init_gain=.125)
    assert_close(b.gamma, a.gamma / 8)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10_000))
def test_the_estimate_grows_to_the_norm_and_never_beyond(o, i, seed):
    layer = S.SigmaLinear(i, o, dtype=torch.double)
    U, s, V = torch.linalg.svd(normal(o, i, seed=seed), full_matrices=False)
    s = torch.cat([s[:1] * 1.5, s[1:]])                                    # a gap
    layer.weight.data, layer.u = U * s @ V, normal(1, i, seed=seed + 1) + .2 * V[:1]
    seen, x = [], torch.zeros(1, i, dtype=torch.double)
    for _ in range(50):
        seen.append(layer.sigma().item())
        layer(x)
    assert all(b >= a * (1 - 1e-12) for a, b in zip(seen, seen[1:])) and seen[-1] <= s[0] * (1 + 1e-12)
    assert abs(seen[-1] / s[0] - 1) < 1e-4


def test_scale_of_the_weight_does_not_matter():
    torch.manual_seed(0)
    layer = S.SigmaLinear(9, 7).eval()
    want = layer.effective_weight()
    for c in (1e-3, .5, 400.):
        twin = copy.deepcopy(layer)
        twin.weight.data *= c
        assert_close(twin.effective_weight(), want)


def test_train_moves_u_only_and_eval_nothing():
    torch.manual_seed(0)
    layer = S.SigmaLinear(9, 7)
    layer.weight.data += .02 * torch.randn(7, 9)
    x, before = torch.randn(2, 9), copy.deepcopy(layer.state_dict())
    layer.eval()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second) and all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.sigma()
    assert torch.equal(layer.u, before['u'])
    layer.train()(x)
    changed = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'u'} and set(before) == {'weight', 'bias', 'gamma', 'u'}
    with torch.no_grad(): assert not torch.equal(layer(x), first)          # without gradients, but in training mode, it moves too


def test_sgd_lets_the_weight_grow_only():
    torch.manual_seed(0)
    layer, x = S.SigmaLinear(9, 7, dtype=torch.double), torch.randn(30, 9, dtype=torch.double)
    opt = torch.optim.SGD(layer.parameters(), .1)
    for _ in range(20):
        opt.zero_grad()
        (layer(x) - 1).square().mean().backward()
        before, step = layer.weight.norm().item(), .1 * layer.weight.grad.norm().item()
        opt.step()
        assert layer.weight.norm().item() == pytest.approx(math.hypot(before, step), rel=1e-10) and step > 0


@pytest.mark.parametrize('dim, cls, plain', [(1, S.SigmaConv1d, nn.Conv1d), (2, S.SigmaConv2d, nn.Conv2d), (3, S.SigmaConv3d, nn.Conv3d)])
@pytest.mark.parametrize('options', [dict(), dict(stride=2, padding=1), dict(padding='same', dilation=2, bias=False), dict(padding=1, padding_mode='circular'), dict(blocks=(2, 4))])
def test_convolutions(dim, cls, plain, options):
    torch.manual_seed(0)
    layer = cls(3, 6, 3, gamma_init='spectral', **options)
    x = torch.randn(2, 3, *[7] * dim)
    own = plain(3, 6, 3, **{k: v for k, v in options.items() if k != 'blocks'})
    own.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ('weight', 'bias')})
    assert_close(layer.eval()(x), own(x), rtol=1e-5, atol=1e-6)            # gamma_init='spectral' changes nothing
    assert_close(layer(x[0]), own(x[0]), rtol=1e-5, atol=1e-6)             # without a batch
    layer.weight.data += .05 * torch.randn_like(layer.weight)
    assert (layer.sigma() <= torch.stack([svd_norm(w) for w in layer.weight.split(layer.blocks)]) * (1 + 1e-6)).all()   # of the matrix (out, in * kernel)
    slow = copy.deepcopy(layer)
    slow.fast = False
    for m in (layer, slow): m.train()(x).sin().sum().backward()
    for p, q in zip(layer.parameters(), slow.parameters()): assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert_close(S.fold(copy.deepcopy(layer).eval())(x), layer.eval()(x), rtol=1e-5, atol=1e-6)


def test_stats_only_watches():
    torch.manual_seed(0)
    model, x = small(), batch()
    want = model.eval()(x)
    S.convert(model, stats_only=True)
    assert_close(model(x), want, rtol=0, atol=0)
    assert not any('gamma' in n for n, _ in model.named_parameters())
    layer = model.blocks[0].mlp.fc1
    layer.weight.data += .05 * torch.randn_like(layer.weight)
    before = layer.sigma().item()
    for _ in range(60): model.train()(x)
    assert before < layer.sigma().item() and abs(layer.sigma() / svd_norm(layer.weight) - 1) < 1e-2
    assert_close(S.fold(model).eval()(x), model(x))


# precision, saving, moving

def test_low_precision():
    torch.manual_seed(0)
    layer, x = S.SigmaLinear(64, 48), torch.randn(5, 64)
    u, want = layer.u.clone(), layer.eval()(x)
    for dtype in (torch.bfloat16, torch.half):
        low = copy.deepcopy(layer).to(dtype)
        assert low.u.dtype == torch.float32 and torch.equal(low.u, u) and low.weight.dtype == low.gamma.dtype == dtype
        assert low(x.to(dtype)).dtype == dtype and (low(x.to(dtype)).float() - want).abs().max() < .02
        assert S.fold(copy.deepcopy(low)).weight.dtype == dtype
    assert copy.deepcopy(layer).double().u.dtype == torch.float64
    layer.weight.data += .02 * torch.randn_like(layer.weight)
    want, weight, moved = layer(x), layer.effective_weight(), copy.deepcopy(layer).train()
    moved(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = copy.deepcopy(layer).train()
        out = low(x)
        assert out.dtype == torch.bfloat16 and low.u.dtype == torch.float32 and (out.float() - want).abs().max() < .02
        assert torch.equal(low.u, moved.u) and torch.equal(low.sigma(), moved.sigma()) and torch.equal(layer.effective_weight(), weight)   # the iteration is float32 under autocast
    out.float().square().sum().backward()
    exact = copy.deepcopy(layer).train()
    exact(x).square().sum().backward()
    for p, q in zip(low.parameters(), exact.parameters()): assert p.grad.dtype == torch.float32 and (p.grad - q.grad).norm() < .03 * q.grad.norm()


def test_power_iteration_in_half_precision_would_stall():
    "Why u is float32: with a small gap, bfloat16 vectors stop short of the norm, float32 ones reach it."
    U, V = (torch.linalg.qr(normal(64, 64, seed=s))[0] for s in (0, 1))
    W = (U * torch.cat([torch.tensor([1., .97]).double(), torch.linspace(.9, .1, 62).double()]) @ V).float()
    layer = S.SigmaLinear(64, 64)
    layer.weight.data, layer.u = W.bfloat16().float(), torch.ones(1, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for _ in range(200): layer(torch.zeros(1, 64))
        u = torch.ones(64)
        for _ in range(200): u = F.normalize(layer.weight.T @ F.normalize(layer.weight @ u, dim=0), dim=0)
    low = ((layer.weight @ u.float()).norm() / u.float().norm()).item()
    assert abs(layer.sigma().item() / svd_norm(layer.weight) - 1) < 1e-5 < abs(low / svd_norm(layer.weight) - 1)


def test_state_dict_pickle_and_copies():
    a, b, x = S.convert(small(0)), S.convert(small(1)), batch()
    a(x)
    b.load_state_dict(a.state_dict())
    want = a.eval()(x)
    assert torch.equal(b.eval()(x), want)
    S.PowerIteration(a.train())()
    assert torch.equal(pickle.loads(pickle.dumps(a)).eval()(x), copy.deepcopy(a).eval()(x))
    assert copy.deepcopy(a).head._fresh is None                            # an estimate belongs to one weight at one moment
    with torch.device('meta'): ghost = S.convert(small())
    ghost = ghost.to_empty(device='cpu')
    ghost.load_state_dict(b.state_dict())
    assert torch.equal(ghost.eval()(x), want)


def test_restart_after_new_weights():
    torch.manual_seed(0)
    layer = S.SigmaLinear(8, 6)
    nn.init.normal_(layer.weight)
    layer.restart()
    assert abs(layer.sigma() / svd_norm(layer.weight) - 1) < 1e-5 and layer.gamma.tolist() == [1]
    layer.restart('spectral')
    assert abs(layer.gamma / svd_norm(layer.weight) - 1) < 1e-5


def test_refresh_finds_u_and_leaves_gamma():
    for side in ('in', 'out'):
        layer = S.SigmaLinear(8, 6, blocks=(4, 2), side=side)
        layer.gamma.data *= 3
        layer.weight.data = torch.randn(6, 8)
        u = layer.u
        layer.refresh()
        assert layer.u is u and layer.gamma.tolist() == [3, 3]
        assert_close(layer.sigma(), torch.stack([svd_norm(w) for w in layer.weight.split((4, 2))]))


def test_gradients_of_gradients():
    torch.manual_seed(0)
    layer = S.SigmaLinear(5, 4, fast=False, dtype=torch.double)
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    layer.eval()
    v, u = layer.step()[0], layer.step()[1][0]
    names = ('weight', 'gamma', 'bias')
    def f(*p):
        W, gamma, bias = p
        return F.linear(x, gamma * W / (v @ W @ u), bias).sin()
    params = tuple(getattr(layer, n) for n in names)
    H = torch.autograd.functional.hvp(lambda *p: torch.func.functional_call(layer, dict(zip(names, p)), (x,)).sin().sum(), params, tuple(torch.ones_like(p) for p in params))[1]
    assert len(H) == 3 and all(h.isfinite().all() for h in H) and f(*params).shape == (3, 4)
    fast = copy.deepcopy(layer)
    fast.fast = True
    (g,) = torch.autograd.grad(fast(x).sin().sum(), x, create_graph=True)  # a penalty on the input's gradient needs one derivative of the weight: works
    (h,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    for a, b in zip(torch.autograd.grad(g.square().sum(), (fast.weight, fast.gamma)), torch.autograd.grad(h.square().sum(), (layer.weight, layer.gamma))): assert_close(a, b)
    (g,) = torch.autograd.grad(fast(x).sin().sum(), fast.weight, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()    # never a silently wrong Hessian


def test_stacked_models_train_together():
    models, x = [S.convert(small(s)).train() for s in (0, 1)], batch()
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to('meta')
    params = {k: v.detach().requires_grad_() for k, v in params.items()}
    out = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(params, buffers)
    out.sin().sum().backward()
    for i, m in enumerate(models):
        own = m(x)
        own.sin().sum().backward()
        assert_close(out[i], own, rtol=1e-4, atol=1e-5)
        for name, p in m.named_parameters(): assert_close(params[name].grad[i], p.grad, rtol=1e-3, atol=1e-4, msg=name)
        for name, b in m.named_buffers(): assert_close(buffers[name][i], b, rtol=1e-4, atol=1e-5)


def test_compiled(unchecked):
    torch._dynamo.reset()
    model, x = S.convert(nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2))).train(), torch.randn(5, 9)
    for p in model.parameters(): p.data += .05 * torch.randn_like(p)
    twin, start = copy.deepcopy(model), model[0].u.clone()
    fast = torch.compile(twin, backend='aot_eager', fullgraph=True)
    for _ in range(2):                                                     # u moves in compiled code too
        a, b = fast(x), model(x)
        assert_close(a, b, rtol=1e-4, atol=1e-5)
        a.sin().sum().backward(), b.sin().sum().backward()
    assert_close(twin[0].u, model[0].u)
    assert not torch.equal(twin[0].u, start)
    for p, q in zip(twin.parameters(), model.parameters()): assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# the whole step at once

@pytest.mark.parametrize('options', [dict(), dict(side='out'), dict(qkv='qk_v'), dict(qkv='separate', side='out')])
def test_power_iteration_in_batches(options):
    a, x = S.convert(small(), **options).train(), batch()
    b = copy.deepcopy(a)
    S.PowerIteration(a)()
    assert_close(a(x), b(x), rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(a.named_buffers(), b.buffers()): assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    before = {n: v.clone() for n, v in a.named_buffers()}
    a(x)
    assert all(torch.equal(v, before[n]) for n, v in a.named_buffers())    # no second move for the same weights …
    with torch.no_grad(): a.head.weight.add_(.01)
    a(x)
    assert {n for n, v in a.named_buffers() if not torch.equal(v, before[n])} == {'head.u'}   # … and one where they changed


def test_accumulation_and_checkpointing():
    from torch.utils.checkpoint import checkpoint
    def grads(model, x, how):
        model.zero_grad()
        out = checkpoint(model, x, use_reentrant=False) if how == 'checkpointed' else model(x)
        out.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    model, x = S.convert(small()).train(), batch()
    for p in model.parameters(): p.data += .05 * normal(*p.shape, dtype=torch.float)
    alone, thrice = copy.deepcopy(model), copy.deepcopy(model)
    alone(x)
    for part in x.split(1): thrice(part)
    assert not torch.equal(alone.head.u, thrice.head.u)                     # u moves once a forward, as in the official code: three small batches, three moves
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    grads(a, x, 'checkpointed'), grads(b, x, '')
    assert not torch.equal(a.head.u, b.head.u)                              # the recomputed forward moves it again
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    S.PowerIteration(a)(), S.PowerIteration(b)()
    assert_close(grads(a, x, 'checkpointed'), grads(b, x, ''))              # one move a step: recomputation is exact
    for part in x.split(1): a(part)
    assert torch.equal(a.head.u, b.head.u)


# converting

def count(model): return sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())


def test_convert_counts():
    model = small()
    layers, norms, before = count(model), sum(p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()), sum(p.numel() for p in model.parameters())
    assert S.convert(model, remove_norms=True) is model
    assert len(list(S.sigma_layers(model))) == layers == count(model)
    assert not any('Norm' in type(m).__name__ for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) - before == layers - norms
    state = copy.deepcopy(model.state_dict())
    S.convert(model, gamma_init='spectral')                                # a second time changes nothing
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('gamma_init', ['one', 'spectral'])
def test_fold_gives_what_eval_gave(gamma_init):
    model, x = small(), batch()
    names, want = set(model.state_dict()), model.eval()(x)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    S.convert(model, gamma_init=gamma_init)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())   # weights and biases are kept
    if gamma_init == 'spectral': assert_close(model(x), want, rtol=0, atol=1e-6)
    for _ in range(3): model.train()(x)
    for m in model.modules():
        if isinstance(m, S.Sigma): m.gamma.data.mul_(1.3)
    for p in model.parameters(): p.data += .05 * torch.randn_like(p)      # u is no longer near
    want = model.eval()(x)
    folded = S.fold(copy.deepcopy(model).train())
    assert folded.head.training
    assert_close(folded.eval()(x), want, rtol=0, atol=2e-6 * want.abs().max().item())
    assert set(folded.state_dict()) == names and not list(S.sigma_layers(folded)) and type(folded.head) is nn.Linear
    assert folded.blocks[0].attn.qkv.__dict__.keys() == small().blocks[0].attn.qkv.__dict__.keys()
    small().load_state_dict(folded.state_dict())


def test_hugging_face():
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    hf = ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4, num_channels=1, num_labels=5)).eval()
    x, layers = batch(), count(hf)
    want = hf(x).logits
    S.convert(hf, gamma_init='spectral')
    assert len(list(S.sigma_layers(hf))) == layers == 14 and S.bypassed(hf, x) == []
    assert_close(hf(x).logits, want, rtol=0, atol=1e-6)
    hf.train()(x).logits.sum().backward()
    assert all(p.grad is not None for p in hf.parameters() if p.requires_grad)
    want = hf.eval()(x).logits
    assert S.attention_entropy(hf, x).shape == (2, 3)
    assert_close(S.fold(hf)(x).logits, want, rtol=0, atol=1e-6)
    S.convert(hf, remove_norms=True)
    assert not any(isinstance(m, nn.LayerNorm) for m in hf.modules()) and hf(x).logits.isfinite().all()


def torch_attentions():
    for batch_first in (True, False):
        for bias in (True, False): yield nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first, add_bias_kv=bias and not batch_first)


@pytest.mark.parametrize('qkv', ['fused', 'qk_v', 'separate'])
def test_torch_attention(qkv):
    torch.manual_seed(0)
    for m in torch_attentions():
        x, y = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
        pad, mask = torch.rand(2, 5) > .8, torch.rand(5, 5) > .8
        pad[:, 0] = mask[:, 0] = False
        if not m.batch_first: x, y = x.transpose(0, 1), y.transpose(0, 1)
        calls = [lambda: m(x, x, x), lambda: m(x, y, y, need_weights=False), lambda: m(x, y, x, key_padding_mask=pad, attn_mask=mask), lambda: m(x, x, x, average_attn_weights=False),
                 lambda: m(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True, need_weights=False)]
        def outputs():
            with torch.no_grad(): return [t for c in calls for t in c() if t is not None]
        m.eval()
        want, keys = outputs(), set(m.state_dict())
        S.convert(m, gamma_init='spectral', qkv=qkv)
        assert type(m) is S.SigmaMultiheadAttention and len(m.gamma) == {'fused': 1, 'qk_v': 2, 'separate': 3}[qkv]
        for a, b in zip(outputs(), want, strict=True): assert_close(a, b, rtol=1e-5, atol=2e-6)
        m.gamma.data *= 2
        u = m.u.clone()
        m.train()(x, x, x)[0].sum().backward()
        assert m.gamma.grad.abs().sum() > 0 and m.in_proj_weight.grad is not None and m.out_proj.gamma.grad is not None and m.u.shape == u.shape
        m.eval()
        changed = outputs()
        assert not torch.allclose(changed[0], want[0])
        with recording(m) as rec: m(x, x, x)
        assert len(rec.weights) == 1 and rec.weights[0].shape == (2, 3, 5, 5) or m.bias_k is not None
        S.fold(m)
        assert type(m) is nn.MultiheadAttention and set(m.state_dict()) == keys
        for a, b in zip(outputs(), changed, strict=True): assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.filterwarnings('ignore')
def test_torch_encoder_does_not_read_past_the_layers(norm_first):
    torch.manual_seed(0)
    e = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first), 2).eval()
    x, pad = torch.randn(3, 5, 16), torch.tensor([[0] * 5, [0] * 3 + [1] * 2, [0] * 4 + [1]]).bool()
    with torch.no_grad():
        S.convert(e)
        assert S.bypassed(e, x) == []
        plain = e(x)
        for _, m in S.sigma_layers(e): m.gamma.mul_(1.5)
        assert not torch.allclose(plain, e(x), atol=1e-2)
        want = [e(x), e(x, src_key_padding_mask=pad)[~pad]]
        S.fold(e)
        assert e.layers[0].activation_relu_or_gelu == 1 and e.use_nested_tensor == (not norm_first)
        for a, b in zip([e(x), e(x, src_key_padding_mask=pad)[~pad]], want): assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [lambda layer: layer, lambda layer: nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))], ids=['layer', 'stack'])
def test_torch_encoder_without_norms(make):
    "Its fused path reads the norms' weights: without norms it stays off, converted, folded or plain."
    layer = lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    torch.manual_seed(0)
    x, pad = torch.randn(3, 5, 16), torch.tensor([[0] * 5, [0] * 3 + [1] * 2, [0] * 4 + [1]]).bool()
    with torch.no_grad():
        e = S.convert(make(layer()), remove_norms=True).eval()
        want = [e(x), e(x, src_key_padding_mask=pad)[~pad]]
        S.fold(e).eval()
        for a, b in zip([e(x), e(x, src_key_padding_mask=pad)[~pad]], want): assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not any('_fused' in m.__dict__ for m in e.modules())
        assert S.drop_norms(make(layer())).eval()(x, src_key_padding_mask=pad).isfinite().all()


def test_hooks_identity_and_modes_stay():
    model, seen = small(), []
    head, weight = model.head, model.head.weight
    head.register_forward_hook(lambda *_: seen.append(1))
    weight.requires_grad_(False)
    model.blocks[1].eval()
    S.convert(model)
    assert model.head is head and head.weight is weight and not model.blocks[1].mlp.fc1.training and model.blocks[0].mlp.fc1.training
    model(batch())
    assert seen == [1]
    S.fold(model)
    assert model.head is head and not head.weight.requires_grad and not model.blocks[1].mlp.fc1.training
    assert type(S.convert(nn.Linear(3, 4))) is S.SigmaLinear and type(S.fold(S.SigmaLinear(3, 4))) is nn.Linear


def test_shared_layers_tied_weights_subclasses():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 4)
    S.convert(model, gamma_init='spectral')
    assert model[0] is model[2] and len(list(S.sigma_layers(model))) == 1
    assert_close(S.fold(copy.deepcopy(model).eval())(x), model.eval()(x))
    class Lm(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
    with pytest.raises(ValueError, match=r"head \(Linear\) shares its weight with embed.*skip=\['head'\]"): S.convert(Lm())
    assert type(S.convert(Lm(), skip=['head']).head) is nn.Linear
    class Named(nn.Linear): pass
    class Twice(nn.Linear):
        def forward(self, x): return 2 * super().forward(x)
    assert type(S.convert(nn.Sequential(Named(4, 4)))[0]) is S.SigmaLinear and type(S.fold(S.convert(nn.Sequential(Named(4, 4))))[0]) is Named
    with pytest.raises(ValueError, match='way of its own'): S.convert(nn.Sequential(Twice(4, 4)))


def conv_groups(): return nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2))
def lazy(): return nn.Sequential(nn.LazyLinear(4))
def normed(): return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
def zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    return model
def odd_attention(): return nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))


@pytest.mark.parametrize('make, words', [(conv_groups, r'1 \(Conv2d\) has groups=2'), (lazy, 'run the model once'), (normed, 'no plain weight'), (zero, '1 .*zero throughout'), (odd_attention, 'another width')])
def test_what_cannot_be_converted_is_named_and_nothing_has_changed(make, words):
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words): S.convert(model)
    assert [type(m) for m in model.modules()] == kinds
    name = next(str(i) for i, m in enumerate(model) if i == len(model) - 1)
    S.convert(model, skip=[name])
    assert not list(S.sigma_layers(model[-1]))


def test_options_of_convert():
    model = small()
    S.convert(model, skip=['blocks.0', '*.proj'])
    names = [n for n, _ in S.sigma_layers(model)]
    assert names == ['blocks.1.attn.qkv', 'blocks.1.mlp.fc1', 'blocks.1.mlp.fc2', 'head']
    a, b, c = S.convert(small(), qkv='fused'), S.convert(small(), qkv='qk_v'), S.convert(small(), qkv='separate')
    assert [len(m.blocks[0].attn.qkv.gamma) for m in (a, b, c)] == [1, 2, 3] and b.blocks[0].attn.qkv.blocks == (48, 24)
    q, k, v = c.blocks[0].attn.qkv.effective_weight().chunk(3)
    assert all(abs(svd_norm(w) - 1) < 1e-4 for w in (q, k, v))
    qk, v = b.blocks[0].attn.qkv.effective_weight().split((48, 24))
    assert abs(svd_norm(qk) - 1) < 1e-4 and abs(svd_norm(v) - 1) < 1e-4 and svd_norm(qk[:24]) < .999
    fresh = S.convert(small(), init_std=.02, conv_init_gain=.125, gamma_init='spectral')
    assert abs(fresh.head.weight.std() / .02 - 1) < .3 and abs(fresh.patch_embed.proj.weight.std() / .0025 - 1) < .2
    assert fresh.patch_embed.proj.gamma < .1 * fresh.blocks[0].attn.qkv.gamma
    scaled = S.convert(small(), linear_init_gain=2.)
    assert_close(scaled.head.weight, 2 * small().head.weight)
    for bad, words in [(dict(gamma_init='ones'), 'gamma_init'), (dict(side='left'), 'side'), (dict(qkv='both'), 'qkv'), (dict(skip='head'), 'skip must be a list'), (dict(skip=['haed']), 'haed')]:
        with pytest.raises(ValueError, match=words): S.convert(small(), **bad)
    with pytest.raises(ValueError, match='qkv'): S.convert(nn.Sequential(nn.Linear(3, 3)), qkv='separate')
    with pytest.raises(ValueError, match='blocks'): S.SigmaLinear(3, 4, blocks=(1, 2))
    with pytest.raises(ValueError, match='groups'): S.SigmaConv2d(4, 4, 3, groups=2)


def test_bypassed_layers_are_found():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        def forward(self, x): return F.linear(self.a(x), self.b.weight)
    assert S.bypassed(S.convert(Reads()), torch.zeros(1, 3)) == ['b']


def test_all_norms_go():
    from vitbook.layers.norm import LayerNorm2d, RMSNorm
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(4)), nn.InstanceNorm1d(3), nn.RMSNorm(4), LayerNorm2d(3), RMSNorm(4), nn.ReLU())
    assert S.drop_norms(model) is model and type(S.drop_norms(nn.LayerNorm(3))) is nn.Identity
    assert sum(isinstance(m, nn.Identity) for m in model.modules()) == 7 and isinstance(model[-1], nn.ReLU) and not list(model.parameters())


# entropy

@pytest.mark.parametrize('n, s', [(4, 1), (16, 2), (64, 5)])
def test_the_bound_is_attained_and_never_undercut(n, s):
    bound = S.entropy_bound(s, n)
    u = S.extremal_logits(s, n)
    assert abs(u.norm() - s) < 1e-12 and abs(entropy(u) - bound) < 1e-12
    directions = F.normalize(normal(2000, n, seed=n), dim=1) * s
    assert (entropy(directions) >= bound).all() and (entropy(directions + 7) >= bound).all()
    T = n
    beta = math.exp(-s * math.sqrt(T / (T - 1)))
    assert abs(bound - (math.log(1 + (T - 1) * beta) + s * math.sqrt(T * (T - 1)) * beta / (1 + (T - 1) * beta))) < 1e-12


@given(st.integers(2, 500), st.floats(0, 60.), st.floats(.01, 5.))
def test_the_bound_falls(n, s, more):
    assert S.entropy_bound(0, n) == pytest.approx(math.log(n))
    assert S.entropy_bound(s + more, n) < S.entropy_bound(s, n) <= math.log(n) + 1e-12
    assert S.entropy_bound(torch.tensor([1e4]), n).isfinite().all()


def test_bad_arguments_of_the_bound():
    for call in (lambda: S.entropy_bound(1., 1), lambda: S.entropy_bound(-1., 4), lambda: S.extremal_logits(1., 1), lambda: S.extremal_logits(-1., 4)):
        with pytest.raises(ValueError): call()


def test_the_whole_chain():
    "Theorem 3.1 as it stands, on random tokens and weights, and where it is tight."
    for seed in range(20):
        X, K, Q = normal(10, 6, seed=seed), .3 * normal(6, 4, seed=seed + 100), .3 * normal(6, 4, seed=seed + 200)
        s = torch.linalg.matrix_norm(K @ Q.T, 2) * torch.linalg.matrix_norm(X @ X.T, 2)
        assert (entropy(X @ K @ Q.T @ X.T) >= S.entropy_bound(s, 10)).all()
    u = S.extremal_logits(1., 6)
    W = 3 * torch.outer(torch.eye(6).double()[0], u)
    assert abs(entropy(W)[0] - S.entropy_bound(torch.linalg.matrix_norm(W, 2), 6)) < 1e-12 and abs(S.entropy_bound(3., 6) - .689009570825) < 1e-11


@given(st.integers(2, 40), st.floats(.1, 8.), st.integers(0, 1000))
def test_row_length(n, s, seed):
    logits = s * F.normalize(normal(3, n, seed=seed), dim=1)
    length = S.row_length((logits + 5).softmax(-1))
    assert (length <= s + 1e-9).all()
    assert_close(length, (logits - logits.mean(1, keepdim=True)).norm(dim=1))
    assert (entropy(logits) >= S.entropy_bound(length, n) - 1e-12).all()
    assert S.row_length(torch.eye(n))[0].isfinite()


def test_attention_entropy_leaves_no_trace():
    model, x = S.convert(small()).train(), batch()
    model.blocks[0].eval()
    before = copy.deepcopy(model.state_dict())
    H = S.attention_entropy(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training and not model.blocks[0].training and model.blocks[1].attn.training
    with recording(model.eval()) as rec: model(x)
    assert_close(H, torch.stack([-(w * (w + 1e-12).log()).sum(-1).mean((0, 2)) for w in rec.weights]), rtol=1e-4, atol=1e-4)
    assert H.shape == (2, 3) and (H <= math.log(17) + 1e-5).all()
    with pytest.raises(ValueError, match='attend'): S.attention_entropy(nn.Linear(3, 3), torch.zeros(1, 3))
    from types import SimpleNamespace
    trace = S.EntropyTrace(x, every=5)
    for step in range(1, 12): trace(SimpleNamespace(step=step, model=model))
    assert trace.steps == [1, 5, 10] and trace.values.shape == (3, 2, 3)


# proposition 3.2

@given(st.integers(2, 64), st.integers(2, 64), st.integers(0, 1000))
@settings(max_examples=20)
def test_adam_moves_a_norm_by_the_root_of_the_width(w, i, seed):
    mean, std = normal(w, i, seed=seed), normal(w, i, seed=seed + 1).abs()
    assert S.adam_update_bound(mean, std) <= torch.linalg.matrix_norm(S.adam_update(mean, std), 2) * (1 + 1e-12)
    if w == i: assert_close(S.adam_update_bound(mean, torch.zeros_like(std)), torch.tensor(w).double().sqrt())
    assert (S.adam_update(mean, std).abs() <= 1).all()


def test_one_adam_step_on_both():
    torch.manual_seed(0)
    moved = {}
    for width in (64, 256):
        x, y = torch.randn(500, width), torch.randn(500, width)
        for name, layer in dict(plain=nn.Linear(width, width, bias=False), sigma=S.SigmaLinear(width, width, bias=False)).items():
            opt, before = torch.optim.Adam(layer.parameters(), 1e-3), svd_norm(S.fold(copy.deepcopy(layer)).weight)
            (layer(x) - y).square().mean().backward()
            delta = layer.weight.detach().clone()
            opt.step()
            moved[name, width] = (svd_norm(layer.weight - delta) / 1e-3).item() if name == 'plain' else abs(layer.gamma.item() - 1) / 1e-3
            assert before > 0
    assert moved['plain', 256] > math.sqrt(256) * .99 and moved['plain', 64] > 8 * .99
    assert moved['sigma', 64] == pytest.approx(1, abs=1e-3) and moved['sigma', 256] == pytest.approx(1, abs=1e-3)


# the official code

def build(config, weights, inputs, training=False):
    config = {{'init_multiplier': 'init_gain'}.get(k, k): v for k, v in config.items()}
    layer = (S.SigmaLinear if 'in_features' in config else S.SigmaConv2d)(**config)
    layer.load_state_dict(S.official_names(weights, layer))
    layer.train(training)
    x = inputs['x']
    if not training: return dict(y=layer(x), weight=layer.effective_weight().flatten(1))
    out = dict(first_pass=layer(x))
    out['u_after_first'] = layer.u[0].clone()
    out['first_pass'].square().sum().mul(.5).backward()
    out.update(weight_gradient=layer.weight.grad.flatten(1), sigma_gradient=layer.gamma.grad, bias_gradient=None if layer.bias is None else layer.bias.grad, second_pass=layer(x), u_after_second=layer.u[0].clone())
    return out


@pytest.mark.parametrize('name', SHEETS)
def test_official_sheet(name):
    sheet = SHEETS[name]
    sheet.check(build(sheet.config, sheet.weights(), sheet.inputs(), training='training' in name))


def test_there_are_sheets(): assert len(SHEETS) >= 3


def test_official_state_of_a_whole_model():
    "Names of the official converter applied to timm's ViT without a head: every layer's alias and recorded norms are dropped, flat kernels get their shape."
    model = S.SigmaVisionTransformer(**{**SMALL, 'num_classes': 0})
    official = {}
    for name, value in model.state_dict().items():
        where, _, leaf = name.rpartition('.')
        if leaf == 'gamma': official |= {f'{where}.sigma': value + .1, f'{where}.effective_spectral_norm': value, f'{where}.spectral_normed_weight.spectral_norm': value}
        elif leaf == 'u': official[f'{where}.spectral_normed_weight.u'] = value[0]
        elif f'{where}.u' in model.state_dict() and leaf == 'weight': official |= {name: value.flatten(1) * 2, f'{where}.spectral_normed_weight.weight': value.flatten(1)}
        else: official[name] = value
    model.load_state_dict(S.official_names(official, model))
    assert_close(model.patch_embed.proj.weight.detach().flatten(1), official['patch_embed.proj.weight'])
    assert_close(model.blocks[0].mlp.fc2.gamma.detach(), torch.tensor([1.1]))
    inner = {k.replace('spectral_normed_weight.', 'spectral_normed_weight.net.'): v for k, v in official.items()}    # with the float32 wrapper
    assert S.official_names(inner, model).keys() == S.official_names(official, model).keys()


# the model

def test_sizes_of_the_official_models():
    with torch.device('meta'):
        base = create_model('sigma_vit_base_patch16_224', num_classes=0)
        large = create_model('sigma_vit_large_patch16_224', depth=2)
    assert sum(p.numel() for p in base.parameters()) == 85_760_305
    assert sum(b.numel() for b in base.buffers()) + 49 == 65_329           # the official layers also store the norm they last saw, 49 numbers
    assert len(list(S.sigma_layers(base))) == 49 and large.blocks[-1].drop_path1.p == .2 and large.patch_embed.proj.gamma_init == 'spectral'


def test_the_model():
    torch.manual_seed(0)
    model, x = S.SigmaVisionTransformer(**SMALL, gamma_init='spectral', conv_init_gain=.125, qkv='separate'), batch()
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules()) and abs(model.patch_embed.proj.weight.std() / .0025 - 1) < .2
    assert model(x).shape == (3, 5) and S.bypassed(model, x) == []
    model.reset_classifier(7)
    assert type(model.head) is S.SigmaLinear and model.head.gamma_init == 'spectral' and model(x).shape == (3, 7)
    assert any(isinstance(m, nn.LayerNorm) for m in S.SigmaVisionTransformer(**SMALL, remove_norms=False).modules())
    for norm in S.spectral_norms(S.SigmaVisionTransformer(**SMALL)).values(): assert abs(norm - 1) < 1e-4
    plain = S.spectral_norms(small())
    assert plain['head'] == pytest.approx(svd_norm(small().head.weight).item(), rel=1e-5) and len(plain) == 10


# ---- what finds nothing, and weights changed behind torch's back

class Conv1D(nn.Module):
    "As transformers has it: a linear layer with its weight the other way round."
    def __init__(self, a, b):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(a, b)), nn.Parameter(torch.zeros(b))

    def forward(self, x): return x @ self.weight + self.bias


@pytest.mark.parametrize('call, words', [
    (lambda: S.convert(nn.Sequential(nn.ReLU())), 'Sequential has nothing to convert, no Linear'),
    (lambda: S.convert(nn.Sequential(Conv1D(2, 2), nn.Linear(2, 2))), '0 .Conv1D'), (lambda: S.bypassed(nn.Linear(2, 2), torch.ones(2)), 'no σReparam layer'), (lambda: S.PowerIteration(nn.Linear(2, 2)), 'no σReparam layer')])
def test_what_finds_nothing_says_so(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_what_is_converted_already_or_has_no_head_is_no_mistake():
    model = S.convert(nn.Sequential(nn.Linear(3, 3)))
    assert S.convert(model) is model and len(list(S.sigma_layers(model))) == 1
    assert len(list(S.sigma_layers(S.convert(nn.Sequential(Conv1D(3, 3), nn.Linear(3, 3)), skip=['0'])))) == 1
    vit = create_model('sigma_vit_base_patch16_224', img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    vit.reset_classifier(0)
    assert vit(torch.rand(1, 3, 16, 16)).shape == (1, 12)


@pytest.mark.parametrize('change', [lambda p: p.data.mul_(3), lambda p: setattr(p, 'data', p.data.roll(1, 0) * 2), lambda p: nn.utils.vector_to_parameters(p.detach().flatten() * 3, [p])])
def test_an_estimate_is_not_used_for_a_weight_changed_through_data(change):
    "As a model of these weights without a kept estimate; unchanged weights go on with theirs."
    model, x = S.convert(nn.Sequential(nn.Linear(6, 5))).train(), torch.randn(4, 6)
    iterate = S.PowerIteration(model)
    iterate()
    u = model[0].u.clone()
    model(x), model(x)
    assert torch.equal(model[0].u, u), 'u has moved already'
    change(model[0].weight)
    fresh = copy.deepcopy(model)
    fresh[0].__dict__['_fresh'] = None
    assert torch.equal(model(x), fresh(x)) and not torch.equal(model[0].u, u)


# the story's picture and its exercises

def story():
    path = ROOT/'nbs'/'01_dynamics'/'01_sigma_reparam.ipynb'
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(cell['id'], ''.join(cell['source'])) for cell in cells]


def test_the_schematic_carries_what_the_layer_carries():
    space = {'Diagram': Diagram}
    source = dict(story())['5c4e0001']
    exec(source.rpartition('\nschematic()')[0], space)
    d = space['schematic']()
    layer, x = S.SigmaLinear(7, 5).train(), torch.randn(4, 7, generator=rng(0))
    layer.weight.data += .02 * torch.randn(5, 7, generator=rng(1))
    kept, weight = layer.u[0].clone(), layer.weight.detach()
    out = layer(x)
    v, u, sigma = S.power_step(weight, kept)
    plain = x @ weight.T
    scaled = plain * layer.gamma / sigma
    assert_close(layer.u[0], u)                                   # the picture's u' is what training keeps
    assert_close(out, scaled + layer.bias)
    seen = {('x', 'W'): x, ('W', 'scale'): plain, ('scale', 'bias'): scaled, ('bias', 'y'): out,
            ('u', 'v'): kept, ('v', 'next'): v, ('next', 'sigma'): u, ('sigma', 'scale'): sigma[None]}
    assert set(d.shapes) == set(seen)
    assert d.sizes(seen) == {'b': 4, 'i': 7, 'o': 5}
    dashed = {ends for ends, arrow in d.arrows.items() if arrow.dashed}
    assert dashed == {('u', 'v'), ('v', 'next'), ('next', 'sigma')}


def test_the_solutions_of_the_exercises():
    prose = '\n'.join(source for _, source in story()).split('## Exercises')[1].split('## In the library')[0]
    solutions = re.findall(r'```python\n(.*?)```', prose, re.S)
    assert len(solutions) == 4
    space = {'torch': torch, 'gen': rng, **{name: getattr(S, name) for name in S.__all__}}
    for solution in solutions[:3]:
        exec(solution, space)            # the fourth trains, a hidden cell runs its parts
    bounds = [S.entropy_bound(s, 16).item() for s in (4., 8.)]
    assert bounds[0] == pytest.approx(1.02, abs=.005) and bounds[1] == pytest.approx(.04, abs=.005)
    assert abs(space['inner'](False)) < 1e-5 < .05 < abs(space['inner'](True))
    assert space['ratios'][0] <= space['ratios'][-1] <= 1 + 1e-6


def test_the_second_picture_of_a_batch_has_its_own_share_in_the_entropy():
    model, x = small(), batch()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 30
    both = S.attention_entropy(model, x[:2])
    alone = [S.attention_entropy(model, x[i:i + 1]) for i in range(2)]
    assert_close(both, torch.stack(alone).mean(0))
    assert not torch.allclose(*alone)


def test_a_row_with_an_underflowed_weight_has_a_length_that_is_only_a_bound():
    logits = torch.tensor([0., -200., -300.])
    A = logits.softmax(0)
    assert A[1] == A[2] == 0
    assert S.row_length(A) < (logits - logits.mean()).norm()
