"""Questions put to a model as it is: what it writes, and how likely it finds each of ten answers.

All answers to one question go on from one reading of its prompt. Questions whose prompts have one length are read together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locas_ext.evaluation.locomo.answers import Prompts, answer, copies
from locas_ext.hosts.cache_names import cache_argument, returned_cache
from locas_ext.learning.progress import progress_bar
from locas_ext.learning.study.generation import write
from locas_ext.learning.study.prompts import Prompter

from .documents import CLOZE, Question

REPLY = "The answer is"  # hosts begin a reply in many ways, so that bare words right after a question tell little
_MOST_CACHED = 1 << 17  # tokens of all copies of a prompt's cache together

Advance = Callable[[int], None]  # told of so many more questions
_Group = tuple[list[int], list[int], list[list[int]]]


@contextmanager
def question_bar(title: str, questions: int) -> Iterator[Advance]:
    """A bar of questions on standard error. Yields what advances it."""
    with progress_bar("questions", "{task.fields[rate]:,.1f}/s") as progress:
        bar = progress.add_task(title, total=questions, rate=0.0)

        def advance(count: int) -> None:
            done = progress.tasks[0].completed + count
            progress.update(bar, advance=count, rate=done / (progress.tasks[0].elapsed or 1.0))

        yield advance


@dataclass(frozen=True)
class View:
    """What stands in the window when a question is asked.

    shared: a text that all questions see; None: nothing
    of: the text that one question sees, such as what was looked up for it; None: nothing
    """

    shared: str | None = None
    of: Callable[[Question], str] | None = None


def _parts(prompter: Prompter, question: Question, context: str | None) -> tuple[list[int], list[int]]:
    """-> what questions with this context share, and the question's own ids"""
    if question.kind != CLOZE:
        return prompter.context(context), prompter.question(question.text)
    shown = prompter.passage("" if context is None else f"{context}\n\n")
    return (shown, prompter.encode(question.text)) if shown else ([], prompter.passage(question.text))


def reply_begin(prompter: Prompter, question: Question) -> list[int]:
    """What a reply begins with before one answer or another is put there: nothing goes on with a sentence that was begun."""
    return [] if question.kind == CLOZE else prompter.answer(REPLY)


def candidate(prompter: Prompter, text: str) -> list[int]:
    """An answer behind the beginning of a sentence."""
    return prompter.encode(f" {text}")


def prompt_lengths(prompter: Prompter, questions: list[Question], view: View) -> list[int]:
    """The tokens of each question's prompt."""
    lengths = []
    for question in questions:
        context = view.shared if view.of is None else view.of(question)
        shared, own = _parts(prompter, question, context)
        lengths.append(len(shared) + len(own))
    return lengths


def _groups(prompter: Prompter, questions: list[Question], view: View) -> Iterator[_Group]:
    """(indices, shared ids, own ids of each): questions that go on from the same ids."""
    by_shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for index, question in enumerate(questions):
        context = view.shared if view.of is None else view.of(question)
        shared, own = _parts(prompter, question, context)
        if view.of is not None:  # nothing to share
            shared, own = [], shared + own
        by_shared.setdefault(tuple(shared), []).append((index, own))
    for ids, members in by_shared.items():
        yield [index for index, _ in members], list(ids), [own for _, own in members]


def written_answers(
    model: Any,
    prompter: Prompter,
    questions: list[Question],
    view: View,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance,
) -> list[str]:
    """The likeliest continuation of each prompt, up to the end of its first line.

    Prompts that share a text go on from one reading of it, those of one length together; others are padded on the left.
    """
    result = [""] * len(questions)
    for indices, shared, own in _groups(prompter, questions, view):
        if shared and view.shared is not None:
            begun = Prompts(torch.tensor(shared, dtype=torch.long), [torch.tensor(ids) for ids in own], 0)
            texts = answer(model, prompter.tokenizer, begun, max_new_tokens, batch_size, lambda count, tokens: advance(count))
        else:
            prompts = [shared + ids for ids in own]
            texts = []
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                texts += write(model, prompter.tokenizer, part, max_new_tokens, 0, advance=advance)
        for index, text in zip(indices, texts, strict=True):
            result[index] = text.strip().partition("\n")[0].strip()
    return result


def choice_scores(
    model: Any, prompter: Prompter, questions: list[Question], view: View, batch_size: int, advance: Advance
) -> list[list[float]]:
    """For each question the summed log-probability, in nats, of its gold and of each of its distractors behind REPLY.

    A question without distractors has that of its gold alone.
    """
    result: list[list[float]] = [[] for _ in questions]
    with torch.inference_mode():
        for indices, shared, own in _groups(prompter, questions, view):
            own = [ids + reply_begin(prompter, questions[index]) for index, ids in zip(indices, own, strict=True)]
            cache = None
            if shared:
                inputs = torch.tensor([shared], device=model.device)
                cache = returned_cache(model(input_ids=inputs, use_cache=True, logits_to_keep=1))
            for batch in _batches(own, len(shared), batch_size):
                chosen = [questions[indices[place]] for place in batch]
                prompts = torch.tensor([own[place] for place in batch], device=model.device)
                for place, scores in zip(batch, _scores(model, prompter, chosen, prompts, cache), strict=True):
                    result[indices[place]] = scores
                advance(len(batch))
    return result


def _batches(own: list[list[int]], shared: int, size: int) -> Iterator[list[int]]:
    """Places of prompts of one length, as many together as fit."""
    by_length: dict[int, list[int]] = {}
    for place, ids in enumerate(own):
        by_length.setdefault(len(ids), []).append(place)
    for length, places in sorted(by_length.items()):
        step = max(1, min(size, _MOST_CACHED // (10 * (shared + length))))
        for start in range(0, len(places), step):
            yield places[start : start + step]


def _scores(model: Any, prompter: Prompter, questions: list[Question], prompts: Tensor, cache: Any) -> list[list[float]]:
    """prompts: [b, m], those of the questions, behind what the cache holds"""
    options = [[candidate(prompter, text) for text in (q.answers[0], *q.distractors)] for q in questions]
    begun = copies(cache, len(questions))
    output = model(input_ids=prompts, **cache_argument(model, begun), use_cache=True, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1)
    counts = torch.tensor([len(each) for each in options], device=prompts.device)
    rows = torch.arange(len(questions), device=prompts.device).repeat_interleave(counts)
    flat = [ids for each in options for ids in each]
    total = first[rows, torch.tensor([ids[0] for ids in flat], device=prompts.device)].double()
    if max(map(len, flat)) > 1:
        behind = returned_cache(output)
        behind.batch_select_indices(rows)
        total = total + _rest(model, flat, behind)
    values = iter(total.tolist())
    return [[next(values) for _ in each] for each in options]


def _rest(model: Any, candidates: list[list[int]], cache: Any) -> Tensor:
    """The log-probability of all tokens but the first of each candidate, whose prompts the cache holds row by row."""
    width = max(map(len, candidates))
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in candidates], device=model.device)
    lengths = torch.tensor([len(ids) for ids in candidates], device=model.device)
    logits = model(input_ids=padded[:, :-1], **cache_argument(model, cache), use_cache=True).logits
    taken = logits.float().log_softmax(-1).gather(2, padded[:, 1:, None])[..., 0].double()
    inside = torch.arange(1, width, device=model.device)[None] < lengths[:, None]
    return torch.where(inside, taken, 0.0).sum(1)
