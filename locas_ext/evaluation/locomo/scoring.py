"""LoCoMo's scores of an answer, by the rules of its official evaluation."""

import re
import string
from collections import Counter
from functools import cache

from locas_ext.evaluation.arguments import needs_extra

from .data import ADVERSARIAL, CATEGORIES, Question

REFUSAL = "No information available"
_REFUSALS = ("no information available", "not mentioned")
_MULTI_HOP, _OPEN_DOMAIN = 1, 3

TRAP = "adversarial, minus trap F1"
OVERALL, ANSWERABLE = "overall", "overall without adversarial"
UNDISPUTED = "overall without adversarial and corrected"  # of dialogues with corrected answers
SCORES = (*CATEGORIES.values(), TRAP, OVERALL, ANSWERABLE, UNDISPUTED)


@cache
def _stemmer():
    try:
        from nltk.stem import PorterStemmer
    except ImportError as error:
        raise needs_extra("LoCoMo's F1", "nltk", error) from None
    return PorterStemmer()


def check_installed() -> None:
    """LocasError if nltk is not there, better raised before a run than after it."""
    _stemmer()


def stems(text: str) -> list[str]:
    """The Porter stems of a text's words, without case, punctuation and the words a, an, the, and."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [_stemmer().stem(word) for word in re.sub(r"\b(a|an|the|and)\b", " ", text).split()]


def token_f1(prediction: str, gold: str) -> float:
    """The harmonic mean of precision and recall over stems, each counted as often as it is in both."""
    predicted, expected = stems(prediction), stems(gold)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _multi_part_f1(prediction: str, gold: str) -> float:
    """The mean, over the gold answer's parts between commas, of the best F1 of a part of the prediction."""
    parts = prediction.split(",")
    best = [max(token_f1(part, expected) for part in parts) for expected in gold.split(",")]
    return sum(best) / len(best)


def official_score(question: Question, prediction: str) -> float:
    """F1 against the answer, 0 to 1; for an adversarial question 1 if the prediction refuses to answer, else 0."""
    if question.category == ADVERSARIAL:
        return float(any(refusal in prediction.lower() for refusal in _REFUSALS))
    assert question.answer is not None, "only adversarial questions may have none"
    if question.category == _MULTI_HOP:
        return _multi_part_f1(prediction, question.answer)
    if question.category == _OPEN_DOMAIN:
        return token_f1(prediction, question.answer.split(";")[0])
    return token_f1(prediction, question.answer)


def trap_score(question: Question, prediction: str) -> float:
    """-1 to 0: minus the F1 against an adversarial question's trap, as the Locas paper scores these."""
    assert question.trap is not None, "an adversarial question has one"
    return 0.0 - token_f1(prediction, question.trap)


def summarize(questions: tuple[Question, ...], predictions: list[str]) -> dict[str, dict]:
    """{name of SCORES: {"count", "f1"}}, each f1 the mean over its questions; only those that have any."""
    corrected = any(question.published is not None for question in questions)
    values: dict[str, list[float]] = {name: [] for name in SCORES}
    for question, prediction in zip(questions, predictions, strict=True):
        score = official_score(question, prediction)
        values[CATEGORIES[question.category]].append(score)
        values[OVERALL].append(score)
        if question.category == ADVERSARIAL:
            values[TRAP].append(trap_score(question, prediction))
        else:
            values[ANSWERABLE].append(score)
            if corrected and question.published is None:
                values[UNDISPUTED].append(score)
    return {name: {"count": len(scores), "f1": sum(scores) / len(scores)} for name, scores in values.items() if scores}


def pool(summaries: list[dict[str, dict]]) -> dict[str, dict]:
    """Several dialogues' summaries as one, every question counting the same."""
    pooled = {}
    if any(UNDISPUTED in summary for summary in summaries):  # where nothing was corrected, these are all that can be answered
        summaries = [{UNDISPUTED: each[ANSWERABLE], **each} if ANSWERABLE in each else each for each in summaries]
    for name in SCORES:
        parts = [summary[name] for summary in summaries if name in summary]
        if count := sum(part["count"] for part in parts):
            pooled[name] = {"count": count, "f1": sum(part["count"] * part["f1"] for part in parts) / count}
    return pooled
