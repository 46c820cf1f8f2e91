"""Scores of a generated answer: the answer is in it, and how many of its words are."""

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def plain_words(text: str) -> list[str]:
    """Lowered words without punctuation and articles.

    >>> plain_words("The well-to-do Farmer.")
    ['well', 'to', 'do', 'farmer']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def contains(prediction: str, answers: tuple[str, ...]) -> bool:
    """Whether one of the answers stands in the prediction, whole words in a row.

    >>> contains("It was the big red house.", ("red house", "barn"))
    True
    """
    said = f" {' '.join(plain_words(prediction))} "
    return any(f" {' '.join(wanted)} " in said for answer in answers if (wanted := plain_words(answer)))


def token_f1(prediction: str, answers: tuple[str, ...]) -> float:
    """The best F1 over the answers of the words in common, as SQuAD counts it.

    >>> token_f1("a red barn", ("red house",))
    0.5
    """
    return max(map(lambda answer: _f1(plain_words(prediction), plain_words(answer)), answers), default=0.0)


def _f1(predicted: list[str], expected: list[str]) -> float:
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
