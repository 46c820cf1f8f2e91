"""While memorizing on the CPU, the host's RMS norms run as one kernel instead of six small operations.

On a small host those operations cost more than the memory itself. A norm takes part only if it is plain and the kernel
gives what its own forward gives; everything is bound to instances and taken off again when the run ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locas_ext.ops.backends import elementwise


class RMSNormFunction(torch.autograd.Function):
    """apply(x [..., d], weight [d], eps) -> weight * x / rms(x); no gradient for the weight."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1])
        out, _, inverse_rms = elementwise.rms_norm(rows, weight, eps, save=True)
        ctx.save_for_backward(rows, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        rows, weight, inverse_rms = ctx.saved_tensors
        dx = elementwise.rms_norm_backward(d_out.reshape(rows.shape), rows, weight, inverse_rms)
        return dx.view(d_out.shape), None, None


class FastNorm:
    """Stands in for the forward of one norm module."""

    def __init__(self, module: Any):
        """module: a norm as `_is_plain` finds it, of a class of the host's"""
        self.weight: nn.Parameter = module.weight
        self.own = module.forward
        self.eps: float = getattr(module, "variance_epsilon", None) or module.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # under autocast
            return self.own(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return RMSNormFunction.apply(x, self.weight, self.eps)
        rows = x.reshape(-1, x.shape[-1])
        return elementwise.rms_norm(rows, self.weight, self.eps, save=False)[0].view(x.shape)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and "forward" not in module.__dict__
        and type(weight) is nn.Parameter
        and weight.dim() == 1
        and weight.is_cpu
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not weight.requires_grad
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
    )


@torch.no_grad()
def _agrees(module: Any, fast: FastNorm) -> bool:
    """Whether the kernel computes this module's formula (Gemma's, with 1 + weight, is another one)."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, module.weight.shape[0], generator=generator, dtype=torch.float32, device="cpu").to(module.weight.dtype)
    eps = torch.finfo(x.dtype).eps
    return torch.allclose(fast.forward(x), module.forward(x), rtol=4 * eps, atol=4 * eps)


@contextmanager
def fast_norms(model: nn.Module) -> Iterator[None]:
    """Inside this block the model's plain RMS norms run through the kernel."""
    bound = []
    try:
        for module in model.modules():
            if _is_plain(module) and _agrees(module, fast := FastNorm(module)):
                module.forward = fast.forward
                bound.append(module)
        yield
    finally:
        for module in bound:
            del module.forward
