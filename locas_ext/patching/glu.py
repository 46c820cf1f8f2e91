"""Locas-GLU in a gated FFN: the forward that stands in for the host's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from locas_ext import ops
from locas_ext.hosts.ffn import GatedFFN
from locas_ext.ops import reference
from locas_ext.ops.autograd import GluFfnFunction, SidewayGluFunction
from locas_ext.ops.backends import cuda, fused_backend, glu_ffn_backend
from locas_ext.ops.backends.matmul import sideway_glu_forward
from locas_ext.ops.routes import by_address
from locas_ext.ops.types import SlotViews

from .base import PatchedFFN
from .rehome import RehomedFunction, rehomed_forward


class PatchedGluFFN(PatchedFFN[GatedFFN]):
    """Locas-GLU in a gated FFN: host and memory as one op where the host's projections are plain."""

    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        return [(self.ffn.module, self.forward)]

    def forward(self, x: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        if self.observer is not None:
            self.observer(x)
        if not self.attached or state.disabled:
            return self.original(x)
        if not by_address(x):
            return self._forward_traced(x)
        index = self.index
        if not arena.is_current(index):
            state.sync()
        parameter = arena.parameters[index]
        gradients = torch.is_grad_enabled()
        learns = gradients and state.initialized and parameter.requires_grad
        # A memory that has learned nothing adds exactly 0: then the host computes alone, bit for bit.
        if not state.learned and not learns:
            return self.original(x)
        alone = not state.learned or self.ffn.obstacle() is not None
        device, dtype = x.device, x.dtype
        if self.backend == "reference" or dtype == torch.float64 or torch.is_autocast_enabled(device.type):
            return self._forward_plain(x, parameter, alone)
        views = arena.views[index]
        if views.value.dtype != dtype or views.value.device != device:
            self.binding.relocate(arena, device, dtype)
            views = arena.views[index]
        with_graph = gradients and (learns or x.requires_grad)
        y = self._forward_native(x.reshape(-1, x.shape[-1]), parameter, views, alone, with_graph).view_as(x)
        return self.original(x) + y if alone else y

    def _forward_native(self, x: Tensor, parameter: Tensor, views: SlotViews, alone: bool, with_graph: bool) -> Tensor:
        """The memory's output for x [T, d] and, unless it is `alone`, the host's in one."""
        scale, activation = self.arena.scales[self.index], self.activation_index
        home, grad = self.home, self.arena.sink(self.index)
        if alone:
            if with_graph:
                return SidewayGluFunction.apply(x, parameter, views, scale, activation, grad)
            return sideway_glu_forward(x, views, scale, activation)[0]
        if home is not None and home.ready():
            bias = self.ffn.weights().down_bias
            if with_graph:
                return RehomedFunction.apply(x, parameter, home, bias, activation, grad)
            return rehomed_forward(x, home, bias, activation, save=False)[0]
        host = self.ffn.weights()
        backend = glu_ffn_backend("patched FFN", x, host.gate, self.backend)
        if with_graph:
            return GluFfnFunction.apply(x, parameter, views, host, scale, activation, grad, backend)
        return backend.glu_ffn_forward(x, host, views, scale, activation, save=False)[0]

    def _forward_plain(self, x: Tensor, parameter: Tensor, alone: bool) -> Tensor:
        """The reference backend, and any backend under autocast: public ops with all their checks."""
        scale = self.arena.scales[self.index]
        backend = "reference" if x.dtype == torch.float64 else self.beside  # a host moved to float64 after attach
        if alone or torch.is_autocast_enabled(x.device.type):
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, backend)
        gate, up, down, *biases = self.ffn.weights()
        return reference.glu_ffn(x, gate, up, down, parameter, scale, self.activation, *biases)

    def _forward_traced(self, x: Tensor) -> Tensor:
        """The public ops, which are what a compiler, a tracer or a transform can see."""
        state, arena = self.state, self.arena
        if not torch.compiler.is_compiling() and not arena.is_current(self.index):
            state.sync()
        # torch.jit.trace takes no constants that require a gradient
        parameter = arena.slots[self.index] if torch.jit.is_tracing() else arena.parameters[self.index]
        scale = arena.scales[self.index]
        if not (state.learned or (torch.is_grad_enabled() and state.initialized)):
            return self.original(x)
        if not state.learned or self.path()[0] == "sideway":
            beside = "reference" if x.dtype == torch.float64 else self.beside
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, beside)
        host, backend = self.ffn.weights(), "reference" if x.dtype == torch.float64 else self.backend
        biases = (host.gate_bias, host.up_bias, host.down_bias)
        return ops.glu_ffn(x, host.gate, host.up, host.down, parameter, scale, self.activation, *biases, backend)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        if self.ffn.obstacle() is not None:
            return self.ffn.hidden(x).abs().float().mean(0)
        gate, up, _, gate_bias, up_bias, _ = self.ffn.weights()
        return ops.neuron_importance(x, gate, up, self.activation, gate_bias, up_bias, backend=self.backend)

    def host_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        return self.ffn.input_rows(like)

    def backend_name(self) -> str:
        if self.backend != "auto":
            return self.backend
        if self.path()[0] == "sideway":
            return "matmul"
        compute = self.arena.compute
        host = self.binding.host
        return fused_backend(compute).choice(compute, host.hidden_size, host.intermediate_size)

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        compute, host = self.arena.compute, self.binding.host
        if not compute.is_cuda or self.home is not None or self.ffn.obstacle() is not None:
            return False
        return self.backend == "fused" or (
            self.backend == "auto" and cuda.is_faster(compute, tokens, host.hidden_size, host.intermediate_size)
        )

    def path(self) -> tuple[str, str]:
        obstacle = self.ffn.obstacle()
        if obstacle:
            return "sideway", obstacle
        if self.home is not None:
            return "whole", self.home.status()
        return "whole", "plain projections"
