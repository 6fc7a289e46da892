"""Every registered model under what others do to one: copies, other batches, frozen norms, vmap, meta, ONNX.

What a model cannot do stands with its reason in its registration (`reasons`), under one of WHAT."""
import contextlib, copy, io, pickle, traceback, warnings

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from test_api import IMAGE, INFO, NAMES, SMALL, build, doubled, loss, same, shallow, tensors
from vitbook.registry import create_model, example_inputs
from vitbook.train import fit

WHAT = 'torch.func', 'meta', 'meta in training', 'meta in evaluation', 'onnx'
DRAWS_ROUTES = 'which cells a picture visits follows from its gates: their number is not known before'
HELD = {'token_routing_b1': {'torch.func': DRAWS_ROUTES, 'meta in evaluation': DRAWS_ROUTES},
        'histoformer': {'onnx': 'sorts rows and columns by an operator that torch.onnx translates to none'}}
small = pytest.mark.parametrize('name', SMALL)
picture = pytest.mark.parametrize('name', [name for name in SMALL if name in IMAGE])


def unless_said(name, what):
    "Skip with the reason that the model's registration gives for not being able to."
    reason = {**HELD.get(name, {}), **INFO[name].reasons}.get(what)
    if reason: pytest.skip(f'{name}: {reason}')


def test_reasons_are_reasons():
    for name in NAMES:
        for what, reason in INFO[name].reasons.items():
            assert what in WHAT and len(reason) > 20, (name, what, reason)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
@small
def test_a_copy_computes_the_same(name, copied):
    "Also of a model that has computed already, with what it keeps, and after the copy's weights moved."
    model, given = build(name).eval(), example_inputs(name)
    with torch.no_grad():
        out = model(*given)
        twin = copied(model)
        same(twin(*given), out, atol=0, rtol=0)
        for p in twin.parameters(): p.add_(torch.randn_like(p) * .1)
        assert any(not torch.equal(a, b) for a, b in zip(tensors(twin(*given)), tensors(out)))
        same(model(*given), out, atol=0, rtol=0)


@small
def test_inputs_and_earlier_outputs_stay_as_they_are(name, unchecked):
    model, given = build(name).eval(), example_inputs(name)
    kept = copy.deepcopy(given)
    with torch.no_grad():
        out = model(*given)
        first = [x.clone() for x in tensors(out)]
        assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True) if isinstance(x, Tensor))
        model(*(x * .5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
    for x, y in zip(tensors(out), first, strict=True): assert torch.equal(x, y)


@small
def test_strides_and_defaults_of_others_change_nothing(name, unchecked):
    "Inputs that lie apart in memory, another default device, and inference mode before training."
    model, given = build(name).eval(), example_inputs(name)
    with torch.inference_mode(): model(*given)
    out = model(*given)
    loss(out).backward()
    apart = [torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x for x in given]
    with torch.no_grad():
        same(model(*apart), out, atol=1e-4, rtol=1e-3)
        with torch.device('meta'): same(model(*given), out, atol=1e-4, rtol=1e-3)


@picture
def test_an_odd_batch_is_its_pictures(name, unchecked):
    model, (x,) = build(name).eval().double(), doubled(example_inputs(name, 3))
    with torch.no_grad():
        rows = [tensors(model(one[None])) for one in x]
        for whole, *ones in zip(tensors(model(x)), *rows, strict=True):
            assert_close(whole, torch.cat(ones), atol=1e-9, rtol=1e-9)


@picture
def test_frozen_norms_stay_frozen(name, unchecked):
    "Through a step of training and the evaluation after it: numbers, mode, and no gradient."
    model, (x,) = build(name), example_inputs(name, 3)
    norms = {path: m for path, m in model.named_modules() if 'Norm' in type(m).__name__}
    if not norms: pytest.skip(f'{name} has no norms')
    for m in norms.values(): m.requires_grad_(False).eval()
    others = [p for p in model.parameters() if p.requires_grad]
    before = {path: copy.deepcopy(m.state_dict()) for path, m in norms.items()}
    moved = [p.detach().clone() for p in others]
    fit(model, lambda step: x, loss=lambda model, x: loss(model(x)).float(), steps=1,
        evaluate=lambda model: dict(seen=float(loss(model.eval()(x)))), progress=False)
    for path, m in norms.items():
        assert not m.training, path
        assert all(torch.equal(value, before[path][key]) for key, value in m.state_dict().items()), path
    assert any(not torch.equal(p, old) for p, old in zip(others, moved))


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@small
def test_gradients_of_single_samples(name, unchecked):
    "vmap over grad, as private training and influence functions take them, against a loop."
    unless_said(name, 'torch.func')
    model, given = build(name).eval().double(), doubled(example_inputs(name))
    params = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def one(params, *given): return loss(functional_call(model, params, tuple(x[None] for x in given)))

    got = vmap(grad(one), in_dims=(None, *(0 for _ in given)), randomness='different')(params, *given)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i in range(given[0].shape[0]):
        want = torch.autograd.grad(loss(model(*(x[i:i + 1] for x in given))), trained, materialize_grads=True)
        for key, w in zip(params, want, strict=True):
            assert_close(got[key][i], w, atol=1e-10, rtol=1e-8)


class Elsewhere(TorchDispatchMode):
    "Notes every tensor that is made on another device than meta, and the line that made it."
    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, call, kinds, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and not x.is_meta for x in tree_leaves(out)):
            ours = [f'{at.filename}:{at.lineno}'
                    for at in traceback.extract_stack() if 'vitbook/' in at.filename]
            self.found.add(f'{call} at {ours[-1:]}')
        return out


@pytest.mark.parametrize('mode', ['evaluation', 'training'])
@small
def test_forward_and_backward_on_the_meta_device(name, mode, unchecked):
    for what in ('meta', f'meta in {mode}'): unless_said(name, what)
    with torch.device('meta'): model = create_model(name, **INFO[name].example).train(mode == 'training')
    given = [x.to('meta') for x in example_inputs(name)]
    with Elsewhere() as made:
        out = model(*given)
        loss(out).backward()
    assert not made.found
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(x.is_meta for x in (*tensors(out), *grads))


@pytest.mark.dear
@picture
def test_onnx(name, unchecked):
    "The exported graph, computed by ONNX's own reference, for more pictures than it was exported with."
    from onnx.reference import ReferenceEvaluator
    unless_said(name, 'onnx')
    model, (x,), more = build(name, **shallow(name)).eval(), example_inputs(name), example_inputs(name, 3)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        graph = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False,
                                  dynamic_shapes=({0: torch.export.Dim('batch')},)).model_proto
    with torch.no_grad(): want = tensors(model(*more))
    got = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: more[0].numpy()})
    for g, w in zip(got, want, strict=True): assert_close(torch.from_numpy(g), w, atol=1e-4, rtol=1e-3)
