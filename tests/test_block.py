"""layers.block: MLPs, gates, layer scale, stochastic depth and the block that joins them, each option against the equation written out."""
import itertools, warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vitbook.layers.block import (
    ACTIVATIONS, Block, DropPath, GatedMlp, LayerScale, Mlp, QuickGELU, act_named, drop_path, drop_path_rates, is_plain)
from vitbook.layers.norm import RMSNorm
from vitbook.layers.position import rope_2d


def seeded(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    drop, x = DropPath(.3), torch.ones(4000, 3, 2)
    out = drop(x)
    kept = out.flatten(1).amax(1)
    assert set(kept.unique().tolist()) == {0., torch.tensor(1 / .7).item()} and abs(out.mean() - 1) < .05
    assert (out == kept[:, None, None]).all() and torch.equal(drop.eval()(x), x)


def test_layer_scale_and_mlps():
    x = seeded(2, 5, 8, dtype=torch.float32)
    assert_close(LayerScale(8, 1e-3)(x), x * 1e-3)
    for mlp in (Mlp(8, 16), Mlp(8, 16, 4), GatedMlp(8, 16)):
        out = mlp(x)
        assert out.shape[:2] == (2, 5) and torch.allclose(mlp(x[:, [3, 1]]), out[:, [3, 1]], atol=1e-6), 'each token for itself'


@pytest.mark.parametrize('position', ['pre', 'post'])
def test_block(position):
    block, x = Block(12, 3, qkv_bias=True, norm_position=position).double(), seeded(2, 7, 12)
    if position == 'pre': want = x + block.attn(block.norm1(x)); want = want + block.mlp(block.norm2(want))
    else: want = block.norm1(x + block.attn(x)); want = block.norm2(want + block.mlp(want))
    assert_close(block(x), want)


def test_signatures_are_checked_in_this_run():
    "The import hook is on: a wrong rank is refused by the signature, an int where a float is named is not."
    from jaxtyping import TypeCheckError
    from vitbook.layers.block import LayerScale
    from vitbook.layers.window import window_partition
    with pytest.raises(TypeCheckError): window_partition(torch.zeros(2, 4, 4), 2)
    assert LayerScale(3, 1).gamma.tolist() == [1, 1, 1]


def test_mlp_in_place_under_transforms():
    "Without gradients GELU overwrites its input: derivatives by torch.func, vmap and inference mode see the same function, and no caller's tensor changes."
    from vitbook.layers.block import Mlp
    torch.manual_seed(0)
    mlp, x = Mlp(6, 10, 4).double().requires_grad_(False), torch.randn(5, 6, dtype=torch.double)
    plain, total = lambda x: mlp.fc2(F.gelu(mlp.fc1(x))), lambda f: lambda x: f(x).square().sum()
    same, before = torch.testing.assert_close, x.clone()
    same(torch.func.jacrev(mlp)(x), torch.func.jacrev(plain)(x))
    same(torch.func.jacfwd(mlp)(x), torch.func.jacfwd(plain)(x))
    same(torch.func.hessian(total(mlp))(x), torch.func.hessian(total(plain))(x))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                  # vmap says that it loops
        same(torch.vmap(mlp)(x), plain(x))
    with torch.inference_mode(): same(mlp(x), plain(x))
    with torch.no_grad(): same(torch.func.grad(total(mlp))(x), torch.func.grad(total(plain))(x))
    assert torch.equal(x, before)
    tanh = Mlp(6, act_layer=lambda: nn.GELU('tanh')).double().requires_grad_(False)
    same(tanh(x), tanh.fc2(F.gelu(tanh.fc1(x), approximate='tanh')))
    identity = Mlp(6, 6).double().requires_grad_(False)
    identity.fc1 = nn.Identity()                                          # its output is the caller's tensor
    same(identity(x), identity.fc2(F.gelu(x)))
    assert torch.equal(x, before)


@pytest.mark.parametrize('drop', [0., .4])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('act', [nn.GELU, nn.SiLU, nn.ReLU, nn.Identity])
def test_options_of_the_mlps(act, bias, drop):
    "Both against the equation, dropout after the hidden and after the output."
    x = seeded(3, 5, 8)
    for cls, names in ((Mlp, ('fc1', 'fc2')), (GatedMlp, ('gate', 'value', 'out'))):
        mlp = cls(8, 12, 4, act_layer=act, drop=drop, bias=bias).double()
        maps = [getattr(mlp, n) for n in names]
        assert all((m.bias is not None) == bias for m in maps) and maps[0].out_features == 12 and maps[-1].out_features == 4
        hidden = lambda: act()(maps[0](x)) * (maps[1](x) if cls is GatedMlp else 1)
        for training, grad in itertools.product((False, True), repeat=2):
            mlp.train(training).requires_grad_(grad)
            torch.manual_seed(3)
            out = mlp(x)
            torch.manual_seed(3)
            assert_close(out, F.dropout(maps[-1](F.dropout(hidden(), drop, training)), drop, training))
        same = cls(8)
        assert getattr(same, names[0]).out_features == getattr(same, names[-1]).out_features == 8


def test_gates_and_plain_are_silu_and_gelu_unless_told():
    assert type(GatedMlp(4).act) is nn.SiLU and type(Mlp(4).act) is nn.GELU


def test_layer_scale_starts_small():
    assert_close(LayerScale(3).gamma.detach(), torch.full((3,), 1e-5))
    scale, x = LayerScale(3, .5), seeded(2, 4, 3, dtype=torch.float32)
    with torch.no_grad(): scale.gamma.copy_(torch.tensor([1., 2., -3.]))
    assert torch.equal(scale(x), x * torch.tensor([1., 2., -3.]))
    block = Block(12, 3, init_values=.25)
    assert block.ls1.gamma.eq(.25).all() and block.ls2.gamma.eq(.25).all() and block.ls1.gamma is not block.ls2.gamma
    assert not any('ls' in n for n, _ in Block(12, 3).named_parameters()) and Block(12, 3, init_values=0.).ls1.gamma.eq(0).all(), '0 is a value, None is none'


@pytest.mark.parametrize('shape', [(4000,), (4000, 2), (4000, 2, 3, 2)])
@pytest.mark.parametrize('p', [.2, .75])
def test_drop_path_keeps_the_mean_at_every_rate(p, shape):
    x = torch.ones(shape)
    out = drop_path(x, p)
    kept = out.flatten(1)[:, 0] if out.dim() > 1 else out
    assert torch.equal(out, kept.view(-1, *[1] * (out.dim() - 1)).expand_as(out))
    assert_close(kept.unique(), torch.tensor([0., 1 / (1 - p)]))
    assert abs((kept == 0).float().mean() - p) < .04
    assert drop_path(x, p, training=False) is x and drop_path(x, 0.) is x and torch.equal(x, torch.ones(shape))
    for wrong in (1., -.1):
        with pytest.raises(ValueError, match=f'p must.*{wrong}'): drop_path(x, wrong)
        with pytest.raises(ValueError, match=f'p must.*{wrong}'): DropPath(wrong)
    assert 'p=0.3' in repr(DropPath(.3))


def test_rates_grow_to_the_last_block():
    assert drop_path_rates(.3, 4) == pytest.approx([0, .1, .2, .3]) and drop_path_rates(.3, 1) == [0.] and drop_path_rates(0., 3) == [0., 0., 0.]


def test_a_block_drops_each_branch_for_itself():
    "Of many copies of a sample each loses attention, the MLP, both or none, the rest at 1 / (1 - p)."
    p, n = .4, 600
    block, x = Block(8, 2, drop_path=p, init_values=.7).double(), seeded(1, 3, 8)
    out = block(x.expand(n, -1, -1))
    found = {}
    for look, think in itertools.product((0., 1 / (1 - p)), repeat=2):
        y = x + look * block.ls1(block.attn(block.norm1(x)))
        y = y + think * block.ls2(block.mlp(block.norm2(y)))
        found[look > 0, think > 0] = ((out - y).abs().amax((1, 2)) < 1e-9).double().mean().item()
    assert sum(found.values()) == pytest.approx(1)
    for (look, think), share in found.items(): assert abs(share - (1 - p if look else p) * (1 - p if think else p)) < .07
    assert_close(block.eval()(x), (y := x + block.ls1(block.attn(block.norm1(x)))) + block.ls2(block.mlp(block.norm2(y))))


def test_options_reach_the_parts():
    block = Block(12, 3, 2.5, qkv_bias=True, qk_norm=True, proj_drop=.1, attn_drop=.2, drop_path=.3, act_layer=nn.ReLU, norm_layer=RMSNorm, mlp_layer=GatedMlp)
    assert type(block.mlp) is GatedMlp and block.mlp.gate.out_features == 30 and type(block.mlp.act) is nn.ReLU and block.attn.qkv.bias is not None
    assert [type(m) for m in (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm)] == [RMSNorm] * 4 and block.attn.q_norm.weight.shape == (4,)
    assert (block.mlp.drop.p, block.attn.proj_drop.p, block.attn.attn_drop, block.drop_path1.p, block.drop_path2.p) == (.1, .1, .2, .3, .3)
    plain = Block(12, 3)
    assert plain.mlp.fc1.out_features == 48 and type(plain.mlp.act) is nn.GELU and plain.attn.qkv.bias is None and type(plain.attn.q_norm) is nn.Identity
    assert type(plain.norm1) is nn.LayerNorm and plain.norm_position == 'pre' and plain.attn.num_heads == 3
    assert_close(plain(x := seeded(2, 4, 12, dtype=torch.float32)), plain.eval()(x))


@pytest.mark.parametrize('position', ['pre', 'post'])
@pytest.mark.parametrize('what', ['mask', 'bias', 'rope'])
def test_mask_bias_and_rotation_reach_attention(what, position):
    block, x = Block(12, 3, norm_position=position, init_values=.5).double(), seeded(2, 7, 12)
    given = {what: dict(mask=torch.ones(7, 7, dtype=torch.bool).tril(), bias=seeded(3, 7, 7) * 3, rope=rope_2d(2, 3, 4))[what]}
    look, think = lambda x: block.ls1(block.attn(x, **given)), lambda x: block.ls2(block.mlp(x))
    if position == 'pre': want = x + look(block.norm1(x)); want = want + think(block.norm2(want))
    else: want = block.norm1(x + look(x)); want = block.norm2(want + think(want))
    assert_close(block(x, **given), want)
    assert not torch.allclose(block(x, **given), block(x))


def test_what_is_a_plain_layer():
    class Special(nn.Linear): pass
    assert is_plain(nn.Linear(2, 2), nn.Linear) and is_plain(nn.GELU(), nn.ReLU, nn.GELU) and not is_plain(nn.Linear(2, 2), nn.GELU) and not is_plain(Special(2, 2), nn.Linear)
    for hook in ('register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook', 'register_full_backward_pre_hook'):
        layer = nn.Linear(2, 2)
        handle = getattr(layer, hook)(lambda *_: None)
        assert not is_plain(layer, nn.Linear), hook
        handle.remove()
        assert is_plain(layer, nn.Linear), hook
    own = nn.Linear(2, 2)
    own.forward = lambda x: x
    assert not is_plain(own, nn.Linear)
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try: assert not is_plain(nn.Linear(2, 2), nn.Linear)
    finally: handle.remove()
    class Packed(torch.Tensor): pass
    packed = nn.Linear(2, 2)
    packed._parameters['weight'] = torch.zeros(2, 2).as_subclass(Packed)
    assert not is_plain(packed, nn.Linear)


@pytest.mark.parametrize('what, call', [
    ('num_heads', lambda: Block(10, 3)),
    ('norm_position', lambda: Block(8, 2, norm_position='middle')),
    ('p', lambda: Block(8, 2, drop_path=1.)),
])
def test_bad_input(what, call, unchecked):
    with pytest.raises(ValueError, match=rf'\b{what}\b'): call()


def test_quick_gelu_is_the_equation():
    z = seeded(3, 7).mul_(4).requires_grad_()
    want = z * torch.sigmoid(1.702 * z)
    assert_close(QuickGELU()(z), want)
    assert_close(torch.autograd.grad(QuickGELU()(z).sum(), z), torch.autograd.grad(want.sum(), z))
    assert torch.autograd.gradcheck(QuickGELU(), z) and torch.equal(z.detach(), seeded(3, 7).mul_(4))


@pytest.mark.parametrize('name, want', [
    ('gelu', F.gelu), ('gelu_fast', lambda z: F.gelu(z, approximate='tanh')),
    ('gelu_new', lambda z: F.gelu(z, approximate='tanh')), ('silu', F.silu),
    ('swish', F.silu), ('quick_gelu', lambda z: z * torch.sigmoid(1.702 * z)), ('relu6', F.relu6),
    ('tanh', torch.tanh), ('linear', lambda z: z)])
def test_activations_by_name(name, want):
    z = seeded(4, 5)
    assert_close(act_named(name)()(z), want(z))
    assert type(Mlp(5, 7, act_layer=act_named(name)).act) is type(act_named(name)())


def test_an_unknown_activation_is_named():
    assert all(isinstance(act_named(name)(), nn.Module) for name in ACTIVATIONS)
    with pytest.raises(ValueError, match="act must be one of gelu, .*got 'glu'"): act_named('glu')
    with pytest.raises(ValueError, match="hidden_act must be.*'glu'"): act_named('glu', 'hidden_act')
