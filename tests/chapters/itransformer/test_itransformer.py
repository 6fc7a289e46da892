"iTransformer: what the card says must hold, for every kind of attention where it applies."
import copy, pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sheets import built, sheets
from vitbook.data.timeseries import Windows, evaluate
from vitbook.layers.block import Block
from vitbook.registry import create_model, list_models, model_info
from vitbook.sequences import itransformer as T

DEFAULTS = dict(seq_len=24, pred_len=12, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2., drop_rate=0.)
KINDS = ('full', 'flash', 'flow', 'prob', 'lsh', 'none')
SOFTMAX = ('full', 'flash')
kinds = pytest.mark.parametrize('attn', KINDS)


def model(**given):
    torch.manual_seed(0)
    made = T.ITransformer(**DEFAULTS | given).eval()
    with torch.no_grad():
        for p in made.parameters(): p.add_(.1 * torch.randn_like(p))
    return made


def data(b=2, n=5, c=0, t=24, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return 2 * torch.randn(b, t, n, generator=g, dtype=dtype) + 3, torch.rand(b, t, c, generator=g, dtype=dtype) - .5 if c else None


# ---- sizes

def formula(t, s, d, f, e): return (t + 1) * d + e * (4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d) + 2 * d + (d + 1) * s


def test_parameters_follow_the_formula_and_know_no_variates():
    def count(**given):
        with torch.device('meta'): return sum(p.numel() for p in T.ITransformer(**given).parameters())
    assert count(seq_len=96, pred_len=96, embed_dim=256, depth=2, mlp_ratio=1.) == formula(96, 96, 256, 256, 2) == 841_568
    for t, s, d, ratio, e in ((48, 12, 64, 2, 2), (96, 720, 512, 1, 2), (336, 96, 128, 4, 3)): assert count(seq_len=t, pred_len=s, embed_dim=d, depth=e, mlp_ratio=ratio) == formula(t, s, d, d * ratio, e)
    assert count() == formula(96, 96, 512, 2048, 2)
    m = model()
    before = {k: v.shape for k, v in m.state_dict().items()}
    for n, c in ((1, 0), (9, 4)): m(*data(n=n, c=c))
    assert {k: v.shape for k, v in m.state_dict().items()} == before


PUBLISHED = {('itransformer_etth1', 96): (256, 2, True), ('itransformer_etth1', 192): (256, 2, True), ('itransformer_etth1', 336): (512, 2, True), ('itransformer_etth1', 720): (512, 2, True),
             ('itransformer_pems03', 96): (512, 4, True), ('itransformer_pems04', 12): (1024, 4, False), ('itransformer_pems07', 24): (512, 2, False), ('itransformer_pems07', 48): (512, 4, False),
             ('itransformer_pems08', 24): (512, 2, True), ('itransformer_pems08', 48): (512, 4, False)}
PUBLISHED |= {(f'itransformer_{name}', s): (d, e, True) for name, d, e in (('etth2', 128, 2), ('ettm1', 128, 2), ('ettm2', 128, 2), ('exchange', 128, 2), ('ecl', 512, 3), ('traffic', 512, 4), ('weather', 512, 3), ('solar', 512, 2))
              for s in (96, 720)}


@pytest.mark.parametrize('name,s', PUBLISHED)
def test_published_configurations(name, s):
    d, e, norm = PUBLISHED[name, s]
    with torch.device('meta'): m = create_model(name, pred_len=s)
    assert sum(p.numel() for p in m.parameters()) == formula(96, s, d, d, e) and m.use_norm is norm and len(m.blocks) == e and m.blocks[0].attn.num_heads == 8


def test_the_five_of_the_framework():
    assert {'itransformer', 'iinformer', 'ireformer', 'iflowformer', 'iflashformer'} <= set(list_models(part='sequences'))
    for name in ('itransformer', 'iinformer', 'iflowformer', 'iflashformer'): assert model_info(name)['parameters'] == formula(96, 96, 512, 2048, 2)
    assert model_info('ireformer')['parameters'] == formula(96, 96, 512, 2048, 2) - 2 * (512 * 512 + 3 * 512)   # one matrix for query and key, no biases there
    assert [create_model(n, **model_info(n)['example']).attn for n in ('itransformer', 'iinformer', 'ireformer', 'iflowformer', 'iflashformer')] == ['full', 'prob', 'lsh', 'flow', 'flash']


# ---- symmetries

@pytest.mark.parametrize('attn', ('full', 'flash', 'flow', 'none'))
def test_permuting_variates_permutes_forecasts(attn):
    m, (x, mark) = model(attn=attn).double(), data(n=7, c=4, dtype=torch.double)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert_close(m(x[..., order], mark), m(x, mark)[..., order], rtol=0, atol=1e-10)
    assert_close(m(x, mark[..., [2, 0, 3, 1]]), m(x, mark), rtol=0, atol=1e-10)              # covariates among themselves
    assert not torch.allclose(m(x[..., order], mark), m(x, mark))


@kinds
@pytest.mark.parametrize('n', (1, 2, 3, 8, 40))
def test_any_number_of_variates(attn, n):
    for c in (0, 4):
        y = model(attn=attn)(*data(n=n, c=c))
        assert y.shape == (2, 12, n) and y.isfinite().all()


def test_alone_attention_is_the_value_path():
    m, (x, _) = model(), data(n=1)
    assert all((w == 1).all() for w in m.attention_maps(x))
    attn, h = m.blocks[0].attn, torch.randn(2, 1, 16)
    value = F.linear(h, attn.qkv.weight[32:], attn.qkv.bias[32:])
    assert_close(attn(h), attn.proj(value))


@pytest.mark.parametrize('attn', ('full', 'flow', 'none'))
def test_scale_and_shift_of_each_variate(attn):
    m, (x, _) = model(attn=attn).double(), data(dtype=torch.double)
    a, c = torch.tensor([.5, 1., 2., 30., 1e3]).double(), torch.tensor([0., -5., 100., 3., -1e4]).double()
    error = ((m(a * x + c) - (a * m(x) + c)) / a).abs().amax((0, 1))
    assert (error <= 1e-4 * m(x).abs().max()).all()
    far = [((m(k * (x - 3)) / k) - m(1e6 * (x - 3)) / 1e6).abs().max().item() for k in (.1, 1., 10.)]
    assert far[0] > 10 * far[1] > 100 * far[2]                                               # all that is left comes from eps, and goes with the variance
    bare = model(attn=attn, use_norm=False).double()
    assert not torch.allclose(bare(x + 100), bare(x) + 100, atol=1.)


@kinds
def test_constant_series_stay_about_constant(attn):
    m, x = model(attn=attn), torch.tensor([0., 5., -1e3])[None, None].expand(2, 24, 3).clone()
    y = m(x)
    assert y.isfinite().all() and ((y - x[:, :12]).abs() <= 1e-5 ** .5 * 10 + 1e-4 * x[:, :12].abs()).all()
    x.requires_grad_()
    m(x).sum().backward()
    assert x.grad.isfinite().all()


def test_the_mean_carries_no_gradient_and_the_deviation_does():
    x = torch.randn(2, 9, 3, dtype=torch.double, requires_grad=True)
    z, mean, std = T.instance_norm(x)
    assert not mean.requires_grad and std.requires_grad
    assert_close(z.mean(1), torch.zeros(2, 3).double(), atol=1e-12, rtol=0)
    assert_close(std[:, 0], (x.var(1, correction=0) + 1e-5).sqrt())
    up = torch.randn(z.shape, dtype=torch.double)
    (got,) = torch.autograd.grad(z, x, up, retain_graph=True)
    away, n = x.detach() - mean, x.shape[1]
    assert_close(got, up / std.detach() - away * (up * away).sum(1, keepdim=True) / (n * std.detach() ** 3))  # no share of the mean's
    kept = x.detach().clone()
    T.instance_norm(kept)
    assert torch.equal(kept, x)                                                              # the caller's tensor is left alone


def test_time_has_no_symmetry_but_the_embedding_s():
    m, (x, _) = model(), data()
    assert not [name for name, _ in (*m.named_parameters(), *m.named_buffers()) if 'pos' in name] and not list(m.buffers())
    assert not torch.allclose(m(x.roll(1, 1)), m(x), atol=1e-3) and not torch.allclose(m(x.flip(1)), m(x), atol=1e-3)
    turned = copy.deepcopy(m)
    with torch.no_grad(): turned.embed.proj.weight.copy_(m.embed.proj.weight.flip(1))
    assert_close(turned(x.flip(1)), m(x))


# ---- who sees whom

def jacobian(m, n=4):
    x, _ = data(b=1, n=n, dtype=torch.double)
    J = torch.autograd.functional.jacobian(lambda x: m(x)[0].sum(0), x)[:, 0]                # of each variate's forecast by t n
    return J.abs().sum(1)


@pytest.mark.parametrize('attn', KINDS)
def test_variates_meet_in_attention_only(attn):
    m = model(attn=attn).double()
    across = lambda: (jacobian(m) * (1 - torch.eye(4))).max()
    assert (across() == 0) == (attn == 'none')
    for block in m.blocks: block.attn = T.NoAttention()
    assert across() == 0 and jacobian(m).diagonal().min() > 0


@kinds
def test_covariates_are_seen_but_not_forecast(attn):
    m, (x, mark) = model(attn=attn), data(c=4)
    mark.requires_grad_()
    y = m(x, mark)
    assert y.shape == (2, 12, 5)
    y.sum().backward()
    assert (mark.grad.abs().sum() > 0) == (attn != 'none')
    assert torch.allclose(m(x, mark), m(x), atol=1e-4) == (attn == 'none')


@pytest.mark.parametrize('attn', SOFTMAX)
def test_attention_maps(attn):
    m, (x, mark) = model(attn=attn), data(c=4)
    maps = m.attention_maps(x, mark)
    assert len(maps) == 2 and all(w.shape == (2, 4, 9, 9) for w in maps)
    for w in maps: assert_close(w.sum(-1), torch.ones(2, 4, 9))
    assert not any(w.requires_grad for w in maps)
    with pytest.raises(ValueError, match="'flow'"): model(attn='flow').attention_maps(x)


@pytest.mark.parametrize('attn', ('full', 'flash', 'flow', 'none'))
def test_a_subset_is_forecast_as_if_it_were_all(attn):
    m, (x, _) = model(attn=attn), data(n=6)
    some = [4, 1, 5]
    twin = T.ITransformer(**DEFAULTS | dict(attn=attn)).eval()                               # a model built for nothing but these
    twin.load_state_dict(m.state_dict())
    assert_close(m(x[..., some]), twin(x[..., some]))
    alone = T.per_variate(m, x)
    assert alone.shape == (2, 12, 6)
    for i in range(6): assert_close(alone[..., i:i + 1], m(x[..., i:i + 1]), rtol=1e-4, atol=1e-5)


def test_per_variate_gives_each_its_own_sample_s_marks():
    m, (x, mark) = model(), data(b=3, n=2, c=4)
    y = T.per_variate(m, x, mark)
    for b in range(3):
        for i in range(2): assert_close(y[b, :, i], m(x[b:b + 1, :, i:i + 1], mark[b:b + 1])[0, :, 0], rtol=1e-4, atol=1e-5)


def test_random_variates_are_the_same_of_past_and_future(unchecked):
    x = torch.arange(8.).expand(2, 24, 8)
    a, b = T.random_variates(x, x[:, :12], 3, torch.Generator().manual_seed(0))
    assert a.shape == (2, 24, 3) and torch.equal(a[:, :12], b) and len(set(a[0, 0].tolist())) == 3
    seen = {int(v) for s in range(40) for v in T.random_variates(x, x, 3, torch.Generator().manual_seed(s))[0][0, 0]}
    assert seen == set(range(8))
    with pytest.raises(ValueError, match='keep.*9'): T.random_variates(x, x, 9)


# ---- the layer

def test_layer_is_convolutions_and_three_projections():
    m = model()
    block, h = m.blocks[0], torch.randn(2, 5, 16)
    q, k, v = (F.linear(h, w, b).view(2, 5, 4, 4) for w, b in zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)))
    A = (torch.einsum('blhe,bshe->bhls', q, k) / 2).softmax(-1)
    look = block.attn.proj(torch.einsum('bhls,bshd->blhd', A, v).flatten(2))
    h1 = block.norm1(h + look)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    f = F.conv1d(F.gelu(F.conv1d(h1.transpose(1, 2), fc1.weight[..., None], fc1.bias)), fc2.weight[..., None], fc2.bias).transpose(1, 2)
    assert_close(block(h), block.norm2(h1 + f), rtol=1e-4, atol=1e-5)
    assert isinstance(block, Block) and block.norm1.eps == block.norm2.eps == m.norm.eps == 1e-5


