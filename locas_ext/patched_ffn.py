"""A host FFN with its memory: the forwards that stand in for the host's own while a memory is attached."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused, ops, reference
from .activations import activate, activation_index
from .arena import SlotArena
from .host_ffn import HostFFN, TwoLayerFFN
from .kernels import sideway_forward, sideway_mlp_forward
from .ops import GluFFNFunction, SidewayGluFunction, SidewayMlpFunction
from .rehome import RehomedFFN, RehomedFunction, rehomed_forward

if TYPE_CHECKING:
    from .patch import Attachment


class Stand:
    """A module whose forward another function stands in for."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward
        # accelerate keeps the real forward in _old_forward and calls it from its hook: bind beneath it.
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.replaced = module.__dict__.get(name)
        self.original = getattr(module, name)
        setattr(module, name, forward)

    def end(self) -> None:
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) != self.forward:  # equal, not identical: deepcopy makes a second method object
                continue
            if self.replaced is None:
                del attributes[name]
            else:
                attributes[name] = self.replaced


class PatchedFFN:
    """What the variants share: where the memory is, how it is computed, and the binding."""

    def __init__(self, attachment: "Attachment", ffn: HostFFN, arena: SlotArena, index: int):
        """index: the layer's place in its arena."""
        self.attachment, self.ffn, self.arena, self.index = attachment, ffn, arena, index
        self.state, self.backend = attachment.state, attachment.backend
        self.beside = "reference" if self.backend == "reference" else "auto"  # for a memory beside the host's FFN
        self.activation = ffn.activation
        self.activation_index = activation_index(ffn.activation)
        self.home: RehomedFFN | None = None  # with attach(rehome=True)
        self.observer = None  # called with the FFN input [..., d] during initialization
        self.attached = False
        self.stands: list[Stand] = []

    # ---- binding ---------------------------------------------------------------------------------------------
    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        """The modules to bind, each with the forward that stands in for its own."""
        raise NotImplementedError

    def bind(self) -> None:
        self.stands = [Stand(module, forward) for module, forward in self.forwards()]
        self.attached = True

    def unbind(self) -> None:
        self.attached = False  # whoever wrapped our forward since and still holds it gets the original's result
        for stand in self.stands:
            stand.end()

    def original(self, *arguments: Tensor) -> Tensor:
        """The host's own forward of the first module bound."""
        return self.stands[0].original(*arguments)

    # ---- what the verbs ask ----------------------------------------------------------------------------------
    def importance(self, x: Tensor) -> Tensor:
        """How strongly each host neuron fires on x [T, d]: [m] float32 (`ops.neuron_importance`)."""
        raise NotImplementedError

    def host_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """The host's rows [m, d] that a slot's can be copies of, in the order of the planes."""
        raise NotImplementedError

    def path(self) -> tuple[str, str]:
        """("whole", why) where host and memory run as one op, ("sideway", why) where the memory is added beside the host."""
        raise NotImplementedError

    def backend_name(self) -> str:
        """The backend, "auto" resolved for where the memory lies."""
        raise NotImplementedError

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        """Whether so many tokens go through the fused CUDA kernels (fused.py)."""
        return False


