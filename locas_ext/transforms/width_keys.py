"""Which entries of a host's config state the width of its FFNs, found by trying: a model made on the meta device shows it."""

import copy
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from locas_ext.hosts.ffn import HostFFN
from locas_ext.hosts.registry import Host
from locas_ext.hosts.tried import tried

# Entries that may state a width though no FFN is as wide as they say: some models halve it, or round it.
_WIDTH_WORDS = ("intermediate", "ffn", "ff_dim", "feed_forward", "inner")
# Switches that make a model compute another width than its config states.
_SWITCH_WORDS = ("auto_adjust",)


@dataclass(frozen=True)
class WidthKey:
    """An entry of the text config that states the width of FFNs, and of nothing else.

    layers: whose FFNs; value: as it is; per_unit: neurons per unit; counts: whether it is a number of experts
    """

    name: str
    layers: tuple[int, ...]
    value: int
    per_unit: Fraction
    counts: bool


def copied_config(host: Host, settings: dict[str, Any]) -> PreTrainedConfig:
    """A copy of the model's config, as it would be read from a file, with other entries in its text part."""
    config = copy.deepcopy(host.model.config)
    text = config.get_text_config(decoder=True)
    for name, value in settings.items():
        setattr(text, name, value)
    return type(config).from_dict(config.to_dict())


def made_on_meta(host: Host, settings: dict[str, Any]) -> nn.Module:
    """A model without weights, of the host's class and its config with other entries; whatever its class raises."""
    config = copied_config(host, settings)
    kind: Any = type(host.model)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        return kind(config)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a model's parameters, by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def ffn_parameters(host: Host) -> dict[int, set[str]]:
    """By layer, the names of the parameters in the model whose shapes follow the FFN's width."""
    names = {id(parameter): name for name, parameter in host.model.named_parameters()}
    result = {}
    for layer, ffn in host.ffns.items():
        own = [projection._parameters.get("weight") for projection in ffn.projections()]
        own += [projection._parameters.get("bias") for projection in ffn.projections()[:-1]]
        result[layer] = {names[id(parameter)] for parameter in own if id(parameter) in names}
    return result


def _candidates(values: dict[str, Any], widths: set[int]) -> Iterable[tuple[str, int, bool]]:
    """(name, value, whether it counts experts) of the entries that may state a width."""
    for name, value in values.items():
        named = any(word in name for word in _WIDTH_WORDS)
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and named)):
            continue
        counts = "shared_expert" in name and not name.endswith("size")
        if counts or named or value in widths:
            yield name, max(widths) if value is None else value, counts  # None: what follows from the hidden size


def switches(host: Host) -> dict[str, Any] | None:
    """Entries to change so that the config says how wide the FFNs are, literally; None if it cannot say it.

    Raises whatever the host's class raises for the config as it is.
    """
    values = vars(host.config)
    off = {name: False for name, value in values.items() if value is True and any(word in name for word in _SWITCH_WORDS)}
    width = next((ffn.width for ffn in host.ffns.values()), None)
    literal: list[dict[str, Any]] = [
        {**off, name: width} for name in values if off and any(word in name for word in _WIDTH_WORDS)
    ]
    own, parameters = shapes(host.model), set[str]().union(*ffn_parameters(host).values())
    for settings in [*literal, {}, off]:
        with tried() if settings else nullcontext():
            stated = shapes(made_on_meta(host, settings))
            if all(stated.get(name) == own[name] for name in parameters):
                return settings
    return None


def _step(value: int, counts: bool) -> int:
    return 1 if counts else value  # twice as wide divides by whatever the width divides by


def _tried(host: Host, entry: tuple[str, int, bool], base: dict[str, Any], stated: dict[str, torch.Size]) -> WidthKey | None:
    """The key, if a model made with a larger value differs from the stated shapes in FFNs only, and in whole ones."""
    name, value, counts = entry
    changed = None
    with tried():  # an entry that means something else may raise
        changed = made_on_meta(host, {**base, name: value + _step(value, counts)})
    if changed is None:
        return None
    other = shapes(changed)
    differing = {n for n in stated.keys() | other.keys() if stated.get(n) != other.get(n)}
    layers, gains = [], set()
    for layer, names in ffn_parameters(host).items():
        if names & differing:
            layers.append(layer)
            differing -= names
            gains.add(_width_in(changed, host.ffns[layer], host) - (host.ffns[layer].width or 0))
    if differing or not layers or len(gains) != 1:
        return None
    return WidthKey(name, tuple(layers), value, Fraction(gains.pop(), _step(value, counts)), counts)


def _width_in(model: nn.Module, ffn: HostFFN, host: Host) -> int:
    """The width of an FFN in another model of the host's class."""
    last = ffn.projections()[-1]
    name = next(name for name, module in host.model.named_modules() if module is last)
    other: Any = model.get_submodule(name)
    return getattr(other, "nx", None) or other.in_features


def width_keys(host: Host, base: dict[str, Any]) -> list[WidthKey]:
    """The keys of a host's FFNs, those of most layers first; widths before numbers of experts. base: what `switches` says."""
    widths = {width for ffn in host.ffns.values() if (width := ffn.width) is not None}
    if not widths:
        return []
    stated = shapes(made_on_meta(host, base))
    tried = [_tried(host, entry, base, stated) for entry in _candidates({**vars(host.config), **base}, widths)]
    return sorted((key for key in tried if key is not None), key=lambda key: (key.counts, -len(key.layers)))
