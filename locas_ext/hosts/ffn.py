"""One host FFN as the memory sees it: its projections, whatever they are, and their weights in one layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locas_ext.ops.activations import activate
from locas_ext.ops.types import HostWeights

from .formula import bound_forward, class_name, class_obstacle, has_hooks, is_plain_activation
from .projections import dense_weight, linear_obstacle
from .seen import Place, SeenFFN

# A module that acts as a linear layer; which class it is of is the host's affair.
Projection = Any
# A projection's new parameters: (the module, "weight" or "bias", the parameter).
Packed = list[tuple[Projection, str, nn.Parameter]]


class HostFFN(ABC):
    """One layer's FFN. Weights are looked up at every call: `.to()`, a loaded state dict or a swapped projection take
    effect at once.

    m neurons, each with one or two input rows [d] (gate and up; of a two-layer FFN the one of its first projection) and an
    output column [d].
    """

    names: tuple[str, ...]  # of the projections inside the module, the output projection last
    plain: type[nn.Module] = nn.Linear  # what a projection is whose weights can be used directly
    differs: str | None = None  # what the probe saw the module do other than the formula here

    def __init__(self, module: nn.Module, activation: str):
        self.activation = activation
        self.activation_name = "act_fn"  # of the module's activation module
        self.modeling = type(module).__module__  # the Python module that defines the decoder layer
        self.replace_module(module)

    def replace_module(self, module: nn.Module) -> None:
        """Replaces this FFN's module. ValueError if the new one lacks the projections."""
        if missing := [name for name in self.names if name not in module._modules]:
            raise ValueError(
                f"an FFN of the host is a {class_name(module)} without {' and '.join(missing)}; expected one with "
                f"{', '.join(self.names)}"
            )
        self.module = module
        self._seen: SeenFFN | None = None  # as of the latest look

    def projections(self) -> list[Projection]:
        modules = self.module._modules
        return [modules[name] for name in self.names]

    def relevant_modules(self) -> list[Any]:
        """The projections and the activation, if that is a module."""
        act = self.module._modules.get(self.activation_name)
        return self.projections() + ([] if act is None else [act])

    def _see(self) -> SeenFFN:
        """What obstacle() depends on, as it is now."""
        modules, own, relevant = self.module._modules, self.module.__dict__, self.relevant_modules()
        places: list[Place] = [(modules, name) for name in (*self.names, self.activation_name)]
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

    def formula_obstacle(self) -> str | None:
        """Why the module may compute something else than its family's formula, or None."""
        kind: Any = type(self.module)
        act: Any = self.module._modules.get(self.activation_name)
        if (problem := class_obstacle(kind, kind.forward, self.modeling)) is not None:
            return f"the FFN {problem}"
        if bound_forward(self.module) is not None:
            return "the FFN has a forward of its own (of another library)"
        if not is_plain_activation(act, self.activation):
            return f"{self.activation_name} is a {class_name(act)}, not a plain {self.activation}"
        if "forward" in act.__dict__ and bound_forward(act) is not None:
            return f"{self.activation_name} has a forward of its own"
        return f"{self.activation_name} has hooks" if has_hooks(act) else None

    def forget(self) -> None:
        """Lets go of what was looked at: a memory's forward is among it."""
        self._seen = None

    def projection_obstacle(self) -> str | None:
        """Why the weights cannot be used directly, or None."""
        if self.differs is not None:
            return self.differs
        modules, plain = self.module._modules, self.plain
        for name in self.names:
            if (problem := linear_obstacle(modules[name], plain)) is not None:  # type: ignore[arg-type]  # it is there
                return f"{name} {problem}"
        return None

    def obstacle(self) -> str | None:
        """Why the formula on the host's own weights does not stand for the module, or None."""
        return self.formula_obstacle() or self.projection_obstacle()

    def seen_obstacle(self) -> str | None:
        """obstacle(), looked for again only where something has changed. Runs on every call."""
        seen = self._seen  # one object: other threads replace it whole
        if seen is None or not seen.holds():
            seen = self._see()
            seen.obstacle = self.obstacle()
            self._seen = seen
        return seen.obstacle

    def activate(self, pre: Tensor) -> Tensor:
        """The activation as the module has it."""
        act = self.module._modules.get(self.activation_name)
        return activate(pre, self.activation) if act is None else act(pre)

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """What the output projection takes in, [..., m], from the projections as they are, whatever they are."""

    @abstractmethod
    def input_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """The neurons' input rows, each [m, d]; computed where the projections are not plain."""

    def output_columns(self, like: Tensor) -> Tensor:
        """[d, m]."""
        return dense_weight(self.projections()[-1], like)

    @abstractmethod
    def resized(self, rows: Callable, columns: Callable) -> Packed:
        """New parameters for the projections, not yet put in; meaningful where obstacle() is None.

        rows(tensor, index) gives those of the neurons' input rows [m, d] number `index` and, with index None, of their
        biases [m]; columns(tensor) those of the output columns [d, m].
        """


