"""The contract of every registered model: timm's names, shapes, other sizes, training and evaluation, saving, low precision, compilation, gradients, bad input.

A model is built small, from the `example` it registers, and fed pictures of its `input_shape`, or the `inputs` it
registers. What depends on the name is tried for every name, what is computed once for each small version. What a model
cannot do stands with its reason in its registration (`compiles`, `reasons`)."""
import contextlib, inspect, os, warnings
from unittest import mock

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.testing import assert_close

from vitbook.registry import create_model, example_inputs, list_models, model_arguments, model_info
from vitbook.registry import _entry as entry_of

CHAPTER = os.environ.get('VITBOOK_CHAPTER')                             # of one chapter only, or of all
NAMES = [name for name in list_models() if CHAPTER in (None, model_info(name)['chapter'])]
INFO = {name: entry_of(name) for name in NAMES}                         # with the builders themselves, to look at


def made(name):
    """The class and all constructor arguments of a model's small version, without building it.

    Where a builder says no class, or makes another one, the name itself: such a model is like no other."""
    build, kind = INFO[name].build, INFO[name].build.__annotations__.get('return')
    calls = []

    def record(self, *args, **kw):
        calls.append(signature.bind(self, *args, **kw))
        raise InterruptedError                                          # one that nothing in the library catches

    if not inspect.isclass(kind): return name
    signature = inspect.signature(kind.__init__)
    with mock.patch.object(kind, '__init__', record), contextlib.suppress(InterruptedError):
        build(**INFO[name].example)
    if not calls: return name
    calls[0].apply_defaults()
    return kind, repr(list(calls[0].arguments.items())[1:])


def distinct():
    "The first name of each small version: the sizes of one model have the same."
    return list({made(name): name for name in reversed(NAMES)}.values())[::-1]


SMALL = distinct()
IMAGE = [name for name in NAMES if INFO[name].input_shape]
every, image, small = (pytest.mark.parametrize('name', names) for names in (NAMES, IMAGE, SMALL))
picture = pytest.mark.parametrize('name', [name for name in SMALL if name in IMAGE])


def build(name, **more):
    torch.manual_seed(0)
    model = create_model(name, **{**INFO[name].example, **more})
    with torch.no_grad():                                               # zero gates and class tokens would hide mistakes
        for p in model.parameters(): p.add_(torch.randn_like(p) * .02)
    return model


def tensors(value):
    "All floating tensors of an output: a tensor, or a tuple, list or dict of outputs."
    if isinstance(value, Tensor): return [value] if value.is_floating_point() else []
    if isinstance(value, dict): value = value.values()
    return [t for part in value for t in tensors(part)] if not isinstance(value, (str, int, float, bool, type(None))) else []


def same(a, b, **tolerance):
    assert len(tensors(a)) == len(tensors(b)) > 0
    for x, y in zip(tensors(a), tensors(b)): assert_close(x, y, **tolerance)


def loss(value): return sum(t.double().square().mean() + t.double().mean() for t in tensors(value))


def doubled(given):
    "Inputs in float64, where a sort, a top-k or a threshold finds no two values as close as rounding is."
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]


# ---- names and facts

def test_there_are_models(): assert NAMES and NAMES == sorted(set(NAMES)) and IMAGE


@every
def test_facts(name):
    info = model_info(name)
    assert set(info) >= {'name', 'paper', 'part', 'parameters'} and info['name'] == name and info['parameters'] > 0
    assert INFO[name].input_shape or INFO[name].inputs, f'{name} takes no pictures: register its `inputs`'
    assert name in list_models(part=info['part']) and name in list_models(f'{name[:3]}*')


TIMM = {'img_size', 'patch_size', 'in_chans', 'num_classes', 'embed_dim', 'depth', 'depths', 'num_heads', 'mlp_ratio', 'mlp_ratios', 'qkv_bias', 'drop_path_rate', 'drop_rate'}
OTHER = {'image_size', 'input_size', 'in_channels', 'in_channel', 'in_ch', 'n_classes', 'num_class', 'classes', 'dim', 'hidden_dim', 'hidden_size', 'width', 'num_layers', 'layers',
         'n_layers', 'heads', 'n_heads', 'nhead', 'num_attention_heads', 'mlp_dim', 'mlp_factor', 'expansion', 'bias_qkv', 'drop_path', 'dropout', 'p_drop', 'patch', 'drop_path_prob'}


@image
def test_constructor_names_are_timms(name):
    known = set(model_arguments(INFO[name].build))
    assert known & TIMM >= {'in_chans'}, f'{name} takes {sorted(known)}'
    assert not known & OTHER, f"{name} calls {sorted(known & OTHER)} what timm calls otherwise ({', '.join(sorted(TIMM))})"
    assert set(INFO[name].example) <= known


@every
def test_no_argument_is_swallowed(name):
    wrong = {**INFO[name].example, 'num_haeds': 3}
    with pytest.raises(ValueError, match='num_haeds'): create_model(name, **wrong)
    with pytest.raises(TypeError): INFO[name].build(**wrong)


