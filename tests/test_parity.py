"""Models agree with the official code, by the sheets in tests/parity. A sheet without a builder fails: add one below, named after the sheet."""
import pytest
import torch

from sheets import noise, sheets, weight

SHEETS = {sheet.name: sheet for sheet in sheets()}
BUILDERS = {}


def builder(name):
    "Registers `build(config, weights, inputs) -> outputs`, which maps the official names to ours."
    def keep(build):
        BUILDERS[name] = build
        return build
    return keep


@builder('vit__tiny')
def vit(config, weights, inputs):
    from vitbook.vit import VisionTransformer
    model = VisionTransformer(**config).eval()
    model.load_state_dict(weights)                                      # timm's names are ours: nothing to map, nothing may be left over
    return dict(logits=model(inputs['x']), features=model.forward_features(inputs['x']))


@pytest.mark.parametrize('name', SHEETS)
@torch.no_grad()
def test_sheet(name, record_property):
    assert name in BUILDERS, f'tests/parity/{name}.json has no builder in tests/test_parity.py'
    sheet = SHEETS[name]
    worst = sheet.check(BUILDERS[name](sheet.config, sheet.weights(), sheet.inputs()))
    record_property('worst error / rms', worst)


def test_every_builder_has_a_sheet(): assert set(BUILDERS) <= set(SHEETS), f'builders without a sheet: {set(BUILDERS) - set(SHEETS)}'


@torch.no_grad()
def test_a_small_mistake_is_seen():
    "The check would be worth nothing if a swapped or slightly scaled weight passed it."
    sheet = SHEETS['vit__tiny']
    weights = sheet.weights()
    swapped = weights | {'blocks.1.norm1.weight': weights['blocks.1.norm2.weight']}
    scaled = weights | {'blocks.0.attn.qkv.bias': weights['blocks.0.attn.qkv.bias'] * 1.01}
    for wrong in (swapped, scaled):
        with pytest.raises(AssertionError, match='vit__tiny is off by'): sheet.check(vit(sheet.config, wrong, sheet.inputs()))


def test_the_report_sees_missing_outputs_shapes_and_nan():
    sheet = SHEETS['vit__tiny']
    good = dict(logits=torch.zeros(2, 10), features=torch.zeros(2, 17, 48))
    assert sheet.errors(dict(logits=good['logits']))['features'] == float('inf')
    assert sheet.errors(good | dict(logits=torch.zeros(10, 2)))['logits'] == float('inf')
    with pytest.raises(AssertionError): sheet.check(good | dict(logits=torch.full((2, 10), float('nan'))))


def test_the_rule():
    "The hash against the same integer arithmetic done by hand in Python's own integers, and what the names mean."
    import zlib
    for name, i in (('cls_token', 0), ('blocks.0.attn.qkv.weight', 4711)):
        h = (i + zlib.crc32(name.encode()) * 0x9E3779B9) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)): h = (h ^ h >> shift) * factor % 2**32
        assert noise(name, i + 1)[i] == (h ^ h >> 16) / 2**31 - 1
    assert weight('a.bias', [1000]).abs().max() <= .1 and (weight('a.weight', [1000]) - 1).abs().max() <= .1
    assert weight('bn.running_var', [1000]).min() >= .5 and weight('bn.running_mean', [1000]).abs().max() <= .1
    assert abs(weight('fc.weight', [50, 400]).std() * 20 - 1) < .02     # variance 1 / fan-in