class GatedFFN(HostFFN):
    """An FFN with separate gate, up and down projections."""

    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def weights(self) -> HostWeights:
        """The host's own tensors, not copies; meaningful where obstacle() is None."""
        modules: Any = self.module._modules
        gate, up, down = [modules[name]._parameters for name in self.names]
        return HostWeights(gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"], down["bias"])

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up [..., m] from the projections as they are, whatever they are."""
        gate, up, _ = self.projections()
        return gate(x), up(x)

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.pre_activations(x)
        return self.activate(gate) * up

    def input_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, _ = self.projections()
        return dense_weight(gate, like), dense_weight(up, like)

    def pack(self, weights: HostWeights) -> Packed:
        """Parameters for the projections that hold these weights, not yet put in."""
        gate, up, down = self.projections()
        return _packed(
            [
                (gate, "weight", weights.gate),
                (up, "weight", weights.up),
                (down, "weight", weights.down),
                (gate, "bias", weights.gate_bias),
                (up, "bias", weights.up_bias),
                (down, "bias", weights.down_bias),
            ]
        )

    def resized(self, rows: Callable, columns: Callable) -> Packed:
        old = self.weights()
        return self.pack(
            HostWeights(
                rows(old.gate, 0),
                rows(old.up, 1),
                columns(old.down),
                None if old.gate_bias is None else rows(old.gate_bias, None),
                None if old.up_bias is None else rows(old.up_bias, None),
                old.down_bias,
            )
        )


class FusedGatedFFN(GatedFFN):
    """An FFN with gate and up rows in one projection, the gate rows first (Phi-3, GLM-4)."""

    names = ("gate_up_proj", "down_proj")

    def weights(self) -> HostWeights:
        gate_up, down = (projection._parameters for projection in self.projections())
        gate, up = gate_up["weight"].chunk(2)
        gate_bias, up_bias = (None, None) if gate_up["bias"] is None else gate_up["bias"].chunk(2)
        return HostWeights(gate, up, down["weight"], gate_bias, up_bias, down["bias"])

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.projections()[0](x).chunk(2, dim=-1)
        return gate, up

    def input_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = dense_weight(self.projections()[0], like).chunk(2)
        return gate, up

    def pack(self, weights: HostWeights) -> Packed:
        gate_up, down = self.projections()
        bias = None
        if weights.gate_bias is not None:
            assert weights.up_bias is not None, "the two are halves of one bias"
            bias = torch.cat([weights.gate_bias, weights.up_bias])
        return _packed(
            [
                (gate_up, "weight", torch.cat([weights.gate, weights.up])),
                (down, "weight", weights.down),
                (gate_up, "bias", bias),
                (down, "bias", weights.down_bias),
            ]
        )


class TwoLayerFFN(HostFFN):
    """An FFN of two projections, act(x W_in^T + b_in) W_out^T + b_out (OPT, GPT-NeoX, Phi)."""

    def __init__(self, module: nn.Module, activation: str, names: tuple[str, str]):
        """module: the one that holds both projections: the FFN, or for OPT the decoder layer."""
        self.names = names
        super().__init__(module, activation)

    def hidden(self, x: Tensor) -> Tensor:
        return self.activate(self.projections()[0](x))

    def input_rows(self, like: Tensor) -> tuple[Tensor]:
        return (dense_weight(self.projections()[0], like),)

    def resized(self, rows: Callable, columns: Callable) -> Packed:
        first, last = self.projections()
        named: list[tuple[Projection, str, Tensor | None]] = [
            (first, "weight", rows(first.weight, 0)),
            (last, "weight", columns(last.weight)),
        ]
        if first.bias is not None:
            named.append((first, "bias", rows(first.bias, None)))
        return _packed(named)


class Conv1DFFN(TwoLayerFFN):
    """The same with GPT-2's Conv1D, which holds its weight as [in, out]."""

    plain = Conv1D

    def resized(self, rows: Callable, columns: Callable) -> Packed:
        first, last = self.projections()
        return _packed(
            [
                (first, "weight", rows(first.weight.T, 0).T.contiguous()),
                (first, "bias", rows(first.bias, None)),
                (last, "weight", columns(last.weight.T).T.contiguous()),
            ]
        )


def _packed(named: list[tuple[Projection, str, Tensor | None]]) -> Packed:
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
