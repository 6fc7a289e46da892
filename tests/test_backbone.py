"""Checkpoints of every model with official names: files that run code, files of another network, files under wrappers' names. The notebook of `vitbook.backbone` has the small cases."""
import io, os, pickle, re, struct

import pytest
import safetensors.torch
import torch
from torch import nn

import vitbook.backbone
from sheets import sheets
from vitbook.backbone import FeatureMaps, Level
from vitbook.weights import load_checkpoint, read_weights
from vitbook.backbones.crossformer import CrossFormer
from vitbook.backbones.cvt import CvT
from vitbook.backbones.tnt import TNT
from vitbook.mixers.hornet import HorNet

SHEETS = {sheet.name: sheet for sheet in sheets()}
CASES = {'cvt__tiny': CvT, 'crossformer__tiny': CrossFormer, 'tnt__tiny': TNT, 'hornet__tiny7x7': HorNet}
HEADS = dict(NUM_HEADS='num_heads', outer_num_heads='num_heads', inner_num_heads='inner_num_heads')     # what weights do not tell
each = pytest.mark.parametrize('sheet', CASES)


def official(sheet): return SHEETS[sheet].weights()
def model(sheet): return CASES[sheet].from_official(official(sheet), **{HEADS[k]: v for k, v in SHEETS[sheet].config.items() if k in HEADS})
def values(m): return {k: v.clone() for k, v in m.state_dict().items()}
def unchanged(m, before): return all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


class Runs:
    "Unpickled, it calls a function with arguments."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call


def hostile(folder):
    "Name -> bytes of a file that leaves a mark in `folder` when it is unpickled without care, and the function that would read it so."
    mark = lambda name: folder/f'{name} ran'
    def saved(name, content, **how):
        file = io.BytesIO()
        torch.save(content, file, **how)
        return file.getvalue()
    tensors = {'weight': torch.zeros(2)}
    yield 'in a value', saved('', tensors | {'x': Runs(os.mkdir, str(mark('in a value')))})
    yield 'old format', saved('', tensors | {'x': Runs(os.mkdir, str(mark('old format')))}, _use_new_zipfile_serialization=False)
    yield 'as the whole', saved('', Runs(os.mkdir, str(mark('as the whole'))))
    yield 'eval', saved('', tensors | {'x': Runs(eval, f"__import__('os').mkdir({str(mark('eval'))!r})")})
    yield 'bare pickle', pickle.dumps({'x': Runs(os.mkdir, str(mark('bare pickle')))})
    yield 'system', saved('', {'model': tensors, 'x': Runs(os.system, f"mkdir '{mark('system')}'")})


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('kind', ['in a value', 'old format', 'as the whole', 'eval', 'bare pickle', 'system'])
def test_a_file_that_runs_code_is_refused(kind, tmp_path):
    content, m = dict(hostile(tmp_path))[kind], nn.Linear(2, 1)
    before = values(m)
    (tmp_path/'evil.pth').write_bytes(content)
    for source in (tmp_path/'evil.pth', str(tmp_path/'evil.pth'), io.BytesIO(content)):
        with pytest.raises(ValueError, match='refused|no file of weights'): vitbook.load_checkpoint(m, source)
    assert unchanged(m, before) and not (tmp_path/f'{kind} ran').exists()
    if kind != 'bare pickle': torch.load(tmp_path/'evil.pth', weights_only=False)          # the file is what it says: read without care, it runs
    else: pickle.loads(content)
    assert (tmp_path/f'{kind} ran').exists()


@pytest.mark.parametrize('content', [b'', b'PK', b'not a checkpoint at all', struct.pack('<Q', 10) + b'{"a": broken', struct.pack('<Q', 1 << 60) + b'{}'])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path/'broken.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match='broken.safetensors'): load_checkpoint(nn.Linear(2, 1), tmp_path/'broken.safetensors')


@each
def test_official_file(sheet, tmp_path):
    "Plain, wrapped, with a data-parallel prefix, as safetensors: the same network."
    want, x = model(sheet), SHEETS[sheet].inputs()['x']
    weights = official(sheet)
    torch.save(weights, tmp_path/'plain.pth')
    torch.save({'epoch': 300, 'model': {f'module.{k}': v for k, v in weights.items()}}, tmp_path/'wrapped.pth')
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path/'x.safetensors')
    safetensors.torch.save_model(want, str(tmp_path/'ours.safetensors'))
    for file in ('plain.pth', 'wrapped.pth', 'x.safetensors', 'ours.safetensors'):
        fresh = model(sheet)
        with torch.no_grad():
            for p in fresh.parameters(): p.zero_()
            assert torch.equal(vitbook.load_checkpoint(fresh, tmp_path/file)(x), want(x)), file


