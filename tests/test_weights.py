"""The protocol of official weights, for every family whose sheet is of a whole model: a class makes the model of weights
under official names, in eval mode; `load_checkpoint` takes the same weights from a file, however a script has wrapped them;
what is missing is named. The notebook of `vitbook.weights` has the small cases."""
import importlib

import pytest
import torch
from torch import nn

from sheets import sheets
from vitbook import load_checkpoint
from vitbook.weights import Official, bare_names

SHEETS = {sheet.name: sheet for sheet in sheets()}


def dsvt(config):
    layer = config['INPUT_LAYER']
    return dict(num_heads=config['nhead'][0], grid=layer['sparse_shape'], set_size=layer['set_info'][0][0], windows=layer['window_shape'],
                hybrid_factor=layer['hybrid_factor'], shifts=layer['shifts_list'], pos_bug=True)


def decoder(model, inputs):
    "What the sheet calls last_hidden: padded places have the mean of all, as in transformers' eager attention."
    ids, mask = inputs['position_ids'], inputs['attention_mask'].bool()
    return dict(last_hidden=model.norm(model.forward_blocks(inputs['embeds'], ids, mask)[-1]))


def urpe(model, inputs):
    states = model(inputs['tokens'], return_states=True)
    return dict(zip(('embedded', 'layer0', 'layer1'), states))


# sheet -> class, what weights do not tell, how the model is called
CASES = {
    'crossformer__tiny': ('backbones.crossformer.CrossFormer', lambda c: dict(img_size=64, group_size=4, crs_interval=c['crs_interval']), None),
    'cvt__tiny': ('backbones.cvt.CvT', lambda c: dict(num_heads=c['NUM_HEADS']), None),
    'tnt__tiny': ('backbones.tnt.TNT', lambda c: dict(num_heads=3, inner_num_heads=2), None),
    'hornet__tiny7x7': ('mixers.hornet.HorNet', lambda c: {}, None),
    'itransformer__tiny': ('sequences.itransformer.ITransformer', lambda c: dict(num_heads=c['n_heads'], act_layer=nn.GELU, official=True),
                           lambda m, i: dict(y=m(i['x'], i['x_mark']), y_without_marks=m(i['x'], None))),
    'histoformer__tiny': ('restoration.histoformer.Histoformer', lambda c: {}, None),
    'fitv2__tiny': ('generation.fitv2.FiT', lambda c: dict(num_heads=c['num_heads'], official=True), lambda m, i: m(i['x'], i['t'], i['y'], i['grid'], i['mask'])),
    'fitv2__padded': ('generation.fitv2.FiT', lambda c: dict(num_heads=c['num_heads'], official=True), lambda m, i: m(i['x'], i['t'], i['y'], i['grid'], i['mask'])),
    'qwen25_vl__vision': ('multimodal.qwen25_vl.Qwen25Vision', lambda c: dict(config=c), lambda m, i: dict(features=m(i['patches'], i['grid_thw']))),
    'qwen25_vl__decoder': ('multimodal.qwen25_vl.Qwen25Decoder', lambda c: dict(config=c, padded_queries='mean'), decoder),
    'urpe__tiny': ('dynamics.urpe.URPEncoder', lambda c: dict(config={k: v for k, v in c.items() if k != 'vocab_size'}), urpe),
    'dsvt__tiny': ('detection.dsvt.DSVT', lambda c: dsvt(c), lambda m, i: dict(features=m(i['x'], i['coords'])[0])),
}
EXACT = [name for name in CASES if name != 'histoformer__tiny']     # a sort turns the last bit into another order, see its parity.py
each = pytest.mark.parametrize('name', CASES)


def made(name, weights=None):
    "The model of a sheet's weights, by the protocol."
    sheet, (place, told, _) = SHEETS[name], CASES[name]
    module, cls = place.rsplit('.', 1)
    return getattr(importlib.import_module(f'vitbook.{module}'), cls).from_official(sheet.weights() if weights is None else weights, **told(sheet.config))


@torch.no_grad()
def outputs(name, model):
    call, inputs = CASES[name][2], SHEETS[name].inputs()
    found = call(model, inputs) if call else model(inputs['x'])
    return found if isinstance(found, dict) else {next(iter(SHEETS[name].data['outputs'])): found}


def blank(model):
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    return model


def same(name, model, other):
    a, b = outputs(name, model), outputs(name, other)
    return all(torch.equal(a[k], b[k]) for k in a)


def test_every_family_with_a_sheet_of_a_whole_model_is_here():
    whole = {'Model', 'FiT', 'TNT', 'DSVT', 'HorNet', 'Histoformer', 'ConvolutionalVisionTransformer', 'Qwen2_5_VLTextModel',
             'Qwen2_5_VisionTransformerPretrainedModel', 'TransformerSentenceEncoder'}
    assert {name for name, sheet in SHEETS.items() if sheet.module in whole} <= {*CASES}


@each
def test_from_official_is_a_model_in_eval_mode_that_gives_the_sheets_numbers(name):
    model = made(name)
    assert isinstance(model, Official) and not any(m.training for m in model.modules())
    if name in EXACT:
        found = {k: v for k, v in SHEETS[name].errors(outputs(name, model)).items() if k in outputs(name, model)}
        assert found and max(found.values()) <= 1e-4, found


