"""The official layers of σReparam, built from a sheet with our parts."""
import torch


@torch.enable_grad()
def sigma_reparam(config, weights, inputs, module=''):
    from vitbook.dynamics.sigma_reparam import SigmaConv2d, SigmaLinear, official_names
    linear = module == 'SNLinear' or 'in_features' in config
    layer, x = (SigmaLinear if linear else SigmaConv2d)(**config), inputs['x']
    layer.load_state_dict(official_names(weights, layer))
    layer.eval()
    out = dict(y=layer(x), weight=layer.effective_weight().flatten(1))
    layer.train()
    out |= dict(first_pass=layer(x), u_after_first=layer.u[0].clone())
    out['first_pass'].square().sum().mul(.5).backward()
    out |= dict(weight_gradient=layer.weight.grad.flatten(1), sigma_gradient=layer.gamma.grad)
    out |= dict(second_pass=layer(x), u_after_second=layer.u[0].clone())
    return out | ({} if layer.bias is None else dict(bias_gradient=layer.bias.grad))