def test_head_sees_all_of_the_token_and_gives_all_steps():
    m, (x, _) = model(), data()
    z, mean, std = T.instance_norm(x)
    tokens = m.norm(m.blocks[1](m.blocks[0](m.embed(z))))
    want = torch.stack([tokens[:, i] @ m.head.weight.T + m.head.bias for i in range(5)], -1)
    assert_close(m(x), want * std + mean, rtol=1e-4, atol=1e-5)


def naive_flow(q, k, v, eps=1e-6):
    "One head, by loops over tokens."
    q, k = q.sigmoid(), k.sigmoid()
    n, m = len(q), len(k)
    I = [1 / ((q[i] + eps) @ (sum(k) + eps)) for i in range(n)]
    O = [1 / ((k[j] + eps) @ (sum(q) + eps)) for j in range(m)]
    gate = [torch.sigmoid((q[i] + eps) @ (sum(k[j] * O[j] for j in range(m)) + eps) * n / m) for i in range(n)]
    share = torch.stack([(k[j] + eps) @ (sum(q[i] * I[i] for i in range(n)) + eps) for j in range(m)]).softmax(0) * m
    return torch.stack([gate[i] * I[i] * sum((q[i] @ k[j]) * share[j] * v[j] for j in range(m)) for i in range(n)])


