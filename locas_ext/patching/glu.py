"""Locas-GLU in a gated FFN: the forward that stands in for the host's."""

from typing import Any

import torch
from torch import Tensor

from locas_ext import ops
from locas_ext.hosts.ffn import HostFFN, Place, Rows
from locas_ext.hosts.gated_ffn import GatedFFN
from locas_ext.hosts.sharding import fsdp_modules
from locas_ext.ops import reference
from locas_ext.ops.autograd import GluFfnFunction, SidewayGluFunction
from locas_ext.ops.backends import cuda, fused_backend, glu_ffn_backend
from locas_ext.ops.backends.matmul import sideway_glu_forward
from locas_ext.ops.types import SlotFactors
from locas_ext.state.scope import Scope

from .base import PatchedFFN, Route
from .compiled import in_use
from .forward_patch import the_input
from .rehome import RehomedFFN, RehomedFunction, rehomed_forward


class PatchedGluFFN(PatchedFFN[HostFFN]):
    """Locas-GLU in a gated FFN: host and memory as one op where the host's projections are plain."""

    def gated(self) -> GatedFFN:
        """The FFN, where its own weights are used."""
        assert isinstance(self.ffn, GatedFFN), "others have an obstacle"
        return self.ffn

    def obstacle(self) -> str | None:
        if self.ffn.place is Place.PROJECTIONS:
            return self.ffn.differs or "the module does more than its FFN, so the memory stands between the projections"
        return super().obstacle()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The FFN's output for its input [..., d], however it is passed."""
        if not isinstance(self.ffn, GatedFFN):
            return super().forward(*arguments, **named)
        x = the_input(arguments, named)
        if torch.compiler.is_compiling():
            return self._forward_compiled(x, arguments, named)
        scope = self.observed_scope(x)
        match self.route(x, scope):
            case Route.WHOLE:
                return self._whole(x, scope)
            case Route.HOST:
                return self.original(*arguments, **named)
            case Route.BESIDE:
                return self.original(*arguments, **named) + self._beside(x, scope)
            case Route.PUBLIC_BESIDE:
                return self.original(*arguments, **named) + self._public_beside(x, self.arena.parameters[self.index])
            case Route.PUBLIC_WHOLE:
                return self._public_whole(x)
            case Route.TRACED:
                return self._traced(x, arguments, named)
            case Route.REHOMED:
                rehomed = self.rehomed
                assert rehomed is not None, "_resolve() gives this route only where there is one"
                return self._rehomed(x, rehomed, scope) if rehomed.ready() else self._whole(x, scope)

    def with_memory(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._with_memory_compiled(x, y)
        scope = self.observed_scope(x)
        match self.route(x, scope):
            case Route.BESIDE:
                return y + self._beside(x, scope).view_as(y)
            case Route.PUBLIC_BESIDE:
                return y + self._public_beside(x, self.arena.parameters[self.index]).view_as(y)
            case Route.TRACED:
                return y + self._public_beside(x, self.traced_slots()).view_as(y)
        return y

    def _with_graph(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.learns())

    def _beside(self, x: Tensor, scope: Scope | None) -> Tensor:
        """The memory's output alone."""
        arena, x2d, views = self.arena, self.entered(x.reshape(-1, x.shape[-1])), self.arena.views[self.index]
        scale, activation = arena.scales[self.index], self.activation_index
        if self._with_graph(x):
            parameter, sink = arena.parameters[self.index], self.sink(scope)
            assert not isinstance(sink, SlotFactors), "factors are kept only where all FFNs run on the CUDA kernels"
            return self.total(SidewayGluFunction.apply(x2d, parameter, views, scale, activation, sink)).view_as(x)
        return self.total(sideway_glu_forward(x2d, views, scale, activation)[0]).view_as(x)

    def _rehomed(self, x: Tensor, rehomed: RehomedFFN, scope: Scope | None) -> Tensor:
        x2d, bias, activation = x.reshape(-1, x.shape[-1]), self.gated().weights().down_bias, self.activation_index
        if self._with_graph(x):
            parameter = self.arena.parameters[self.index]
            return RehomedFunction.apply(x2d, parameter, rehomed, bias, activation, self.sink(scope)).view_as(x)
        return rehomed_forward(x2d, rehomed, bias, activation, save=False)[0].view_as(x)

    def _whole(self, x: Tensor, scope: Scope | None) -> Tensor:
        arena, views, host = self.arena, self.arena.views[self.index], self.gated().weights()
        x2d = self.entered(x.reshape(-1, x.shape[-1]))
        scale, activation = arena.scales[self.index], self.activation_index
        backend = glu_ffn_backend("patched FFN", x2d, host.gate, self.backend)
        if self._with_graph(x):
            parameter = arena.parameters[self.index]
            y = GluFfnFunction.apply(x2d, parameter, views, host, scale, activation, self.sink(scope), backend)
        else:
            y = backend.glu_ffn_forward(x2d, host, views, scale, activation, save=False)[0]
        return self.total(y).view_as(x)

    def _public_beside(self, x: Tensor, slots: Tensor) -> Tensor:
        """The memory's output alone, through the public ops."""
        scale, backend = self.arena.scales[self.index], self.beside_backend(x)
        return self.total(ops.sideway_glu(self.entered(x), slots, scale, self.activation, backend))

    def _public_whole(self, x: Tensor) -> Tensor:
        parameter, scale = self.arena.parameters[self.index], self.arena.scales[self.index]
        gate, up, down, *biases = self.gated().weights()
        return self.total(reference.glu_ffn(self.entered(x), gate, up, down, parameter, scale, self.activation, *biases))

    def _traced(self, x: Tensor, arguments: tuple, named: dict[str, Any]) -> Tensor:
        scale, slots = self.arena.scales[self.index], self.traced_slots()
        if not self.state.learned or self.obstacle() is not None:
            return self.original(*arguments, **named) + self._public_beside(x, slots)
        host, backend = self.gated().weights(), "reference" if x.dtype == torch.float64 else self.backend
        biases = (host.gate_bias, host.up_bias, host.down_bias)
        x = self.entered(x)
        return self.total(ops.glu_ffn(x, host.gate, host.up, host.down, slots, scale, self.activation, *biases, backend))

    def _forward_compiled(self, x: Tensor, arguments: tuple, named: dict[str, Any]) -> Tensor:
        state, arena = self.state, self.arena
        parameter, scale = arena.parameters[self.index], arena.scales[self.index]
        backend = "reference" if x.dtype == torch.float64 else None
        if self.is_host_alone():
            return self.original(*arguments, **named)
        # Nobody looks into a graph: handed out and not known to have learned, the slots are read beside the host.
        if state.learned and state.exclusion.off_somewhere == 0 and self.formula is None and not self.ffn.projection_obstacle():
            host = self.gated().weights()
            biases = (host.gate_bias, host.up_bias, host.down_bias)
            x, backend = self.entered(x), backend or self.backend
            y = ops.glu_ffn(x, host.gate, host.up, host.down, parameter, scale, self.activation, *biases, backend)
            return self.total(y)
        return self._with_memory_compiled(x, self.original(*arguments, **named))

    def _with_memory_compiled(self, x: Tensor, y: Tensor) -> Tensor:
        if self.is_host_alone():
            return y
        memory = self._public_beside(x, self.arena.parameters[self.index])
        if self.state.exclusion.off_somewhere > 0:
            memory = memory * in_use(x, self.binding.number)
        return y + memory.view_as(y)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        if self.obstacle() is not None:
            return super().importance(x)
        gate, up, _, gate_bias, up_bias, _ = self.gated().weights()
        fires = ops.neuron_importance(x.to(gate.dtype), gate, up, self.activation, gate_bias, up_bias, backend=self.backend)
        return fires if self.ffn.ranks is None else self.ffn.ranks.gathered(fires)

    def host_rows(self, like: Tensor) -> tuple[Rows, ...]:
        return self.ffn.input_rows(like)

    def backend_name(self) -> str:
        if self.backend != "auto":
            return self.backend
        if self.path()[0] == "sideway":
            return "matmul"
        compute = self.arena.compute
        host = self.binding.host
        return fused_backend(compute).choice(compute, host.hidden_size, self.ffn.width_here or host.intermediate_size)

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        compute, host = self.arena.compute, self.binding.host
        if not compute.is_cuda or self.rehomed is not None or self.ffn.repeated or self.obstacle() is not None:
            return False
        width = self.ffn.width_here or host.intermediate_size
        return self.backend == "fused" or (self.backend == "auto" and cuda.is_faster(compute, tokens, host.hidden_size, width))

    def _is_gathered_later(self) -> bool:
        """Whether it is only for now, between forwards, that FSDP2 keeps parts of the weights in their places."""
        formula = self.ffn.place is Place.MODULE and self.ffn.formula_obstacle() is None
        return formula and self.ffn.projection_obstacle(gathered=True) is None and bool(fsdp_modules(self.binding.host.model))

    def path(self) -> tuple[str, str]:
        obstacle = self.obstacle()
        if obstacle and self._is_gathered_later():
            return "whole", "plain projections, gathered by FSDP2 for each forward"
        if obstacle:
            return "sideway", obstacle
        if self.rehomed is not None:
            return "whole", self.rehomed.status()
        return "whole", "plain projections"
