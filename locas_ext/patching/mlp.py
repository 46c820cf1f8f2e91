"""Locas-MLP beside an FFN: the forwards that stand in for the host's."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext import ops
from locas_ext.hosts.ffn import HostFFN, TwoLayerFFN
from locas_ext.hosts.seen import Place
from locas_ext.ops.activations import activate
from locas_ext.ops.autograd import SidewayMlpFunction
from locas_ext.ops.backends.matmul import sideway_mlp_forward
from locas_ext.ops.types import SlotFactors
from locas_ext.state.scope import Scope, scopes

from .base import PatchedFFN, Route
from .compiled import in_use
from .forward_patch import the_input

# The FFN whose first projection ran last in this context, and its input, until its last projection runs.
_entered: ContextVar[tuple[Any, Tensor] | None] = ContextVar("locas_entered", default=None)


class PatchedMlpFFN(PatchedFFN[HostFFN]):
    """Locas-MLP beside an FFN.

    Of a two-layer FFN both projections are bound: the first one's forward keeps its input, the last one's adds the memory,
    so that what the host does to the sum, such as dropout, is done to the memory too. OPT has no other place.
    """

    traced_input: Tensor | None = None  # while a graph is traced, which knows no contexts

    def modules(self) -> list[nn.Module]:
        return self.ffn.projections() if isinstance(self.ffn, TwoLayerFFN) else [self.ffn.module]

    def places(self) -> list[Place]:
        inside = isinstance(self.ffn, TwoLayerFFN)
        return [(self.ffn.module._modules, name) for name in self.ffn.names] if inside else []

    def forwards(self) -> list[Callable]:
        return [self.enter, self.leave] if isinstance(self.ffn, TwoLayerFFN) else [self.around]

    def enter(self, *arguments: Any, **named: Any) -> Tensor:
        """The first projection's forward."""
        if torch.compiler.is_compiling():
            self.traced_input = the_input(arguments, named)
        else:
            _entered.set((self, the_input(arguments, named)))
        return self.patches[0].original(*arguments, **named)

    def leave(self, *arguments: Any, **named: Any) -> Tensor:
        """The last projection's forward."""
        if torch.compiler.is_compiling():
            x, self.traced_input = self.traced_input, None
        else:
            entered = _entered.get()
            x = entered[1] if entered is not None and entered[0] is self else None
            _entered.set(None)
        y = self.patches[1].original(*arguments, **named)
        return y if x is None else self.with_memory(x, y)  # None: a call of this projection alone, which is no FFN

    def around(self, *arguments: Any, **named: Any) -> Tensor:
        """The forward of an FFN that is bound whole."""
        return self.with_memory(the_input(arguments, named), self.original(*arguments, **named))

    def with_memory(self, x: Tensor, y: Tensor) -> Tensor:
        """The FFN's output y [..., d] for its input x [..., d], with the memory's added."""
        if torch.compiler.is_compiling():
            return self._with_memory_compiled(x, y)
        scope = scopes.get().get(self.state)
        if scope is not None and scope.observer is not None:
            scope.observer(self, x)
        tap = None if scope is None else scope.tap
        match self.route(x, scope):
            case Route.BESIDE:
                y = y + (self._beside(x, scope) if tap is None else self._tapped(x))
            case Route.PUBLIC_BESIDE:
                y = y + self._public_beside(x, detached=tap is not None)
            case Route.TRACED:
                y = y + self._traced(x)
        return y if tap is None else tap(self, x, y)

    def _obstacle_now(self) -> str:
        return self.obstacle()

    def obstacle(self) -> str:
        return "Locas-MLP runs beside the host's FFN"

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

    def _public_beside(self, x: Tensor, detached: bool) -> Tensor:
        arena, parameter = self.arena, self.arena.parameters[self.index]
        slots = (parameter.detach() if detached else parameter)[:, : arena.used]
        backend = "reference" if x.dtype == torch.float64 else self.beside
        return ops.sideway_mlp(x, slots, arena.scales[self.index], self.activation, backend)

    def _traced(self, x: Tensor) -> Tensor:
        """With the empty slots, so that the number of used ones is not part of a graph."""
        backend = "reference" if x.dtype == torch.float64 else self.beside
        return ops.sideway_mlp(x, self.traced_slots(), self.arena.scales[self.index], self.activation, backend)

    def _with_memory_compiled(self, x: Tensor, y: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        if not self.attached or not (state.learned or state.watched or (torch.is_grad_enabled() and state.initialized)):
            return y
        # With the empty slots, so that the number of used ones is not part of the graph.
        parameter, scale = arena.parameters[self.index], arena.scales[self.index]
        backend = "reference" if x.dtype == torch.float64 else self.beside
        memory = ops.sideway_mlp(x, parameter, scale, self.activation, backend)
        return y + (memory * in_use(x, self.binding.number) if state.exclusion.off_somewhere > 0 else memory)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        hidden = self.ffn.hidden(x)
        _entered.set(None)  # what the first projection's forward kept just now
        return hidden.abs().float().mean(0)

    def host_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        return self.ffn.input_rows(like)[:1]  # of a gated FFN those of the gate, which the activation is applied to

    def path(self) -> tuple[str, str]:
        return "sideway", self.obstacle()

    def backend_name(self) -> str:
        return "matmul" if self.backend == "auto" else self.backend
