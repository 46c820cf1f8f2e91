"""Locas-MLP beside an FFN: the forwards that stand in for the host's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext import ops
from locas_ext.hosts.ffn import HostFFN, Rows
from locas_ext.ops.activations import activate
from locas_ext.ops.autograd import SidewayMlpFunction
from locas_ext.ops.backends.matmul import sideway_mlp_forward
from locas_ext.ops.types import SlotFactors
from locas_ext.state.scope import Scope

from .base import PatchedFFN, Route
from .compiled import in_use


class PatchedMlpFFN(PatchedFFN[HostFFN]):
    """Locas-MLP beside an FFN."""

    def with_memory(self, x: Tensor, y: Tensor) -> Tensor:
        """The FFN's output y [..., d] for its input x [..., d], with the memory's added."""
        if torch.compiler.is_compiling():
            return self._with_memory_compiled(x, y)
        scope = self.observed_scope(x)
        tap = None if scope is None else scope.tap
        match self.route(x, scope):
            case Route.BESIDE:
                y = y + (self._beside(x, scope) if tap is None else self._tapped(x))
            case Route.PUBLIC_BESIDE:
                parameter = self.arena.parameters[self.index]
                slots = parameter if tap is None else parameter.detach()
                y = y + self._public_beside(x, slots[:, : self.arena.used])
            case Route.TRACED:  # with the empty slots, so that the number of used ones is not part of a graph
                y = y + self._public_beside(x, self.traced_slots())
        return y if tap is None else tap(self, x, y)

    def _obstacle_now(self) -> str:
        return self.obstacle()

    def obstacle(self) -> str:
        return self.ffn.differs or "Locas-MLP runs beside the host's FFN"

    def _beside(self, x: Tensor, scope: Scope | None) -> Tensor:
        """The memory's output alone, [..., d]."""
        arena, index, x2d = self.arena, self.index, x.reshape(-1, x.shape[-1])
        views, scale, parameter = arena.views[index], arena.scales[index], arena.parameters[index]
        if torch.is_grad_enabled() and (x.requires_grad or self.learns()):
            sink = self.sink(scope)
            assert not isinstance(sink, SlotFactors), "factors are kept only where all FFNs run on the CUDA kernels"
            sink = None if sink is None else sink[:, : arena.used]
            return SidewayMlpFunction.apply(x2d, parameter, views, scale, self.activation_index, sink).view_as(x)
        return sideway_mlp_forward(x2d, views, scale, self.activation_index)[0].view_as(x)

    def _tapped(self, x: Tensor) -> Tensor:
        """The same while writing: only x may have a gradient, and torch's own nodes bring it with less work on the CPU."""
        views = self.arena.views[self.index]
        hidden = activate(F.linear(x, views.gate_key), self.activation)
        return hidden @ views.value * self.arena.scales[self.index]

    def _public_beside(self, x: Tensor, slots: Tensor) -> Tensor:
        """The memory's output alone, through the public ops."""
        return ops.sideway_mlp(x, slots, self.arena.scales[self.index], self.activation, self.beside_backend(x))

    def _with_memory_compiled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.is_host_alone():
            return y
        memory = self._public_beside(x, self.arena.parameters[self.index])  # with the empty slots, as where it is traced
        return y + (memory * in_use(x, self.binding.number) if self.state.exclusion.off_somewhere > 0 else memory)

    def host_rows(self, like: Tensor) -> tuple[Rows, ...]:
        return self.ffn.input_rows(like)[:1]  # of a gated FFN those of the gate, which the activation is applied to

    def path(self) -> tuple[str, str]:
        return "sideway", self.obstacle()

    def backend_name(self) -> str:
        return "matmul" if self.backend == "auto" else self.backend
