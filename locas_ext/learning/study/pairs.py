"""What a memory learns of a passage: questions and their answers, written by the host, given, or made from its sentences."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from locas_ext.errors import LocasError

from .passages import Passage
from .prompts import Prompter
from .settings import BEGUN, CONTINUED

GIVEN = "given"


@dataclass(frozen=True)
class Pair:
    """A question and its answer.

    Attributes:
        kind: one of KINDS or GIVEN; of "continued" the question is the beginning of a sentence
        passage: the number of the passage that answers it
        begin: how the answer begins, which is given and not learned
    """

    kind: str
    question: str
    answer: str
    passage: int
    begin: str = ""

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
    asked = prompter.ask(pair.question, passage)
    if not pair.begin:
        return asked, prompter.answer(pair.answer) + prompter.end()
    end = [] if pair.kind == BEGUN else prompter.end()
    return asked + prompter.answer(pair.begin), prompter.encode(f" {pair.answer}") + end
