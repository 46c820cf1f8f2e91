"""Making a memory permanent: the host's FFNs become r neurons wider (docs/method.md, "Merging"), and back."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from locas_ext.checks import integer
from locas_ext.hosts.ffn import Packed, ProjectedFFN, put_in
from locas_ext.hosts.registry import Host, inspect_host
from locas_ext.hosts.sharding import fsdp_obstacle
from locas_ext.ops import reference
from locas_ext.signals import uninterrupted
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import VALUE

from .widening import ORIGINAL_WIDTH_KEY, Widening, check_stated, narrowing, stated_attributes, stated_by, widening


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


Attributes = list[tuple[nn.Module, str, int]]


def _put(packed: list[Packed], attributes: Attributes, configs: list[tuple[dict[str, Any], str, Any]]) -> None:
    for parameters in packed:
        put_in(parameters)
    for module, name, value in attributes:
        setattr(module, name, value)
    for own, name, config in configs:
        own[name] = config


def _widths_of_modules(host: Host, change: Widening) -> Attributes:
    """The attributes besides the projections' that state a width."""
    if host.width_key is None:
        return stated_attributes(host, change.entries)
    modules = [(host.ffns[layer].module, width) for layer, width in change.widths.items()]
    return [(module, "intermediate_size", width) for module, width in modules if hasattr(module, "intermediate_size")]


def _resize(host: Host, packed: list[Packed], change: Widening, check: Callable[[], None]) -> None:
    """Puts new parameters in; every attribute that states the width follows, and the config, as a copy of the model's own.

    The old config may be another model's too. What can fail, fails before the first change; what interrupts the changes,
    Ctrl-C that is, undoes them, and so does what `check` raises at the end.
    """
    old_configs, copies = _configs_of(host.model), dict[int, Any]()
    configs = [(attributes, name, copy.deepcopy(config, copies)) for attributes, name, config in old_configs]
    config = copies[id(host.config)]
    for name, value in change.entries.items():
        setattr(config, name, value)
    if change.note is None:
        delattr(config, ORIGINAL_WIDTH_KEY)
    else:
        setattr(config, ORIGINAL_WIDTH_KEY, change.note)
    attributes = _widths_of_modules(host, change)
    old = [[(module, name, module._parameters[name]) for module, name, _ in parameters] for parameters in packed]
    old_attributes = [(module, name, getattr(module, name)) for module, name, _ in attributes]
    try:
        _put(packed, attributes, configs)
        check()
    except BaseException:
        _put(old, old_attributes, old_configs)
        raise


# ---- there and back ----------------------------------------------------------------------------------------------
def _check_mergeable(host: Host, state: MemoryState) -> None:
    """ValueError for a memory that the host's FFNs have no neurons for."""
    if state.grows and any(host.ffns[layer].is_gated for layer in state.layers):
        raise ValueError(
            "cannot merge: a neuron of the host's gated FFN has a gate row and an up row, and a slot of Locas-MLP one key "
            "row only; use the memory attached instead"
        )
    _check_free(host, tuple(host.ffns) if host.width_key is not None else state.layers)


def _check_free(host: Host, layers: tuple[int, ...]) -> None:
    """ValueError for FFNs that cannot get other weights."""
    layer_of: dict[int, int] = {}
    for layer in layers:
        ffn = host.ffns[layer]
        if (obstacle := ffn.obstacle()) is not None:
            raise ValueError(f"cannot merge: layer {layer}'s {obstacle}; use the memory attached instead")
        if (first := layer_of.setdefault(id(ffn.module), layer)) != layer:
            raise ValueError(
                f"cannot merge: layers {first} and {layer} share one FFN, which has no place for the slots of both; "
                "use the memory attached instead"
            )


def merge_notes(host: Host) -> dict[int, str]:
    """By layer, whether an FFN could be widened for a memory, in words: the entry of the config that states it, or why not."""
    obstacles = {layer: ffn.obstacle() for layer, ffn in host.ffns.items()}
    try:
        stated = stated_by(host) if None in obstacles.values() else {}
    except ValueError as error:
        stated, missing = {}, str(error)
    else:
        missing = "no key of the config states its width and nothing else"
    return {
        layer: f"mergeable by {stated[layer]}"
        if obstacle is None and layer in stated
        else f"not mergeable: {obstacle or missing}"
        for layer, obstacle in obstacles.items()
    }


