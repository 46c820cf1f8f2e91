"""Slots that are addressed by words: which inputs fire a slot is computed, what the slot then says is learned."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.errors import LocasError
from locas_ext.learning.optimizers import OPTIMIZERS
from locas_ext.learning.plane_updates import clip_rows_
from locas_ext.learning.run_guards import eager_host
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.base import PatchedFFN
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scoped

from .passages import Passage, sentences_of
from .prompts import Prompter
from .rows import Row, in_batches, logits_of
from .salience import Salience

_FIRST = 1  # a text's first token draws attention in many hosts, and its FFN inputs are like no others
_RIDGE = 1e-3  # of the mean energy of a direction
_ENOUGH = 16  # places of a word
_THRESHOLD, _GATE = 0.6, 8.0  # the answer from which on a gate opens; what it gets at an answer of 1
_INNER = 0.25, 0.87  # shares of the host's depth between which slots are addressed: layers 8 to 25 of 30
Place = tuple[int, int]  # of a token in its row, with the number of what stands there
Moments = tuple[Tensor, Tensor]  # E[x xᵀ], [d, d], and the mean x of each number, [numbers, d]


# ---- words and where they stand ----------------------------------------------------------------------------------
def addressed_words(passages: Sequence[Passage], salient: Salience, prompter: Prompter, general: Sequence[Row]) -> list[str]:
    """The words worth asking for, in the order of the text; a name of several words by its last one.

    A word that general rows have too counts only beside a name: elsewhere its slots would fire in any text.
    """
    usual = set(re.findall(r"\w+", " ".join(prompter.tokenizer.decode(row.ids) for row in general).lower()))
    result: dict[str, None] = {}
    for sentence in dict.fromkeys(sentence for passage in passages for sentence in sentences_of(passage.text)):
        words = salient(sentence)
        named = any(word.name for word in words)
        result |= dict.fromkeys(word.text.split()[-1] for word in words if named or word.text.lower() not in usual)
    return list(result)


def spelled(prompter: Prompter, words: Sequence[str]) -> dict[tuple[int, ...], int]:
    """The number of each word by its tokens, inside a text and at the beginning of one."""
    result: dict[tuple[int, ...], int] = {}
    for number, word in enumerate(words):
        for text in (f" {word}", word, f" {word.capitalize()}", word.capitalize()):
            result.setdefault(tuple(prompter.encode(text)), number)
    return result


def found_in(ids: Sequence[int], spellings: dict[tuple[int, ...], int]) -> list[Place]:
    """(the place of its last token, its number) of each word in a row that is read to its last token but one."""
    longest = max(map(len, spellings), default=0)
    result, place = [], 0
    while place < len(ids) - 1:
        fits = (n for n in range(min(longest, len(ids) - 1 - place), 0, -1) if tuple(ids[place : place + n]) in spellings)
        length = next(fits, 0)
        if length and place + length > _FIRST:
            result.append((place + length - 1, spellings[tuple(ids[place : place + length])]))
        place += max(1, length)
    return result


def enough(rows: Sequence[Row], spellings: dict[tuple[int, ...], int]) -> tuple[list[Row], list[list[Place]]]:
    """The first rows in which a word stands that did not stand in _ENOUGH places before, and their words' places."""
    often: Counter[int] = Counter()
    chosen, places = [], []
    for row in rows:
        found = found_in(row.ids, spellings)
        if any(often[number] < _ENOUGH for _, number in found):
            often.update(number for _, number in found)
            chosen.append(row)
            places.append(found)
    return chosen, places


# ---- FFN inputs --------------------------------------------------------------------------------------------------
def moments(
    attachment: Attachment, rows: Sequence[Row], places: Sequence[Sequence[Place]], count: int, device: torch.device
) -> list[Moments]:
    """By a host's layers, over the FFN inputs x at some places of rows: E[x xᵀ], [d, d], where each number counts alike
    however often it stands somewhere, and E[x] of each of the numbers, [count, d]. The model is the bare host here.
    """
    often = Counter(number for each in places for _, number in each)
    sums: dict[PatchedFFN[Any], list[Tensor]] = {}
    flat = numbers = weights = torch.empty(0)  # of the batch: places in its inputs, what stands there, how much it counts

    def observe(ffn: PatchedFFN[Any], x: Tensor) -> None:
        chosen = x.detach().reshape(-1, x.shape[-1])[flat.to(x.device)].double()
        weighted = chosen * weights.to(x.device)[:, None]
        found = [weighted.T @ chosen, _one_hot(numbers, count, x.device) @ weighted, weights.sum()]
        sums[ffn] = [old + new for old, new in zip(sums[ffn], found, strict=True)] if ffn in sums else found

    with scoped(attachment.state, observer=observe), eager_host(attachment.host.model), torch.no_grad():
        for batch in in_batches(rows):
            width = max(len(rows[index].ids) for index in batch) - 1
            here = [(at * width + place, number) for at, index in enumerate(batch) for place, number in places[index]]
            flat, numbers = torch.tensor(here, dtype=torch.long).reshape(-1, 2).T
            weights = torch.tensor([1 / often[number] for _, number in here], dtype=torch.float64)
            logits_of(attachment.host.model, [rows[index] for index in batch], device)
    # the sum of the weights: how many numbers there are, times how often the host calls this FFN in a forward
    found = (sums[ffn] for ffn in attachment.ffns)
    return [(second / whole, means * (len(often) / whole)) for second, means, whole in found]


