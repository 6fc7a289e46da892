"""registry: the index is what the chapters register, and a name imports its own chapter only."""
import sys

import pytest
from torch import nn

from tools import ROOT, run
from vitbook import _models, registry
from vitbook.registry import create_model, example_inputs, list_models, model_info, register_model

OLD = 'the index is old: run `make export`'
MODULES = sorted({row['module'] for row in _models.MODELS.values()})


@pytest.mark.parametrize('module', MODULES)
def test_the_index_says_what_is_registered(module, monkeypatch):
    """The facts of each name, its parameters counted again.

    On the meta device: nothing in a constructor may need real numbers."""
    def count(build):
        with registry.torch.device('meta'): model = build()
        assert all(p.is_meta for p in model.parameters())
        return sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(registry, 'count_parameters', count)
    names = [name for name, row in _models.MODELS.items() if row['module'] == module]
    for name in names: assert model_info(name) == registry._facts(registry._entry(name)), OLD


def test_the_index_is_complete(monkeypatch, tmp_path):
    "The file is what `write_index` would write, but for the counting, which the test above does."
    counted = {name: row['parameters'] for name, row in _models.MODELS.items()}
    monkeypatch.setattr(registry, 'count_parameters', lambda build: counted.get(build.__name__))
    registry.write_index(tmp_path/'index.py')
    fresh, kept = (path.read_text(encoding='utf-8') for path in (tmp_path/'index.py', ROOT/'vitbook'/'_models.py'))
    assert fresh == kept, OLD


ALONE = '''
import sys
from vitbook import _models
from vitbook.registry import PARTS, create_model, list_models, model_info

def imported(): return {name for name in sys.modules if name.count('.') == 2 and name.split('.')[1] in PARTS}

for name in list_models(): model_info(name)
assert not imported() and 'vitbook.vit' not in sys.modules, imported()
sys.modules['vitbook.backbones.cvt'] = None               # as if this chapter could not be imported
create_model('urpe_synthetic', **model_info('urpe_synthetic')['example'])
assert imported() == {'vitbook.backbones.cvt', 'vitbook.dynamics.urpe'}, imported()
try: create_model('cvt_13')
except ImportError: pass
else: raise AssertionError('cvt_13 came from somewhere')
try: create_model('cvt_31')
except ValueError as e: assert 'cvt_13' in str(e)
unlisted = _models.MODELS.pop('tnt_small_patch16_224')    # as if it had been written after the index was made
create_model('tnt_small_patch16_224', **unlisted['example'])
assert imported() == {'vitbook.backbones.cvt', 'vitbook.dynamics.urpe', 'vitbook.backbones.tnt'}, imported()
assert 'tnt_small_patch16_224' in list_models()
print('alone')
'''


def test_a_name_imports_its_own_chapter_only():
    "In a process of its own: what is listed, created, mistyped, broken and not yet listed."
    assert 'alone' in run(sys.executable, '-c', ALONE, PYTHONPATH=str(ROOT)).stdout


FACTS = dict(paper='1706.03762', part='toys', chapter='registry', example=dict(width=2))


@pytest.fixture
def toy(monkeypatch):
    "A model of the user's, registered for one test."
    registry._entry('vit_tiny_patch16_224')                             # vit registers itself once, and for all tests
    monkeypatch.setattr(registry, '_entries', dict(registry._entries))

    def a_users_toy(width: int = 3) -> nn.Linear: return nn.Linear(width, 1)
    return register_model(a_users_toy, **FACTS, input_shape=(), reasons=dict(pickle='it is a toy'))


def test_a_model_registered_at_run_time_is_one_of_the_others(toy):
    assert {'a_users_toy', 'vit_tiny_patch16_224'} <= set(list_models()) and list_models(part='toys') == ['a_users_toy']
    assert create_model('a_users_toy', width=5).in_features == 5
    info = model_info('a_users_toy')
    assert (info['parameters'], info['module'], info['reasons']) == (4, __name__, dict(pickle='it is a toy'))
    with pytest.raises(ValueError, match='did you mean a_users_toy'): create_model('a_user_toy')
    with pytest.raises(ValueError, match='a_users_toy .* registers no inputs'): example_inputs('a_users_toy')


def test_a_name_of_the_book_cannot_be_taken(toy, monkeypatch):
    "Whether its chapter was imported or not."
    def vit_tiny_patch16_224() -> nn.Linear: return nn.Linear(1, 1)
    create_model('vit_tiny_patch16_224', depth=1)
    for _ in range(2):
        with pytest.raises(ValueError, match='already, by vitbook.vit'): register_model(vit_tiny_patch16_224, **FACTS)
        registry._entries.pop('vit_tiny_patch16_224', None)


def test_what_is_asked_may_be_changed():
    model_info('vit_tiny_patch16_224')['example']['depth'] = 99
    assert model_info('vit_tiny_patch16_224')['example']['depth'] == 2


def test_inputs_are_the_same_at_every_call():
    for name in ('vit_tiny_patch16_224', 'dsvt_waymo_voxel', 'qwen25_vl_7b'):
        one, two = (example_inputs(name) for _ in range(2))
        assert len(one) == len(two) > 0
        assert all(a.equal(b) if hasattr(a, 'equal') else a == b for a, b in zip(one, two))
    assert example_inputs('vit_tiny_patch16_224', 5)[0].shape == (5, 3, 32, 32)
