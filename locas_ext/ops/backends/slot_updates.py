"""The updates of all slots as native kernels, one call each, without the checks of locas_ext/ops/slot_updates.py."""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import SlotFactors, stream_of

# What the update can form the slots' gradient from.
MOST_FACTOR_TOKENS, MOST_FACTOR_LAYERS, MOST_FACTOR_WIDTH = _C.MOST_FACTOR_TOKENS, _C.MOST_FACTOR_LAYERS, _C.MOST_FACTOR_WIDTH


def update_slots_(
    slots: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step over rows of the last dimension, then the row clip; in place."""
    _C.adamw_slots(
        slots,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        learning_rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        clip,
        compute,
        finite,
        stream_of(slots),
    )


def sgd_slots_(
    slots: Tensor,
    grad: Tensor,
    learning_rate: Tensor,
    momentum_buffer: Tensor | None,
    momentum: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One SGD step over rows of the last dimension, then the row clip; in place."""
    _C.sgd_slots(slots, grad, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite, stream_of(slots))


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
    if gradient_norm is not None:
        gradient_norm = gradient_norm.contiguous()
    _C.write_slots(
        slots,
        start,
        inputs.contiguous(),
        gradients.contiguous(),
        epsilon,
        compute,
        gradient_norm,
        norms,
        workspace,
        stream_of(slots),
    )
    return norms


def adamw_from_factors_(
    slots: Tensor,
    factors: list[SlotFactors],
    factor_scale: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step of slots [l, 3, r, d] on the gradient that the l factors make, times factor_scale; then the clip.

    At most MOST_FACTOR_TOKENS tokens and MOST_FACTOR_LAYERS layers, d at most MOST_FACTOR_WIDTH; else as
    `update_slots_`.
    """
    _C.adamw_slots_from_factors(
        slots,
        exp_avg,
        exp_avg_sq,
        step,
        learning_rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        clip,
        compute,
        finite,
        [layer.kept() for layer in factors],
        factor_scale,
        stream_of(slots),
    )


def sgd_from_factors_(
    slots: Tensor,
    factors: list[SlotFactors],
    factor_scale: float,
    learning_rate: Tensor,
    momentum_buffer: Tensor | None,
    momentum: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor,
    finite: Tensor | None = None,
) -> None:
    """One SGD step as `adamw_from_factors_`."""
    _C.sgd_slots_from_factors(
        slots,
        momentum_buffer,
        learning_rate,
        momentum,
        weight_decay,
        clip,
        compute,
        finite,
        [layer.kept() for layer in factors],
        factor_scale,
        stream_of(slots),
    )
