"""Locas-MLP beside an FFN: the forwards that stand in for the host's."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext import ops
from locas_ext.hosts.ffn import HostFFN, TwoLayerFFN
from locas_ext.ops.activations import activate
from locas_ext.ops.autograd import SidewayMlpFunction
from locas_ext.ops.backends.matmul import sideway_mlp_forward
from locas_ext.ops.routes import by_address
from locas_ext.ops.types import SlotFactors

from .base import PatchedFFN


class PatchedMlpFFN(PatchedFFN[HostFFN]):
    """Locas-MLP beside an FFN.

    Of a two-layer FFN both projections are bound: the first one's forward keeps its input, the last one's adds the memory,
    so that what the host does to the sum, such as dropout, is done to the memory too. OPT has no other place.
    """

    input: Tensor | None = None  # of the first projection, until the last one runs
    tap: Callable[[Tensor, Tensor], Tensor] | None = None  # while writing: takes the FFN's input and output, returns the latter

    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        if not isinstance(self.ffn, TwoLayerFFN):
            return [(self.ffn.module, self.around)]
        first, last = self.ffn.projections()
        return [(first, self.enter), (last, self.leave)]

    def enter(self, x: Tensor) -> Tensor:
        self.input = x
        return self.patches[0].original(x)

    def leave(self, hidden: Tensor) -> Tensor:
        x = cast(Tensor, self.input)  # the first projection ran, or the memory has learned nothing and reads no x
        self.input = None
        return self.with_memory(x, self.patches[1].original(hidden))

    def around(self, x: Tensor) -> Tensor:
        return self.with_memory(x, self.original(x))

    def with_memory(self, x: Tensor, y: Tensor) -> Tensor:
        """The FFN's output y [..., d] for its input x [..., d], with the memory's added."""
        if self.observer is not None:
            self.observer(x)
        if self.attached and not self.state.disabled and (memory := self.memory(x)) is not None:
            y = y + memory
        return y if self.tap is None else self.tap(x, y)

    def memory(self, x: Tensor) -> Tensor | None:
        """The memory's own output [..., d], or None where that is exactly 0 and nothing is to be learned."""
        state, arena, index = self.state, self.arena, self.index
        if not torch.compiler.is_compiling() and not arena.is_current(index):
            state.sync()
        parameter = arena.parameters[index] if self.tap is None else arena.parameters[index].detach()
        learns = torch.is_grad_enabled() and state.initialized and parameter.requires_grad
        if not state.learned and not learns:
            return None
        scale, dtype = arena.scales[index], x.dtype
        backend = "reference" if dtype == torch.float64 else self.beside
        if not by_address(x):  # with the empty slots, so that the number of used ones is no part of a graph
            if torch.jit.is_tracing():  # which takes no constants that require a gradient
                parameter = arena.slots[index]
            return ops.sideway_mlp(x, parameter, scale, self.activation, backend)
        if backend == "reference" or torch.is_autocast_enabled(x.device.type):
            return ops.sideway_mlp(x, parameter[:, : arena.used], scale, self.activation, backend)
        if arena.views[index].value.dtype != dtype or arena.views[index].value.device != x.device:
            self.binding.relocate(arena, x.device, dtype)
        views = arena.views[index]
        if self.tap is not None:  # only x may have a gradient, and torch's own nodes bring it with less work on the CPU
            return activate(F.linear(x, views.gate_key), self.activation) @ views.value * scale
        x2d = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (learns or x.requires_grad):
            sink = arena.sink(index)
            assert not isinstance(sink, SlotFactors), "factors are kept only where all FFNs run on the CUDA kernels"
            sink = None if sink is None else sink[:, : arena.used]
            y = SidewayMlpFunction.apply(x2d, parameter, views, scale, self.activation_index, sink)
        else:
            y = sideway_mlp_forward(x2d, views, scale, self.activation_index)[0]
        return y.view_as(x)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        hidden = self.ffn.hidden(x)
        self.input = None  # what the first projection's forward kept just now
        return hidden.abs().float().mean(0)

    def host_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        return self.ffn.input_rows(like)[:1]  # of a gated FFN those of the gate, which the activation is applied to

    def path(self) -> tuple[str, str]:
        return "sideway", "Locas-MLP runs beside the host's FFN"

    def backend_name(self) -> str:
        return "matmul" if self.backend == "auto" else self.backend
