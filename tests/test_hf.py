"""Hugging Face's ViT and DeiT, with random weights and no download: their weights give the same numbers here, and a probe leaves their output alone."""
import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip('transformers', reason='transformers is not installed: these tests compare with it')
SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8, num_labels=7)


def theirs(kind, **more):
    "A Hugging Face model whose every weight is random, norms and tokens too."
    torch.manual_seed(0)
    config = (transformers.DeiTConfig if kind.startswith('DeiT') else transformers.ViTConfig)(**{**SIZES, **more})
    config._attn_implementation = 'eager'
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .1)
    return model


def pixels(size=32, chans=3): return torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('kind', ['ViTForImageClassification', 'DeiTForImageClassificationWithTeacher'])
@torch.no_grad()
def test_classifiers_give_the_same_logits(kind):
    from vitbook.vit import vit_from_state_dict
    model, x = theirs(kind), pixels()
    ours = vit_from_state_dict(model.state_dict(), num_heads=SIZES['num_attention_heads'])
    assert_close(ours(x), model(x).logits, atol=1e-5, rtol=1e-5)
    assert ours.num_classes == 7 and not ours.training


@pytest.mark.parametrize('kind', ['ViTModel', 'DeiTModel'])
@torch.no_grad()
def test_backbones_give_the_same_tokens(kind):
    from vitbook.vit import vit_from_state_dict
    model, x = theirs(kind), pixels()
    ours = vit_from_state_dict(model.state_dict(), num_heads=SIZES['num_attention_heads'])
    assert_close(ours.forward_features(x), model(x).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_channel_no_bias_and_another_resolution():
    from vitbook.vit import vit_from_state_dict
    model = theirs('ViTForImageClassification', num_channels=1, qkv_bias=False)
    ours = vit_from_state_dict(model.state_dict(), num_heads=4)
    assert_close(ours(pixels(chans=1)), model(pixels(chans=1)).logits, atol=1e-5, rtol=1e-5)
    larger = vit_from_state_dict(model.state_dict(), num_heads=4, img_size=48)
    assert larger(pixels(48, 1)).shape == (2, 7)


@torch.no_grad()
def test_names_of_the_checkpoints_on_the_hub():
    "Checkpoints keep the names of earlier versions of the library: attention.attention.query, attention.output.dense, layer …"
    import re
    from vitbook.vit import vit_from_state_dict
    model, x = theirs('ViTForImageClassification'), pixels()
    old = {}
    for name, value in model.state_dict().items():
        for pattern, older in ((r'^vit\.(?:encoder\.)?layers?\.', 'vit.encoder.layer.'), (r'\.attention\.q_proj\.', '.attention.attention.query.'), (r'\.attention\.k_proj\.', '.attention.attention.key.'),
                               (r'\.attention\.v_proj\.', '.attention.attention.value.'), (r'\.attention\.o_proj\.', '.attention.output.dense.'),
                               (r'\.mlp\.(?:fc1|up_proj|dense_in)\.', '.intermediate.dense.'), (r'\.mlp\.(?:fc2|down_proj|dense_out)\.', '.output.dense.')):
            name = re.sub(pattern, older, name)
        old[name] = value
    assert any('.attention.attention.query.weight' in name for name in old) and any(name.endswith('.0.intermediate.dense.weight') for name in old), sorted(old)[:20]
    assert_close(vit_from_state_dict(old, num_heads=4)(x), model(x).logits, atol=1e-5, rtol=1e-5)


def test_weights_of_something_else_are_refused(unchecked):
    from vitbook.vit import vit_from_state_dict
    from vitbook.weights import load_weights
    state = theirs('ViTForImageClassification').state_dict()
    with pytest.raises(ValueError, match='state_dict'): vit_from_state_dict({'conv1.weight': torch.zeros(3, 3)})
    with pytest.raises(ValueError, match='state_dict'): vit_from_state_dict({k: v for k, v in state.items() if 'layernorm_after' not in k}, num_heads=4)
    ours = vit_from_state_dict(state, num_heads=4)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match='head.weight.*instead of'): load_weights(ours, before | {'head.weight': torch.zeros(3, 48)})
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), 'nothing may be half loaded'


# ---- probes

@pytest.mark.parametrize('kind', ['ViTForImageClassification', 'DeiTForImageClassificationWithTeacher', 'ViTModel'])
@torch.no_grad()
def test_recording_leaves_the_output_and_sees_the_weights(kind):
    from vitbook.probe import recording
    model, x = theirs(kind), pixels()
    plain = model(x)[0]
    want = model(x, output_attentions=True).attentions
    with recording(model) as rec: watched = model(x)[0]
    assert torch.equal(watched, plain), 'the probe changed the output'
    assert len(rec.weights) == len(want) == 3
    for got, weights in zip(rec.weights, want): assert_close(got, weights, atol=1e-6, rtol=1e-5)
    for got, weights in zip(rec.entropy, want): assert_close(got, -(weights * weights.log()).sum(-1), atol=1e-5, rtol=1e-5)
    seen = len(rec.weights)
    assert torch.equal(model(x)[0], plain) and len(rec.weights) == seen, 'after the block nothing is recorded any more'


