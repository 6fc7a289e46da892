"""What others put on a layer has its effect in every registered model: a hook, an adapter in the layer's place, a parametrisation, a hook of all modules. Graphs keep their batch, and batches of none go through."""
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.testing import assert_close

from test_api import IMAGE, build, distinct, loss, tensors
from vitbook.layers.norm import RMSNorm
from vitbook.registry import example_inputs as inputs

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, RMSNorm)
models, pictures = pytest.mark.parametrize('name', distinct()), pytest.mark.parametrize('name', [name for name in distinct() if name in IMAGE])


class Adapter(nn.Module):
    "What an adapter library puts in a layer's place: the layer's weight, bias and widths can be read, but what is added stands in `forward`."
    def __init__(self, base):
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.ones(()))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    def forward(self, x): return self.base(x) * self.gain


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight): return weight * self.gain


def layers(model): return {name: layer for name, layer in model.named_modules() if isinstance(layer, KINDS)}


def used(name):
    "Layers whose weights have an influence in evaluation; the others (a head for training alone) nobody need call."
    model = build(name).eval()
    loss(model(*inputs(name))).backward()
    found = {path for path, layer in layers(model).items() if any(p.grad is not None and p.grad.any() for p in layer.parameters(recurse=False))}
    assert found
    return found


@models
def test_hooks_see_every_layer_at_every_call(name, unchecked):
    model, seen = build(name).eval(), {}
    with torch.no_grad(): model(*inputs(name))                      # what is kept from this call must not stand for later ones
    for path, layer in layers(model).items(): layer.register_forward_hook(lambda module, given, out, path=path: seen.__setitem__(path, seen.get(path, 0) + 1))
    for calls in (1, 2):
        with torch.no_grad(): model(*inputs(name))
        assert not (silent := {path for path in used(name) if seen.get(path, 0) < calls}), silent


@models
def test_an_adapter_on_every_layer_learns(name, unchecked):
    model, wanted = build(name).eval(), used(name)
    with torch.no_grad(): before = model(*inputs(name))
    adapters = {}
    for path, layer in layers(model).items():
        if path not in wanted: continue
        adapters[path] = Adapter(layer)
        where, _, last = path.rpartition('.')
        setattr(model.get_submodule(where), last, adapters[path])
    out = model(*inputs(name))
    for x, y in zip(tensors(out), tensors(before), strict=True): assert_close(x, y, atol=1e-4, rtol=1e-3)
    loss(out).backward()
    idle = [path for path, adapter in adapters.items() if adapter.gain.grad is None or not adapter.gain.grad.any()]
    assert not idle, idle


@models
def test_a_parametrisation_of_every_layer_learns(name, unchecked):
    model, wanted = build(name).eval(), used(name)
    gains = {}
    for path, layer in layers(model).items():
        if path not in wanted or layer._parameters.get('weight') is None: continue
        gains[path] = Gain()
        parametrize.register_parametrization(layer, 'weight', gains[path])
    loss(model(*inputs(name))).backward()
    idle = [path for path, gain in gains.items() if gain.gain.grad is None or not gain.gain.grad.any()]
    assert not idle, idle


@models
def test_a_hook_of_all_modules_sees_what_layers_gave(name, unchecked):
    model, seen = build(name).eval(), []
    wanted = {layer: path for path, layer in layers(model).items() if isinstance(layer, nn.Linear)}
    handle = register_module_forward_hook(lambda module, given, out: seen.append((wanted[module], out, out.clone())) if module in wanted else None)
    try:
        with torch.no_grad(): model(*inputs(name))
    finally: handle.remove()
    assert not (overwritten := [path for path, out, kept in seen if not torch.equal(out, kept)]), overwritten
    assert {path for path, *_ in seen} >= {path for path in used(name) if isinstance(model.get_submodule(path), nn.Linear)}


@pictures
def test_a_batch_of_none(name, unchecked):
    model = build(name).eval()
    for y, one in zip(tensors(model(inputs(name)[0][:0])), tensors(model(*inputs(name))), strict=True): assert y.shape == (0, *one.shape[1:])


@pictures
def test_an_exported_graph_takes_other_batches(name, unchecked):
    model, (x,) = build(name).eval(), inputs(name)
    batch = {0: torch.export.Dim('batch')}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graph = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=False).module()
    more = inputs(name, 3)[0]
    for got, want in zip(tensors(graph(more)), tensors(model(more)), strict=True): assert_close(got, want, atol=1e-4, rtol=1e-3)


@pictures
def test_a_traced_graph_repeats(name, unchecked):
    model, (x,) = build(name).eval(), inputs(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        graph = torch.jit.trace(model, (x,), check_trace=False)
        for got, want in zip(tensors(graph(x)), tensors(model(x)), strict=True): assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@models
def test_half_precision_is_near_float32(name, dtype, unchecked):
    model, given = build(name).eval(), inputs(name)
    with torch.no_grad():
        want = model(*given)
        out = model.to(dtype)(*(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given))
    for x, y in zip(tensors(out), tensors(want), strict=True):
        if x.shape != y.shape: continue                              # a point that changed its cell
        assert x.isfinite().all() and (x.float() - y).square().mean().sqrt() <= .1 * y.square().mean().sqrt() + .02