def test_flow_attention():
    q, k, v = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 7, 4).double(), torch.randn(2, 3, 7, 6).double()
    out = T.flow_attention(q, k, v)
    assert out.shape == (2, 3, 5, 6)
    for b in range(2):
        for h in range(3): assert_close(out[b, h], naive_flow(q[b, h], k[b, h], v[b, h]))


def test_prob_attention():
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    g = lambda: torch.Generator().manual_seed(3)
    full = (q @ k.mT / 8 ** .5).softmax(-1) @ v
    assert_close(T.prob_attention(q, k, v, factor=5), full, rtol=1e-4, atol=1e-5)            # 5 ln 12 > 12: every query is served
    out = T.prob_attention(q, k, v, factor=1, generator=g())
    served = (out - full).abs().amax(-1) < 1e-5
    assert (served.sum(-1) == 3).all()                                                       # ceil(ln 12)
    mean = v.mean(-2, keepdim=True).expand_as(out)
    assert_close(out[~served], mean[~served])
    index = T.sampled_keys(12, 12, 3, g())
    M = torch.stack([torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in index[i].tolist()], -1) for i in range(12)], 2)
    M = M.amax(-1) - M.sum(-1) / 12
    assert all(set(M[b, h].topk(3).indices.tolist()) == set(served[b, h].nonzero()[:, 0].tolist()) for b in range(2) for h in range(4))


