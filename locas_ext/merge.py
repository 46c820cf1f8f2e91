"""Making a memory permanent: the host's FFNs become r neurons wider (docs/method.md, "Merging"), and back."""

import torch
from torch import Tensor, nn

from .hosts import Host, inspect_host
from .patch import Attachment
from .slots import GATE, KEY, VALUE

ORIGINAL_WIDTH_KEY = "locas_unmerged_intermediate_size"


def _grown(weight: Tensor, rows: Tensor | None, width: int, dim: int) -> nn.Parameter:
    """weight with zeros appended along `dim` up to `width`, the first of them taken by `rows`."""
    shape = list(weight.shape)
    old, shape[dim] = shape[dim], width
    grown = weight.new_zeros(shape)
    grown.narrow(dim, 0, old).copy_(weight)
    if rows is not None:
        grown.narrow(dim, old, rows.shape[dim]).copy_(rows)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)


def _replace(host: Host, tensors: list[dict], width: int) -> None:
    """Puts new parameters in and lets every attribute that states the width follow."""
    for ffn, new in zip(host.ffns, tensors):
        gate, up, down = ffn.projections()
        for linear, prefix in ((gate, "gate"), (up, "up"), (down, "down")):
            linear.weight = new[prefix]
            if (bias := new.get(prefix + "_bias")) is not None:
                linear.bias = bias
        gate.out_features = up.out_features = down.in_features = width
        if hasattr(ffn.module, host.family.width_key):
            setattr(ffn.module, host.family.width_key, width)
    setattr(host.config, host.family.width_key, width)


@torch.no_grad()
def merge(attachment: Attachment, pad_to_multiple_of: int):
    """See `Memory.merge_and_unload`. All new tensors are built before the first is put in."""
    if isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected an integer >= 1")
    host, arena = attachment.host, attachment.arena
    arena.sync()
    for layer, ffn in enumerate(host.ffns):
        if (obstacle := ffn.obstacle()) is not None:
            raise ValueError(f"cannot merge: layer {layer}'s {obstacle}; use the memory attached instead")
    m = host.intermediate_size
    width = -(-(m + arena.rank) // pad_to_multiple_of) * pad_to_multiple_of
    slots_of = dict(zip(arena.layers, arena.slots))
    scale_of = dict(zip(arena.layers, arena.scales))

    with torch.inference_mode(False):
        tensors = []
        for layer, ffn in enumerate(host.ffns):
            weights, slots = ffn.weights(), slots_of.get(layer)
            gate_rows = up_rows = down_columns = None
            if slots is not None:
                gate_rows, up_rows = slots[GATE], slots[KEY]
                down_columns = scale_of[layer] * slots[VALUE].T
            new = {
                "gate": _grown(weights.gate, gate_rows, width, 0),
                "up": _grown(weights.up, up_rows, width, 0),
                "down": _grown(weights.down, down_columns, width, 1),
            }
            if weights.gate_bias is not None:
                new["gate_bias"] = _grown(weights.gate_bias, None, width, 0)
            if weights.up_bias is not None:
                new["up_bias"] = _grown(weights.up_bias, None, width, 0)
            tensors.append(new)
    _replace(host, tensors, width)
    if not hasattr(host.config, ORIGINAL_WIDTH_KEY):
        setattr(host.config, ORIGINAL_WIDTH_KEY, m)
    return host.model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Slices a merged model back to the host it was, bit for bit; in place, returns the model.

    It works on a merged model in memory or one read back from its checkpoint. Raises ValueError if the model's config
    does not record a merge.
    """
    if (m := getattr(_text_config(model), ORIGINAL_WIDTH_KEY, None)) is None:
        raise ValueError("model is not a merged one: its config does not record the width before a merge")
    host = inspect_host(model)
    with torch.inference_mode(False):
        tensors = []
        for ffn in host.ffns:
            weights = ffn.weights()
            sliced = {
                "gate": weights.gate[:m],
                "up": weights.up[:m],
                "down": weights.down[:, :m],
                "gate_bias": weights.gate_bias if weights.gate_bias is None else weights.gate_bias[:m],
                "up_bias": weights.up_bias if weights.up_bias is None else weights.up_bias[:m],
            }
            tensors.append({
                name: tensor if tensor is None else nn.Parameter(tensor.clone(), requires_grad=tensor.requires_grad)
                for name, tensor in sliced.items()
            })
    _replace(host, tensors, m)
    delattr(host.config, ORIGINAL_WIDTH_KEY)
    return model


def _text_config(model):
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
