"""The step of value rows preconditioned from the left, as Shampoo does with one of its two factors, as long as AdamW's.

    L <- 0.95 L + 0.05 G Gᵀ             [r, r] of each layer, G [r, d] the gradient of its value rows, of all processes
    (L / tr L + 0.01 / r)^(-1/2) M     M [r, d] AdamW's mean of gradients

Slots of a layer that answer the same tokens have gradients that are alike: each one's step then goes the way that the
others do not.
"""

import math

import torch
from torch import Tensor

from locas_ext.ops.ranks import Ranks

_DECAY = 0.95
_DAMPING = 1e-2
_CLOSE = 1e-9


def inverse_root(matrix: Tensor, least: float) -> Tensor:
    """matrix^(-1/2) of symmetric matrices [l, r, r] in float64 with eigenvalues from `least` to 1.

    The coupled Newton-Schulz iteration: products only, as a decomposition on a GPU would wait for it. Each of its steps is
    scaled by what the last one leaves of the range (Chen and Chow 2014), which takes half as many.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    root, inverse, low = matrix, identity, math.sqrt(least)
    while low < 1 - _CLOSE:  # the singular values of their product are from low to 1
        scale = math.sqrt(3 / (1 + low + low**2))
        factor = torch.baddbmm(identity, inverse, root, beta=1.5 * scale, alpha=-0.5 * scale**3)
        root, inverse = root @ factor, factor @ inverse
        low = scale * low * (1.5 - 0.5 * (scale * low) ** 2)
    return inverse


def preconditioned(gram: Tensor, rows: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """-> L [l, r, r] after a gradient, and the step [l, r / processes, d] that takes the place of AdamW's.

    gram: L before; rows: [3, l, r / processes, d], this process's value rows of the gradient, its mean M, and AdamW's step
    ranks: among whom the rows are split

    In float64, whatever precision a user allows products of float32. Nothing waits for the device.
    """
    gradient, mean, step = (rows if ranks is None else ranks.whole(rows, 2)).double()
    gram = torch.lerp(gradient @ gradient.mT, gram.double(), _DECAY)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    damping = _DAMPING / gram.shape[-1]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    least = damping / (1 + damping)
    way = inverse_root((1 - least) * gram / trace + least * identity, least) @ mean
    length, own = (tensor.norm(dim=(-2, -1), keepdim=True) for tensor in (step, way))
    way *= length / own.clamp_min(torch.finfo(own.dtype).tiny)
    return gram.float(), (way if ranks is None else ranks.mine(way, 1)).float()