def _one_hot(numbers: Tensor, count: int, device: torch.device) -> Tensor:
    """[count, n] float64; a product with it sums by number, in the same order each time."""
    return nn.functional.one_hot(numbers, count).T.to(device, torch.float64)


def addressed_rows(general: Moments, words: Moments, slots: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows [rank, d] float64 that answer to words and to little else, and a row [d] that answers everywhere with 1.

    A ridge regression from FFN inputs to slots: with A = E[x xᵀ] of words + E[x xᵀ] of general inputs + ridge, row s is A⁻¹
    times the sum of the means of the words of slot s, scaled so that their mean answer is 1. The other row is A⁻¹ times the
    mean of all, scaled likewise.

    general: with a single mean; slots: [words], the slot of each
    """
    (energy, middle), (second, means) = general, words
    both, mean = energy + second, middle[0] + means.mean(0)
    both = both + _RIDGE * both.diagonal().mean() * torch.eye(len(both), dtype=both.dtype, device=both.device)
    of_slots = _one_hot(slots, rank, means.device)
    *rows, level = torch.linalg.solve(both, torch.cat([of_slots @ means, mean[None]]).T).T
    found = torch.stack(rows)
    answers = (found * (of_slots @ means)).sum(1) / of_slots.sum(1).clamp_min(1)
    return found / torch.where(answers > 0, answers, 1)[:, None], level * 2 / (level @ mean)


def inner_positions(layers: Sequence[int], depth: int) -> set[int]:
    """Which of a memory's layers, by their place in it, are addressed in a host so deep; all if none lies within _INNER.

    >>> inner_positions([0, 7, 8, 25, 26], depth=30), inner_positions([0, 29], depth=30)
    ({2, 3}, {0, 1})
    """
    first, last = (share * depth for share in _INNER)
    return {at for at, layer in enumerate(layers) if first <= layer and layer + 1 <= last} or set(range(len(layers)))


@dataclass(frozen=True)
class Addresses:
    """Where a memory's slots fire.

    rows: for each arena [l, r, d] float32, the rows that answer to words; levels: [l, 1, d], what answers everywhere; both
        are 0 in the outer layers, whose slots then say nothing
    words: how many there are
    """

    rows: list[Tensor]
    levels: list[Tensor]
    words: int

    @classmethod
    def of(
        cls,
        attachment: Attachment,
        prompter: Prompter,
        words: Sequence[str],
        rows: Sequence[Row],
        general: Sequence[Row],
        seed: int,
        device: torch.device,
    ) -> "Addresses":
        """Of words where they stand in rows, apart from what general rows have; the model is the bare host here.

        In the first and the last layers slots stay at 0: there they cost more of what the host knows (docs/method.md).
        Each layer shares its slots out among the words in another order, so that two words that share one in a layer
        are apart in others. LocasError where no word stands anywhere.
        """
        spellings, state = spelled(prompter, words), attachment.state
        rows, places = enough(random.Random(seed).sample(list(rows), len(rows)), spellings)
        numbers = {number: at for at, number in enumerate(dict.fromkeys(n for each in places for _, n in each))}
        if not numbers:
            raise LocasError(
                "keys is 'addressed', but the text has no word that is worth asking for; expected a text with names or rare "
                "words, or keys='learned'"
            )
        places = [[(place, numbers[number]) for place, number in each] for each in places]
        everywhere = [[(place, 0) for place in range(_FIRST, len(row.ids) - 1)] for row in general]
        of_words = moments(attachment, rows, places, len(numbers), device)
        of_all = moments(attachment, general, everywhere, 1, device)
        inner, found = inner_positions(state.layers, attachment.host.depth), []
        for position, (all_, own) in enumerate(zip(of_all, of_words, strict=True)):
            order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + position))
            rows_level = addressed_rows(all_, own, order % state.rank, state.rank)
            found.append(rows_level if position in inner else tuple(map(torch.zeros_like, rows_level)))
        at = lambda arena, n: torch.stack([found[p][n].to(arena.slots.device) for p in arena.positions]).float()
        arenas = state.arenas
        return cls([at(arena, 0) for arena in arenas], [at(arena, 1)[:, None] for arena in arenas], len(numbers))

    @torch.no_grad()
    def put(self, state: MemoryState, fresh: bool) -> None:
        """Added to the rows that decide when slots fire: gates that open above an answer of _THRESHOLD, and keys.

        No later update clips them shorter than they are now: then they would fire elsewhere.

        fresh: whether these rows are 0 so far; else they keep the thresholds they have
        """
        slope = _GATE / (1 - _THRESHOLD)
        for arena, rows, level in zip(state.arenas, self.rows, self.levels, strict=True):
            arena.slots[:, 0] += slope * (rows - _THRESHOLD * level if fresh else rows)
            if state.planes == 3:
                arena.slots[:, 1] += rows
            arena.on_demand("lengths")[:, :-1] = arena.slots[:, :-1].norm(dim=-1, keepdim=True)
            arena.round_slots()


def update_values(state: MemoryState, rate: float, clip: bool, scale: float) -> None:
    """AdamW's step of the value rows alone, with the gradient times scale; clip: whether they are then clipped."""
    rates = torch.tensor([0.0] * (state.planes - 1) + [rate])
    OPTIMIZERS["adamw"](state, rates, clip=False, gradient_scale=scale)
    if clip:
        with torch.no_grad():
            for arena in state.arenas:
                for part in arena.learning_parts():
                    clip_rows_(arena.slots[part, -1:], arena, part)
                arena.round_slots()