@each
def test_everything_that_does_not_fit_is_listed(sheet, tmp_path):
    "Two missing, two too many, two of another shape: all six are named, under the model's names or the file's, and nothing is loaded."
    m, weights = model(sheet), official(sheet)
    before, names = values(m), [k for k, v in weights.items() if v.dim() > 1 and v.shape[0] > 1]
    wrong = {k: v for k, v in weights.items() if k not in names[:2]} | {'surplus.one': torch.zeros(1), 'surplus.two': torch.zeros(1)}
    wrong |= {k: wrong[k][:-1] for k in ('head.weight', 'head.bias')}
    torch.save(wrong, tmp_path/'wrong.pth')
    for call in (lambda: m.from_official(wrong), lambda: load_checkpoint(m, tmp_path/'wrong.pth')):
        with pytest.raises(ValueError) as e: call()
        words = str(e.value)
        assert 'surplus.one' in words and 'surplus.two' in words and 'head.weight' in words and 'head.bias' in words and '2 missing' in words and '2 unexpected' in words and '2 of another shape' in words, words
        assert unchanged(m, before)


@each
def test_own_names_with_something_too_many(sheet, tmp_path):
    m = model(sheet)
    before = values(m)
    torch.save(m.state_dict() | {'surplus': torch.zeros(1)}, tmp_path/'more.pth')
    with pytest.raises(ValueError, match='surplus'): load_checkpoint(m, tmp_path/'more.pth')
    torch.save({'a.weight': torch.zeros(2, 2)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='missing'): load_checkpoint(m, tmp_path/'other.pth')
    assert unchanged(m, before)


@each
def test_head_for_another_task(sheet, tmp_path):
    weights = official(sheet)
    torch.save(weights, tmp_path/'x.pth')
    m = model(sheet)
    m.reset_classifier(3)
    head = m.head.weight.clone()
    with torch.no_grad():
        for k, p in m.named_parameters():
            if not k.startswith('head.'): p.zero_()
    load_checkpoint(m, tmp_path/'x.pth', skip='head.*')
    same = model(sheet).state_dict()
    assert torch.equal(m.head.weight, head) and all(torch.equal(v, same[k]) for k, v in m.state_dict().items() if not k.startswith('head.'))


@each
def test_published_weights_give_maps(sheet, tmp_path):
    "The classifier's file, under official names and under ours, and the file that the maps themselves save."
    want, x = model(sheet).eval(), SHEETS[sheet].inputs()['x']
    torch.save({'model': official(sheet)}, tmp_path/'official.pth')
    torch.save(want.state_dict(), tmp_path/'ours.pth')
    torch.save(FeatureMaps(model(sheet)).state_dict(), tmp_path/'maps.pth')
    for file in ('official', 'ours', 'maps'):
        maps = FeatureMaps(model(sheet), out_indices=[0, -1]).eval()
        with torch.no_grad():
            for p in maps.parameters(): p.zero_()
            assert load_checkpoint(maps, tmp_path/f'{file}.pth') is maps
            for a, b in zip(maps(x), (want.feature_maps(x)[0], want.feature_maps(x)[-1])): assert torch.equal(a, b), file
    torch.save({k: v for k, v in want.state_dict().items() if not k.startswith('norm.')}, tmp_path/'less.pth')
    if 'norm.weight' in want.state_dict():
        with pytest.raises(ValueError, match='norm.weight'): load_checkpoint(maps, tmp_path/'less.pth')


def test_maps_of_a_vit_at_another_size(tmp_path):
    "Positions are interpolated, the head is left out, from timm's names."
    small = dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)
    torch.save(vitbook.create_model('vit_tiny_patch16_224', img_size=32, **small).state_dict(), tmp_path/'vit.pth')
    maps = load_checkpoint(vitbook.create_model('vit_tiny_patch16_224', features_only=True, img_size=64, **small).eval(), tmp_path/'vit.pth')
    want = load_checkpoint(vitbook.create_model('vit_tiny_patch16_224', img_size=64, **small).eval(), tmp_path/'vit.pth')
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(maps(x), want.feature_maps(x), strict=True): assert torch.equal(a, b)


