"""Questions as token ids: what the model reads, and which of its log-probabilities answer the question.

A choice of several tokens is a request of its own. Choices of one token each, such as letters, are all read off one forward of
their context.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from locas_ext.errors import LocasError
from locas_ext.evaluation.locomo.answers import starts_with_bos

from .data import Question

_BLOCK = 1024  # texts that a tokenizer takes at once


@dataclass(frozen=True)
class Request:
    """One sequence for the model.

    question: which question it belongs to, by number
    ids: [n] int32, what goes in
    choices: which choices it scores, by number
    targets: for each of these the tokens that should come at the end: the first is predicted at the end of ids less the others
    """

    question: int
    ids: np.ndarray
    choices: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def scored(self) -> int:
        """How many positions, the last ones, are asked for."""
        return len(self.targets[0])


@dataclass(frozen=True)
class Encoded:
    """A task's questions for one tokenizer.

    cut: how many questions lost the beginning of their context, as it did not fit into the model's positions
    """

    questions: list[Question]
    requests: list[Request]
    cut: int


def _ids(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """In blocks, so that no more than a block lies there as lists of Python integers."""
    result: list[np.ndarray] = []
    for start in range(0, len(texts), _BLOCK):
        block = tokenizer(texts[start : start + _BLOCK], add_special_tokens=False)["input_ids"]
        result += [np.array(ids, dtype=np.int32) for ids in block]
    return result


def _last_line(context: str) -> str:
    return context[context.rfind("\n", 0, -1) + 1 :]


def _continuations(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[np.ndarray]:
    """The tokens of each continuation where it stands: behind its context.

    A token's bounds depend on its surroundings, and a context's last line is enough of them. Where the context's own tokens
    change with what follows, the continuation is encoded by itself.
    """
    lines = [_last_line(context) for context, _ in pairs]
    before = _ids(tokenizer, lines)
    both = _ids(tokenizer, [line + continuation for line, (_, continuation) in zip(lines, pairs, strict=True)])
    alone = _ids(tokenizer, [continuation for _, continuation in pairs])
    return [
        joined[len(first) :] if len(joined) > len(first) and np.array_equal(joined[: len(first)], first) else by_itself
        for first, joined, by_itself in zip(before, both, alone, strict=True)
    ]


def encode(tokenizer: Any, questions: list[Question], positions: int) -> Encoded:
    """The requests of all questions; contexts that are too long lose their beginning.

    positions: the most tokens that the model can see
    """
    pairs = [pair for question in questions for pair in zip(question.contexts, question.continuations, strict=True)]
    places = {context: place for place, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    contexts, tails = _ids(tokenizer, list(places)), iter(_continuations(tokenizer, pairs))
    start = np.array([tokenizer.bos_token_id] if starts_with_bos(tokenizer) else [], dtype=np.int32)
    requests: list[Request] = []
    cut = 0
    for number, question in enumerate(questions):
        own = [next(tails) for _ in question.continuations]
        shown = [contexts[places[context]] for context in question.contexts]
        made = _requests_of(number, question, shown, own)
        room = positions - len(start)
        if any(request.scored > room for request in made):
            raise LocasError(f"the model has {positions} positions, fewer than a choice of question {number} takes")
        cut += any(len(request.ids) > room for request in made)
        requests += [
            Request(request.question, np.concatenate([start, request.ids[-room:]]), request.choices, request.targets)
            for request in made
        ]
    return Encoded(questions, requests, cut)


def _requests_of(number: int, question: Question, shown: list[np.ndarray], own: list[np.ndarray]) -> list[Request]:
    if len(set(question.contexts)) == 1 and all(len(ids) == 1 for ids in own):
        return [Request(number, shown[0], tuple(range(len(own))), tuple((int(ids[0]),) for ids in own))]
    return [
        Request(number, np.concatenate([context, ids[:-1]]), (choice,), (tuple(ids.tolist()),))
        for choice, (context, ids) in enumerate(zip(shown, own, strict=True))
    ]
