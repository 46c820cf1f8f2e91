"""BM25 over the chunks of a text: the memory that is looked up instead of learned (Robertson and Zaragoza 2009)."""

import math
import re
from collections import Counter

K1, B = 1.5, 0.75


def words(text: str) -> list[str]:
    """Runs of letters and digits, lowered.

    >>> words("Doctor Klau's violin, 2nd")
    ['doctor', 'klau', 's', 'violin', '2nd']
    """
    return re.findall(r"\w+", text.lower())


class BM25:
    """An index of chunks, with idf = ln(1 + (N - n + 0.5) / (n + 0.5)).

    >>> BM25(["the cat sat", "a dog ran", "the dog sat"]).best("Where did the dog sit?", 1)
    [2]
    """

    def __init__(self, chunks: list[str]):
        self._counts = [Counter(words(chunk)) for chunk in chunks]
        self._lengths = [max(1, counts.total()) for counts in self._counts]
        self._mean = sum(self._lengths) / max(1, len(self._lengths))
        self._holding = Counter(word for counts in self._counts for word in counts)

    def scores(self, query: str) -> list[float]:
        """One a chunk; each distinct word of the query counts once."""
        n = len(self._counts)
        idf = {word: math.log(1 + (n - self._holding[word] + 0.5) / (self._holding[word] + 0.5)) for word in set(words(query))}
        result = []
        for counts, length in zip(self._counts, self._lengths, strict=True):
            norm = K1 * (1 - B + B * length / self._mean)
            result.append(math.fsum(idf[w] * counts[w] * (K1 + 1) / (counts[w] + norm) for w in sorted(idf) if counts[w]))
        return result

    def best(self, query: str, count: int) -> list[int]:
        """The indices of the `count` best chunks, in the order of the text; earlier ones first where scores tie."""
        scores = self.scores(query)
        return sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])
