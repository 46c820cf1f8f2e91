"""One memorizing step: a chunk's loss, its gradient in the arenas, and the update. graph_step.py captures the same parts."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .chunk import Window, chunk_loss
from .errors import LocasError
from .optim import OPTIMIZERS
from .patch import Attachment
from .slots import MemoryState

if TYPE_CHECKING:
    from .online import Settings

# Lifts the gradients of a float16 host out of its subnormal range; divided out before the update.
FP16_LOSS_SCALE = 1024.0


def backward(state: MemoryState, loss: Tensor, tokens: int) -> None:
    """Adds the gradient of a summed loss, divided by `tokens`, into the arenas; nothing waits for the device."""
    loss_scale = FP16_LOSS_SCALE if state.arenas[0].compute.dtype == torch.float16 else 1.0
    state.accumulate = True
    try:
        (loss * (loss_scale / tokens)).backward()
    finally:
        state.accumulate = False
    if loss_scale != 1.0:
        for arena in state.arenas:
            arena.grad /= loss_scale


def check_loss(loss: float, state: MemoryState, place: str) -> None:
    """LocasError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise LocasError(f"the loss is {loss} at {place}; the memory stays at version {state.version}")


def check_gradient(finite: bool, state: MemoryState, place: str) -> None:
    """LocasError for a gradient that is not finite."""
    if not finite:
        raise LocasError(f"the gradient is not finite at {place}; the memory stays at version {state.version}")


def eager_step(attachment: Attachment, window: Window, settings: "Settings", ends_early: bool, place: str) -> float:
    """Learns a window's targets. Returns their summed negative log-likelihood before the update.

    LocasError, with the memory unchanged, if loss or gradient is not finite.
    """
    state = attachment.state
    loss = chunk_loss(attachment.host, window, settings.context_gradient, ends_early)
    value = loss.item()
    check_loss(value, state, place)
    try:
        backward(state, loss, len(window.targets))
        check_gradient(all([math.isfinite(arena.grad.norm().item()) for arena in state.arenas]), state, place)
        OPTIMIZERS[settings.optimizer](state, settings.learning_rate, clip=attachment.config.clip)
    finally:
        state.zero_grad()
    return value
