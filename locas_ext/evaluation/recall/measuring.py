"""One method on one text: every question asked, and what became of everything else the host could do."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from locas_ext.errors import is_out_of_memory
from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.capability.bootstrap import interval, resampled_sums
from locas_ext.evaluation.capability.distributions import divergence
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.hosts.probe.agreement import rounds_whole_texts
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter

from .asking import Advance, View, candidate, choice_scores, question_bar, written_answers
from .documents import ABSENT, Document, Question
from .general import general_questions
from .scoring import contains, token_f1

OTHER_TEXT, OTHER_TOKENS, OTHER_WINDOW = ASSETS / "tono-bungay.txt", 512, 128
_AT_ONCE = 96  # general questions between two looks at whether enough are right
_OFFERED = 3  # questions that offer an answer, from which on what is usual for it is known
Usual = dict[tuple[str, str], float]  # nats, by the kind of question and the answer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked.

    max_new_tokens: of an answer
    batch_size: questions asked at once
    general: how many general questions that the host answers right are asked again of each method; 0: none
    """

    max_new_tokens: int = 20
    batch_size: int = 32
    general: int = 200


@dataclass
class HostAlone:
    """What the bare host does, asked once a run: figures of every method compare with it.

    right: the general questions that it answers right
    right_in_float32: those that it answers right in float32; none where that is its precision, or where there is no room for it
    rounding: the share of the first that it answers right in float32 too: what rounding alone leaves; None where there are none
    other: its logits on an unrelated text, window by window
    """

    right: list[Question]
    right_in_float32: list[Question]
    rounding: float | None
    other: list[torch.Tensor]
    other_ids: torch.Tensor


# ---- everything else -------------------------------------------------------------------------------------------
@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, a host of half precision computes in float32 with the same weights, and a memory with it; then it is as before.

    In bfloat16 the two likeliest tokens are often equal or one rounding apart, so that any change at all may decide which of
    them is written.
    """
    tensors = (*model.parameters(), *model.buffers())
    halves = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, data in halves:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in halves:
            tensor.data = data


def other_logits(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits [n, V] of an unrelated text's windows, read side by side."""
    with torch.inference_mode():
        windows = ids.to(model.device).split(OTHER_WINDOW)
        return [model(input_ids=part[None], use_cache=False).logits[0] for part in windows if len(part) > 1]


def right_general(
    model: Any, prompter: Prompter, questions: list[Question], view: View, asking: Asking, advance: Advance
) -> list[bool]:
    """Whether each general question is answered right."""
    texts = written_answers(model, prompter, questions, view, asking.max_new_tokens, asking.batch_size, advance)
    return [contains(text, question.answers) for text, question in zip(texts, questions, strict=True)]


