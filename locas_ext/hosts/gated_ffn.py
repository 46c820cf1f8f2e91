"""FFNs whose neurons have a gate row and an up row, a class per layout."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from locas_ext.ops.types import HostWeights

from .ffn import Packed, ProjectedFFN, Rows, as_parameters
from .projections import dense_weight, value_norms
from .split import SplitRows, local, split_obstacle


class GatedFFN(ProjectedFFN):
    """An FFN with separate gate, up and down projections."""

    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    is_gated = True
    layout = "gated"

    def __init__(self, module: nn.Module, activation: str, names: tuple[str, ...] | None = None):
        """names: of gate, up and down projection; None: Llama's"""
        self.names = names or self.names
        super().__init__(module, activation)

    def weights(self) -> HostWeights:
        """The host's own tensors, not copies; meaningful where obstacle() is None.

        Where neurons are split among processes: those of this one, and the output's bias on one process only.
        """
        gate, up, down = (projection._parameters for projection in self.projections())
        weights = HostWeights(gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"], down["bias"])
        if self.ranks is None:
            return weights
        weights = HostWeights(*map(local, weights))
        return weights if self.ranks.rank == 0 else weights._replace(down_bias=None)

    def split_obstacle(self) -> str | None:
        for name, projection, dim in zip(self.names, self.projections(), (0, 0, 1), strict=True):
            if problem := split_obstacle(projection, dim):
                return f"{name} {problem}"
        return None

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up [..., m] from the projections as they are, whatever they are."""
        gate, up, _ = self.projections()
        return gate(x), up(x)

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = self.pre_activations(x)
        return self.activate(gate) * up

    def input_rows(self, like: Tensor) -> tuple[Rows, Rows]:
        gate, up, _ = self.projections()
        if self.ranks is not None and self.obstacle() is None:
            ranks, total = self.ranks, gate.out_features
            return SplitRows(local(gate.weight), ranks, total), SplitRows(local(up.weight), ranks, total)
        return dense_weight(gate, like), dense_weight(up, like)

    def mean_value_norm(self, like: Tensor) -> float:
        if self.ranks is not None and self.obstacle() is None:
            return self.ranks.gathered(value_norms(local(self.projections()[-1].weight))).mean().item()
        return super().mean_value_norm(like)

    def pack(self, weights: HostWeights) -> Packed:
        """Parameters for the projections that hold these weights, not yet put in."""
        gate, up, down = self.projections()
        return as_parameters(
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
    layout = "gated, gate and up in one projection"

    def split_obstacle(self) -> str | None:
        return ProjectedFFN.split_obstacle(self)  # a process may have gate rows only

    def split(self, both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The gate's and the up projection's part of a tensor along one of its dimensions."""
        gate, up = both.chunk(2, dim)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """[2m, ...] from the two parts [m, ...], as `split` takes them apart."""
        return torch.cat([gate, up])

    def weights(self) -> HostWeights:
        gate_up, down = (projection._parameters for projection in self.projections())
        gate, up = self.split(gate_up["weight"], 0)
        gate_bias = up_bias = None
        if gate_up["bias"] is not None:  # the kernels take no strided biases
            gate_bias, up_bias = (part.contiguous() for part in self.split(gate_up["bias"], 0))
        return HostWeights(gate, up, down["weight"], gate_bias, up_bias, down["bias"])

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.projections()[0](x), -1)

    def input_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(dense_weight(self.projections()[0], like), 0)

    def pack(self, weights: HostWeights) -> Packed:
        gate_up, down = self.projections()
        bias = None
        if weights.gate_bias is not None:
            assert weights.up_bias is not None, "the two are halves of one bias"
            bias = self.joined(weights.gate_bias, weights.up_bias)
        return as_parameters(
            [
                (gate_up, "weight", self.joined(weights.gate, weights.up)),
                (down, "weight", weights.down),
                (gate_up, "bias", bias),
                (down, "bias", weights.down_bias),
            ]
        )


class UpFirstFFN(FusedGatedFFN):
    """The same with the up rows first."""

    layout = "gated, up and gate in one projection"

    def split(self, both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        up, gate = both.chunk(2, dim)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([up, gate])


class InterleavedFFN(FusedGatedFFN):
    """The same with gate and up rows by turns."""

    layout = "gated, gate and up by turns in one projection"

    def split(self, both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        gate, up = both.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.stack([gate, up], 1).flatten(0, 1)
