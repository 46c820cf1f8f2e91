"""Loss and norms as native kernels, one call each, without checks and autograd."""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import stream_of


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-> the negative log-likelihood of each row [T] float32 and, if asked for, its gradient [T, V] in logits' dtype."""
    nll = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    d_logits = torch.empty_like(logits) if gradient else None
    _C.cross_entropy(logits, targets, nll, d_logits, stream_of(logits))
    return nll, d_logits


def rms_norm(x: Tensor, weight: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """-> weight * x / rms(x) over the rows of x [n, d], and with `save` 1 / rms [n]. CPU."""
    out = torch.empty_like(x)
    inverse_rms = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if save else None
    _C.rms_norm(x, weight, out, inverse_rms, eps)
    return out, inverse_rms


def rms_norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """-> dx [n, d]; the weight is frozen. CPU."""
    dx = torch.empty_like(x)
    _C.rms_norm_backward(d_out, x, weight, inverse_rms, dx)
    return dx
