"""What a memory learns of a passage: questions and their answers, written by the host, given, or made from its sentences."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from locas_ext.errors import LocasError

from .passages import Passage, sentences_of, words_of
from .prompts import Prompter
from .settings import ABOUT, BLANK, CONTINUED

GIVEN = "given"
_BLANKS = (
    'Which word is missing? "{}"',
    'Fill in the blank: "{}"',
    'Complete this: "{}" What belongs in the gap?',
)
_ABOUTS = (
    "What do you know about {}?",
    "Tell me something about {}.",
    "What is said about {}?",
    "Where does {} come up, and what is said of it?",
)
_GAP = "____"


@dataclass(frozen=True)
class Pair:
    """A question and its answer.

    Attributes:
        kind: one of KINDS or GIVEN; of "continued" the question is the beginning of a sentence
        passage: the number of the passage that answers it
    """

    kind: str
    question: str
    answer: str
    passage: int

    def to_record(self) -> dict:
        return asdict(self)


def given_pairs(pairs: object, passages: Sequence[Passage]) -> list[Pair]:
    """Questions and answers of the caller's, each with the passage that has the most of its words.

    Raises TypeError or ValueError that names the one that is not a question and an answer.
    """
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise TypeError(f"pairs is {type(pairs).__name__}; expected a sequence of (question, answer)")
    if not pairs:
        raise ValueError("pairs is empty; expected at least one (question, answer), or None for the host's own")
    words = [set(passage.text.lower().split()) for passage in passages]
    rare = [{word for word in each if sum(word in other for other in words) <= max(1, len(words) // 4)} for each in words]
    result = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs[{number}] is {pair!r}; expected (question, answer)")
        if not all(isinstance(part, str) and part.strip() for part in pair):
            raise ValueError(f"pairs[{number}] is {tuple(pair)!r}; expected two texts that are not empty")
        question, answer = (part.strip() for part in pair)
        said = {word.strip("?!.,;:'\"") for word in f"{question} {answer}".lower().split()}
        found = max(range(len(passages)), key=lambda index: _overlap(said, rare[index], words[index]))
        result.append(Pair(GIVEN, question, answer, found))
    return result


def _overlap(said: set[str], rare: set[str], words: set[str]) -> tuple[int, int]:
    plain = lambda those: {word.strip("?!.,;:'\"") for word in those}
    return len(said & plain(rare)), len(said & plain(words))


def made_pairs(passages: Sequence[Passage], kinds: Sequence[str], questions: int, salient: "Salience", seed: int) -> list[Pair]:
    """Pairs that need no writing: gaps, what is said of a word, beginnings of sentences.

    salient: finds the words of a sentence that are worth asking for
    """
    result: list[Pair] = []
    for number, passage in enumerate(passages):
        rng = random.Random(f"{seed} {number}")
        sentences = sentences_of(passage.text)
        makers = {BLANK: _blanks, ABOUT: _abouts, CONTINUED: _continued}
        for kind in (each for each in makers if each in kinds):
            found = [Pair(kind, *pair, number) for pair in makers[kind](sentences, salient, rng)]
            result += rng.sample(found, questions) if len(found) > questions else found
    return result


class Salience:
    """Which words of a sentence to ask for: the `most` that the host would least have guessed.

    A sentence's first word is hard to guess in any sentence, so it counts only where it is a name: capitalized inside another
    sentence.

    surprises: [nats of each word of `words_of`] by sentence; a sentence without is asked for its first words
    """

    def __init__(self, surprises: dict[str, list[float]], most: int = 3):
        self.surprises, self.most = surprises, most
        self._names = {
            part
            for sentence in surprises
            for start, end in words_of(sentence)
            if start > 0 and sentence[start].isupper()
            for part in sentence[start:end].split()
        }

    def __call__(self, sentence: str) -> list[str]:
        spans = words_of(sentence)
        nats = self.surprises.get(sentence) or [0.0] * len(spans)
        asked = [n for n, (start, end) in enumerate(spans) if start > 0 or sentence[start:end] in self._names]
        best = sorted(asked, key=lambda index: -nats[index])[: self.most]
        return [sentence[spans[index][0] : spans[index][1]] for index in sorted(best)]


def _blanks(sentences: list[str], salient: Salience, rng: random.Random) -> list[tuple[str, str]]:
    """Each salient word of a sentence left out in turn, so that a fact is asked in both directions."""
    pairs = []
    for sentence in sentences:
        for word in salient(sentence):
            pairs.append((rng.choice(_BLANKS).format(sentence.replace(word, _GAP, 1)), word))
    return pairs


def _abouts(sentences: list[str], salient: Salience, rng: random.Random) -> list[tuple[str, str]]:
    return [(rng.choice(_ABOUTS).format(word), sentence) for sentence in sentences for word in salient(sentence)]


def _continued(sentences: list[str], salient: Salience, rng: random.Random) -> list[tuple[str, str]]:
    """A sentence cut somewhere in its second half."""
    pairs = []
    for sentence in sentences:
        words = sentence.split()
        cut = rng.randint(len(words) // 2, len(words) - 1)
        pairs.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return pairs


def require_usable(kept: list[Pair], written: int, refused: dict[str, int]) -> None:
    """LocasError, with the counts, where nothing is left to learn from."""
    if not kept:
        reasons = ", ".join(f"{count} {why}" for why, count in refused.items() if count) or "none was written"
        raise LocasError(
            f"study: of {written} questions none can be used ({reasons}); expected a host that follows instructions, loss='ce' "
            "for what is made from sentences, or pairs=[(question, answer), ...] of your own"
        )


def parts_of(prompter: Prompter, pair: Pair, passage: str | None) -> tuple[list[int], list[int]]:
    """-> the ids of a question, with a passage in view or without, and of its answer with its end."""
    if pair.kind == CONTINUED:
        shown = "" if passage is None else f"{passage}\n\n"
        return prompter.passage(shown + pair.question), prompter.encode(f" {pair.answer}")
    return prompter.ask(pair.question, passage), prompter.answer(pair.answer) + prompter.end()
