"""Making a memory permanent: the host's FFNs become r neurons wider (docs/method.md, "Merging"), and back."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

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
        taken = grown.narrow(dim, old, rows.shape[dim]).copy_(rows)
        if not taken.isfinite().all():
            raise ValueError(f"cannot merge: the memory holds numbers that are not finite in {weight.dtype}, the host's dtype")
    return grown


# ---- what is put into the model ----------------------------------------------------------------------------------
def _configs_of(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Where the model's modules refer to configs, each as (a module's attributes, the name, the config)."""
    attributes = [vars(module) for module in model.modules()]
    return [(own, name, value) for own in attributes for name, value in own.items() if isinstance(value, PreTrainedConfig)]


def _put(host: Host, packed: list[Packed], width: int, configs: list[tuple[dict[str, Any], str, Any]]) -> None:
    for ffn, parameters in zip(host.ffns.values(), packed, strict=True):
        put_in(parameters)
        module: Any = ffn.module  # of a class of the host's
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = width
    for attributes, name, config in configs:
        attributes[name] = config


def _resize(host: Host, packed: list[Packed], width: int, width_before: int | None) -> None:
    """Puts new parameters in; every attribute that states the width follows, and the config, as a copy of the model's own.

    The old config may be another model's too. What can fail, fails before the first change; what interrupts the changes,
    Ctrl-C that is, undoes them.

    width_before: what the config notes down for `unmerge`; None: nothing
    """
    old_configs, copies = _configs_of(host.model), dict[int, Any]()
    configs = [(attributes, name, copy.deepcopy(config, copies)) for attributes, name, config in old_configs]
    config = copies[id(host.config)]
    assert host.width_key is not None, "_check_mergeable refuses the others"
    setattr(config, host.width_key, width)
    if width_before is None:
        delattr(config, ORIGINAL_WIDTH_KEY)
    else:
        setattr(config, ORIGINAL_WIDTH_KEY, width_before)
    old = [[(module, name, module._parameters[name]) for module, name, _ in parameters] for parameters in packed]
    try:
        _put(host, packed, width, configs)
    except BaseException:
        _put(host, old, host.intermediate_size, old_configs)
        raise


# ---- there and back ----------------------------------------------------------------------------------------------
def _check_mergeable(host: Host, state: MemoryState) -> None:
    """ValueError for a memory that the host's FFNs have no neurons for."""
    if state.grows and any(ffn.is_gated for ffn in host.ffns.values()):
        raise ValueError(
            "cannot merge: a neuron of the host's gated FFN has a gate row and an up row, and a slot of Locas-MLP one key "
            "row only; use the memory attached instead"
        )
    layer_of: dict[int, int] = {}
    if host.width_key is None:
        raise ValueError("cannot merge: no key of the config is known to state the width of its FFNs")
    for layer, ffn in host.ffns.items():
        if (obstacle := ffn.obstacle()) is not None:
            raise ValueError(f"cannot merge: layer {layer}'s {obstacle}; use the memory attached instead")
        if (first := layer_of.setdefault(id(ffn.module), layer)) != layer:
            raise ValueError(
                f"cannot merge: layers {first} and {layer} share one FFN, which has no place for the slots of both; "
                "use the memory attached instead"
            )


@torch.no_grad()
def merge(host: Host, state: MemoryState, pad_to_multiple_of: int) -> PreTrainedModel:
    """See `Memory.merge_and_unload`."""
    if isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected an integer >= 1")
    state.sync()
    _check_mergeable(host, state)
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
        packed = [widened(layer) for layer in host.ffns]
        _resize(host, packed, width, getattr(host.config, ORIGINAL_WIDTH_KEY, host.intermediate_size))
    return host.model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Slices a merged model back to the host it was, bit for bit; in place, returns the model.

    It works on a merged model in memory or one read back from its checkpoint. Raises ValueError if the model's config
    does not record a merge, or one that cannot have been.
    """
    if (m := getattr(_text_config(model), ORIGINAL_WIDTH_KEY, None)) is None:
        raise ValueError("model is not a merged one: its config does not record the width before a merge")
    if getattr(model, "_locas_memory", None) is not None:
        raise ValueError("model has a memory attached, made for the merged width: detach() it before unmerge")
    host = inspect_host(model)
    if type(m) is not int or not 1 <= m < host.intermediate_size:
        raise ValueError(
            f"the config's {ORIGINAL_WIDTH_KEY} is {m!r}; expected an integer from 1 to {host.intermediate_size - 1}, "
            "less than the width"
        )
    with torch.inference_mode(False):
        packed = [
            ffn.resized(
                lambda tensor, _: tensor[:m].clone(),
                lambda columns: columns[:, :m].clone(memory_format=torch.contiguous_format),
            )
            for ffn in host.ffns.values()
        ]
        _resize(host, packed, m, None)
    return model


def _text_config(model):
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