@small
def test_the_class_names_its_arguments(name):
    kinds = {p.kind for p in inspect.signature(type(build(name)).__init__).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, 'the class itself must name its arguments'


@small
def test_public_methods_say_their_shapes(name):
    for part in {type(module) for module in build(name).modules() if type(module).__module__.startswith('vitbook.')}:
        if 'forward' not in vars(part): continue
        signature = inspect.signature(part.forward)
        bare = [p.name for p in list(signature.parameters.values())[1:] if p.annotation is p.empty]
        assert not bare and signature.return_annotation is not signature.empty, f'{part.__module__}.{part.__name__}.forward: no annotation of {bare or "the output"}'
        assert (inspect.getdoc(part) or '').strip(), f'{part.__module__}.{part.__name__} has no docstring'


# ---- what it computes

@picture
def test_classifier_shapes(name):
    model, (x,) = build(name).eval(), example_inputs(name)
    if 'num_classes' not in model_arguments(INFO[name].build): return
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, model.num_classes)
        features = model.forward_features(x)
        same(model.forward_head(features), out)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        model.reset_classifier(7)
        assert model.num_classes == 7 and model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert_close(model(x), pooled)
        assert build(name, num_classes=0).eval()(x).shape == pooled.shape


@picture
def test_feature_maps(name):
    "As many maps as `levels` says, of these channels and strides; `features_only` gives the same without a head."
    model, (x,) = build(name).eval(), example_inputs(name)
    if not hasattr(model, 'feature_maps'): pytest.skip(f'{name} offers no maps')
    with torch.no_grad():
        maps, size = model.feature_maps(x), x.shape[2:]
        assert len(maps) == len(model.levels) > 0
        for m, level in zip(maps, model.levels): assert m.shape == (2, level.channels, *(-(-s // level.stride) for s in size))
        only = create_model(name, features_only=True, out_indices=(-1,), **INFO[name].example).eval()
        only.model.load_state_dict(model.state_dict(), strict=False)
        same(only(x), [maps[-1]])
        assert only.levels == (model.levels[-1],) and not any('head' in n for n in only.state_dict())


@picture
def test_gradients_of_feature_maps(name):
    "Every parameter of `features_only` that is not frozen gets a gradient, whichever maps are asked for: so it trains in several processes."
    small, (x,) = INFO[name].example, example_inputs(name)
    if not hasattr(build(name), 'feature_maps'): pytest.skip(f'{name} offers no maps')
    levels = len(create_model(name, features_only=True, **small).levels)
    for chosen in (None, *([i] for i in range(levels))):
        maps = create_model(name, features_only=True, out_indices=chosen, **small).train()
        sum((m * torch.randn_like(m)).sum() for m in maps(x)).backward()
        wrong = [k for k, p in maps.named_parameters() if p.requires_grad == (p.grad is None)]
        assert not wrong and any(p.requires_grad for p in maps.parameters()), (chosen, wrong)


@picture
@pytest.mark.parametrize('chans', [1, 4])
def test_channels(name, chans):
    size = INFO[name].input_shape[1:]
    with torch.no_grad(): assert all(t.isfinite().all() for t in tensors(build(name, in_chans=chans).eval()(torch.rand(2, chans, *size))))


@picture
@pytest.mark.parametrize('size', [(40, 24), (32, 48), (33, 31), (35, 64), (7, 7)])
def test_other_sizes_work_or_are_refused_by_name(name, size, unchecked):
    "Built for the size, and given it afterwards: outputs of the right shape, or a ValueError that names the argument; never another error, never nan."
    known = model_arguments(INFO[name].build)
    calls = [lambda: build(name).eval()(torch.rand(1, INFO[name].input_shape[0], *size))]
    if 'img_size' in known: calls.append(lambda: build(name, img_size=size).eval()(torch.rand(1, INFO[name].input_shape[0], *size)))
    for call in calls:
        try:
            with torch.no_grad(): out = call()
        except ValueError as error: assert any(word in str(error) for word in ('img_size', 'patch_size', 'x must', 'window')) and any(str(n) in str(error) for n in size), error
        else: assert all(t.isfinite().all() for t in tensors(out))


@small
def test_evaluation_repeats_and_batches_do_not_mix(name):
    model, given = build(name).eval(), example_inputs(name)
    with torch.no_grad():
        out = model(*given)
        same(model(*given), out, atol=0, rtol=0)
        if name not in IMAGE: return
        x, = doubled(given)
        same(model.double()(x[:1]), [t[:1] for t in tensors(model(x))], atol=1e-9, rtol=1e-9)


@small
def test_training(name):
    """In training mode the gradient reaches every parameter, and a step against it lowers the loss as it says.

    The step is so small that no sort, top-k or threshold falls otherwise: there the loss leaps, and further than
    a step of 1e-4 lowers it.
    """
    model, given, step = build(name).train().double(), doubled(example_inputs(name)), 1e-9
    start = {key: value.clone() for key, value in model.named_buffers()}

    def measured():                                                     # with the same random numbers and buffers each time
        torch.manual_seed(1)
        with torch.no_grad():
            for key, value in model.named_buffers(): value.copy_(start[key])
        return loss(model(*given))

    before = measured()
    before.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or p.grad.abs().sum() == 0)]
    assert not without, f'no gradient reaches {without}'
    slope = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    with torch.no_grad():
        for p in model.parameters(): p -= step * p.grad / slope
        assert_close((before - measured()) / step, slope, rtol=.01, atol=0)


@picture
def test_dropout_and_stochastic_depth_act_in_training_only(name):
    known = model_arguments(INFO[name].build)
    for rate in [r for r in ('drop_rate', 'drop_path_rate', 'attn_drop_rate', 'proj_drop_rate', 'pos_drop_rate') if r in known]:
        model, (x,) = build(name, **{rate: .5}), example_inputs(name, 8)
        with torch.no_grad():
            assert any((a != b).any() for a, b in zip(tensors(model.train()(x)), tensors(model(x)))), f'{rate} does nothing in training'
            same(model.eval()(x), model(x), atol=0, rtol=0)


@small
def test_state_dict_goes_through_safetensors(name):
    model, given = build(name).eval(), example_inputs(name)
    other = create_model(name, **INFO[name].example).eval()
    other.load_state_dict(load(save({key: value.contiguous() for key, value in model.state_dict().items()})))
    with torch.no_grad(): same(other(*given), model(*given), atol=0, rtol=0)


@small
def test_bfloat16_autocast(name):
    model, given = build(name).train(), example_inputs(name)
    exact = loss(model.eval()(*given))
    with torch.autocast('cpu', dtype=torch.bfloat16): out = model(*given)
    low = loss(out)
    low.backward()
    assert low.isfinite() and abs(low - exact) <= .1 * abs(exact) + .05
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def shallow(name):
    "One block is as good as two where blocks are alike; stages may differ, and stay."
    return dict(depth=1) if INFO[name].example.get('depth') == 2 else {}


@pytest.mark.dear
@small
def test_compiles_or_says_why_not(name, unchecked):
    "The graph is caught whole, and its gradients too; the code made from it is inductor's business, tried for one model below."
    if INFO[name].compiles is not True:
        assert isinstance(INFO[name].compiles, str) and len(INFO[name].compiles) > 10, f'{name}: `compiles` must be True or the reason why it does not compile'
        pytest.skip(f'{name}: {INFO[name].compiles}')
    torch._dynamo.reset()
    model, given = build(name, **shallow(name)).eval(), example_inputs(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        out = torch.compile(model, backend='aot_eager', fullgraph=True)(*given)
    same(out, model(*given), atol=1e-5, rtol=1e-4)
    loss(out).backward()
    torch._dynamo.reset()


@small
def test_copies_are_independent_modules(name):
    import copy
    model = build(name)
    twin = copy.deepcopy(model)
    with torch.no_grad(): next(twin.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(twin.parameters()))
    assert all(isinstance(value, (Tensor, nn.Parameter)) for value in model.state_dict().values())


# ---- bad input

@picture
def test_wrong_channels_are_named(name, unchecked):
    c, *size = INFO[name].input_shape
    with pytest.raises(ValueError, match=rf'in_chans.*{c + 1}'): build(name).eval()(torch.rand(1, c + 1, *size))


@picture
def test_sizes_that_are_no_multiple_of_the_patch(name, unchecked):
    known, example = model_arguments(INFO[name].build), INFO[name].example
    if not {'img_size', 'patch_size'} <= set(known): pytest.skip(f'{name} has no patch_size')
    patch = example.get('patch_size', known['patch_size'])
    with pytest.raises(ValueError, match='img_size|patch_size'): build(name, img_size=4 * patch + 1)


@picture
def test_heads_that_do_not_divide_the_width(name, unchecked):
    known, example = model_arguments(INFO[name].build), INFO[name].example
    if not isinstance(example.get('num_heads', known.get('num_heads')), int) or not isinstance(example.get('embed_dim', known.get('embed_dim')), int): pytest.skip('no num_heads')
    with pytest.raises(ValueError, match='num_heads'): build(name, num_heads=example.get('embed_dim', known['embed_dim']) - 1)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match='vit_tiny_patch16_224'): create_model('vit_tiny_pach16_224')
    with pytest.raises(ValueError, match='vit_base'): model_info('vitbase_patch16')
    with pytest.raises(ValueError, match='num_heads'): create_model(IMAGE[0], num_haeds=3)
    assert list_models('no_such_*') == [] and list_models(part='no such part') == []


def test_one_model_through_inductor():
    "The whole way once, in a process of its own without the shape checks."
    import sys
    from tools import ROOT, run
    program = '''
import torch
from vitbook.registry import create_model, model_info
torch.manual_seed(0)
info = model_info('vit_tiny_patch16_224')
model, x = create_model('vit_tiny_patch16_224', **info['example']).eval(), torch.rand(2, *info['input_shape'])
with torch.no_grad(): torch.testing.assert_close(torch.compile(model)(x), model(x), atol=1e-5, rtol=1e-4)
print('agrees')
'''
    assert 'agrees' in run(sys.executable, '-c', program, PYTHONPATH=str(ROOT)).stdout
