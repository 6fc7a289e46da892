"""Checkpoints of every model with official names: files that run code, files of another network, files under wrappers' names. The notebook of `vitbook.backbone` has the small cases."""
import io, os, pickle, struct

import pytest
import safetensors.torch
import torch
from torch import nn

import vitbook
from sheets import sheets
from vitbook.backbone import load_checkpoint, read_weights
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
