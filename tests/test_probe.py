"""probe: what it writes down against what attention itself says, and what it does to a model."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vitbook.layers.attention import BACKENDS, Attention, attention, refusal
from vitbook.layers.window import shift_mask, window_partition
from vitbook.probe import recording


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)),
                       dtype=dtype)


def identity(b, heads, m): return torch.eye(m).expand(b, heads, m, m).contiguous()      # as values: the output of attention is then its weights


def agree(call, weights, expected_out=None):
    "The call, watched twice: with its weights kept, which must be these, and with entropies alone."
    with recording() as full: out = call()
    with recording(weights=False) as short: call()
    assert len(full.weights) == len(full.entropy) == len(short.entropy) == 1 and short.weights == []
    assert full.weights[0].dtype == torch.float32 and not full.weights[0].requires_grad
    assert not full.entropy[0].requires_grad
    assert_close(full.weights[0], weights, atol=1e-5, rtol=1e-4)
    for H in (full.entropy[0], short.entropy[0]):
        assert_close(H, torch.special.entr(weights).sum(-1), atol=1e-4, rtol=1e-4)
    assert full.names == short.names == ['']
    if expected_out is not None: assert_close(out, expected_out)


# ---- the library's own attention

B, H, N, M, D = 2, 6, 5, 7, 4
CLOSED = torch.ones(N, M, dtype=torch.bool)
CLOSED[2] = False
OPTIONS = {
    'plain': {}, 'causal': dict(causal=True), 'more queries than keys, causal': dict(n=9, causal=True), 'shared key heads': dict(g=2), 'one key head': dict(g=1, causal=True),
    'keys hidden': dict(mask=torch.tensor([[True] * 4 + [False] * 3, [False] + [True] * 6])[:, None, None]), 'a query that sees nothing': dict(mask=CLOSED),
    'bias of a head': dict(bias=seeded(1, H, N, M) * 3), 'bias of a key': dict(bias=seeded(B, 1, 1, M) * 3), 'scale': dict(scale=2.),
    'all': dict(g=3, causal=True, mask=CLOSED.flip(1), bias=seeded(B, H, N, M), scale=.1),
}


def problem(g=H, n=N, **given):
    return seeded(B, H, n, D), seeded(B, g, M, D, seed=1), identity(B, g, M), given


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('backend', [b for b in ('auto', *BACKENDS) if b not in ('flex', 'triton')])
def test_our_attention(option, backend):
    q, k, v, given = problem(**OPTIONS[option])
    wanted = dict(bias='bias' in given, uneven='causal' in given and q.shape[2] != M)
    if backend != 'auto' and refusal(backend, head_dim_differs=True, width=M, **wanted):
        v = seeded(B, k.shape[1], M, D, seed=2)
    if backend != 'auto' and (why := refusal(backend, head_dim_differs=v.shape[-1] != D, **wanted)):
        pytest.skip(why)
    weights = attention(q, k, v, return_weights=True, **given).weights
    if v.shape[-1] == M: assert_close(attention(q, k, v, **given), weights)
    agree(lambda: attention(q, k, v, backend=backend, **given), weights,
          attention(q, k, v, **given))
    agree(lambda: attention(q.requires_grad_(), k, v, backend=backend, **given), weights)


def test_dropout_is_not_in_what_is_written_down():
    q, k, v, _ = problem()
    weights = attention(q, k, v, return_weights=True).weights
    agree(lambda: attention(q, k, v, dropout_p=.5), weights)
    agree(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=.5), weights)
    module, x = Attention(12, 3, attn_drop=.5), seeded(2, 5, 12)
    with recording(module) as on: module(x)
    with recording(module) as off: module.eval()(x)
    assert_close(on.weights[0], off.weights[0])


def test_windows_of_a_rolled_map():
    "Weights of every window, the mask of each its own."
    x, mask = seeded(2, 4, 6, 8), shift_mask((4, 6), (2, 3), (1, 2))
    q, k = (window_partition(x.roll((-1, -2), (1, 2)) @ seeded(8, 8, seed=s),
                             (2, 3)).unflatten(-1, (2, 4)).transpose(1, 2) for s in (0, 1))
    mask = mask.repeat(2, 1, 1)[:, None]
    weights = attention(q, k, identity(8, 2, 6), mask=mask)
    assert weights.shape == (8, 2, 6, 6) and ((weights > 0) == mask).all()
    agree(lambda: attention(q, k, k, mask=mask), weights)


# ---- torch's

@pytest.mark.parametrize('given', [{}, dict(is_causal=True), dict(n=M, is_causal=True), dict(n=9, is_causal=True), dict(attn_mask=CLOSED | (torch.arange(M) < 2)), dict(attn_mask=seeded(N, M) * 3),
                                   dict(attn_mask=seeded(B, 1, N, M) * 3, scale=.1), dict(scale=2.), dict(g=2, enable_gqa=True), dict(g=1, enable_gqa=True, is_causal=True)], ids=lambda g: ' '.join(g) or 'plain')
def test_torchs_scaled_dot_product_attention(given):
    q, k, v, given = problem(**given)
    weights = F.scaled_dot_product_attention(q, k, v, **given)
    agree(lambda: F.scaled_dot_product_attention(q, k, v, **given), weights, weights)
    agree(lambda: F.scaled_dot_product_attention(query=q, key=k, value=v, **given), weights)
    if 'attn_mask' in given and len(given) == 1:
        agree(lambda: F.scaled_dot_product_attention(q, k, v, given['attn_mask']), weights)
    if [*given] == ['is_causal']:
        agree(lambda: F.scaled_dot_product_attention(q, k, v, None, 0., True), weights)


MASKS = {'plain': {}, 'keys hidden': dict(key_padding_mask=torch.tensor([[False] * 5 + [True] * 2, [True] + [False] * 6])), 'mask': dict(attn_mask=torch.ones(N, M, dtype=torch.bool).triu(3)),
         'bias': dict(attn_mask=seeded(N, M)), 'bias of heads': dict(attn_mask=seeded(B * 3, N, M))}


@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('options', [{}, dict(batch_first=True), dict(dropout=.4),
                                     dict(add_zero_attn=True), dict(add_bias_kv=True, bias=False),
                                     dict(kdim=6, vdim=10)], ids=lambda o: ' '.join(o) or 'plain')
@pytest.mark.parametrize('need_weights', [False, True])
def test_torchs_module(options, masks, need_weights):
    module, first = nn.MultiheadAttention(12, 3, **options), options.get('batch_first', False)
    q, k, v = seeded(B, N, 12), seeded(B, M, options.get('kdim', 12), seed=1), seeded(
        B, M, options.get('vdim', 12), seed=2)
    if not first: q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    weights = module.eval()(q, k, v, average_attn_weights=False, **MASKS[masks])[1].detach()
    for training in (False, True):
        agree(lambda: module.train(training)(q, k, v, need_weights=need_weights, **MASKS[masks])[0],
              weights)
    module.eval()
    # where torch has a faster way
    with torch.no_grad():
        agree(lambda: module(q, k, v, need_weights=need_weights, **MASKS[masks])[0], weights)


@pytest.mark.parametrize('training', [False, True])
def test_torchs_encoder_and_one_sample(training):
    layer, x = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.,
                                          batch_first=True).train(training), seeded(B, N, 12)
    weights = layer.self_attn(x, x, x, average_attn_weights=False)[1].detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            plain = layer(x)
            agree(lambda: layer(x), weights, plain)
    with recording(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)) as rec: layer(x)
    assert len(rec.weights) == 1
    single = nn.MultiheadAttention(12, 3).eval()
    agree(lambda: single(x[0], x[0], x[0])[0],
          single(*[x[0]] * 3, average_attn_weights=False)[1][None].detach())


def test_softmaxes_of_four_axes():
    """As Hugging Face's eager attention computes them.

    Other axes and other shapes are not attention."""
    s = seeded(B, H, N, M)
    for call in (lambda: F.softmax(s, dim=-1), lambda: torch.softmax(s, -1), lambda: s.softmax(3),
                 lambda: s.softmax(dim=-1), lambda: F.softmax(s, -1, dtype=torch.float64)):
        agree(call, s.softmax(-1))
    with recording() as rec: s.softmax(1), s[0].softmax(-1), F.softmax(s, dim=2), s.sigmoid()
    assert rec.weights == rec.entropy == rec.names == []


# ---- what it does to a model

def model():
    return nn.ModuleDict({'first': Attention(12, 3),
                          'second': nn.ModuleDict({'attn': Attention(12, 2)})})


def test_layers_by_name_and_by_choice():
    m, x = model(), seeded(2, 5, 12)
    def both(): return m['second']['attn'](m['first'](x))
    with recording(m) as rec: both()
    assert rec.names == ['first', 'second.attn'] and [w.shape[1] for w in rec.weights] == [3, 2]
    with recording(m, every=lambda name: name.startswith('second')) as rec: both()
    assert rec.names == ['second.attn'] and len(rec.weights) == len(rec.entropy) == 1
    with recording(m, weights=False, every=lambda name: False) as rec: both()
    assert rec.names == rec.entropy == []
    both()
    assert not rec.names


def test_after_an_error_nothing_watches():
    m, x = model(), seeded(2, 5, 12)
    with pytest.raises(ValueError, match='on purpose'):
        with recording(m) as rec:
            m['first'](x)
            with pytest.raises(ValueError): m['first'](x, mask=torch.ones(4, 4, dtype=torch.bool))
            m['second']['attn'](x)
            raise ValueError('on purpose')
    assert rec.names == ['first', 'second.attn'], 'a layer that failed is not on the stack any more'
    m['first'](x)
    assert len(rec.names) == 2
    assert not any(l._forward_hooks or l._forward_pre_hooks for l in m.modules())
