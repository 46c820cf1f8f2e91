"""The host, with a passage in its window, writes questions about it and answers them."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .generation import seconds_to_write, write
from .pairs import Pair
from .passages import Passage, sentences_of, words_of
from .prompts import Prompter
from .salience import Salience
from .settings import ASKED, ASKED_FOR, StudySettings

SEEDS = (
    "Write one short question about a fact in this text. Write only the question.",
    "Write one question that asks for a name in this text. Write only the question.",
    "Write one question that starts with Who or Which and can be answered from this text. Write only the question.",
    "Write one question that starts with Where or When and can be answered from this text. Write only the question.",
    "Write one question that starts with What and can be answered from this text. Write only the question.",
    "Write one question that a teacher would ask to see whether a student remembers this text. Write only the question.",
)
# Examples for hosts that do not follow an instruction: a sentence, a word of it, a question to the word.
EXAMPLES = (
    ("The mill at Harrow belongs to old Tomkin.", "Tomkin", "Who owns the mill at Harrow?"),
    ("The lamp on the ferry Anneke is green.", "green", "What color is the lamp on the ferry Anneke?"),
    ("Miss Lund was taught to paint by her uncle.", "paint", "What was Miss Lund taught by her uncle?"),
    ("The bakers of Dorn put cinnamon into their bread.", "Dorn", "Whose bakers put cinnamon into their bread?"),
    ("In 1907 the tower of Elm was struck by lightning.", "1907", "When was the tower of Elm struck by lightning?"),
)
_EXAMPLE = "Text: {}\nAnswer: {}\nQuestion:{}"
_MOST_WORDS = 40
_FIRST_SENTENCE = re.compile(r"(?<=[a-z0-9]{3}[.!?])[\"']?\s")
Advance = Callable[[int], None]


@dataclass
class Written:
    """What a host wrote: pairs by passage, and why others were no use."""

    pairs: list[Pair] = field(default_factory=list)
    asked: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1


def question_in(text: str) -> str | None:
    """The question in what was written; None if there is none.

    >>> question_in('Question: "Who sold the wool?" It is easy.')
    'Who sold the wool?'
    """
    line = next((line for line in text.strip().splitlines() if "?" in line), "")
    line = re.sub(r"^\W*(\d+[.)]|question\s*\d*\s*:|q\s*:)?\s*", "", line.strip(), flags=re.IGNORECASE)
    question = line[: line.find("?") + 1].strip("\"'* ")
    return question if 3 <= len(question.split()) <= _MOST_WORDS else None


def answer_in(text: str) -> str | None:
    """The answer in what was written: its first sentence, without quotes; None if it is empty.

    >>> answer_in('"Anna Bell." She said it twice.'), answer_in("Dr. Bell, of course. Why?")
    ('Anna Bell.', 'Dr. Bell, of course.')
    """
    line = next((line.strip() for line in text.strip().splitlines() if line.strip()), "")
    return _FIRST_SENTENCE.split(line, maxsplit=1)[0].strip("\"'* ") or None


@dataclass(frozen=True)
class _Wish:
    """A question that the host is to write: about a passage, of a sentence for a word of it, or a free one."""

    passage: int
    prompt: tuple[int, ...]
    word: str | None = None
    sentence: str = ""


@dataclass(frozen=True)
class Asker:
    """A host that is asked about passages; while it is, the model is the bare host.

    salient: the words of a sentence that are worth a question
    seed: of what is drawn
    """

    model: Any
    prompter: Prompter
    passages: Sequence[Passage]
    salient: Salience
    settings: StudySettings
    seed: int

    def seconds(self, numbers: Sequence[int]) -> tuple[int, float]:
        """How many questions `ask` would have the host write about some passages, and about how long that takes."""
        prompts = [wish.prompt for wish in self._wishes(numbers)]
        seconds = seconds_to_write(self.model, self.prompter.tokenizer, prompts, self.settings.new_tokens, self.seed)
        return len(prompts), 2 * seconds  # questions, and their answers

    def ask(self, numbers: Sequence[int], advance: Advance) -> Written:
        """Questions about some passages, by their numbers, and answers to them.

        advance: told of so many passages that are done with
        """
        written, wishes = Written(), self._wishes(numbers)
        written.asked = len(wishes)
        asked: dict[tuple[int, str], _Wish] = {}
        texts = self._written([wish.prompt for wish in wishes], self.seed + numbers[0], temperature=0.7)
        for wish, text in zip(wishes, texts, strict=True):
            question = question_in(text if wish.word is None else text.lstrip().partition("\n")[0])
            if question is None:
                written.refuse("are no question")
            elif wish.word is not None and set(_parts(wish.word)) <= set(_parts(question)):
                written.refuse("say their answer")
            elif not _shared(question, wish.sentence or self.passages[wish.passage].text):
                written.refuse("are not about the passage")
            else:
                asked.setdefault((wish.passage, question), wish)
        self._answer(asked, written)
        advance(len(numbers))
        return written

    def _written(self, prompts: Sequence[Sequence[int]], seed: int, temperature: float = 0.0) -> list[str]:
        return write(self.model, self.prompter.tokenizer, prompts, self.settings.new_tokens, seed, temperature=temperature)

    def _wishes(self, numbers: Sequence[int]) -> list[_Wish]:
        """What the host is told to write about some passages."""
        prompter, settings = self.prompter, self.settings
        shown = "\n\n".join(_EXAMPLE.format(text, word, f" {question}") for text, word, question in EXAMPLES)
        wishes: list[_Wish] = []
        for number in numbers:
            rng, passage = random.Random(f"{self.seed} {number}"), self.passages[number]
            if ASKED in settings.kinds and prompter.has_chat:
                told = [SEEDS[index % len(SEEDS)] for index in range(settings.questions)]
                wishes += [_Wish(number, tuple(prompter.ask(each, passage.text))) for each in told]
            if ASKED_FOR in settings.kinds:
                words = [(each, word.text) for each in sentences_of(passage.text) for word in self.salient(each)]
                for sentence, word in rng.sample(words, min(settings.questions, len(words))):
                    prompt = prompter.passage(f"{shown}\n\n{_EXAMPLE.format(sentence, word, '')}")
                    wishes.append(_Wish(number, tuple(prompt), word, sentence))
        return wishes

    def _answer(self, asked: dict[tuple[int, str], _Wish], written: Written) -> None:
        """The host's own answers, with the passage in view; a question for a word has that word for an answer too."""
        texts = self._written([self.prompter.ask(q, self.passages[number].text) for number, q in asked], self.seed)
        for ((number, question), wish), text in zip(asked.items(), texts, strict=True):
            answer = answer_in(text)
            if wish.word is not None:
                agrees = answer is not None and set(_parts(wish.word)) <= set(_parts(answer))
                if self.settings.check and not agrees:
                    written.refuse("are answered otherwise with the passage in view")
                    continue
                written.pairs.append(Pair(ASKED_FOR, question, wish.word, number))
                if answer is not None and agrees and answer != wish.word:
                    written.pairs.append(Pair(ASKED_FOR, question, answer, number))
            elif answer is None:
                written.refuse("got no answer")
            elif not _shared(answer, self.passages[number].text):
                written.refuse("have an answer without a word of the passage")
            else:
                written.pairs.append(Pair(ASKED, question, answer, number))


def _parts(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shared(said: str, text: str) -> bool:
    """Whether a word that can be asked for stands in both: of four letters, or a number; of an answer without any, any word."""
    there = set(_parts(text))
    words = [part for a, b in words_of(said) for part in _parts(said[a:b]) if len(part) > 3 or part[0].isdigit()]
    return any(part in there for part in words or _parts(said))
