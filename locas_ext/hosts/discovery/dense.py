"""FFNs of plain projections: found where the output projection takes in what a formula makes of the first ones' outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from locas_ext.hosts.gated_ffn import FusedGatedFFN, InterleavedFFN, UpFirstFFN
from locas_ext.hosts.probe.recording import Recording

from .activations import Activated, Activations, closest
from .forward import here, input_of, is_linear, outline, output_of, sizes_here, tolerance

# How gate and up can lie in one projection: a class, and the two parts of its output.
_FUSED = {
    FusedGatedFFN: lambda y: y.chunk(2, -1),
    UpFirstFFN: lambda y: y.chunk(2, -1)[::-1],
    InterleavedFFN: lambda y: (y[..., ::2], y[..., 1::2]),
}


@dataclass(frozen=True)
class Formula:
    """How projections of a layer may make an FFN.

    names: of the projections inside the layer, the output projection last: gate, up and down, or two of a two-layer FFN
    layout: of a fused one, of two projections too, its class
    """

    names: tuple[str, ...]
    layout: Any = None

    @property
    def kind(self) -> str:
        if self.layout is not None:
            return "fused"
        return "gated" if len(self.names) == 3 else "two-layer"


@dataclass(frozen=True)
class Dense:
    """An FFN of one layer.

    activated: by what; error: how well the numbers fit; width: m; order: when its output projection ran
    """

    formula: Formula
    activated: Activated
    error: float
    width: int
    order: int


class _Linear:
    """A linear module that every token went through.

    shape: how many numbers went in and came out per token; x, y: these, [rows, in] and [rows, out] on the CPU
    """

    def __init__(self, name: str, x: Tensor, y: Tensor, order: int):
        self.name, self.order = name, order
        self.shape = x.shape[-1], y.shape[-1]
        self._x, self._y = x, y

    @cached_property
    def x(self) -> Tensor:
        return here(self._x, _rows(self._x))

    @cached_property
    def y(self) -> Tensor:
        return here(self._y, _rows(self._y))


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
                yield _Linear(name, x, y, recording.order(call))


def _formulas(out: _Linear, firsts: list[_Linear]) -> Iterator[Formula]:
    """What the output projection may take in, by the sizes."""
    m, before = out.shape[0], [first for first in firsts if first.order < out.order]
    whole = [first.name for first in before if first.shape[1] == m]
    yield from (Formula((gate, up, out.name)) for gate, up in permutations(whole, 2))
    yield from (Formula((first, out.name)) for first in whole)
    both = [first.name for first in before if first.shape[1] == 2 * m]
    yield from (Formula((first, out.name), layout) for first in both for layout in _FUSED)


class LayerNumbers:
    """What the linear modules and the activations of one layer computed.

    d: the hidden size; rows: the tokens of the recorded forward
    """

    def __init__(self, layer: nn.Module, recording: Recording, d: int, rows: int):
        self.d = d
        self.linears = {
            linear.name: linear for linear in _linears(layer, recording, rows, _expert_modules(layer, recording, rows))
        }
        self.activations = Activations(layer, recording, rows)
        self.made: dict[tuple[str, Any], list[Activated]] = {}

    def fit(self, formula: Formula) -> Dense | None:
        """The FFN of this formula, with the nearest activation; None where the numbers are not what it makes of them."""
        *firsts, out = (self.linears[name] for name in formula.names)
        products = [first.y for first in firsts] if formula.layout is None else _FUSED[formula.layout](firsts[0].y)
        gate = firsts[0].name, formula.layout
        if gate not in self.made:
            self.made[gate] = self.activations.of(products[0])
        up = products[1].float() if len(products) > 1 else None
        found = closest(self.made[gate], out.x.float(), up, tolerance(out.x.dtype))
        return None if found is None else Dense(formula, *found, out.shape[0], out.order)

    def ffns(self) -> list[Dense]:
        """The FFNs that every token goes through, in the order in which they end.

        Bottlenecks, of less than half as many neurons as the stream is wide and without gate, are none.
        """
        firsts = [linear for linear in self.linears.values() if linear.shape[0] == self.d]
        found = []
        for out in self.linears.values():
            if out.shape[1] != self.d:
                continue
            fits = [fit for formula in _formulas(out, firsts) if (fit := self.fit(formula)) is not None]
            best = min(fits, key=attrgetter("error"), default=None)
            if best is not None and (best.formula.kind != "two-layer" or 2 * best.width >= self.d):
                found.append(best)
        return sorted(found, key=attrgetter("order"))


def dense_ffn(layer: nn.Module, recording: Recording, d: int, rows: int, known: dict[tuple, Formula]) -> Dense | None:
    """A layer's FFN that every token goes through: of several the last to end, if it is no adapter, which is narrower.

    known: by `outline`, the formulas of layers before, which is added to; where one's numbers fit, nothing else is searched
    """
    numbers, outlined = LayerNumbers(layer, recording, d, rows), outline(layer, recording)
    if outlined in known and (found := numbers.fit(known[outlined])) is not None:
        return found
    if not (ffns := numbers.ffns()):
        return None
    widest = max(ffn.width for ffn in ffns)
    found = [ffn for ffn in ffns if 2 * ffn.width > widest][-1]
    known[outlined] = found.formula
    return found