def test_maps_of_a_model_that_cannot_run_on_meta():
    "What its maps need cannot be told, so all of it stays trainable; nothing is broken."
    class Counts(nn.Module):
        levels, in_chans = (Level(4, 1),), 3
        def __init__(self): super().__init__(); self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(4)
        def reset_classifier(self, n): pass
        def feature_maps(self, x): return [self.conv(x) * (1 if x.sum() > 0 else 2)]
    maps = FeatureMaps(Counts())
    assert all(p.requires_grad for p in maps.parameters()) and maps(torch.rand(1, 3, 4, 4))[0].shape == (1, 4, 4, 4)


@pytest.mark.parametrize('sheet, other', zip(CASES, [*CASES][1:] + [*CASES][:1]))
def test_the_weights_of_another_model_are_refused(sheet, other):
    with pytest.raises(ValueError): CASES[sheet].from_official(official(other))
    m = model(sheet)
    before = values(m)
    with pytest.raises(ValueError, match='missing'): m.from_official(official(other))
    assert unchanged(m, before)


def test_read_weights_takes_a_file_at_any_place(tmp_path):
    "An open file, a buffer; a key inside a key."
    weights = {'a': torch.arange(3.)}
    torch.save({'state_dict': {'model': weights}}, tmp_path/'deep.pth')
    with open(tmp_path/'deep.pth', 'rb') as file: assert torch.equal(read_weights(file)['a'], weights['a'])
    with pytest.raises(ValueError, match='key=.nothing.'): read_weights(tmp_path/'deep.pth', key='nothing')


# ---- each entry counts

class Small(vitbook.backbone.Backbone):
    "Three maps of different sizes, a batch norm, and a parameter without a layer."
    in_chans, levels, num_features = 2, tuple(vitbook.backbone.Level(c, s) for c, s in ((3, 1), (4, 2), (5, 4))), 5

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 2, 2)])
        self.norm, self.scale, self.num_classes = nn.BatchNorm2d(5), nn.Parameter(torch.ones(5)), 6
        self.head = nn.Linear(5, 6)

    def feature_maps(self, x):
        maps = []
        for stage in self.stages: maps.append(x := stage(x))
        return maps

    def forward_features(self, x): return self.norm(self.feature_maps(x)[-1]) * self.scale[:, None, None]
    def forward_head(self, x, pre_logits=False): return x.mean((2, 3)) if pre_logits else self.head(x.mean((2, 3)))

    @staticmethod
    def official_names(state): return {k.removeprefix('backbone.'): v for k, v in state.items()}


def shaken(seed):
    "A small model with other numbers everywhere, running means and counts too."
    torch.manual_seed(seed)
    m = Small()
    for k, v in m.state_dict().items(): v.copy_(torch.rand_like(v.float()) + 3 if v.is_floating_point() else torch.tensor(7 + seed))
    return m


