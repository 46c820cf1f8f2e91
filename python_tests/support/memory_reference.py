"""A model's outputs with a memory, once more: a float64 host with the formula of `locas_ext.reference` in hooks."""

import copy

import torch

from locas_ext import reference
from support.hosts import PROJECTION_NAMES, activation_of, projections


def _formula(x, slots, scale, activation):
    function = reference.sideway_glu if slots.shape[0] == 3 else reference.sideway_mlp
    return function(x, slots, scale, activation)


def _ffns(model):
    """Per layer the module whose input the memory reads, and the one to whose output it adds."""
    if model.config.model_type in PROJECTION_NAMES:
        return projections(model)
    return [(layer.mlp, layer.mlp) for layer in model.model.layers]


def outputs(host, memory, ids, dtype):
    """Logits [n, vocabulary] of a copy of the host in `dtype`, with the memory beside its FFNs."""
    twin = copy.deepcopy(host).to(dtype).eval()
    tensors, inputs = memory.state.tensors(optimizer=False), {}
    activation = activation_of(twin)

    def add(index, y):
        x = inputs[index].to(dtype)
        return y + _formula(x, tensors["slots"][index].to(dtype), tensors["scale"][index].item(), activation).view(y.shape)

    ffns = _ffns(twin)
    for index, layer in enumerate(memory.layers):
        first, last = ffns[layer]
        first.register_forward_pre_hook(lambda module, args, i=index: inputs.__setitem__(i, args[0]))
        last.register_forward_hook(lambda module, args, y, i=index: add(i, y))
    with torch.no_grad():
        return twin(input_ids=ids[None], use_cache=False).logits[0]


def assert_outputs_are_the_formula(model, host, memory, logits, ids, merged=False):
    """The mean error is at most twice that of plain torch at the same dtype, plus a rounding; merged: two roundings more."""
    dtype = logits.dtype
    exact = outputs(host, memory, ids, torch.float64)
    peer = outputs(host, memory, ids, dtype)
    rounding = (3 if merged else 1) * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    error = lambda values: (values.double() - exact).norm() / exact.norm()
    assert error(logits) <= 2 * error(peer) + rounding, (
        f"outputs are {error(logits):.3g} from the formula's, plain torch at this dtype {error(peer):.3g}"
    )
