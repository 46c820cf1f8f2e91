"""Slots that are addressed by words: which inputs fire a slot is computed, what the slot then says is learned."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
_MOST = 2048  # rows in which words are looked for
Place = tuple[int, int]  # of a token in its row, with the number of what stands there


# ---- words and where they stand ----------------------------------------------------------------------------------
def words_of_passages(passages: Sequence[Passage], salient: Salience) -> list[str]:
    """The words worth asking for, in the order of the text; a name of several words by its last one."""
    sentences = dict.fromkeys(sentence for passage in passages for sentence in sentences_of(passage.text))
    return list(dict.fromkeys(word.text.split()[-1] for sentence in sentences for word in salient(sentence)))


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


# ---- FFN inputs --------------------------------------------------------------------------------------------------
def moments(
    attachment: Attachment, rows: Sequence[Row], places: Sequence[Sequence[Place]], count: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
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


def addressed_rows(general: Tensor, second: Tensor, means: Tensor, slots: Tensor, rank: int) -> Tensor:
    """Unit rows [rank, d] float64 that answer to words and to little else: a ridge regression from FFN inputs to slots.

    With A = `second` + `general` + ridge, row s is A⁻¹ times the sum of the means of the words of slot s: what it answers to
    each of them is 1 in the regression, to other words and to general inputs 0.

    general, second: [d, d], E[x xᵀ] at general places and at the words'; means: [words, d]; slots: [words], of each word
    """
    d = len(general)
    both = second + general
    both = both + _RIDGE * both.diagonal().mean() * torch.eye(d, dtype=both.dtype, device=both.device)
    wanted = _one_hot(slots, rank, means.device) @ means
    rows = torch.linalg.solve(both, wanted.T).T
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Addresses:
    """Where a memory's slots fire.

    rows: for each arena [l, r, d] float32
    words: how many there are
    """

    rows: list[Tensor]
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

        Each layer shares its slots out among the words in another order, so that two words that share one in a layer
        are apart in others.
        """
        spellings, state = spelled(prompter, words), attachment.state
        rows = random.Random(seed).sample(list(rows), min(_MOST, len(rows)))
        places = [found_in(row.ids, spellings) for row in rows]
        numbers = {number: at for at, number in enumerate(dict.fromkeys(n for each in places for _, n in each))}
        places = [[(place, numbers[number]) for place, number in each] for each in places]
        everywhere = [[(place, 0) for place in range(_FIRST, len(row.ids) - 1)] for row in general]
        of_words = moments(attachment, rows, places, len(numbers), device)
        of_all = moments(attachment, general, everywhere, 1, device)
        layers = []
        for layer, ((energy, _), (second, means)) in enumerate(zip(of_all, of_words, strict=True)):
            order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + layer))
            layers.append(addressed_rows(energy, second, means, order % state.rank, state.rank))
        arenas = [torch.stack([layers[p].to(arena.slots.device) for p in arena.positions]).float() for arena in state.arenas]
        return cls(arenas, len(numbers))

    @torch.no_grad()
    def put(self, state: MemoryState) -> None:
        """Added to the rows that decide when slots fire; those of a fresh memory are 0."""
        for arena, rows in zip(state.arenas, self.rows, strict=True):
            arena.slots[:, :-1] += rows[:, None]
            arena.round_slots()
