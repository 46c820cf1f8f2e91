"""Making a memory permanent: the host's FFNs become r neurons wider (docs/method.md, "Merging"), and back."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from locas_ext.hosts.ffn import Packed, put_in
from locas_ext.hosts.registry import Host, inspect_host
from locas_ext.state.memory_state import VALUE, MemoryState

ORIGINAL_WIDTH_KEY = "locas_unmerged_intermediate_size"


def _grown(weight: Tensor, rows: Tensor | None, width: int, dim: int) -> Tensor:
    """weight with zeros appended along `dim` up to `width`, the first of them taken by `rows`."""
    shape = list(weight.shape)
    old, shape[dim] = shape[dim], width
    grown = weight.new_zeros(shape)
    grown.narrow(dim, 0, old).copy_(weight)
    if rows is not None:
        grown.narrow(dim, old, rows.shape[dim]).copy_(rows)
    return grown


def _resize(host: Host, packed: list[Packed], width: int) -> None:
    """Puts new parameters in and lets every attribute that states the width follow.

    All parameters are made before the first is put in: what can fail, fails while the model is still whole.
    """
    for ffn, parameters in zip(host.ffns, packed, strict=True):
        put_in(parameters)
        module: Any = ffn.module  # of a class of the host's
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = width
    setattr(host.config, host.width_key, width)


@torch.no_grad()
def merge(host: Host, state: MemoryState, pad_to_multiple_of: int) -> PreTrainedModel:
    """See `Memory.merge_and_unload`."""
    if isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected an integer >= 1")
    if state.grows and host.is_gated:
        raise ValueError(
            "cannot merge: a neuron of the host's gated FFN has a gate row and an up row, and a slot of Locas-MLP one key "
            "row only; use the memory attached instead"
        )
    state.sync()
    for layer, ffn in enumerate(host.ffns):
        if (obstacle := ffn.obstacle()) is not None:
            raise ValueError(f"cannot merge: layer {layer}'s {obstacle}; use the memory attached instead")
    rank = state.shape[2]
    width = -(-(host.intermediate_size + rank) // pad_to_multiple_of) * pad_to_multiple_of
    layer_slots = state.in_layer_order(lambda arena: arena.slots[:, :, :rank])
    memory_of = dict(zip(state.layers, zip(layer_slots, state.scales, strict=True), strict=True))

    def widened(layer: int) -> Packed:
        slots, scale = memory_of.get(layer, (None, 0.0))
        return host.ffns[layer].resized(
            lambda tensor, plane: _grown(tensor, None if slots is None or plane is None else slots[plane], width, 0),
            lambda columns: _grown(columns, None if slots is None else scale * slots[VALUE].T, width, 1),
        )

    with torch.inference_mode(False):
        packed = [widened(layer) for layer in range(len(host.ffns))]
        old_width = host.intermediate_size
        _resize(host, packed, width)
    if not hasattr(host.config, ORIGINAL_WIDTH_KEY):
        setattr(host.config, ORIGINAL_WIDTH_KEY, old_width)
    return host.model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Slices a merged model back to the host it was, bit for bit; in place, returns the model.

    It works on a merged model in memory or one read back from its checkpoint. Raises ValueError if the model's config
    does not record a merge.
    """
    if (m := getattr(_text_config(model), ORIGINAL_WIDTH_KEY, None)) is None:
        raise ValueError("model is not a merged one: its config does not record the width before a merge")
    if getattr(model, "_locas_memory", None) is not None:
        raise ValueError("model has a memory attached, made for the merged width: detach() it before unmerge")
    host = inspect_host(model)
    with torch.inference_mode(False):
        packed = [
            ffn.resized(
                lambda tensor, _: tensor[:m].clone(),
                lambda columns: columns[:, :m].clone(memory_format=torch.contiguous_format),
            )
            for ffn in host.ffns
        ]
        _resize(host, packed, m)
    delattr(host.config, ORIGINAL_WIDTH_KEY)
    return model


def _text_config(model):
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
