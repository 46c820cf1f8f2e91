"""The kernels as autograd Functions on [T, d] matrices: what eager code calls, behind the checks of `functional.py`."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import elementwise, matmul
from .types import HostWeights, SlotFactors, SlotViews


class GluFFNFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, host, scale, activation index, slots_grad, backend) -> y [T, d].

    `views` are the slots in x's dtype, `backend` is the module that computes (`native_backend`). `slots_grad` is where
    the slots' gradient is added in place (an fp32 [3, r, d] slice of the arena), or None: then autograd gets it. It is a
    plain ctx attribute because all slices of an arena share one version counter, which save_for_backward would check.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slots: Tensor,
        views: SlotViews,
        host: HostWeights,
        scale: float,
        activation: int,
        slots_grad: Tensor | SlotFactors | None,
        backend: ModuleType,
    ) -> Tensor:
        needs_dx = ctx.needs_input_grad[0]
        y, saved = backend.glu_ffn_forward(x, host, views, scale, activation, save=True, needs_dx=needs_dx)
        ctx.save_for_backward(x, *saved, *views)
        ctx.host, ctx.scale, ctx.activation = host, scale, activation
        ctx.slots_grad, ctx.slots_dtype, ctx.backend = slots_grad, slots.dtype, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved, gate_key, value = ctx.saved_tensors
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        dx, d_slots = ctx.backend.glu_ffn_backward(
            dy, x, saved, ctx.host, SlotViews(gate_key, value), ctx.scale, ctx.activation, needs_dx, ctx.slots_grad
        )
        if d_slots is not None:
            d_slots = d_slots.to(ctx.slots_dtype) if needs_slots else None
        return dx, d_slots, None, None, None, None, None, None


class SidewayGluFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, scale, activation index, slots_grad) -> the memory's own output [T, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slots: Tensor,
        views: SlotViews,
        scale: float,
        activation: int,
        slots_grad: Tensor | None,
    ) -> Tensor:
        y, memory_gate_key = matmul.sideway_forward(x, views, scale, activation)
        ctx.save_for_backward(x, memory_gate_key, *views)
        ctx.scale, ctx.activation = scale, activation
        ctx.slots_grad, ctx.slots_dtype = slots_grad, slots.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, memory_gate_key, *views = ctx.saved_tensors
        views = SlotViews(*views)
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        d_gate_key, d_slots = matmul.sideway_backward(dy, x, memory_gate_key, views, ctx.scale, ctx.activation, ctx.slots_grad)
        dx = d_gate_key @ views.gate_key if needs_dx else None
        if d_slots is not None:
            d_slots = d_slots.to(ctx.slots_dtype) if needs_slots else None
        return dx, d_slots, None, None, None, None


class SidewayMlpFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, scale, activation index, slots_grad) -> a Locas-MLP memory's output [T, d].

    `slots` is the parameter [2, capacity, d]; `views` are its first r rows, those in use, in x's dtype. `slots_grad` is
    where their gradient is added in place (an fp32 [2, r, d] slice of the arena), or None: then autograd gets it, with
    zeros behind the r rows. Where slots need no gradient only dx is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slots: Tensor,
        views: SlotViews,
        scale: float,
        activation: int,
        slots_grad: Tensor | None,
    ) -> Tensor:
        y, pre = matmul.sideway_mlp_forward(x, views, scale, activation)
        ctx.save_for_backward(x, pre, *views)
        ctx.scale, ctx.activation = scale, activation
        ctx.slots_grad, ctx.slots_dtype, ctx.capacity = slots_grad, slots.dtype, slots.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, *views = ctx.saved_tensors
        views = SlotViews(*views)
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        d_pre, d_slots = matmul.sideway_mlp_backward(dy, x, pre, views, ctx.scale, ctx.activation, needs_slots, ctx.slots_grad)
        dx = d_pre @ views.gate_key if needs_dx else None
        if d_slots is not None:
            unused = ctx.capacity - len(views.value)
            d_slots = torch.nn.functional.pad(d_slots.to(ctx.slots_dtype), (0, 0, 0, unused))
        return dx, d_slots, None, None, None, None


class TokenNLLFunction(torch.autograd.Function):
    """apply(logits [T, V], targets [T]) -> each token's negative log-likelihood [T].

    The gradient is made along with the value, in one kernel; it can be asked for once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        nll, ctx.d_logits = elementwise.cross_entropy(logits, targets, gradient=ctx.needs_input_grad[0])
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, ctx.d_logits = ctx.d_logits, None
        if d_logits is None:
            raise RuntimeError("token_nll: the gradient was already taken once; call it again for another")
        return d_logits.mul_(d_nll[:, None]), None
