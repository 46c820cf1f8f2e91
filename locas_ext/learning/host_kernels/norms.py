"""Norms as one kernel, with the residual's addition before them where a layer asks for it.

A norm takes part only if the kernel gives what its own forward gives: an RMS norm in Llama's convention (weight * x / rms) or
in Gemma's ((1 + weight) * x / rms), or torch's layer norm.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locas_ext.ops.backends import elementwise

from .agreement import agree
from .binding import why_not_bound


class NormFunction(torch.autograd.Function):
    """apply(x [..., d], residual [..., d] or None, norm, weight [d]) -> (norm of the sum, the sum).

    norm: a FastNorm. No gradient for its weight. Without a residual the sum is x itself.
    """

    @staticmethod
    def forward(ctx, x, residual, norm, weight):
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        others = None if residual is None else residual.reshape(rows.shape)
        out, total, statistics = norm.rows(rows, weight, True, others)
        total = rows if total is None else total
        ctx.save_for_backward(total, weight, *statistics)
        ctx.norm, ctx.adds = norm, residual is not None
        return out.view(x.shape), x if residual is None else total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_sum):
        total, weight, *statistics = ctx.saved_tensors
        if d_out is None:
            return d_sum, d_sum if ctx.adds else None, None, None
        d_rows = d_out.reshape(total.shape)
        d_sum = None if d_sum is None else d_sum.reshape(total.shape)
        dx = ctx.norm.rows_backward(d_rows, total, weight, statistics, d_sum).view(d_out.shape)
        return dx, dx if ctx.adds else None, None, None


class FastNorm(ABC):
    """Stands in for the forward of one norm module."""

    def __init__(self, module: Any):
        """module: a norm as `is_plain` finds it, of a class of the host's"""
        self.module = module
        self.eps: float = getattr(module, "variance_epsilon", None) or module.eps

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
            return NormFunction.apply(x, residual, self, weight)
        rows = x.reshape(-1, x.shape[-1])
        others = None if residual is None else residual.reshape(rows.shape)
        out, total, _ = self.rows(rows, weight, False, others)
        return out.view(x.shape), x if total is None else total.view(x.shape)

    @abstractmethod
    def rows(
        self, x: Tensor, weight: Tensor, save: bool, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """x [n, d], residual [n, d] -> the norm, the sum where there is a residual, and with `save` the statistics."""

    @abstractmethod
    def rows_backward(
        self, d_out: Tensor, total: Tensor, weight: Tensor, statistics: list[Tensor], d_sum: Tensor | None
    ) -> Tensor:
        """-> the gradient [n, d] of the sum `total`; d_sum: what reaches it by other ways"""


class FastRMSNorm(FastNorm):
    """weight_offset: 0 in Llama's convention, 1 in Gemma's"""

    def __init__(self, module: Any, weight_offset: float):
        super().__init__(module)
        self.weight_offset = weight_offset

    def rows(self, x, weight, save, residual):
        out, total, inverse_rms = elementwise.rms_norm(x, weight, self.eps, save, residual, self.weight_offset)
        return out, total, () if inverse_rms is None else (inverse_rms,)

    def rows_backward(self, d_out, total, weight, statistics, d_sum):
        (inverse_rms,) = statistics
        return elementwise.rms_norm_backward(d_out, total, weight, inverse_rms, d_sum, self.weight_offset)


class FastLayerNorm(FastNorm):
    """torch's layer norm, with or without a bias."""

    def rows(self, x, weight, save, residual):
        out, total, statistics = elementwise.layer_norm(x, weight, self.module.bias, self.eps, save, residual)
        return out, total, statistics or ()

    def rows_backward(self, d_out, total, weight, statistics, d_sum):
        mean, inverse_std = statistics
        return elementwise.layer_norm_backward(d_out, total, weight, (mean, inverse_std), d_sum)


def is_plain(module: nn.Module) -> bool:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        (type(module) is nn.LayerNorm or type(module).__name__.endswith("RMSNorm"))
        and why_not_bound(module) is None
        and type(weight) is nn.Parameter
        and weight.dim() == 1
        and (weight.is_cpu or weight.is_cuda)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
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
    candidates = [FastLayerNorm(module)] if type(module) is nn.LayerNorm else [FastRMSNorm(module, o) for o in (0.0, 1.0)]
    return next((fast for fast in candidates if agree(fast.forward(x), expected)), None)