@torch.no_grad()
def test_recording_with_fused_attention():
    "sdpa keeps no weights: the probe must compute them beside it, and the output must stay what it was."
    from vitbook.probe import recording
    model, x = theirs('ViTForImageClassification'), pixels()
    want = model(x, output_attentions=True).attentions
    model.set_attn_implementation('sdpa')
    plain = model(x).logits
    with recording(model) as rec: watched = model(x).logits
    assert_close(watched, plain, atol=1e-6, rtol=1e-5)
    assert len(rec.weights) == 3
    for got, weights in zip(rec.weights, want): assert_close(got, weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('training', [False, True])
def test_recording_our_own(training):
    "A vitbook model, watched and not: the same output, the same gradients, weights that sum to one."
    from vitbook.probe import recording
    from vitbook.vit import VisionTransformer
    torch.manual_seed(0)
    model, x = VisionTransformer(32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3, drop_path_rate=.2).train(training), pixels()
    def once(watch):
        torch.manual_seed(1)
        model.zero_grad()
        if watch:
            with recording(model) as rec: out = model(x)
        else: rec, out = None, model(x)
        out.square().sum().backward()
        return rec, out.detach(), [p.grad.clone() for p in model.parameters()]
    _, plain, gradients = once(False)
    rec, watched, others = once(True)
    assert_close(watched, plain, atol=1e-6, rtol=1e-5)
    for a, b in zip(gradients, others): assert_close(b, a, atol=1e-4, rtol=1e-4)
    assert [w.shape for w in rec.weights] == [(2, 3, 17, 17)] * 2 and [h.shape for h in rec.entropy] == [(2, 3, 17)] * 2
    for w, h in zip(rec.weights, rec.entropy):
        assert_close(w.sum(-1), torch.ones(2, 3, 17))
        assert_close(h, -(w * w.clamp(min=1e-30).log()).sum(-1), atol=1e-5, rtol=1e-5)
        assert not w.requires_grad


def test_recording_under_autocast():
    "Weights and entropies in float32, of the very numbers that are multiplied, with or without keeping the weights."
    from vitbook.probe import recording
    from vitbook.layers.attention import Attention
    torch.manual_seed(0)
    model, x = Attention(48, 3, qk_norm=True), torch.randn(2, 9, 48)
    with torch.no_grad(): model.q_norm.weight.mul_(4)
    with torch.autocast('cpu', torch.bfloat16):
        plain = model(x)
        with recording(model) as full: watched = model(x)
        with recording(model, weights=False) as short: model(x)
    assert torch.equal(plain, watched) and full.weights[0].dtype == full.entropy[0].dtype == short.entropy[0].dtype == torch.float32
    assert_close(full.weights[0].sum(-1), torch.ones(2, 3, 9), atol=1e-6, rtol=0)
    assert_close(full.entropy[0], short.entropy[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', ['ViTForImageClassification', 'DeiTForImageClassification'])
def test_row_gates_before_their_blocks(kind):
    "Open gates change nothing; gates that differ leave shut tokens as they are, and get gradients in training."
    from vitbook.tokens.token_routing import RoutedBlock, routed, watched
    model, x = theirs(kind), pixels()
    want = model(x).logits
    path = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    with pytest.raises(ValueError, match=f"such as .'{path}'"): routed(model)
    with pytest.raises(ValueError, match='num_prefix'): routed(model, blocks=path)
    assert not any(isinstance(m, RoutedBlock) for m in model.modules())
    routed(model, blocks=path, num_prefix=1 if kind.startswith('ViT') else 2)
    assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
    gates = [m.gate for m in model.modules() if isinstance(m, RoutedBlock)]
    assert len(gates) == SIZES['num_hidden_layers'] - 1
    for gate in gates: gate.weight.data.normal_(); gate.bias.data.zero_(); gate.weight_hat.copy_(gate.weight); gate.bias_hat.zero_()
    with watched(model) as seen: out = model(x).logits
    assert all(0 < g.mean() < 1 and g.shape == (2, 16) for g in seen) and (out - want).abs().max() > 1e-3
    with watched(model.train()) as seen: out = model(x).logits
    (out.square().sum() + sum(g.mean() for g in seen)).backward()          # the task alone asks nothing of the last gate: the class token is read
    assert all(gate.weight.grad.abs().max() > 0 for gate in gates)
