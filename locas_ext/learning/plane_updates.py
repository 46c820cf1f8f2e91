"""AdamW and SGD in plain torch, where planes have rates, lengths or steps of their own; arguments: optimizers.py."""

import torch
from torch import Tensor

from locas_ext.ops.ranks import Ranks
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import VALUE
from locas_ext.state.slot_rows import of_first

from .shampoo import preconditioned

_LEAST_SHARE = 1e-3


def _per_plane(rate: float | Tensor, arena: SlotArena) -> Tensor:
    """A learning rate, or one per plane [planes], as float32 [planes or 1, 1, 1] on the arena's device."""
    device = arena.slots.device
    rates = (
        rate.to(device, torch.float32) if isinstance(rate, Tensor) else torch.tensor(rate, device=device, dtype=torch.float32)
    )
    return rates.reshape(-1, 1, 1)


def clip_rows_(rows: Tensor, arena: SlotArena, part: slice) -> Tensor:
    """Scales back the rows [l, n, r, d] of the last n planes that are longer than theirs may be."""
    planes = slice(-rows.shape[1], None)
    longest = rows.new_ones(()) if arena.longest is None else arena.longest[part, planes, None, None]
    if arena.lengths is not None:
        longest = torch.maximum(longest, arena.lengths[part, planes])
    lengths = rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)  # 0 / 0 is no number
    return rows.div_((lengths / longest).clamp_min(1.0))


def _put_where(finite: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> None:
    """Copies the second of each pair into the first, unless finite is 0."""
    for old, new in pairs:
        old.copy_(new if finite is None else torch.where(finite != 0, new, old))


def _finish(state: MemoryState, finite: Tensor | None) -> None:
    """After the slots of every arena were written; see `adamw_step` for finite."""
    for arena in state.arenas:
        if (copy := arena.rounded_copy()) is not None:
            copy.copy_(arena.slots)
    if finite is None:
        state.finish_update()


def adamw_planes(state, learning_rate, betas, eps, weight_decay, clip, gradient_scale, finite, shampoo, cautious) -> None:
    """`adamw_step` where planes have rates, lengths or steps of their own."""
    for arena in state.arenas:
        rate, (beta1, beta2) = _per_plane(learning_rate, arena), betas
        correction1, correction2 = 1 - beta1 ** arena.step.double(), 1 - beta2 ** arena.step.double()
        for part in arena.learning_parts():
            slots, grad = arena.slots[part], arena.grad[part] * gradient_scale
            states = arena.on_demand("exp_avg")[part], arena.on_demand("exp_avg_sq")[part]
            first, second = torch.lerp(grad, states[0], beta1), torch.lerp(grad.square(), states[1], beta2)
            step = (first / correction1) / ((second / correction2).sqrt() + eps)
            pairs = [(states[0], first), (states[1], second)]
            if shampoo:
                pairs.append(_shampoo_(step, grad, first, arena, part, state.ranks))
            if cautious:
                step = _cautious(step, grad, first, arena, state.ranks)
            new = (slots - rate * (step + weight_decay * slots)).float()
            _put_where(finite, *pairs, (slots, clip_rows_(new, arena, part) if clip else new))
    _finish(state, finite)


def _shampoo_(
    step: Tensor, grad: Tensor, mean: Tensor, arena: SlotArena, part: slice, ranks: Ranks | None
) -> tuple[Tensor, Tensor]:
    """Puts Shampoo's step of value rows in the place of AdamW's. -> its state, and what takes the state's place."""
    used = arena.used or arena.capacity
    gram = of_first(arena.on_demand("value_gram")[part], used * arena.processes)
    rows = torch.stack([tensor[:, VALUE, :used] for tensor in (grad, mean, step)])
    new, step[:, VALUE, :used] = preconditioned(gram, rows, ranks)
    return gram, new


def _cautious(step: Tensor, grad: Tensor, mean: Tensor, arena: SlotArena, ranks: Ranks | None) -> Tensor:
    """The step where gradient and mean have the same sign, divided by the share of a plane's numbers where they have."""
    agree = grad.sign() * mean.sign() > 0
    share = agree.sum((-2, -1), keepdim=True, dtype=torch.float32)  # unused slots have no gradient
    if ranks is not None:
        ranks.add_up(share)
    share /= (arena.used or arena.capacity) * arena.processes * arena.slots.shape[-1]
    return step * agree / share.clamp_min(_LEAST_SHARE)


def sgd_planes(state, learning_rate, momentum, weight_decay, clip, gradient_scale, finite) -> None:
    """`sgd_step` where planes have rates or lengths of their own."""
    for arena in state.arenas:
        rate = _per_plane(learning_rate, arena)
        for part in arena.learning_parts():
            slots, step = arena.slots[part], arena.grad[part] * gradient_scale
            pairs = []
            if momentum:
                step = momentum * arena.on_demand("momentum_buffer")[part] + step
                pairs.append((arena.on_demand("momentum_buffer")[part], step))
            new = slots - rate * (step + weight_decay * slots)
            _put_where(finite, *pairs, (slots, clip_rows_(new, arena, part) if clip else new))
    _finish(state, finite)
