"""The host with a passage in view: how surprised it is by a sentence, whether it answers a question, and how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from locas_ext.ops import token_nll

from .pairs import Pair, parts_of
from .passages import Passage, offsets_of, sentences_of, surprise, words_of
from .prompts import Prompter
from .rows import Row, expectations, in_batches, logits_of, targets_of

ANSWERED = 0.5  # the share of an answer's tokens that the host must find the likeliest, each after those before it
Advance = Callable[[int], None]


def surprises_of(model: Any, prompter: Prompter, passages: Sequence[Passage], device: torch.device) -> dict[str, list[float]]:
    """How little the model would have guessed each word of each sentence, in nats, from the sentence before it."""
    begin = prompter.passage("") or prompter.encode("\n") or prompter.end()
    read = {}
    for sentence in dict.fromkeys(sentence for passage in passages for sentence in sentences_of(passage.text)):
        if (found := offsets_of(prompter.tokenizer, sentence)) is not None and found[0]:
            read[sentence] = found
    sentences = list(read)
    rows = [Row((*begin, *read[sentence][0]), len(begin)) for sentence in sentences]
    result = {}
    with torch.no_grad():
        for batch in in_batches(rows):
            those = [rows[index] for index in batch]
            logits = logits_of(model, those, device).float()
            nats = token_nll(logits, targets_of(those, logits.device)).tolist()
            for index in batch:
                losses, nats = nats[: rows[index].count], nats[rows[index].count :]
                sentence = sentences[index]
                result[sentence] = surprise(sentence, words_of(sentence), read[sentence][1], losses)
    return result


@dataclass(frozen=True)
class Lesson:
    """A pair as the memory learns it: its row without the passage, and what the host expects with it in view.

    answered: the share of the answer's tokens that are the host's likeliest, with the passage in view
    """

    pair: Pair
    row: Row
    answered: float


def lessons_without(prompter: Prompter, pairs: Sequence[Pair], positions: int) -> list[Lesson]:
    """A Lesson for each pair that fits, whose answer itself is what is expected; nothing is read."""
    result = []
    for pair in pairs:
        plain, answer = parts_of(prompter, pair, None)
        if plain and len(plain) + len(answer) <= positions:
            result.append(Lesson(pair, Row((*plain, *answer), len(plain)), 1.0))
    return result


def lessons_of(
    model: Any,
    prompter: Prompter,
    passages: Sequence[Passage],
    pairs: Sequence[Pair],
    top_k: int,
    positions: int,
    device: torch.device,
    advance: Advance,
) -> list[Lesson]:
    """A Lesson for each pair that fits into the host's positions; the model is the bare host here."""
    seen: list[Row] = []
    alone: list[Row] = []
    fitting: list[Pair] = []
    for pair in pairs:
        shown, answer = parts_of(prompter, pair, passages[pair.passage].text)
        plain, _ = parts_of(prompter, pair, None)
        if plain and len(shown) + len(answer) <= positions:
            seen.append(Row((*shown, *answer), len(shown)))
            alone.append(Row((*plain, *answer), len(plain)))
            fitting.append(pair)
    found = expectations(model, seen, top_k, device, advance)
    return [
        Lesson(pair, replace(row, targets=targets), answered)
        for pair, row, (targets, answered) in zip(fitting, alone, found, strict=True)
    ]
