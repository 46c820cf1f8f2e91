"""One host FFN as the memory sees it: its projections, whatever they are, and their weights in one layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locas_ext.ops.activations import activate
from locas_ext.ops.ranks import Ranks

from .formula import Seen, bound_forward, class_name, class_obstacle, has_hooks, is_plain_activation
from .projections import dense_weight, linear_obstacle, value_norms
from .seen import Entry, SeenFFN
from .sharding import own_class

# A module that acts as a linear layer; which class it is of is the host's affair.
Projection = Any
# A projection's new parameters: (the module, "weight" or "bias", the parameter).
Packed = list[tuple[Projection, str, nn.Parameter]]


class Rows(Protocol):
    """Rows [m, d] of which some can be taken, a tensor's or of many experts."""

    shape: torch.Size
    device: torch.device

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class Place(Enum):
    """Where a memory can stand."""

    MODULE = auto()  # the module takes in what the FFN takes in and gives out what it gives out
    PROJECTIONS = auto()  # the module does more: between its first and its last projection


def _child(module: nn.Module, name: str) -> Any:
    """The module of this dotted name inside another one; None if there is none."""
    child: Any = module._modules.get(name)
    if child is None and "." in name:
        child = module
        for part in name.split("."):
            child = None if child is None else child._modules.get(part)
    return child


def entries(module: nn.Module, name: str) -> list[Entry]:
    """Where a module keeps the one of this dotted name inside it, and each on the way."""
    found, inside = list[Entry](), module
    for part in name.split("."):
        found.append((inside._modules, part))
        if (child := inside._modules.get(part)) is None:
            break
        inside = child
    return found