@each
def test_load_checkpoint_takes_official_names(name, tmp_path):
    "Into a model of the same arguments, however the weights are wrapped; and its own weights go round."
    want, weights = made(name), SHEETS[name].weights()
    under = lambda prefix, of: {f'{prefix}{k}': v for k, v in of.items()}
    ways = dict(plain=weights, wrapped={'epoch': torch.tensor(3), 'model': under('module.', weights), 'optimizer': {'lr': .1}},
                ema={'state_dict_ema': weights}, averaged=under('module.', weights) | {'n_averaged': torch.tensor(2)},
                lightning={'state_dict': under('net.', weights), 'pytorch-lightning_version': '2'}, compiled=under('_orig_mod.', weights),
                own={'model': want.state_dict()})
    for way, held in ways.items():
        torch.save(held, tmp_path/f'{way}.pth')
        fresh = blank(made(name))
        assert same(name, load_checkpoint(fresh, tmp_path/f'{way}.pth'), want), way
    assert same(name, load_checkpoint(blank(made(name)), weights), want) and same(name, made(name, ways['wrapped']), want)


@each
def test_every_missing_entry_is_named(name):
    "One after the other is left out; nothing is loaded then."
    model, weights = blank(made(name)), SHEETS[name].weights()
    whole, unused = set(model.official_names(weights)), []
    for left in weights:
        rest = {k: v for k, v in weights.items() if k != left}
        gone = whole - set(model.official_names(rest))
        if left.endswith('num_batches_tracked') or not gone:
            unused.append(left)
            continue
        with pytest.raises(ValueError) as e: load_checkpoint(model, rest)
        assert any(k in str(e.value) for k in gone), f'{left}: {e.value}'
    assert len(unused) < len(weights) / 5, unused
    assert not any(p.any() for p in model.parameters())


@each
def test_what_the_class_does_not_know_is_refused(name):
    with pytest.raises(ValueError): type(made(name)).from_official({'a.weight': torch.zeros(2, 2)}, **CASES[name][1](SHEETS[name].config))
    told = CASES[name][1](SHEETS[name].config) | dict(no_such_argument=1)
    with pytest.raises(ValueError, match='no_such_argument'): type(made(name)).from_official(SHEETS[name].weights(), **told)
    with pytest.raises(ValueError, match='made already'): made(name).from_official(SHEETS[name].weights(), no_such_argument=1)


@pytest.mark.parametrize('name', ['tnt__tiny', 'fitv2__tiny', 'dsvt__tiny', 'qwen25_vl__vision'])
def test_heads_are_asked_for(name):
    place = CASES[name][0].rsplit('.', 1)
    cls = getattr(importlib.import_module(f'vitbook.{place[0]}'), place[1])
    with pytest.raises(ValueError, match='num_heads|config'): cls.from_official(SHEETS[name].weights())


def test_a_tied_qwen_without_its_head_and_a_model_without_one():
    "Names of transformers' Qwen2_5_VLModel, which has no head, and of the model around it, of now and of before."
    from vitbook import create_model, model_info
    ours = create_model('qwen25_vl_3b', **model_info('qwen25_vl_3b')['example'], tie_embeddings=True)
    tower, words = ours.visual.state_dict(), {k: v for k, v in ours.language.state_dict().items()}
    for visual, language in (('visual.', 'language_model.'), ('model.visual.', 'model.language_model.'), ('visual.', 'model.')):
        theirs = {visual + k: v for k, v in tower.items()} | {language + k.replace('embed.', 'embed_tokens.').replace('blocks.', 'layers.'): v for k, v in words.items()}
        fresh = blank(create_model('qwen25_vl_3b', **model_info('qwen25_vl_3b')['example'], tie_embeddings=True))
        load_checkpoint(fresh, theirs | {'lm_head.weight': words['embed.weight']} if visual != 'visual.' else theirs)
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_checkpoints_of_fit_are_read(tmp_path):
    from vitbook.train import save_checkpoint
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_checkpoint(tmp_path/'run.safetensors', other, step=3, optimizer=dict(exp_avg=[torch.zeros(2)]))
    load_checkpoint(model, tmp_path/'run.safetensors')
    assert torch.equal(model.weight, other.weight)


def test_a_converted_sigma_net_takes_official_names(tmp_path):
    "By `names`, for the function needs the model."
    from vitbook.dynamics import sigma_reparam as S
    torch.manual_seed(0)
    net, other = S.convert(nn.Sequential(nn.Linear(3, 4))), S.convert(nn.Sequential(nn.Linear(3, 4)))
    theirs = {f'0.{"sigma" if k == "0.gamma" else k[2:]}': v for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match='sigma'): load_checkpoint(net, theirs)
    load_checkpoint(net, theirs, names=lambda weights: S.official_names(weights, net))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


def test_names_of_wrapped_parts():
    one = torch.zeros(1)
    assert set(bare_names({'module.blocks.0._orig_mod.attn.w': one})) == {'blocks.0.attn.w'}
    assert set(bare_names({'module.a': one, 'b': one})) == {'module.a', 'b'}


@pytest.mark.parametrize('name', ['pvt_v2_b0', 'pvt_v2_b2_li', 'pvt_v2_b5'])
def test_a_pyramid_is_told_by_its_weights(name):
    "Official names are ours; sizes, the linear kind and the published heads are read off."
    from vitbook import create_model
    with torch.device('meta'): want = create_model(name)
    told = type(want).official_arguments(want.state_dict())
    with torch.device('meta'): made = type(want)(**told)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
    heads = lambda model: [m.num_heads for m in model.modules() if hasattr(m, 'num_heads')]
    assert heads(made) == heads(want) and told['linear'] == name.endswith('_li')
    with pytest.raises(ValueError, match='num_heads'): type(want).official_arguments({'patch_embed1.proj.weight': torch.zeros(24, 3, 7, 7)})
    with pytest.raises(ValueError, match='PVTv2'): type(want).from_official({'a.weight': torch.zeros(2, 2)})
