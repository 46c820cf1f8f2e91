"""The backends as autograd Functions on [T, d] matrices: what eager code calls, behind the checks of `functional.py`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import elementwise, matmul
from .backends.base import Backend
from .types import HostWeights, SlotFactors, SlotViews


class GluFfnFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, host, scale, activation index, slots_grad, backend) -> y [T, d].

    `views` are the slots in x's dtype. `slots_grad` is where the slots' gradient is added in place (an fp32 [3, r, d] slice
    of the arena; SlotFactors on the CUDA backend), or None: then autograd gets it. It is a plain ctx attribute because all
    slices of an arena share one version counter, which save_for_backward would check.
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
        backend: Backend,
    ) -> Tensor:
        needs_dx = ctx.needs_input_grad[0]
        y, saved = backend.glu_ffn_forward(x, host, views, scale, activation, save=True, needs_dx=needs_dx)
        ctx.save_for_backward(x, *views, *saved)
        ctx.host, ctx.scale, ctx.activation = host, scale, activation
        ctx.slots_grad, ctx.slots_dtype, ctx.backend = slots_grad, slots.dtype, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_key, value, *saved = ctx.saved_tensors
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        dx, d_slots = ctx.backend.glu_ffn_backward(
            dy, x, saved, ctx.host, SlotViews(gate_key, value), ctx.scale, ctx.activation, needs_dx, ctx.slots_grad
        )
        if d_slots is not None:
            d_slots = d_slots.to(ctx.slots_dtype) if needs_slots else None
        return dx, d_slots, None, None, None, None, None, None


class SidewayGluFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, scale, activation index, slots_grad, backend) -> the memory's own output [T, d].

    Arguments as in `GluFfnFunction`.
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
        backend: Backend = matmul,
    ) -> Tensor:
        y, saved = backend.sideway_glu_forward(x, views, scale, activation)
        ctx.save_for_backward(x, *views, *saved)
        ctx.scale, ctx.activation, ctx.backend = scale, activation, backend
        ctx.slots_grad, ctx.slots_dtype = slots_grad, slots.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_key, value, *saved = ctx.saved_tensors
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        dx, d_slots = ctx.backend.sideway_glu_backward(
            dy, x, saved, SlotViews(gate_key, value), ctx.scale, ctx.activation, needs_dx, ctx.slots_grad
        )
        if d_slots is not None:
            d_slots = d_slots.to(ctx.slots_dtype) if needs_slots else None
        return dx, d_slots, None, None, None, None, None


class SidewayMlpFunction(torch.autograd.Function):
    """apply(x [T, d], slots, views, scale, activation index, slots_grad, backend) -> a Locas-MLP memory's output [T, d].

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
        backend: Backend = matmul,
    ) -> Tensor:
        y, saved = backend.sideway_mlp_forward(x, views, scale, activation)
        ctx.save_for_backward(x, *views, *saved)
        ctx.scale, ctx.activation, ctx.backend = scale, activation, backend
        ctx.slots_grad, ctx.slots_dtype, ctx.capacity = slots_grad, slots.dtype, slots.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, key, value, *saved = ctx.saved_tensors
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        dx, d_slots = ctx.backend.sideway_mlp_backward(
            dy, x, saved, SlotViews(key, value), ctx.scale, ctx.activation, needs_dx, needs_slots, ctx.slots_grad
        )
        if d_slots is not None:
            unused = ctx.capacity - len(value)
            d_slots = torch.nn.functional.pad(d_slots.to(ctx.slots_dtype), (0, 0, 0, unused))
        return dx, d_slots, None, None, None, None, None


class TokenNllFunction(torch.autograd.Function):
    """apply(logits [T, V], targets [T]) -> each token's negative log-likelihood [T].

    The gradient is made along with the value, in one kernel; it can be asked for once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        nll, ctx.d_logits = elementwise.token_nll(logits, targets, gradient=ctx.needs_input_grad[0])
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, ctx.d_logits = ctx.d_logits, None
        if d_logits is None:
            raise RuntimeError("token_nll: the gradient was already taken once; call it again for another")
        return d_logits.mul_(d_nll[:, None]), None
