"""The fused updates: one launch steps and clips the slots of all layers on a device."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from locas_ext.ops.backends import slot_updates
from locas_ext.ops.types import SGD, AdamW
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState

from .plane_updates import adamw_planes, sgd_planes


def _learning_rate_tensor(learning_rate: float | torch.Tensor, arena: SlotArena) -> torch.Tensor:
    if isinstance(learning_rate, torch.Tensor):
        return learning_rate.reshape(()).to(arena.slots.device)
    # float64, as a Python float is: the kernels read it on the device
    return torch.tensor(learning_rate, dtype=torch.float64, device=arena.slots.device)


def _kernel_copy(arena: SlotArena) -> torch.Tensor | None:
    """The compute copy if the kernels can write its dtype."""
    copy = arena.rounded_copy()
    return copy if copy is not None and copy.dtype != torch.float64 else None


def _finish(state: MemoryState) -> None:
    for arena in state.arenas:
        if arena.compute.dtype == torch.float64:
            arena.compute.copy_(arena.slots)
    state.finish_update()


def _allocate(state: MemoryState, *names: str) -> None:
    """Makes the optimizer states of every arena, so that no arena is updated if another's find no room."""
    for arena in state.arenas:
        for name in names:
            arena.on_demand(name)


def _by_plane(state: MemoryState, learning_rate: float | torch.Tensor, clip: bool) -> bool:
    """Whether planes have learning rates or lengths of their own."""
    several = isinstance(learning_rate, torch.Tensor) and learning_rate.numel() > 1
    return several or (clip and any(arena.clips_by_row for arena in state.arenas))


def _scale_gradient(arena: SlotArena, scale: float) -> None:
    if arena.factors is None and scale != 1.0:
        arena.grad *= scale


def _gradient(arena: SlotArena, part: slice, scale: float, from_grad: Callable, from_factors: Callable) -> tuple:
    """-> the update function for what the backward left, and its arguments for the gradient of some layers."""
    if arena.factors is not None:
        return from_factors, arena.factors[part], scale
    return from_grad, arena.grad[part]


def _of(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[part]


@torch.no_grad()
def adamw_step(
    state: MemoryState,
    learning_rate: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: bool = True,
    gradient_scale: float = 1.0,
    finite: torch.Tensor | None = None,
    shampoo: bool = False,
    cautious: bool = False,
) -> None:
    """AdamW with bias correction on the arenas' gradient times gradient_scale, then the row clip.

    shampoo: whether the step of value rows is preconditioned (shampoo.py)
    cautious: whether only numbers move whose gradient and mean of gradients have the same sign
    finite: [] int64, 1 or 0, on the arena's device; at 0 nothing happens. Whoever passes it calls state.finish_update()
    when the host knows that it was 1. A captured graph passes it, and the learning rate as a tensor.
    """
    _allocate(state, "exp_avg", "exp_avg_sq", *(["value_gram"] if shampoo else []))
    for arena in state.arenas:
        arena.step += 1 if finite is None else finite
    if shampoo or cautious or _by_plane(state, learning_rate, clip):
        adamw_planes(state, learning_rate, betas, eps, weight_decay, clip, gradient_scale, finite, shampoo, cautious)
        return
    for arena in state.arenas:
        _scale_gradient(arena, gradient_scale)
        rate, copy = _learning_rate_tensor(learning_rate, arena), _kernel_copy(arena)
        kernels = slot_updates.adamw_slots_, slot_updates.adamw_slots_from_factors_
        for part in arena.learning_parts():  # neither moments nor decay nor clip move the others
            update, *gradient = _gradient(arena, part, gradient_scale, *kernels)
            update(
                arena.slots[part],
                *gradient,
                arena.on_demand("exp_avg")[part],
                arena.on_demand("exp_avg_sq")[part],
                arena.step,
                rate,
                AdamW(*betas, eps, weight_decay, clip),
                _of(copy, part),
                finite,
            )
    if finite is None:
        _finish(state)


@torch.no_grad()
def sgd_step(
    state: MemoryState,
    learning_rate: float | torch.Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: bool = True,
    gradient_scale: float = 1.0,
    finite: torch.Tensor | None = None,
) -> None:
    """SGD on the arenas' gradient times gradient_scale, then the row clip; finite as in `adamw_step`."""
    if momentum:
        _allocate(state, "momentum_buffer")
    if _by_plane(state, learning_rate, clip):
        sgd_planes(state, learning_rate, momentum, weight_decay, clip, gradient_scale, finite)
        return
    for arena in state.arenas:
        buffer = arena.momentum_buffer if momentum else None
        _scale_gradient(arena, gradient_scale)
        rate, copy = _learning_rate_tensor(learning_rate, arena), _kernel_copy(arena)
        kernels = slot_updates.sgd_slots_, slot_updates.sgd_slots_from_factors_
        for part in arena.learning_parts():
            update, *gradient = _gradient(arena, part, gradient_scale, *kernels)
            update(
                arena.slots[part],
                *gradient,
                _of(buffer, part),
                rate,
                SGD(momentum, weight_decay, clip),
                _of(copy, part),
                finite,
            )
    if finite is None:
        _finish(state)


class Update(Protocol):
    """What memorizing asks of an optimizer."""

    def __call__(
        self,
        state: MemoryState,
        learning_rate: float | torch.Tensor,
        *,
        clip: bool,
        gradient_scale: float,
        finite: torch.Tensor | None = None,
    ) -> None: ...


OPTIMIZERS: dict[str, Update] = {"adamw": adamw_step, "sgd": sgd_step, "shampoo": partial(adamw_step, shampoo=True)}
