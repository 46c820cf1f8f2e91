"""Muon for slots: the momentum of each layer's gate, key and value rows [r, d], orthogonalized, then the row clip.

Newton-Schulz as in Jordan et al. (https://kellerjordan.github.io/posts/muon/), all matrices of a device at once; an update's
root mean square is 0.2, as with Liu et al., arXiv 2502.16982, so that AdamW's learning rates are of its size.
"""

import torch
from torch import Tensor

from locas_ext.state.memory_state import MemoryState

from .plane_updates import clip_rows_, finish, per_plane, put_where

_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
_SIZE = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """[..., r, d] with every singular value moved near to 1, those of a zero matrix excepted; float32 inside."""
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


@torch.no_grad()
def muon_step(
    state: MemoryState,
    learning_rate: float | Tensor,
    momentum: float = 0.9,
    clip: bool = True,
    gradient_scale: float = 1.0,
    finite: Tensor | None = None,
) -> None:
    """One step of Muon with Nesterov's momentum on the arenas' gradient times gradient_scale, then the row clip.

    learning_rate, finite: as in `adamw_step`
    """
    for arena in state.arenas:
        arena.optimizer_state("momentum_buffer")
    for arena in state.arenas:
        rate = per_plane(learning_rate, arena)
        for part in arena.learning_parts():
            slots, grad = arena.slots[part, :, : arena.used], arena.grad[part, :, : arena.used] * gradient_scale
            buffer = arena.optimizer_state("momentum_buffer")[part, :, : arena.used]
            moved = momentum * buffer + grad
            step = orthogonalized(grad + momentum * moved) * (_SIZE * max(slots.shape[-2:]) ** 0.5)
            new = clip_rows_(slots - rate * step, arena, part) if clip else slots - rate * step
            put_where(finite, (buffer, moved), (slots, new))
    finish(state, finite)
