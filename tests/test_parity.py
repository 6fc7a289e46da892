"""Models agree with the official code, by the sheets in tests/parity. A sheet without a builder fails: add one below, named after the sheet, or after the chapter for all of its sheets."""
import pytest
import torch

from sheets import noise, sheets, weight

SHEETS = {sheet.name: sheet for sheet in sheets()}
BUILDERS = {}


def builder_of(name): return BUILDERS.get(name) or BUILDERS.get(name.split('__')[0])


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


@builder('sigma_reparam')
@torch.enable_grad()
def sigma_reparam(config, weights, inputs):
    from vitbook.dynamics.sigma_reparam import SigmaConv2d, SigmaLinear, from_official
    layer, x = (SigmaLinear if 'in_features' in config else SigmaConv2d)(**config), inputs['x']
    layer.load_state_dict(from_official(weights, layer))
    layer.eval()
    out = dict(y=layer(x), weight=layer.effective_weight().flatten(1))
    layer.train()
    out |= dict(first_pass=layer(x), u_after_first=layer.u[0].clone())
    out['first_pass'].square().sum().mul(.5).backward()
    out |= dict(weight_gradient=layer.weight.grad.flatten(1), sigma_gradient=layer.gamma.grad, second_pass=layer(x), u_after_second=layer.u[0].clone())
    return out | ({} if layer.bias is None else dict(bias_gradient=layer.bias.grad))


@builder('urpe')
def urpe(config, weights, inputs):
    from vitbook.dynamics.urpe import URPEAttention, from_official, join_qkv
    if 'vocab_size' in config:
        states = from_official(weights, config)(inputs['tokens'], inputs.get('segment_labels'), inputs.get('positions'), inputs.get('token_embeddings'), return_states=True)
        return {'embedded' if i == 0 else f'layer{i - 1}': x for i, x in enumerate(states)} | dict(last=states[-1], sentence_rep=states[-1][:, 0])
    bias = config.get('bias', True)
    model = URPEAttention(config['embed_dim'], config['num_heads'], qkv_bias=bias, proj_bias=bias).eval()
    model.load_state_dict(join_qkv(weights))
    hidden, added = inputs.get('key_padding_mask'), [inputs[k] for k in ('bias', 'attn_mask') if k in inputs]
    return dict(y=model(inputs['x'], bias=sum(added) if added else None, factor=inputs.get('multiplier'), mask=None if hidden is None else ~hidden.bool()[:, None, None]))


@pytest.mark.parametrize('name', SHEETS)
@torch.no_grad()
def test_sheet(name, record_property):
    assert builder_of(name), f'tests/parity/{name}.json has no builder in tests/test_parity.py'
    sheet = SHEETS[name]
    worst = sheet.check(builder_of(name)(sheet.config, sheet.weights(), sheet.inputs()))
    record_property('worst error / rms', worst)


def test_every_builder_has_a_sheet():
    spare = {name for name in BUILDERS if not any(name in (sheet, sheet.split('__')[0]) for sheet in SHEETS)}
    assert not spare, f'builders without a sheet: {spare}'


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
