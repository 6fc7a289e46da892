"""Models agree with the official code, by the sheets of the chapters (`tests/chapters/<slug>/parity`) and others.

A sheet without a builder fails: `tests/chapters/<slug>/parity.py` has one function for all sheets of a chapter,
also for those that are put into tests/parity or the folder VITBOOK_SHEETS, see `sheets.builders`."""
import copy, inspect, shutil

import pytest
import torch

from sheets import HERE, built, builder_of, builders, noise, sheets, weight

SHEETS = {sheet.name: sheet for sheet in sheets()}


@pytest.mark.parametrize('name', SHEETS)
@torch.no_grad()
def test_sheet(name, record_property):
    slug = name.split('__')[0]
    assert builder_of(name), f'{name}: tests/chapters/{slug}/parity.py must have a function {slug} or {name}'
    worst = SHEETS[name].check(built(SHEETS[name]))
    record_property('worst error / rms', worst)


def test_every_builder_has_a_sheet():
    for path in HERE.glob('chapters/*/parity.py'):
        slug = path.parent.name
        own = {sheet.name for sheet in sheets(slug)}
        assert all(name.startswith(f'{slug}__') for name in own), f'{path.parent}/parity holds {own}'
        spare = builders(slug).keys() - (own and own | {slug})
        assert not spare, f'{path} answers sheets that are not there: {spare}'


@torch.no_grad()
def test_a_small_mistake_is_seen():
    "The check would be worth nothing if a swapped or slightly scaled weight passed it."
    sheet = SHEETS['vit__tiny']
    weights = sheet.weights()
    swapped = weights | {'blocks.1.norm1.weight': weights['blocks.1.norm2.weight']}
    scaled = weights | {'blocks.0.attn.qkv.bias': weights['blocks.0.attn.qkv.bias'] * 1.01}
    for wrong in (swapped, scaled):
        outputs = built(sheet, weights=wrong)
        with pytest.raises(AssertionError, match='vit__tiny is off by'): sheet.check(outputs)


def asks_for_the_class(name): return builder_of(name) and 'module' in inspect.signature(builder_of(name)).parameters


@pytest.mark.parametrize('name', [name for name in SHEETS if SHEETS[name].module and asks_for_the_class(name)])
@torch.no_grad()
def test_a_part_is_told_by_its_class_or_by_its_weights(name):
    "The same numbers whether the sheet's class is known or only the names of the weights tell the part."
    SHEETS[name].check(built(SHEETS[name], module=''))


def of(**shapes):
    "A sheet that wants outputs of these shapes."
    sheet = copy.copy(SHEETS['vit__tiny'])
    sheet.data = sheet.data | dict(outputs={name: dict(shape=list(shape)) for name, shape in shapes.items()})
    return sheet


def test_outputs_are_found_under_the_sheets_names():
    y, words, maps = torch.zeros(2, 3), torch.zeros(2, 4, 5), [torch.zeros(2, 8, s, s) for s in (8, 4)]
    assert of(velocity=(2, 3)).named(y)['velocity'] is y                 # one result answers one output
    two = dict(y=y, y_without_marks=y + 1)
    assert of(out=(2, 3)).named(two)['out'] is y                         # and so does the first, where no name is like it
    found = of(out_without_marks=(2, 3), out=(2, 3)).named(two)
    assert found['out'] is y and found['out_without_marks'][0, 0] == 1
    found = of(feat1=(2, 8, 8, 8), feat2=(2, 8, 4, 4)).named(dict(logits=y, stage0=maps[0], stage1=maps[1]))
    assert found['feat1'] is maps[0] and found['feat2'] is maps[1]       # counted from another number: the shapes tell
    names = dict(set_mask_config0='set_voxel_mask_shift0', set_mask_config1='set_voxel_mask_shift1',
                 set_inds_config0='set_voxel_inds_shift0', set_inds_config1='set_voxel_inds_shift1')
    ours = {name: torch.full((3, 2), i) for i, name in enumerate(names)}
    found = of(**dict.fromkeys(reversed(names.values()), (3, 2))).named(ours)
    assert all(found[theirs] is ours[name] for name, theirs in names.items())
    found = of(words=(2, 4, 6), y=(2, 3)).named(dict(y=y, words=words))
    assert found['words'] is words and found['y'] is y                   # the right name, of a shape that the report tells


def test_the_class_is_what_the_sheet_says():
    sheet = of(y=(1,))
    for said, module in {'Net': 'Net', 'Net.part': 'Net.part', 'Net (first block)': ''}.items():
        sheet.data = sheet.data | dict(source=f'a/b @ 1, c.py, {said}')
        assert sheet.module == module
    sheet.data['module'] = 'Block'
    assert sheet.module == 'Block'


def test_sheets_of_others_are_read_too(tmp_path, monkeypatch):
    shutil.copy(HERE/'chapters'/'urpe'/'parity'/'urpe__tiny.json', tmp_path/'urpe__other.json')
    monkeypatch.setenv('VITBOOK_SHEETS', str(tmp_path))
    assert {sheet.name for sheet in sheets()} >= {'urpe__other', 'urpe__tiny'}
    assert 'urpe__other' not in {sheet.name for sheet in sheets('urpe')}
    assert builder_of('urpe__other') is builder_of('urpe__tiny')


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