class PatchedGluFFN(PatchedFFN):
    """Locas-GLU in a gated FFN: host and memory as one op where the host's projections are plain."""

    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        return [(self.ffn.module, self.forward)]

    def forward(self, x: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        if self.observer is not None:
            self.observer(x)
        if not self.attached or state.disabled:
            return self.original(x)
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
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
            self.attachment.follow(arena, device, dtype)
            views = arena.views[index]
        scale, activation = arena.scales[index], self.activation_index
        x2d = x.reshape(-1, x.shape[-1])
        rehomed = not alone and self.home is not None and self.home.ready()
        if not alone and not rehomed:
            host = self.ffn.weights()
            backend = ops.native_backend("patched FFN", x2d, host.gate, self.backend)
        if gradients and (learns or x.requires_grad):
            grad = arena.sink(index)
            if rehomed:
                y = RehomedFunction.apply(x2d, parameter, self.home, self.ffn.weights().down_bias, activation, grad)
            elif alone:
                y = SidewayGluFunction.apply(x2d, parameter, views, scale, activation, grad)
            else:
                y = GluFFNFunction.apply(x2d, parameter, views, host, scale, activation, grad, backend)
        elif rehomed:
            y = rehomed_forward(x2d, self.home, self.ffn.weights().down_bias, activation, save=False)[0]
        elif alone:
            y = sideway_forward(x2d, views, scale, activation)[0]
        else:
            y = backend.glu_ffn_forward(x2d, host, views, scale, activation, save=False)[0]
        y = y.view_as(x)
        return self.original(x) + y if alone else y

    def _forward_plain(self, x: Tensor, parameter: Tensor, alone: bool) -> Tensor:
        """The reference backend, and any backend under autocast: public ops with all their checks."""
        scale = self.arena.scales[self.index]
        backend = "reference" if x.dtype == torch.float64 else self.beside  # a host moved to float64 after attach
        if alone or torch.is_autocast_enabled(x.device.type):
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, backend)
        gate, up, down, *biases = self.ffn.weights()
        return reference.glu_ffn(x, gate, up, down, parameter, scale, self.activation, *biases)

    def _forward_compiled(self, x: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        parameter, scale = arena.parameters[self.index], arena.scales[self.index]
        if not (state.learned or (torch.is_grad_enabled() and state.initialized)):
            return self.original(x)
        if not state.learned or self.path()[0] == "sideway":
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, self.beside)
        gate, up, down, *biases = self.ffn.weights()
        return ops.glu_ffn(x, gate, up, down, parameter, scale, self.activation, *biases, backend=self.backend)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        if self.ffn.obstacle() is not None:
            return self.ffn.hidden(x).abs().float().mean(0)
        gate, up, _, gate_bias, up_bias, _ = self.ffn.weights()
        return ops.neuron_importance(x, gate, up, self.activation, gate_bias, up_bias, backend=self.backend)

    def host_rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.ffn.input_rows(like)

    def backend_name(self) -> str:
        if self.backend != "auto":
            return self.backend
        if self.path()[0] == "sideway":
            return "matmul"
        compute = self.arena.compute
        host = self.attachment.host
        return ops.fused_backend(compute).choice(compute, host.hidden_size, host.intermediate_size)

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        compute, host = self.arena.compute, self.attachment.host
        if not compute.is_cuda or self.home is not None or self.ffn.obstacle() is not None:
            return False
        return self.backend == "fused" or (
            self.backend == "auto" and fused.is_faster(compute, tokens, host.hidden_size, host.intermediate_size)
        )

    def path(self) -> tuple[str, str]:
        obstacle = self.ffn.obstacle()
        if obstacle:
            return "sideway", obstacle
        if self.home is not None:
            return "whole", self.home.status()
        return "whole", "plain projections"


class PatchedMlpFFN(PatchedFFN):
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
        return self.stands[0].original(x)

    def leave(self, hidden: Tensor) -> Tensor:
        x, self.input = self.input, None
        return self.with_memory(x, self.stands[1].original(hidden))

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
        compiling = torch.compiler.is_compiling()
        if not compiling and not arena.is_current(index):
            state.sync()
        parameter = arena.parameters[index] if self.tap is None else arena.parameters[index].detach()
        learns = torch.is_grad_enabled() and state.initialized and parameter.requires_grad
        if not state.learned and not learns:
            return None
        scale, dtype = arena.scales[index], x.dtype
        if compiling:  # with the empty slots, so that the number of used ones is no part of the graph
            return ops.sideway_mlp(x, parameter, scale, self.activation, self.beside)
        if self.backend == "reference" or dtype == torch.float64 or torch.is_autocast_enabled(x.device.type):
            backend = "reference" if dtype == torch.float64 else self.beside
            return ops.sideway_mlp(x, parameter[:, : arena.used], scale, self.activation, backend)
        if arena.views[index].value.dtype != dtype or arena.views[index].value.device != x.device:
            self.attachment.follow(arena, x.device, dtype)
        views = arena.views[index]
        if self.tap is not None:  # only x may have a gradient, and torch's own nodes bring it with less work on the CPU
            return activate(F.linear(x, views.gate_key), self.activation) @ views.value * scale
        x2d = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (learns or x.requires_grad):
            sink = arena.sink(index)
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

    def host_rows(self, like: Tensor) -> tuple[Tensor]:
        return self.ffn.input_rows(like)[:1]  # of a gated FFN those of the gate, which the activation is applied to

    def path(self) -> tuple[str, str]:
        return "sideway", "Locas-MLP runs beside the host's FFN"

    def backend_name(self) -> str:
        return "matmul" if self.backend == "auto" else self.backend
