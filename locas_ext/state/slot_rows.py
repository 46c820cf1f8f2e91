"""Slots come and go: what each tensor of an arena has of them, by rows, or by rows and columns, comes and goes with them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import SlotArena

# ---- of tensors [l, planes, r, d], and [l, r, r] of pairs of slots; the others have no slots ---------------------


def of_first(tensor: Tensor, slots: int) -> Tensor:
    """What the first slots have of it, a view."""
    places = {4: (..., slice(slots), slice(None)), 3: (..., slice(slots), slice(slots))}
    return tensor[places[tensor.dim()]] if tensor.dim() in places else tensor


def resized(arena: SlotArena, capacity: int) -> dict[str, Tensor]:
    """Copies of an arena's tensors with room for `capacity` slots, for `replace_tensors`; new ones are zero."""
    kept = min(arena.capacity, capacity)
    more = capacity - kept
    pads = {4: (0, 0, 0, more), 3: (0, more, 0, more)}
    with torch.inference_mode(False), torch.no_grad():
        by_slot = {name: tensor for name, tensor in arena.tensors().items() if tensor.dim() in pads}
        return {name: F.pad(of_first(tensor, kept), pads[tensor.dim()]) for name, tensor in by_slot.items()}


@torch.no_grad()
def drop_oldest(arena: SlotArena, count: int) -> None:
    """Moves the used slots but the first `count` to the front, in all of an arena's tensors; behind them are zeros."""
    kept = arena.used - count
    by_slot = [tensor for tensor in arena.tensors().values() if tensor.dim() >= 3]
    columns = [tensor.mT for tensor in by_slot if tensor.dim() == 3]
    for tensor in by_slot + columns:
        tensor[..., :kept, :] = tensor[..., count : arena.used, :].clone()
        tensor[..., kept : arena.used, :] = 0
    arena.round_slots()
