"""One method on one text: every question asked, and what became of everything else the host could do."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.capability.bootstrap import interval, resampled_sums
from locas_ext.evaluation.capability.distributions import divergence
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter

from .asking import CLOZE_FORMS, FORMS, Advance, View, choice_scores, written_answers
from .documents import ABSENT, CLOZE, Document, Question
from .scoring import contains, token_f1

OTHER_TEXT, OTHER_TOKENS, OTHER_WINDOW = ASSETS / "tono-bungay.txt", 512, 128


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
    other: its logits on an unrelated text, window by window
    """

    right: list[Question]
    other: list[torch.Tensor]
    other_ids: torch.Tensor
    priors: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)


# ---- everything else -------------------------------------------------------------------------------------------
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


NEUTRAL = ("", "What is it?", "Which one is it?", "Who or what is it?")
NEUTRAL_CLOZE = ("The", "It is", "They spoke of")


def priors_of(model: Any, prompter: Prompter, questions: list[Question], asking: Asking) -> dict:
    result: dict = {}
    for kind in dict.fromkeys(q.kind for q in questions if q.kind != ABSENT):
        texts = list(dict.fromkeys(t for q in questions if q.kind == kind for t in (q.answers[0], *q.distractors)))
        for name, form in (CLOZE_FORMS if kind == CLOZE else FORMS).items():
            for neutral in NEUTRAL_CLOZE if kind == CLOZE else NEUTRAL:
                for start in range(0, len(texts), 64):
                    part = texts[start : start + 64]
                    q = Question(kind, neutral, (part[0],), tuple(part[1:]))
                    (scores,) = choice_scores(model, prompter, [q], View(), form, asking.batch_size, lambda count: None)
                    for text, score in zip(part, scores, strict=True):
                        result.setdefault(kind, {}).setdefault(name, {}).setdefault(text, []).append(score)
    return result


# ---- questions -------------------------------------------------------------------------------------------------
def ask_all(
    model: Any,
    prompter: Prompter,
    document: Document,
    view: View,
    priors: dict[tuple[str, str], float],
    asking: Asking,
    advance: Advance,
) -> list[dict]:
    """One entry a question: what was written, and whether it is right by each measure.

    contained: the gold is in what was written; of "absent": a value of the text is, which is made up
    choice, calibrated: whether the gold is the likeliest of ten, and likeliest after the prior is taken off; None: no choice
    gold_nats: the gold's log-probability a token
    """
    questions = list(document.questions)
    texts = written_answers(model, prompter, questions, view, asking.max_new_tokens, asking.batch_size, advance)
    asked = [question for question in questions if question.kind != ABSENT]
    found: list[dict] = [{} for _ in asked]
    for cloze, forms in ((True, CLOZE_FORMS), (False, FORMS)):
        places = [n for n, q in enumerate(asked) if (q.kind == CLOZE) == cloze]
        for number, (name, form) in enumerate(forms.items()):
            told = advance if number == 0 else lambda count: None
            each = choice_scores(model, prompter, [asked[n] for n in places], view, form, asking.batch_size, told)
            for place, values in zip(places, each, strict=True):
                found[place][name] = values
    scores = iter(found)
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
        entries.append(entry if question.kind == ABSENT else entry | _choice(prompter, question, next(scores), priors))
    return entries


def _choice(prompter: Prompter, question: Question, by_form: dict, priors: dict) -> dict:
    gold, scores = question.answers[0], by_form["bare"]
    tokens = len(prompter.encode(f" {gold}") if question.kind == CLOZE else prompter.answer(gold))
    options = (gold, *question.distractors)
    several = len(options) > 1
    total = [0.0] * len(options)
    for name, values in by_form.items():
        for place, text in enumerate(options):
            own = priors[question.kind][name][text]
            total[place] += values[place] - sum(own) / len(own)
    return {
        "gold_nats": scores[0] / tokens if math.isfinite(scores[0]) else None,
        "choice": scores[0] > max(scores[1:]) if several else None,
        "calibrated": total[0] > max(total[1:]) if several else None,
        "options": len(options),
        "scores": by_form,
        "choices": options,
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
    """kept: the share of general questions still right; other_kl: nats a token to the host on an unrelated text."""
    logits = other_logits(model, alone.other_ids)
    pairs = zip(alone.other, logits, strict=True)
    total = sum(divergence(host, other) for host, other in pairs)
    right = right_general(model, prompter, alone.right, view, asking, advance) if alone.right else []
    kept, kept_interval = mean_and_interval([float(each) for each in right], seed)
    return {
        "kept": kept,
        "kept_interval": kept_interval,
        "kept_questions": len(right),
        "other_kl": total / sum(map(len, logits)),
    }


def perplexity(model: Any, ids: torch.Tensor, protocol: Protocol) -> float:
    """Of the text, read again by the model as it is now."""
    return truncation(model, ids, protocol.window, protocol.stride, progress=False, bos=protocol.bos).perplexity