class HostFFN(ABC):
    """One layer's FFN. Weights are looked up at every call: `.to()`, a loaded state dict or a swapped projection take
    effect at once.

    m neurons, each with one or two input rows [d] (gate and up; of a two-layer FFN the one of its first projection) and an
    output column [d].
    """

    names: tuple[str, ...]  # of the projections inside the module, dotted ones too, the output projection last
    plain: type[nn.Module] = nn.Linear  # what a projection is whose weights can be used directly
    layout = "projections"  # in words
    differs: str | None = None  # what the module was seen to do other than the formula here
    place = Place.MODULE
    is_gated = False  # whether a neuron has a gate row
    seen: Seen | None = None  # of an FFN found by its numbers: what computed them
    repeated = False  # whether one forward of the host runs it several times
    ranks: Ranks | None = None  # the processes that its neurons are split among

    def __init__(self, module: nn.Module, activation: str):
        self.activation = activation
        self.activation_name = "act_fn"  # of the module's activation module
        self.modeling = own_class(module).__module__  # the Python module that defines the decoder layer
        self.replace_module(module)

    def replace_module(self, module: nn.Module) -> None:
        """Replaces this FFN's module. ValueError if the new one lacks the projections."""
        if missing := [name for name in self.names if _child(module, name) is None]:
            raise ValueError(
                f"an FFN of the host is a {class_name(module)} without {' and '.join(missing)}; expected one with "
                f"{', '.join(self.names)}"
            )
        self.module = module
        self._looked_at: SeenFFN | None = None  # when obstacle() found none

    def projections(self) -> list[Projection]:
        modules = self.module._modules
        try:
            return [modules[name] for name in self.names]
        except KeyError:  # of several modules inside
            return [self.module.get_submodule(name) for name in self.names]

    def relevant_modules(self) -> list[Any]:
        """The projections and the activation, if that is a module."""
        act = _child(self.module, self.activation_name)
        return self.projections() + ([] if act is None else [act])

    def _look(self) -> SeenFFN:
        """What obstacle() depends on, as it is now."""
        own, relevant = self.module.__dict__, self.relevant_modules()
        places = [place for name in (*self.names, self.activation_name) for place in entries(self.module, name)]
        places += [(own, "forward"), (own, "_old_forward"), *((module.__dict__, "forward") for module in relevant)]
        places += [(part._parameters, name) for part in self.projections() for name in part._parameters]
        parameters = [each for part in self.projections() for each in part._parameters.values() if each is not None]
        return SeenFFN(places, [self.module, *relevant], parameters)

    @property
    def width(self) -> int | None:
        """How many neurons there are; None where the output projection does not say."""
        last = self.projections()[-1]
        width = getattr(last, "nx" if isinstance(last, Conv1D) else "in_features", None)
        return width if isinstance(width, int) else None

    @property
    def width_here(self) -> int | None:
        """About how many of them this process has."""
        return self.width if self.width is None or self.ranks is None else self.width // self.ranks.size

    def formula_obstacle(self) -> str | None:
        """Why the module may compute something else than its formula, or None."""
        kind: Any = type(self.module)
        act: Any = _child(self.module, self.activation_name)
        if self.seen is None and (problem := class_obstacle(kind, kind.forward, self.modeling)) is not None:
            return f"the FFN {problem}"
        if bound_forward(self.module) is not None:
            return "the FFN has a forward of its own (of another library)"
        if self.seen is not None:
            if (problem := self.seen.obstacle(self.module, act)) is not None:
                return problem
        elif not is_plain_activation(act, self.activation):
            return f"{self.activation_name} is a {class_name(act)}, not a plain {self.activation}"
        if act is None:
            return None
        if "forward" in act.__dict__ and bound_forward(act) is not None:
            return f"{self.activation_name} has a forward of its own"
        return f"{self.activation_name} has hooks" if has_hooks(act) else None

    def forget(self) -> None:
        """Lets go of what was looked at: a memory's forward is among it."""
        self._looked_at = None

    def projection_obstacle(self, gathered: bool = False) -> str | None:
        """Why the weights cannot be used directly, or None. gathered: as in `linear_obstacle`"""
        if self.differs is not None:
            return self.differs
        if self.ranks is not None:
            return self.split_obstacle()
        for name, projection in zip(self.names, self.projections(), strict=True):
            if problem := linear_obstacle(projection, self.plain, gathered):
                return f"{name} {problem}"
        return None

    def split_obstacle(self) -> str | None:
        """Why the weights of this process cannot be used directly, or None."""
        return f"an FFN of the layout {self.layout!r} is split among {self.ranks.size} processes" if self.ranks else None

    def obstacle(self) -> str | None:
        """Why the formula on the host's own weights does not stand for the module, or None."""
        return self.formula_obstacle() or self.projection_obstacle()

    def seen_obstacle(self) -> str | None:
        """obstacle(); where there was none, looked for again only if something has changed. Runs on every call."""
        seen = self._looked_at  # one object: other threads replace it whole
        if seen is not None and seen.holds():
            return None
        if (problem := self.obstacle()) is None:
            seen = self._look()
            self._looked_at = seen if self.obstacle() is None else None  # another thread may have changed it meanwhile
        return problem

    def activate(self, pre: Tensor) -> Tensor:
        """The activation as the module has it."""
        act = _child(self.module, self.activation_name)
        return activate(pre, self.activation) if act is None else act(pre)

    @abstractmethod
    def importance(self, x: Tensor, forward: Callable) -> Tensor:
        """[m] float32: how strongly each neuron fires on x [T, d]. forward: the module's own."""

    @abstractmethod
    def input_rows(self, like: Tensor) -> tuple[Rows, ...]:
        """The neurons' input rows, each [m, d]; computed where the projections are not plain."""

    def sample_source(self, like: Tensor) -> Rows:
        """Those of the host's numbers by which this FFN is known again (fingerprint.py)."""
        return self.input_rows(like)[0]

    def mean_value_norm(self, like: Tensor) -> float:
        """The mean length of the neurons' output columns."""
        return value_norms(self.output_columns(like)).mean().item()

    def output_columns(self, like: Tensor) -> Tensor:
        """[d, m]."""
        return dense_weight(self.projections()[-1], like)


class ProjectedFFN(HostFFN):
    """An FFN of projections, of which a token has one hidden vector."""

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """What the output projection takes in, [..., m], from the projections as they are, whatever they are."""

    def importance(self, x: Tensor, forward: Callable) -> Tensor:
        fires = self.hidden(x).abs().float().mean(0)
        return fires if self.ranks is None or len(fires) == self.width else self.ranks.gathered(fires)

    @abstractmethod
    def resized(self, rows: Callable, columns: Callable) -> Packed:
        """New parameters for the projections, not yet put in; meaningful where obstacle() is None.

        rows(tensor, index) gives those of the neurons' input rows [m, d] number `index` and, with index None, of their
        biases [m]; columns(tensor) those of the output columns [d, m].
        """


def as_parameters(named: list[tuple[Projection, str, Tensor | None]]) -> Packed:
    """New parameters for projections, those that there are."""
    return [
        (module, name, nn.Parameter(tensor, requires_grad=getattr(module, name).requires_grad))
        for module, name, tensor in named
        if tensor is not None
    ]


def put_in(packed: Packed) -> None:
    """Puts new parameters into their modules, whose stated sizes follow."""
    for module, name, parameter in packed:
        setattr(module, name, parameter)
        if name == "weight" and isinstance(module, Conv1D):
            module.nx, module.nf = parameter.shape
        elif name == "weight":
            module.out_features, module.in_features = parameter.shape
