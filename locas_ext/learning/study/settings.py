"""How a text is studied."""

from collections.abc import Sequence
from dataclasses import dataclass

from locas_ext.checks import boolean, integer, number, one_of

LOSSES = ("kl", "ce")
ADDRESSED, LEARNED = "addressed", "learned"
KEYS = (ADDRESSED, LEARNED)
ASKED, ASKED_FOR, TURNED, LINKED, BEGUN = "asked", "asked-for", "turned", "linked", "begun"
BLANK, ABOUT, CONTINUED = "blank", "about", "continued"
KINDS = (ASKED, ASKED_FOR, TURNED, LINKED, BEGUN, BLANK, ABOUT, CONTINUED)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a study is made of; the defaults are for a text of some thousand tokens.

    Args:
        chunk: int >= 16: tokens of a passage, which is in the host's window while it writes and answers questions
        kinds: some of "asked" (the host writes a question and answers it), "asked-for" (it writes a question to a word of
            a sentence), "turned" (a sentence as a question for one of its words), "linked" (a word from other words of its
            sentence), "begun" (the same, where the answer is the sentence itself and has come that far), "blank" (a sentence
            with a word left out), "about" (what the passage says of a word) and "continued" (the beginning of a sentence,
            its rest); hosts without a chat template get all but the first
        questions: int >= 1: how many of each kind that the host writes ("asked", "asked-for") per passage, at most
        check: bool: whether only those are kept that the host answers with the passage in view; what is made from the passage's
            sentences is true as it is, and checked only where nothing but the host's distribution is learned
        epochs: int >= 1: passes over all questions
        updates: int >= 1: how many updates there are at least, however few the questions
        batch: int >= 1: questions per update
        learning_rate: float >= 0: of AdamW
        top_k: int >= 1: with loss "kl", how many of the host's likeliest tokens are kept at each place; the others as one
        gold: float from 0 to 1: with loss "kl", how much of the target is the answer itself instead of the host's distribution
        recalled: float above 0 and below 1: the probability from which on a token of an answer or of the text counts as
            learned; greedy decoding writes what is above 0.5
        raw: float >= 0: the weight of the text itself beside the questions, its cross-entropy in nats a token
        raw_first: float from 0 to below 1: the share of the updates, the first ones, that learn mostly the text itself
        guard: float >= 0: the weight of the distance to the host on general prompts and its own free text, in nats a token
        most_kl: float > 0: how far that distance may grow, on texts kept back for it: the guard's weight is steered by it, and
            where it is passed in the end, the last state within is put back
        keys: how gate and key rows get to where they fire: "addressed": they are computed, so that they answer to the words
            of the text that are worth asking for and the memory is silent elsewhere, and values alone are learned;
            "learned": they are learned as values are; the defaults of learning_rate, guard and most_kl are for "addressed",
            and this one was measured with 2e-3, 4 and 0.02
        new_tokens: int >= 4: the most tokens of a question or answer that the host writes

    Raises:
        TypeError: a value of another type
        ValueError: a value out of range, or a kind that there is not

    Source: docs/method.md, "Study".

    >>> StudySettings(epochs=3, kinds=("blank", "about")).questions
    4
    """

    chunk: int = 128
    kinds: Sequence[str] = KINDS
    questions: int = 4
    check: bool = True
    epochs: int = 5
    updates: int = 200
    batch: int = 64
    learning_rate: float = 5e-3
    top_k: int = 32
    gold: float = 0.5
    recalled: float = 0.7
    raw: float = 0.5
    raw_first: float = 0.3
    guard: float = 2.0
    most_kl: float = 0.1
    keys: str = ADDRESSED
    new_tokens: int = 40

    def __post_init__(self) -> None:
        for name, least in {
            "chunk": 16,
            "questions": 1,
            "epochs": 1,
            "updates": 1,
            "batch": 1,
            "top_k": 1,
            "new_tokens": 4,
        }.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        for name in ("learning_rate", "raw", "guard"):
            object.__setattr__(self, name, number(name, getattr(self, name), 0))
        object.__setattr__(self, "gold", number("gold", self.gold, 0, 1))
        object.__setattr__(self, "recalled", number("recalled", self.recalled, above=0, below=1))
        object.__setattr__(self, "raw_first", number("raw_first", self.raw_first, 0, below=1))
        object.__setattr__(self, "keys", one_of("keys", self.keys, KEYS))
        object.__setattr__(self, "most_kl", number("most_kl", self.most_kl, above=0))
        boolean("check", self.check)
        if isinstance(self.kinds, str) or not self.kinds:
            raise ValueError(f"kinds is {self.kinds!r}; expected some of {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", tuple(one_of("kinds", kind, KINDS) for kind in self.kinds))
