"""RMS norms as one kernel, with the residual's addition before them where a layer asks for it.

A norm takes part only if the kernel gives what its own forward gives, in Llama's convention (weight * x / rms) or in
Gemma's ((1 + weight) * x / rms).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locas_ext.ops.backends import elementwise

from .agreement import agree
from .binding import why_not_bound


class RMSNormFunction(torch.autograd.Function):
    """apply(x [..., d], residual [..., d] or None, weight [d], eps, weight_offset) -> (norm of the sum, the sum).

    No gradient for the weight. Without a residual the sum is x itself.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, eps, weight_offset):
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        others = None if residual is None else residual.reshape(rows.shape)
        out, total, inverse_rms = elementwise.rms_norm(rows, weight, eps, True, others, weight_offset)
        total = rows if total is None else total
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.weight_offset, ctx.adds = weight_offset, residual is not None
        return out.view(x.shape), x if residual is None else total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_sum):
        total, weight, inverse_rms = ctx.saved_tensors
        if d_out is None:
            return d_sum, d_sum if ctx.adds else None, None, None, None
        d_rows = d_out.reshape(total.shape)
        d_sum = None if d_sum is None else d_sum.reshape(total.shape)
        dx = elementwise.rms_norm_backward(d_rows, total, weight, inverse_rms, d_sum, ctx.weight_offset).view(d_out.shape)
        return dx, dx if ctx.adds else None, None, None, None


class FastNorm:
    """Stands in for the forward of one norm module."""

    def __init__(self, module: Any, weight_offset: float):
        """module: a norm as `is_plain` finds it, of a class of the host's"""
        self.module = module
        self.eps: float = getattr(module, "variance_epsilon", None) or module.eps
        self.weight_offset = weight_offset

    @property
    def weight(self) -> Tensor:
        """As it is now: it may have been replaced since."""
        return self.module.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (the norm of x + residual, x + residual)"""
        weight = self.weight
        if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
            return RMSNormFunction.apply(x, residual, weight, self.eps, self.weight_offset)
        rows = x.reshape(-1, x.shape[-1])
        others = None if residual is None else residual.reshape(rows.shape)
        out, total, _ = elementwise.rms_norm(rows, weight, self.eps, False, others, self.weight_offset)
        return out.view(x.shape), x if total is None else total.view(x.shape)


def is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and why_not_bound(module) is None
        and type(weight) is nn.Parameter
        and weight.dim() == 1
        and (weight.is_cpu or weight.is_cuda)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not weight.requires_grad
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
    )


@torch.no_grad()
def fast_norm(module: nn.Module) -> FastNorm | None:
    """What computes this module's formula, or None."""
    if not is_plain(module):
        return None
    weight: Any = module.weight
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator, dtype=torch.float32, device="cpu").to(weight)
    expected = module.forward(x)
    for weight_offset in (0.0, 1.0):
        fast = FastNorm(module, weight_offset)
        if agree(fast.forward(x), expected):
            return fast
    return None
