"""What a merge changes: the new width of each FFN, and the entries of the config that say so."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from locas_ext.hosts.registry import Host
from locas_ext.hosts.tried import tried

from .width_keys import WidthKey, ffn_parameters, made_on_meta, shapes, switches, width_keys

ORIGINAL_WIDTH_KEY = "locas_unmerged_intermediate_size"
_CANNOT = "use the memory attached instead"


@dataclass(frozen=True)
class Widening:
    """A change of widths, there or back.

    widths: by layer, of each FFN that changes; entries: new values in the text config
    note: what the config keeps under ORIGINAL_WIDTH_KEY for the way back: the width where one entry states it, or the entries
        as they were by name; None: nothing
    """

    widths: dict[int, int]
    entries: dict[str, Any]
    note: Any


def padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _noted(host: Host, before: Any) -> Any:
    """What the config notes down: of a model merged twice what the first merge noted."""
    return vars(host.config).get(ORIGINAL_WIDTH_KEY, before)


def _chosen(host: Host, keys: list[WidthKey], layers: tuple[int, ...]) -> list[WidthKey]:
    """Keys that state the FFNs of these layers, each by one. ValueError where there is none."""
    chosen: list[WidthKey] = []
    for key in keys:
        free = not any(set(key.layers) & set(other.layers) for other in chosen)
        if free and set(key.layers) & set(layers):
            chosen.append(key)
    stated = {layer for key in chosen for layer in key.layers}
    if missing := [layer for layer in layers if layer not in stated]:
        raise ValueError(
            f"cannot merge: no key of the config states the width of layer {missing[0]}'s FFN and of nothing else; {_CANNOT}"
        )
    return chosen


def _widened(host: Host, key: WidthKey, rank: int, multiple: int) -> tuple[int, int]:
    """The new width of a key's FFNs, and its new value."""
    widths = {host.ffns[layer].width or 0 for layer in key.layers}
    if len(widths) > 1:
        raise ValueError(f"cannot merge: {key.name} states FFNs of the widths {sorted(widths)}; {_CANNOT}")
    width = widths.pop()
    if key.counts:
        more = -(-rank // int(key.per_unit))
        return width + more * int(key.per_unit), key.value + more
    least = padded(width + rank, multiple)
    first = math.ceil((least - width) / key.per_unit)
    for more in range(first, first + multiple):  # where a unit is several neurons, or a part of one
        wider = width + more * key.per_unit
        if wider.denominator == 1 and int(wider) % multiple == 0:
            return int(wider), key.value + more
    raise ValueError(
        f"cannot merge: no value of {key.name} makes the FFNs {least} wide or more, in multiples of {multiple}; expected "
        f"another pad_to_multiple_of, or {_CANNOT}"
    )


def _keys(host: Host) -> tuple[dict[str, Any], list[WidthKey]]:
    """What to change of a host's config first, and its keys. ValueError where no model can be made of it."""
    try:
        base = switches(host)
    except Exception as error:
        raise ValueError(
            f"cannot merge: no second {type(host.model).__name__} could be made of its config, which raised "
            f"{type(error).__name__}: {error}; {_CANNOT}"
        ) from error
    if base is None:
        raise ValueError(f"cannot merge: its config, read again, states FFNs of another width than the model's; {_CANNOT}")
    return base, width_keys(host, base)


def stated_by(host: Host) -> dict[int, str]:
    """By layer, the entry of the config that states the FFN's width. ValueError where no model can be made of it."""
    if host.width_key is not None:
        return dict.fromkeys(host.ffns, host.width_key)
    return {layer: key.name for key in reversed(_keys(host)[1]) for layer in key.layers}


def widening(host: Host, layers: tuple[int, ...], rank: int, multiple: int) -> Widening:
    """What merging slots of this rank into these layers changes. ValueError where no entry of the config can say it."""
    if host.width_key is not None:  # of a family that is known
        wider = padded(host.intermediate_size + rank, multiple)
        note = _noted(host, host.intermediate_size)
        return Widening(dict.fromkeys(host.ffns, wider), {host.width_key: wider}, note)
    base, keys = _keys(host)
    widths, entries = dict[int, int](), dict(base)
    for key in _chosen(host, keys, layers):
        wider, entries[key.name] = _widened(host, key, rank, multiple)
        widths |= dict.fromkeys(key.layers, wider)
    values = vars(host.config)
    return Widening(widths, entries, _noted(host, {name: values[name] for name in entries}))


def narrowing(host: Host) -> Widening:
    """The way back from a merge. ValueError where the config notes down something that cannot have been."""
    note = getattr(host.config, ORIGINAL_WIDTH_KEY)
    key = host.width_key
    if key is not None:
        if type(note) is not int or not 1 <= note < host.intermediate_size:
            raise ValueError(
                f"the config's {ORIGINAL_WIDTH_KEY} is {note!r}; expected an integer from 1 to {host.intermediate_size - 1}, "
                "less than the width"
            )
        return Widening(dict.fromkeys(host.ffns, note), {key: note}, None)
    bad = ValueError(
        f"the config's {ORIGINAL_WIDTH_KEY} is {note!r}; expected the entries of the config before the merge, by name, "
        "which state narrower FFNs"
    )
    if not isinstance(note, dict) or not note or not note.keys() <= vars(host.config).keys():
        raise bad
    try:
        widths = _widths_in(host, made_on_meta(host, note))
    except Exception as error:
        raise bad from error
    narrower = {layer: width for layer, width in widths.items() if width != host.ffns[layer].width}
    if not narrower or any(not 1 <= width < (host.ffns[layer].width or 0) for layer, width in narrower.items()):
        raise bad
    return Widening(narrower, dict(note), None)


def _widths_in(host: Host, other: nn.Module) -> dict[int, int]:
    names = {module: name for name, module in host.model.named_modules()}
    result = {}
    for layer, ffn in host.ffns.items():
        if ffn.width is not None:
            last: Any = other.get_submodule(names[ffn.projections()[-1]])
            result[layer] = last.nx if hasattr(last, "nx") else last.in_features
    return result


def check_stated(host: Host, before: dict[str, Any]) -> None:
    """ValueError if the merged model's config, read as from a file, makes parameters of other shapes than the model now has.

    before: the entries of the config as they were. What it did not state then either, such as an embedding that was resized,
    is no concern of the merge.
    """
    own, stated = shapes(host.model), shapes(made_on_meta(host, {}))
    wrong = {name for name in own.keys() & stated.keys() if own[name] != stated[name]}
    wrong |= set[str]().union(*ffn_parameters(host).values()) - stated.keys()
    if wrong:
        earlier = shapes(made_on_meta(host, before))
        wrong = {name for name in wrong if name not in earlier or earlier[name] != stated.get(name)}
    for name in sorted(wrong):
        there = list(stated[name]) if name in stated else "missing"
        raise ValueError(
            f"cannot merge: in a model of the merged config {name} is {there}, but here {list(own[name])}: an entry of the "
            f"config states more than the FFNs' width; {_CANNOT}"
        )


def stated_attributes(host: Host, entries: dict[str, Any]) -> list[tuple[nn.Module, str, int]]:
    """The integers in modules that follow the entries: (module, name, new value). Empty where no such model can be made."""
    before: dict[str, nn.Module] = {}
    after: dict[str, nn.Module] = {}
    with tried():
        before, after = dict(made_on_meta(host, {}).named_modules()), dict(made_on_meta(host, entries).named_modules())
    result = []
    for name, module in host.model.named_modules():
        if name not in before or name not in after:
            continue
        old, new = vars(before[name]), vars(after[name])
        for attribute, value in new.items():
            changed = type(value) is int and type(old.get(attribute)) is int and old[attribute] != value
            if changed and vars(module).get(attribute) == old[attribute] and not hasattr(module, "in_features"):
                result.append((module, attribute, value))
    return result