def _projected(host: Host, layer: int) -> ProjectedFFN:
    ffn = host.ffns[layer]
    assert isinstance(ffn, ProjectedFFN), "_check_free refuses the others"
    return ffn


def _output(ffn: ProjectedFFN, x: Tensor) -> Tensor:
    """What the projections make of x, the host's own."""
    return ffn.projections()[-1](ffn.hidden(x)).float()


def _expected(host: Host, state: MemoryState, layer: int, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A few inputs of an FFN, and what it gives out for them with its memory."""
    ffn = _projected(host, layer)
    weight = ffn.projections()[-1]._parameters["weight"]
    assert weight is not None, "_check_mergeable refuses the others"
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, 8, host.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(weight.device, weight.dtype)
    with state.disable():
        memory = reference.sideway_mlp if state.grows else reference.sideway_glu
        return x, _output(ffn, x) + memory(x.float(), slots.float(), scale, ffn.activation)


def _compare(output: Tensor, expected: Tensor, layer: int, dtype: torch.dtype) -> None:
    """ValueError if a widened FFN does not give out what it did with the memory beside it."""
    error = ((output - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()
    if not error <= 1e-4 + 16 * torch.finfo(dtype).eps:
        raise ValueError(
            f"cannot merge: with the memory in it layer {layer}'s FFN is off by {error:.2g} of what it gives out with the "
            "memory beside it; use the memory attached instead"
        )


@torch.no_grad()
def merge(host: Host, state: MemoryState, pad_to_multiple_of: int, check_interrupt: Callable[[], None]) -> PreTrainedModel:
    """See `Memory.merge_and_unload`. check_interrupt: called before each layer's copy; what it raises leaves all as it was"""
    pad_to_multiple_of = integer("pad_to_multiple_of", pad_to_multiple_of, 1)
    state.sync()
    _check_mergeable(host, state)
    rank = state.shape[2]
    change = widening(host, state.layers, rank, pad_to_multiple_of)
    _check_free(host, tuple(change.widths))
    layer_slots = state.in_layer_order(lambda arena: arena.slots[:, :, :rank])
    memory_of = dict(zip(state.layers, zip(layer_slots, state.scales, strict=True), strict=True))

    def widened(layer: int, width: int) -> Packed:
        check_interrupt()
        slots, scale = memory_of.get(layer, (None, 0.0))
        return _projected(host, layer).resized(
            lambda tensor, plane: _grown(tensor, None if slots is None or plane is None else slots[plane], width, 0),
            lambda columns: _grown(columns, None if slots is None else scale * slots[VALUE].T, width, 1),
        )

    with torch.inference_mode(False):
        packed = [widened(layer, width) for layer, width in change.widths.items()]
        first = state.layers[0]
        x, expected = _expected(host, state, first, *memory_of[first])

        before = {name: getattr(host.config, name) for name in change.entries}

        def check() -> None:
            check_stated(host, before)
            with state.disable():
                _compare(_output(_projected(host, first), x), expected, first, x.dtype)

        _resize(host, packed, change, check)
    return host.model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Slices a merged model back to the host it was, bit for bit, in place.

    Args:
        model: a merged model, in memory or read back from its checkpoint

    Returns:
        The model.

    Raises:
        ValueError: the model has a memory attached, or its config records no merge, or an impossible one
        TypeError: model is not a language model

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
    >>> model = locas.unmerge(memory.merge_and_unload(pad_to_multiple_of=8))
    >>> model.config.intermediate_size
    32
    """
    if getattr(_text_config(model), ORIGINAL_WIDTH_KEY, None) is None:
        raise ValueError("model is not a merged one: its config does not record the width before a merge")
    if getattr(model, "_locas_memory", None) is not None:
        raise ValueError("model has a memory attached, made for the merged width: detach() it before unmerge")
    host = inspect_host(model)
    if (problem := fsdp_obstacle(host.model)) is not None:
        raise ValueError(f"cannot unmerge: {problem}; unmerge the model before fully_shard")
    change = narrowing(host)

    def narrow(layer: int, m: int) -> Packed:
        check_interrupt()
        return _projected(host, layer).resized(
            lambda tensor, _: tensor[:m].clone(),
            lambda columns: columns[:, :m].clone(memory_format=torch.contiguous_format),
        )

    with uninterrupted() as check_interrupt, torch.inference_mode(False):
        packed = [narrow(layer, m) for layer, m in change.widths.items()]
        _resize(host, packed, change, lambda: None)
    return model


def _text_config(model):
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
