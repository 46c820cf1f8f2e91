"""The updates of all slots as native kernels, one call each, without the checks of locas_ext/ops/slot_updates.py.

A step writes, besides the slots, its own states and `compute`, the rounded copy of the slots, where there is one. Where
`finite` is 0 it writes nothing.
"""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import SGD, AdamW, SlotFactors, stream_of

# What the update can form the slots' gradient from.
MOST_FACTOR_TOKENS, MOST_FACTOR_LAYERS, MOST_FACTOR_WIDTH = _C.MOST_FACTOR_TOKENS, _C.MOST_FACTOR_LAYERS, _C.MOST_FACTOR_WIDTH


def adamw_slots_(
    slots: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    adamw: AdamW,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step over rows of the last dimension, then the row clip; in place."""
    stream = stream_of(slots)
    _C.adamw_slots(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, *adamw, compute, finite, stream)


def sgd_slots_(
    slots: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    learning_rate: Tensor,
    sgd: SGD,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One SGD step over rows of the last dimension, then the row clip; in place."""
    _C.sgd_slots(slots, grad, momentum_buffer, learning_rate, *sgd, compute, finite, stream_of(slots))


def adamw_slots_from_factors_(
    slots: Tensor,
    factors: list[SlotFactors],
    factor_scale: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    adamw: AdamW,
    compute: Tensor,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step of slots [l, 3, r, d] on the gradient that the l factors make, times factor_scale; then the clip.

    At most MOST_FACTOR_TOKENS tokens and MOST_FACTOR_LAYERS layers, d at most MOST_FACTOR_WIDTH; else as
    `adamw_slots_`.
    """
    tensors, stream = [layer.kept() for layer in factors], stream_of(slots)
    _C.adamw_slots_from_factors(
        slots, exp_avg, exp_avg_sq, step, learning_rate, *adamw, compute, finite, tensors, factor_scale, stream
    )


def sgd_slots_from_factors_(
    slots: Tensor,
    factors: list[SlotFactors],
    factor_scale: float,
    momentum_buffer: Tensor | None,
    learning_rate: Tensor,
    sgd: SGD,
    compute: Tensor,
    finite: Tensor | None = None,
) -> None:
    """One SGD step as `adamw_slots_from_factors_`."""
    tensors, stream = [layer.kept() for layer in factors], stream_of(slots)
    _C.sgd_slots_from_factors(slots, momentum_buffer, learning_rate, *sgd, compute, finite, tensors, factor_scale, stream)


def write_slots_(
    slots: Tensor,
    start: int,
    inputs: Tensor,
    gradients: Tensor,
    epsilon: float,
    compute: Tensor | None = None,
    gradient_norm: Tensor | None = None,
) -> Tensor:
    """Closed-form slots of all layers and tokens, in place. -> the gradient norms [n] float32."""
    layers, n, _ = inputs.shape
    norms = torch.empty(n, dtype=torch.float32, device=slots.device)
    workspace = torch.empty(_C.write_slots_workspace(layers, n), dtype=torch.float64, device=slots.device)
    inputs, gradients = inputs.contiguous(), gradients.contiguous()
    if gradient_norm is not None:
        gradient_norm = gradient_norm.contiguous()
    stream = stream_of(slots)
    _C.write_slots(slots, start, inputs, gradients, epsilon, compute, gradient_norm, norms, workspace, stream)
    return norms
