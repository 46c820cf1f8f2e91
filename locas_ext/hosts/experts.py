"""A block that a memory stands beside: experts that share the tokens among them, or matrices of an unknown formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.ops.activations import activate

from .expert_weights import ExpertWeights, PooledRows, expert_weights
from .ffn import HostFFN, Projection, Rows
from .tried import tried


class ExpertBlock(HostFFN):
    """A block of experts: the memory stands beside the whole, its neurons are copies from the pool of all experts.

    A neuron counts by the mean over tokens of routing weight times |act(gate) up|.
    """

    names = ()
    layout = "experts"
    differs = "FFN is a block of experts, which the memory stands beside"

    def __init__(self, module: nn.Module, activation: str, d: int):
        """d: the hidden size"""
        self.d = d
        super().__init__(module, activation)
        found = expert_weights(module, d)
        if found is None:
            raise ValueError(f"a {type(module).__name__} holds no experts whose weights are understood")
        self.is_gated = found.gate is not None
        self._width = len(found.up) * found.up[0].shape[0]

    def _experts(self) -> ExpertWeights:
        found = expert_weights(self.module, self.d)
        assert found is not None, "checked where the block was found"
        return found

    def formula_obstacle(self) -> str | None:
        return self.differs

    def projections(self) -> list[Projection]:
        return [self.module]

    @property
    def width(self) -> int:
        """The neurons of all experts."""
        return self._width

    def _routing(self, x: Tensor, forward: Callable) -> Tensor | None:
        """[T, E]: what the router gives each expert; None where the experts are not told."""
        weights = self._experts()
        experts, seen = len(weights.up), list[tuple[Tensor, Tensor]]()

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 2]
            index = [v for v in values if not v.is_floating_point()]
            weight = [v for v in values[1:] if v.is_floating_point()]
            if index and weight:
                seen.append((index[0].reshape(len(x), -1), weight[0].reshape(len(x), -1)))

        handle = weights.owner.register_forward_pre_hook(look, with_kwargs=True)
        try:
            forward(x[None])
        finally:
            handle.remove()
        if not seen or experts == 1:
            return None
        index, weight = seen[0]
        if weight.shape == index.shape:
            index = index.clamp(0, experts)  # beyond: experts that compute nothing
            return x.new_zeros(len(x), experts + 1).scatter_(1, index.long(), weight.to(x.dtype))[:, :experts]
        return weight[:, :experts].to(x.dtype)

    def importance(self, x: Tensor, forward: Callable) -> Tensor:
        weights = self._experts()
        routing = None
        with tried():  # a block may need more than the hidden states
            routing = self._routing(x, forward)
        result = x.new_zeros(len(weights.up), weights.up[0].shape[0], dtype=torch.float32)
        for expert in range(len(result)):
            share = None if routing is None else routing[:, expert].abs()
            rows = slice(None) if share is None else share.nonzero()[:, 0]
            tokens = x[rows]
            if not len(tokens):
                continue
            up = tokens @ weights.up[expert].T
            hidden = activate(up, self.activation)
            if weights.gate is not None:
                hidden = activate(tokens @ weights.gate[expert].T, self.activation) * up
            fires = hidden.abs().float()
            result[expert] = (fires if share is None else fires * share[rows, None].float()).sum(0) / len(x)
        return result.flatten()

    def input_rows(self, like: Tensor) -> tuple[Rows, ...]:
        weights = self._experts()
        return tuple(PooledRows(rows) for rows in (weights.gate, weights.up) if rows is not None)

    def sample_source(self, like: Tensor) -> Tensor:
        weights = self._experts()
        return weights.up[0] if weights.gate is None else weights.gate[0]

    def mean_value_norm(self, like: Tensor) -> float:
        weights = self._experts()
        norms = [torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).mean() for value in weights.value]
        return torch.stack(norms).mean().item()