def host_alone(model: Any, prompter: Prompter, asking: Asking) -> HostAlone:
    """Asks the general questions until enough are right, and reads the unrelated text."""
    ids = torch.tensor(prompter.encode(OTHER_TEXT.read_text(encoding="utf-8"))[:OTHER_TOKENS])
    right = _right(_answered(model, prompter, asking), asking)
    right_in_float32, rounding = list[Question](), None
    if right and model.dtype != torch.float32 and not rounds_whole_texts(model):  # quantized layers compute as they do
        try:
            with in_float32(model):
                answered = _answered(model, prompter, asking)
                rest = [question for question in right if question not in answered]
                is_right = right_general(model, prompter, rest, View(), asking, lambda count: None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # else a host of that size is measured in its own precision alone
        else:
            answered |= zip(rest, is_right, strict=True)
            right_in_float32 = _right(answered, asking)
            rounding = sum(answered[question] for question in right) / len(right)
    return HostAlone(right, right_in_float32, rounding, other_logits(model, ids), ids)


def _answered(model: Any, prompter: Prompter, asking: Asking) -> dict[Question, bool]:
    """Whether the host answers general questions right: the first ones, until as many are right as are asked again."""
    questions, answered = general_questions(), dict[Question, bool]()
    with question_bar("general questions", len(questions)) as advance:
        for start in range(0, len(questions), _AT_ONCE):
            if sum(answered.values()) >= asking.general:
                break
            part = questions[start : start + _AT_ONCE]
            answered |= zip(part, right_general(model, prompter, part, View(), asking, advance), strict=True)
    return answered


def _right(answered: dict[Question, bool], asking: Asking) -> list[Question]:
    """Those answered right, no more than are asked again."""
    return [question for question, is_right in answered.items() if is_right][: asking.general]


# ---- questions -------------------------------------------------------------------------------------------------
def ask_all(
    model: Any,
    prompter: Prompter,
    document: Document,
    view: View,
    asking: Asking,
    advance: Advance,
) -> list[dict]:
    """One entry a question: what was written, and whether it is right by each measure.

    contained: the gold is in what was written; of "absent": a value of the text is, which is made up
    choice: whether the gold is the likeliest of ten; None: there is no choice
    calibrated: the same after what is usual for an answer is taken off, see `usual_scores`; None: too little is known of that
    gold_nats: the gold's log-probability a token
    """
    questions = list(document.questions)
    texts = written_answers(model, prompter, questions, view, asking.max_new_tokens, asking.batch_size, advance)
    asked = [question for question in questions if question.kind != ABSENT]
    scored = choice_scores(model, prompter, asked, view, asking.batch_size, advance)
    usual, scores = usual_scores(asked, scored), iter(scored)
    entries = []
    for question, text in zip(questions, texts, strict=True):
        entry = {
            "kind": question.kind,
            "question": question.text,
            "gold": None if question.kind == ABSENT else question.answers[0],
            "prediction": text,
            "contained": contains(text, question.answers),
            "f1": None if question.kind == ABSENT else token_f1(text, question.answers),
        }
        entries.append(entry if question.kind == ABSENT else entry | _choice(prompter, question, next(scores), usual))
    return entries


def usual_scores(questions: list[Question], scores: list[list[float]]) -> Usual:
    """What each answer gets on the mean over the questions of its kind that offer it, where they are at least three.

    A reader likes some words better than others whatever is asked. Against itself after other questions an answer shows what
    the question does, as P(answer | question) / P(answer | such questions) does (arXiv 2104.08315).
    """
    seen: dict[tuple[str, str], list[float]] = {}
    for question, each in zip(questions, scores, strict=True):
        for text, score in zip((question.answers[0], *question.distractors), each, strict=True):
            seen.setdefault((question.kind, text), []).append(score)
    return {answer: sum(values) / len(values) for answer, values in seen.items() if len(values) >= _OFFERED}


def _choice(prompter: Prompter, question: Question, scores: list[float], usual: Usual) -> dict:
    options = (question.answers[0], *question.distractors)
    tokens = len(candidate(prompter, options[0]))
    several = len(options) > 1
    known = several and all((question.kind, text) in usual for text in options)
    above = [score - usual[question.kind, text] for score, text in zip(scores, options, strict=True)] if known else []
    return {
        "gold_nats": scores[0] / tokens if math.isfinite(scores[0]) else None,
        "choice": scores[0] > max(scores[1:]) if several else None,
        "calibrated": above[0] > max(above[1:]) if known else None,
        "options": len(options),
    }


# ---- figures ---------------------------------------------------------------------------------------------------
MEASURES = ("contained", "f1", "choice", "calibrated", "gold_nats")


def mean_and_interval(values: list[float], seed: int) -> tuple[float | None, list[float] | None]:
    """The mean over units and its bootstrap interval, None where there are too few."""
    if not values:
        return None, None
    if len(values) == 1:
        return float(values[0]), None
    column = np.array(values, dtype=np.float64)[:, None]
    return float(column.mean()), interval(resampled_sums(column, seed=seed)[:, 0] / len(values))


def summarize(entries: list[dict], seed: int) -> dict[str, dict]:
    """{kind: {"count", measure, measure_interval}} over questions."""
    result: dict[str, dict] = {}
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        those = [entry for entry in entries if entry["kind"] == kind]
        figures: dict[str, Any] = {"count": len(those)}
        for measure in MEASURES:
            values = [float(entry[measure]) for entry in those if entry.get(measure) is not None]
            figures[measure], figures[f"{measure}_interval"] = mean_and_interval(values, seed)
        result[kind] = figures
    return result


def everything_else(
    model: Any, prompter: Prompter, view: View, alone: HostAlone, asking: Asking, seed: int, advance: Advance
) -> dict:
    """What a method leaves of what the host does alone.

    kept, kept_in_float32: the share of general questions still right, in the host's precision and in float32; kept_by_rounding:
    what the bare host keeps of the first in float32; other_kl: nats a token to the host on an unrelated text
    """
    logits = other_logits(model, alone.other_ids)
    pairs = zip(alone.other, logits, strict=True)
    total = sum(divergence(host, other) for host, other in pairs)
    right = right_general(model, prompter, alone.right, view, asking, advance)
    right_in_float32 = []
    if alone.right_in_float32:
        with in_float32(model):
            right_in_float32 = right_general(model, prompter, alone.right_in_float32, view, asking, advance)
    result: dict[str, Any] = {"kept_questions": len(right), "kept_by_rounding": alone.rounding}
    for name, values in {"kept": right, "kept_in_float32": right_in_float32}.items():
        result[name], result[f"{name}_interval"] = mean_and_interval([float(each) for each in values], seed)
    return {**result, "other_kl": total / sum(map(len, logits))}


def perplexity(model: Any, ids: torch.Tensor, protocol: Protocol) -> float:
    """The perplexity of the text, read again by the model as it is now."""
    return truncation(model, ids, protocol.window, protocol.stride, progress=False, bos=protocol.bos).perplexity
