"""FFNs of plain projections: found where the output projection takes in what a formula makes of the first ones' outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from locas_ext.hosts.gated_ffn import FusedGatedFFN, InterleavedFFN, UpFirstFFN
from locas_ext.hosts.probe.recording import Recording

from .activations import Activated, Activations, closest
from .forward import here, input_of, is_linear, output_of, sizes_here, tolerance

# How gate and up can lie in one projection: a class, and the two parts of its output.
_FUSED = {
    FusedGatedFFN: lambda y: y.chunk(2, -1),
    UpFirstFFN: lambda y: y.chunk(2, -1)[::-1],
    InterleavedFFN: lambda y: (y[..., ::2], y[..., 1::2]),
}


@dataclass(frozen=True)
class Dense:
    """An FFN of one layer.

    kind: "gated", "fused" or "two-layer"; names: of its projections inside the layer, the output projection last
    layout: of a fused one, its class; activated: by what; width: m; order: when its output projection ran
    """

    kind: str
    names: tuple[str, ...]
    layout: Any
    activated: Activated
    width: int
    order: int


@dataclass(frozen=True)
class _Linear:
    """A linear module, and what it computed: [rows, in] and [rows, out] on the CPU."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor
    order: int


def _expert_modules(layer: nn.Module, recording: Recording, rows: int) -> set[nn.Module]:
    """What is inside lists of modules that share the tokens among them: experts."""
    inside = set[nn.Module]()
    for name, module in layer.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2 or module in inside:
            continue
        children = [child for child in module._modules.values() if child is not None]
        seen = [sum(_rows(call.output) for call in recording.of(child)) for child in children]
        ran = [count for count in seen if count]
        shared_out = bool(ran) and any(count < rows for count in seen)
        if "expert" in name.rsplit(".", 1)[-1] or shared_out:
            inside.update(module.modules())
    return inside


def _rows(value: Any) -> int:
    return value.numel() // value.shape[-1] if isinstance(value, Tensor) and value.dim() > 0 and value.numel() else 0


def _linears(layer: nn.Module, recording: Recording, rows: int, without: set[nn.Module]) -> Iterator[_Linear]:
    """The linear modules of a layer that saw every token."""
    inside = set[nn.Module]()
    for name, module in layer.named_modules():
        if module in inside or not is_linear(module):
            continue
        inside.update(module.modules())  # a wrapper's own layer is no projection of the FFN
        if module in without:
            continue
        for call in recording.of(module)[:1]:
            x, y = input_of(call), output_of(call)
            ok = x is not None and y is not None and (x.shape[-1], y.shape[-1]) in sizes_here(module)
            if ok and x is not None and y is not None and _rows(x) == _rows(y) == rows:
                yield _Linear(name, module, here(x, rows), here(y, rows), recording.order(call))


def _at(out: _Linear, firsts: list[_Linear], activations: Activations) -> Iterator[tuple[float, Dense]]:
    """The FFNs whose output projection this may be, each with how well the numbers fit."""
    m, z, most = out.x.shape[-1], out.x.float(), tolerance(out.x.dtype)
    before = [first for first in firsts if first.order < out.order]
    whole = [first for first in before if first.y.shape[-1] == m]
    made = {first.name: activations.of(first.y) for first in whole}
    for gate, up in permutations(whole, 2):
        if (found := closest(made[gate.name], z, up.y.float(), most)) is not None:
            yield found[1], Dense("gated", (gate.name, up.name, out.name), None, found[0], m, out.order)
    for first in whole:
        if (found := closest(made[first.name], z, None, most)) is not None:
            yield found[1], Dense("two-layer", (first.name, out.name), None, found[0], m, out.order)
    for first in before:
        if first.y.shape[-1] != 2 * m:
            continue
        for layout, split in _FUSED.items():
            gate, up = split(first.y)
            if (found := closest(activations.of(gate), z, up.float(), most)) is not None:
                yield found[1], Dense("fused", (first.name, out.name), layout, found[0], m, out.order)


def dense_ffns(layer: nn.Module, recording: Recording, d: int, rows: int) -> list[Dense]:
    """The FFNs of one layer that every token goes through, in the order in which they end.

    d: the hidden size; rows: the tokens of the recorded forward. Bottlenecks, of less than half as many neurons as the
    stream is wide and without gate, are none.
    """
    linears = list(_linears(layer, recording, rows, _expert_modules(layer, recording, rows)))
    activations = Activations(layer, recording, rows)
    firsts = [linear for linear in linears if linear.x.shape[-1] == d]
    found = []
    for out in linears:
        if out.y.shape[-1] != d:
            continue
        fits = sorted(_at(out, [first for first in firsts if first is not out], activations), key=lambda fit: fit[0])
        if fits and (fits[0][1].kind != "two-layer" or 2 * fits[0][1].width >= d):
            found.append(fits[0][1])
    return sorted(found, key=lambda ffn: ffn.order)
