"""Models agree with the official code, by the sheets of the chapters (`tests/chapters/<slug>/parity`) and of any others that are put into tests/parity or the folder VITBOOK_SHEETS.

A sheet without a builder fails: `tests/chapters/<slug>/parity.py` has one function for all sheets of a chapter, see `sheets.builders`."""
import copy, inspect

import pytest
import torch

from sheets import HERE, built, builder_of, builders, noise, sheets, weight

SHEETS = {sheet.name: sheet for sheet in sheets()}


@pytest.mark.parametrize('name', SHEETS)
@torch.no_grad()
def test_sheet(name, record_property):
    slug = name.split('__')[0]
    assert builder_of(name), f'{name}.json has no builder: tests/chapters/{slug}/parity.py must have a function {slug} or {name}'
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
        with pytest.raises(AssertionError, match='vit__tiny is off by'): sheet.check(built(sheet, weights=wrong))


@pytest.mark.parametrize('name', [name for name, sheet in SHEETS.items() if sheet.module and 'module' in inspect.signature(builder_of(name)).parameters])
@torch.no_grad()
def test_a_part_is_told_by_its_class_or_by_its_weights(name):
    "The same numbers whether the sheet's class is known or only the names of the weights tell which part it is."
    SHEETS[name].check(built(SHEETS[name], module=''))


def of(**shapes):
    "A sheet that wants outputs of these shapes."
    sheet = copy.copy(SHEETS['vit__tiny'])
    sheet.data = sheet.data | dict(outputs={name: dict(shape=list(shape)) for name, shape in shapes.items()})
    return sheet


def test_outputs_are_found_under_the_sheets_names():
    y, words, maps = torch.zeros(2, 3), torch.zeros(2, 4, 5), [torch.zeros(2, 8, s, s) for s in (8, 4)]
    assert of(velocity=(2, 3)).named(y)['velocity'] is y                 # one result answers one output
    assert of(out=(2, 3)).named(dict(y=y, y_without_marks=y + 1))['out'] is y    # and so does the first, where no name is like it
    found = of(out_without_marks=(2, 3), out=(2, 3)).named(dict(y=y, y_without_marks=y + 1))
    assert found['out'] is y and found['out_without_marks'][0, 0] == 1
    found = of(feat1=(2, 8, 8, 8), feat2=(2, 8, 4, 4)).named(dict(logits=y, stage0=maps[0], stage1=maps[1]))
    assert found['feat1'] is maps[0] and found['feat2'] is maps[1]       # counted from another number: the shapes tell
    ours = {f'{what}_stage0_config{c}': torch.full((3, 2), i * 2. + c) for i, what in enumerate(('set_inds', 'set_mask')) for c in (0, 1)}
    found = of(**{f'set_voxel_{what}_stage0_shift{c}': (3, 2) for what in ('mask', 'inds') for c in (1, 0)}).named(ours)
    assert {name: v[0, 0].item() for name, v in found.items()} == dict(set_voxel_inds_stage0_shift0=0, set_voxel_inds_stage0_shift1=1, set_voxel_mask_stage0_shift0=2, set_voxel_mask_stage0_shift1=3)
    found = of(words=(2, 4, 6), y=(2, 3)).named(dict(y=y, words=words))
    assert found['words'] is words and found['y'] is y                   # of a wrong shape under the right name: the report tells


def test_the_class_is_what_the_sheet_says():
    for said, module in {'a/b @ 1, c.py, Net': 'Net', 'a/b @ 1, c.py, Net.part': 'Net.part', 'a/b @ 1, c.py, Net (first block)': ''}.items():
        sheet = of(y=(1,))
        sheet.data = sheet.data | dict(source=said)
        assert sheet.module == module
    sheet.data['module'] = 'Block'
    assert sheet.module == 'Block'


def test_sheets_of_others_are_read_too(tmp_path, monkeypatch):
    (tmp_path/'urpe__other.json').write_text((HERE/'chapters'/'urpe'/'parity'/'urpe__tiny.json').read_text())
    monkeypatch.setenv('VITBOOK_SHEETS', str(tmp_path))
    found = {sheet.name for sheet in sheets()}
    assert found >= {'urpe__other', 'urpe__tiny'} and 'urpe__other' not in {sheet.name for sheet in sheets('urpe')} and builder_of('urpe__other') is builder_of('urpe')


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
