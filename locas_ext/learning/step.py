"""One memorizing step: a chunk's loss, its gradient in the arenas, and the update. cuda_graph.py captures the same parts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.patching.attachment import Attachment
from locas_ext.state.memory_state import MemoryState

from .chunk import Window, chunk_loss, is_read_in_one
from .optimizers import OPTIMIZERS
from .settings import ResolvedSettings

# Lifts the gradients of a float16 host out of its subnormal range; divided out before the update.
FP16_LOSS_SCALE = 1024.0


def loss_scale(state: MemoryState) -> float:
    """What the loss is multiplied by, and the gradient divided by before the update."""
    return FP16_LOSS_SCALE if state.arenas[0].compute.dtype == torch.float16 else 1.0


def gradient(
    attachment: Attachment,
    window: Window,
    settings: ResolvedSettings,
    ends_early: bool,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """-> the summed loss of a window's targets; the gradient of their mean, times loss_scale(), is added into the arenas.

    check sees the loss before the backward. Nothing here waits for the device.
    """
    state, tokens = attachment.state, len(window.inputs)
    if is_read_in_one(attachment.host, window, settings.context_gradient):
        tokens += len(window.context)
    with state.accumulating(as_factors=attachment.keeps_factors(tokens)):
        loss = chunk_loss(attachment.host, window, settings.context_gradient, ends_early)
        if check is not None:
            check(loss)
        (loss * (loss_scale(state) / len(window.targets))).backward()
    return loss.detach()


def check_loss(loss: float, state: MemoryState, place: str) -> None:
    """LocasError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise LocasError(f"the loss is {loss} at {place}; the memory stays at version {state.version}")


def check_gradient(finite: bool, state: MemoryState, place: str) -> None:
    """LocasError for a gradient that is not finite."""
    if not finite:
        raise LocasError(f"the gradient is not finite at {place}; the memory stays at version {state.version}")


def eager_step(attachment: Attachment, window: Window, settings: ResolvedSettings, ends_early: bool, place: str) -> float:
    """Learns a window's targets. Returns their summed negative log-likelihood before the update.

    LocasError, with the memory unchanged, if loss or gradient is not finite.
    """
    state = attachment.state
    try:
        loss = gradient(attachment, window, settings, ends_early, lambda loss: check_loss(loss.item(), state, place))
        check_gradient(all([math.isfinite(arena.gradient_norm().item()) for arena in state.arenas]), state, place)
        update = OPTIMIZERS[settings.optimizer]
        update(state, settings.learning_rate, clip=attachment.config.clip, gradient_scale=1.0 / loss_scale(state))
    finally:
        state.zero_grad()
    return loss.item()