def naive_lsh(qk, v, size, rounds, generator):
    "One token at a time."
    n, d = qk.shape[2:]
    qk, v = (F.pad(t, (0, 0, 0, -n % (2 * size))) for t in (qk, v))
    m, out = qk.shape[2], []
    codes = T.lsh_hashes(qk, m // size, rounds, generator).flatten(0, 1)
    for u, w, code in zip(qk.flatten(0, 1), v.flatten(0, 1), codes):
        row = [i for r in range(rounds) for i in sorted(range(m), key=lambda i: (int(code[r, i]), i))]
        chunks = [row[i:i + size] for i in range(0, len(row), size)]
        sums, logs = [[] for _ in range(m)], [[] for _ in range(m)]
        for c, chunk in enumerate(chunks):
            seen = chunk + chunks[c - 1]
            for i in chunk:
                s = torch.stack([u[i] @ F.normalize(u[j], dim=0) / d ** .5 if i != j else torch.tensor(-5e4) for j in seen])
                sums[i].append(s.softmax(0) @ w[seen])
                logs[i].append(s.logsumexp(0))
        out.append(torch.stack([torch.stack(logs[i]).softmax(0) @ torch.stack(sums[i]) for i in range(n)]))
    return torch.stack(out).unflatten(0, qk.shape[:2])


@pytest.mark.parametrize('n,size,rounds', ((3, 2, 3), (8, 4, 1), (13, 2, 2)))
def test_lsh_attention(n, size, rounds):
    qk, v = torch.randn(2, 2, n, 4), torch.randn(2, 2, n, 5)
    g = lambda: torch.Generator().manual_seed(5)
    assert_close(T.lsh_attention(qk, v, size, rounds, g()), naive_lsh(qk, v, size, rounds, g()), rtol=1e-4, atol=1e-5)
    module, x = T.LSHAttention(8, 2, bucket_size=size, num_hashes=rounds).eval(), torch.randn(2, n, 8)
    split = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)
    assert_close(module(x), module.proj(naive_lsh(split(module.qk(x)), split(module.v(x)), size, rounds, torch.Generator().manual_seed(0)).transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


def test_official_slips_of_prob_are_what_they_are_said_to_be():
    "Both against the plain form: heads as rows, and queries shared by the batch."
    g = lambda: torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    plain, slip = T.prob_attention(q, k, v, 1, g()), T.prob_attention(q, k, v, 1, g(), official=True)
    assert_close(slip.transpose(1, 2).flatten(1), plain.flatten(1))
    assert not torch.allclose(slip, plain)
    q, k, v = torch.randn(3, 2, 1, 12, 8)
    plain, slip = T.prob_attention(q, k, v, 1, g()), T.prob_attention(q, k, v, 1, g(), official=True)
    full = (q @ k.mT / 8 ** .5).softmax(-1) @ v
    served = ((plain - full).abs().amax(-1) < 1e-5).any(0, keepdim=True).expand(2, 1, 12)
    assert_close(slip, torch.where(served[..., None], full, v.mean(-2, keepdim=True)), rtol=1e-4, atol=1e-5)


def test_folded_embedding():
    m, (x, _) = model().double(), data(dtype=torch.double)
    z, mean, std = T.instance_norm(x)
    assert_close(m.embed.folded(x, mean, std), m.embed(z))


@pytest.mark.parametrize('attn', ('prob', 'lsh'))
def test_chance_is_fixed_in_evaluation_unless_asked_for(attn):
    x, _ = data(n=24)
    m = model(attn=attn)
    assert torch.equal(m(x), m(x))
    loose = model(attn=attn, eval_seed=None)
    assert not torch.equal(loose(x), loose(x))
    torch.manual_seed(7); a = loose(x)
    torch.manual_seed(7); b = loose(x)
    assert torch.equal(a, b)
    m.train()
    assert not torch.equal(m(x), m(x))


# ---- baselines, training

def test_channel_linear(unchecked):
    torch.manual_seed(0)
    x, _ = data(n=3)
    shared, own = T.ChannelLinear(24, 12, use_norm=False), T.ChannelLinear(24, 12, 3)
    assert_close(shared(x)[..., 1], F.linear(x[..., 1], shared.weight, shared.bias))
    z, mean, std = T.instance_norm(x)
    for i in range(3): assert_close(own(x)[..., i], F.linear(z[..., i], own.weight[i], own.bias[i]) * std[..., i] + mean[..., i], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='seq_len=24'): shared(x[:, :20])
    with pytest.raises(ValueError, match='variates=3'): own(x[..., :2])


def test_learning_rate_is_full_twice_then_halved(): assert [T.epoch_factor(e) for e in range(5)] == [1, 1, .5, .25, .125]


def test_training_stops_and_keeps_the_best():
    torch.manual_seed(0)
    t = torch.arange(400.)
    values = torch.stack([torch.sin(t / 4 + i) for i in range(3)], 1) + .1 * torch.randn(400, 3)
    train, val = Windows(values[:300], 24, 12), Windows(values[264:], 24, 12)
    m = T.ITransformer(**DEFAULTS)
    before = evaluate(m, val).mse
    rows = T.train_forecaster(m, train, val, epochs=3, lr=3e-3)
    assert [r['lr'] for r in rows] == [3e-3, 3e-3, 1.5e-3]
    best = min(rows, key=lambda r: r['val'])
    assert best['best'] and sum(r['best'] for r in rows) == 1 and abs(evaluate(m, val).mse - best['val']) < 1e-9 and best['val'] < before / 2
    ones, turn = Windows(torch.ones(100, 1), 24, 12), Windows(torch.cat([torch.ones(24, 1), -torch.ones(12, 1)]), 24, 12)
    line = T.ChannelLinear(24, 12, use_norm=False)                                           # learns to go on, and what it is tried on turns: the first epoch is the best
    rows = T.train_forecaster(line, ones, turn, epochs=9, lr=1e-3, patience=2)
    assert [r['best'] for r in rows] == [True, False, False] and rows[2]['val'] > rows[0]['val'] + 1e-4 and abs(evaluate(line, turn).mse - rows[0]['val']) < 1e-6
    bad = T.ITransformer(**DEFAULTS)
    rows = T.train_forecaster(bad, train, val, epochs=20, lr=1e-12, patience=2)              # nothing gets better
    assert len(rows) <= 6
    twin = T.ITransformer(**DEFAULTS)
    assert len(T.train_forecaster(twin, train, val, epochs=1, variates=2)) == 1


# ---- being a module

@kinds
def test_copies_saving_and_low_precision(attn):
    m, (x, mark) = model(attn=attn), data(c=4)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert torch.equal(twin(x, mark), m(x, mark))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert_close(m(x, mark).float(), m(x, mark).float())
    assert m.double()(x.double(), mark.double()).dtype == torch.float64


def test_dropout_where_the_official_code_has_it():
    m = T.ITransformer(**DEFAULTS | dict(drop_rate=.3))
    assert m.embed.drop.p == .3
    for b in m.blocks: assert b.attn.attn_drop == b.attn.proj_drop.p == b.mlp.drop.p == .3
    x, _ = data()
    assert not torch.equal(m.train()(x), m(x)) and torch.equal(m.eval()(x), m(x))
    h = torch.randn(2, 5, 8)
    for kind, acts in (('full', True), ('flash', False), ('flow', False), ('prob', False)):                # of the weights: in the plain attention only
        alone = T.VariateAttention(8, 2, kind, factor=9, attn_drop=.5).train()
        assert torch.equal(alone(h), alone(h)) != acts, kind


def test_bad_input_is_named(unchecked):
    for given, words in ((dict(embed_dim=18), 'num_heads.*18.*4'), (dict(pred_len=float('inf')), 'pred_len.*inf'), (dict(pred_len=float('nan')), 'pred_len.*nan'), (dict(pred_len=0), 'pred_len.*0'),
                         (dict(seq_len=-1), 'seq_len.*-1'), (dict(depth=0), 'depth.*0'), (dict(attn='sparse'), "attn.*'sparse'")):
        with pytest.raises(ValueError, match=words): T.ITransformer(**DEFAULTS | given)
    m, (x, mark) = model(), data(c=4)
    with pytest.raises(ValueError, match='seq_len=24.*20'): m(x[:, :20])
    with pytest.raises(ValueError, match='x_mark.*20'): m(x, mark[:, :20])
    with pytest.raises(ValueError, match='x_mark'): m(x, mark[:1])
    with pytest.raises(ValueError, match='kind'): T.VariateAttention(8, 2, 'lsh')
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match='bucket_size.*0'): T.lsh_attention(q, q, bucket_size=0)
    with pytest.raises(ValueError, match='num_hashes.*0'): T.lsh_attention(q, q, num_hashes=0)
    with pytest.raises(ValueError, match='variates.*0'): T.ChannelLinear(24, 12, 0)
    windows = Windows(torch.randn(60, 5), 24, 12)
    with pytest.raises(ValueError, match='epochs.*0'): T.train_forecaster(m, windows, windows, epochs=0)
    with pytest.raises(ValueError, match='value_embedding'): T.ITransformer.from_official({'a.weight': torch.zeros(2, 2)})


def test_head_width_can_be_set_as_the_official_floor_does():
    m = model(embed_dim=18, head_dim=18 // 4)
    assert m.blocks[0].attn.qkv.weight.shape == (48, 18) and m(*data()).shape == (2, 12, 5)


@torch.no_grad()
def test_agrees_with_the_official_code():
    assert sheets('itransformer')
    for sheet in sheets('itransformer'): sheet.check(built(sheet))
