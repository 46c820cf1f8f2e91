"""Keeping a memory silent where general text is, by where its key and gate rows may point."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locas_ext.learning.plane_updates import clip_rows_
from locas_ext.learning.run_guards import eager_host
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.base import PatchedFFN
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scoped

from .rows import Row, in_batches, logits_of
from .settings import PROJECTED

_FIRST = 1  # a text's first token draws attention in many hosts, and its FFN inputs are like no others


def energies(attachment: Attachment, rows: Sequence[Row], device: torch.device) -> list[Tensor]:
    """The mean of x xᵀ, [d, d] float64, over each layer's FFN inputs x on these rows; the model is the bare host here."""
    sums: dict[PatchedFFN[Any], Tensor] = {}
    counts: dict[PatchedFFN[Any], int] = {}
    inside: Tensor | None = None

    def observe(ffn: PatchedFFN[Any], x: Tensor) -> None:
        assert inside is not None
        chosen = x.detach().reshape(-1, x.shape[-1])[inside.to(x.device).reshape(-1)].double()
        sums[ffn] = sums.get(ffn, 0) + chosen.T @ chosen
        counts[ffn] = counts.get(ffn, 0) + len(chosen)

    with scoped(attachment.state, observer=observe), eager_host(attachment.host.model), torch.no_grad():
        for batch in in_batches(rows):
            those = [rows[index] for index in batch]
            lengths = torch.tensor([len(row.ids) - 1 for row in those])
            places = torch.arange(int(lengths.max()))
            inside = (places >= _FIRST) & (places < lengths[:, None])
            logits_of(attachment.host.model, those, device)
    return [sums[ffn] / max(1, counts[ffn]) for ffn in attachment.ffns]


def ways(energy: Tensor, locality: str, quiet: float) -> Tensor:
    """The symmetric matrix [d, d] that a change of a key row is multiplied by.

    energy: [d, d], the mean of x xᵀ over general inputs
    locality: "projected": what lies in the leading eigenvectors that hold the share `quiet` of the energy is taken out;
        "whitened": each eigenvector by (its energy + (1 - quiet) times the mean)^-1/2, scaled to a mean square of 1
    """
    values, vectors = torch.linalg.eigh(energy.double())
    values = values.clamp_min(0.0)
    if locality == PROJECTED:
        larger = values.flip(0).cumsum(0).flip(0)[1:] / values.sum()  # the share of all those before each but the first in size
        factors = torch.cat([larger >= quiet, larger.new_tensor([quiet == 0]).bool()]).double()
        factors[0] = 1.0  # one way is always left
    else:
        factors = (values + (1 - quiet) * values.mean()).rsqrt()
        factors = factors / factors.square().mean().sqrt()
    return (vectors * factors) @ vectors.T


@dataclass(frozen=True)
class Locality:
    """What steers the rows that decide when slots fire, gate and key; value rows move freely.

    ways: for each arena [l, d, d] float32, see `ways`
    """

    ways: list[Tensor]

    @classmethod
    def of(cls, attachment: Attachment, rows: Sequence[Row], locality: str, quiet: float, device: torch.device) -> "Locality":
        """By a host's FFN inputs on general rows; the model is the bare host here."""
        layers = [ways(energy, locality, quiet) for energy in energies(attachment, rows, device)]
        arenas = attachment.state.arenas
        return cls([torch.stack([layers[p].to(arena.slots.device) for p in arena.positions]).float() for arena in arenas])

    @torch.no_grad()
    def begin(self, state: MemoryState) -> None:
        """Turns the rows of a memory that has learned nothing; their lengths stay."""
        for arena, way in zip(state.arenas, self.ways, strict=True):
            rows = arena.slots[:, :-1]
            turned = rows @ way[:, None]
            rows.copy_(turned * (rows.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True).clamp_min(1e-12)))
            arena.round_slots()

    @contextmanager
    def update(self, state: MemoryState, clip: bool) -> Iterator[None]:
        """Around an optimizer's step, which must not clip: the change of a row goes the ways that are left.

        clip: whether no row may be longer in the end than an optimizer's clip leaves it
        """
        before = []
        with torch.no_grad():
            for arena, way in zip(state.arenas, self.ways, strict=True):
                before.append(arena.slots[:, :-1].clone())
                arena.grad[:, :-1] = arena.grad[:, :-1] @ way[:, None]
        yield
        with torch.no_grad():
            for arena, way, rows in zip(state.arenas, self.ways, before, strict=True):
                _finish(arena, way, rows, clip)


def _finish(arena: SlotArena, way: Tensor, before: Tensor, clip: bool) -> None:
    for part in arena.learning_parts():
        slots, rows = arena.slots[part], arena.slots[part, :-1]
        rows.copy_(before[part] + (rows - before[part]) @ way[part, None])
        if clip:
            clip_rows_(slots, arena, part)
    arena.round_slots()
