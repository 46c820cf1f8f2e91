"""Which words of a sentence are worth asking for."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from .passages import words_of

# "the village of Skolm", "a ship Vomel": what a name is of stands right before it; words that only point do not tell.
_CATEGORY = re.compile(
    r"\b(?:[Tt]he|[Aa]n?) (?!(?:[a-z]*ing|from|with|into|in|at|to|by|for|on|and|or|as)\b)[a-z]{3,} (?:of (?:the )?)?$"
)
# English words that hold a sentence together; in other languages rarity alone tells.
_PLAIN = frozenset(
    "the and but for nor yet was were are had has have his her hers him she they them their its our your you who whom whose "
    "which that this these those there then than with from into onto over under out off not all any some one would could "
    "should will can may might must shall did does done been being upon about when where what why how also very more most "
    "much such only other another each every like just still even ever once here too while because though after before".split()
)
_FEW, _SENTENCES = 3, 50  # a word is common in more sentences than these few, and in more than one of so many


@dataclass(frozen=True)
class Word:
    """A word of a sentence, or a name of several words.

    Attributes:
        start, end: its place in the sentence
        text: itself
        phrase: with what it is of before it, such as "the village of Skolm"; of others than names the word alone
        name: whether it is a name
    """

    start: int
    end: int
    text: str
    phrase: str
    name: bool

    @property
    def category(self) -> str:
        """What a name is of, such as "village"; "" if nothing is said of that."""
        before = self.phrase.removesuffix(self.text).split()
        return before[1] if len(before) > 1 else ""


class Salience:
    """The words of a sentence to ask for: names, and rare ones of the text that the host would least have guessed.

    A word of many sentences, "born" or "trade", is left out: as an answer it stands in the way of what one sentence says. A
    sentence's first word is hard to guess in any sentence, so it counts only where it is a name: capitalized inside another.

    surprises: [nats of each word of `words_of`] by sentence; a sentence without is asked for its first words
    """

    def __init__(self, surprises: dict[str, list[float]], most: int = 5):
        self.surprises, self.most = surprises, most
        self._common = max(_FEW, len(surprises) // _SENTENCES)
        self._holding: Counter[str] = Counter()
        self._names: set[str] = set()
        for sentence in surprises:
            spans = words_of(sentence)
            self._holding.update({sentence[start:end].lower() for start, end in spans})
            self._names |= {part for a, b in spans if a > 0 and sentence[a].isupper() for part in sentence[a:b].split()}

    def __call__(self, sentence: str) -> list[Word]:
        """In the order of the sentence."""
        spans = words_of(sentence)
        nats = list(self.surprises.get(sentence) or [0.0] * len(spans))
        if self._begins_a_name(sentence, spans):
            spans, nats = [(spans[0][0], spans[1][1]), *spans[2:]], [nats[0] + nats[1], *nats[2:]]
        words = [self._word(sentence, start, end) for start, end in spans]
        asked = [n for n, word in enumerate(words) if word.name or self._tells(word)]
        best = sorted(asked, key=lambda n: (-words[n].name, -nats[n] * self._rarity(words[n].text)))[: self.most]
        return [words[n] for n in sorted(best)]

    def _begins_a_name(self, sentence: str, spans: list[tuple[int, int]]) -> bool:
        """Whether the first word goes with the name right behind it, as the Captain of Captain Bell does."""
        if len(spans) < 2 or spans[0][0] > 0 or sentence[spans[0][1] : spans[1][0]] != " ":
            return False
        return sentence[spans[1][0]].isupper() and sentence[slice(*spans[0])] in self._names

    def _tells(self, word: Word) -> bool:
        text = word.text.lower()
        return word.start > 0 and text not in _PLAIN and self._holding[text] <= self._common

    def _word(self, sentence: str, start: int, end: int) -> Word:
        text = sentence[start:end]
        name = sentence[start].isupper() and (start > 0 or text.split()[0] in self._names)
        before = _CATEGORY.search(sentence[:start]) if name else None
        return Word(start, end, text, text if before is None else before[0] + text, name)

    def _rarity(self, word: str) -> float:
        """1 for a word of one sentence, less for one of many."""
        sentences = max(1, len(self.surprises))
        return math.log(1 + sentences / max(1, self._holding[word.lower()])) / math.log(1 + sentences)