@pytest.mark.parametrize('name', Small().state_dict())
@pytest.mark.parametrize('change', ['missing', 'unexpected', 'of another shape'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_every_entry_is_needed(name, change, prefix, tmp_path):
    "Buffers of a batch norm included: without its running mean a model would run, and answer wrongly."
    m, state = shaken(0), {prefix + k: v for k, v in shaken(1).state_dict().items()}
    before = values(m)
    if change == 'missing': del state[prefix + name]
    elif change == 'unexpected': state[prefix + name + '2'] = state[prefix + name]
    else: state[prefix + name] = state[prefix + name][None]
    torch.save(state, tmp_path/'x.pth')
    if change == 'missing' and name.endswith('num_batches_tracked'):                # it counts training steps, and old files have none
        loaded = vitbook.load_checkpoint(m, tmp_path/'x.pth').state_dict()
        assert all(torch.equal(loaded[k.removeprefix(prefix)], v) for k, v in state.items())
        return
    named = re.escape(name + '2' * (change == 'unexpected'))
    for call in (lambda: vitbook.load_checkpoint(m, tmp_path/'x.pth'), lambda: m.from_official(state)):
        with pytest.raises(ValueError, match=rf'Small: 1 {change} \({named}(: .* instead of .*)?\)(; only the head differs.*)?$'): call()
        assert unchanged(m, before)


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_all_numbers_arrive(prefix, tmp_path):
    want = shaken(1)
    torch.save({prefix + k: v for k, v in want.state_dict().items()}, tmp_path/'x.pth')
    m = shaken(0)
    assert vitbook.load_checkpoint(m, tmp_path/'x.pth') is m and unchanged(m, values(want))


def test_what_skip_leaves(tmp_path):
    "Patterns, one or several, a batch norm's buffers too; the file may hold them in another shape or not at all."
    want, m = shaken(1), shaken(0)
    before = values(m)
    state = want.state_dict() | {'head.weight': torch.zeros(2, 5)}
    del state['norm.running_mean'], state['head.bias']
    torch.save({'model': {'a': torch.zeros(1)}, 'ema': state}, tmp_path/'x.pth')
    with pytest.raises(ValueError, match='head.weight'): vitbook.load_checkpoint(m, tmp_path/'x.pth', key='ema', skip='norm.*')
    assert unchanged(m, before)
    vitbook.load_checkpoint(m, tmp_path/'x.pth', key='ema', skip=['head.*', '*.running_mean'])
    kept = {'head.weight', 'head.bias', 'norm.running_mean'}
    for k, v in m.state_dict().items(): assert torch.equal(v, before[k] if k in kept else want.state_dict()[k]), k


# ---- maps

@pytest.mark.parametrize('indices, found', [(None, [0, 1, 2]), ((0,), [0]), ((2, 0), [2, 0]), ((-1, 1), [2, 1]), ((-3, -1), [0, 2]), ([1, 1], [1, 1]), ((), [])])
def test_levels_as_they_were_asked_for(indices, found, unchecked):
    "In their order, negative ones from the last; channels and strides go with them."
    m, x = shaken(0), torch.rand(2, 2, 8, 4)
    maps = m.feature_maps(x)
    body = vitbook.backbone.FeatureMaps(m, indices)
    for got, i in zip(body(x), found, strict=True): assert torch.equal(got, maps[i])
    assert body.channels == [(3, 4, 5)[i] for i in found] and body.strides == [(1, 2, 4)[i] for i in found] and [tuple(l) for l in body.levels] == [(c, s) for c, s in zip(body.channels, body.strides)]
    assert isinstance(m.head, nn.Identity) and m.num_classes == 0, 'no head is kept'
    with pytest.raises(ValueError, match=r'out_indices must lie between -3 and 2, got \[3, -4\]'): vitbook.backbone.FeatureMaps(shaken(0), (0, 3, -4))
    with pytest.raises(ValueError, match='Linear does not'): vitbook.backbone.FeatureMaps(nn.Linear(1, 1))


def test_a_backbones_own_methods():
    m, x = shaken(0).double(), torch.rand(2, 2, 8, 4).double()
    assert torch.equal(m(x), m.forward_head(m.forward_features(x)))
    m.reset_classifier(3)
    assert m.head.weight.dtype == torch.float64 and m(x).shape == (2, 3)
    m.reset_classifier(0)
    assert torch.equal(m(x), m.forward_head(m.forward_features(x), pre_logits=True))
    m.check_picture(x, 4)
    with pytest.raises(ValueError, match='in_chans=2 channels, got 3'): m.check_picture(torch.zeros(1, 3, 8, 8))
    for size in ((8, 6), (6, 8)):
        with pytest.raises(ValueError, match=f'multiples of 4 pixels, got {size[0]}x{size[1]}'): m.check_picture(torch.zeros(1, 2, *size), 4)
    for name in ('forward_features', 'feature_maps', 'forward_head'):
        with pytest.raises(NotImplementedError, match=f'Backbone.{name}'): getattr(vitbook.backbone.Backbone(), name)(x)
    made = Small.from_official(shaken(1).state_dict())
    assert not made.training and unchanged(made, values(shaken(1)))
    with pytest.raises(ValueError, match='made already, it takes no depth'): made.from_official({}, depth=3)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'hornet_tiny_7x7', 'crossformer_tiny', 'cvt_13', 'tnt_small_patch16_224', 'pvt_v2_b0'])
def test_a_forgotten_batch_is_named(name, unchecked):
    from vitbook.registry import create_model, model_info
    with pytest.raises(ValueError, match=r'x must be a batch.*\(3, 64, 64\); x\[None\]'): create_model(name, **model_info(name)['example'])(torch.rand(3, 64, 64))
