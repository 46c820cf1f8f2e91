"""The host, with a passage in its window, writes questions about it and answers them."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .generation import seconds_to_write, write
from .pairs import Pair, Salience
from .passages import Passage, sentences_of, words_of
from .prompts import Prompter
from .settings import ASKED, ASKED_FOR, StudySettings

SEEDS = (
    "Write one short question about a fact in this text. Write only the question.",
    "Write one question that asks for a name in this text. Write only the question.",
    "Write one question that starts with Who or Which and can be answered from this text. Write only the question.",
    "Write one question that starts with Where or When and can be answered from this text. Write only the question.",
    "Write one question that starts with What and can be answered from this text. Write only the question.",
    "Write one question that a teacher would ask to see whether a student remembers this text. Write only the question.",
)
SEED_FOR = 'Write one question about this text whose answer is "{}". Do not use that word. Write only the question.'
SHORTLY = " Answer in a few words."
_MOST_WORDS = 40
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
    """The answer in what was written: its first line, without quotes; None if it is empty.

    >>> answer_in('"Anna Bell."')
    'Anna Bell.'
    """
    line = next((line.strip() for line in text.strip().splitlines() if line.strip()), "")
    return line.strip("\"'* ") or None


def _wishes(passage: Passage, salient: Salience, settings: StudySettings, rng: random.Random) -> list[tuple[str, str | None]]:
    """What the host is told to write about a passage: (instruction, the answer that it is to have or None)."""
    wishes: list[tuple[str, str | None]] = []
    if ASKED in settings.kinds:
        wishes += [(SEEDS[number % len(SEEDS)], None) for number in range(settings.questions)]
    if ASKED_FOR in settings.kinds:
        words = list(dict.fromkeys(word for sentence in sentences_of(passage.text) for word in salient(sentence)))
        chosen = rng.sample(words, settings.questions) if len(words) > settings.questions else words
        wishes += [(SEED_FOR.format(word), word) for word in chosen]
    return wishes


def seconds_to_ask(
    model: Any,
    prompter: Prompter,
    passages: Sequence[Passage],
    numbers: Sequence[int],
    salient: Salience,
    settings: StudySettings,
    seed: int,
) -> tuple[int, float]:
    """How many questions `ask_about` would have the host write about some passages, and about how long that takes."""
    prompts = []
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        prompts += [prompter.ask(told, passages[number].text) for told, _ in _wishes(passages[number], salient, settings, rng)]
    # questions, and the answers to those that had none
    answered = settings.questions * len(numbers) if ASKED in settings.kinds else 0
    seconds = seconds_to_write(model, prompter.tokenizer, prompts, settings.new_tokens, seed)
    return len(prompts), seconds * (1 + answered / max(1, len(prompts)))


def ask_about(
    model: Any,
    prompter: Prompter,
    passages: Sequence[Passage],
    numbers: Sequence[int],
    salient: Salience,
    settings: StudySettings,
    seed: int,
    advance: Advance,
) -> Written:
    """Questions about some passages, by their numbers, and answers to them; the model is the bare host here.

    advance: told of each passage that is done with
    """
    written, wishes = Written(), []
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        wishes += [(number, told, wanted) for told, wanted in _wishes(passages[number], salient, settings, rng)]
    prompts = [prompter.ask(told, passages[number].text) for number, told, _ in wishes]
    texts = write(model, prompter.tokenizer, prompts, settings.new_tokens, seed + numbers[0], temperature=0.8)
    written.asked = len(wishes)
    open_: dict[tuple[int, str], None] = {}
    for (number, _, wanted), text in zip(wishes, texts, strict=True):
        question = question_in(text)
        if question is None:
            written.refuse("are no question")
        elif wanted is None:
            open_[number, question] = None
        elif set(wanted.lower().split()) & set(re.findall(r"\w+", question.lower())):
            written.refuse("say their answer")
        else:
            written.pairs.append(Pair(ASKED_FOR, question, wanted, number))
    _answer(model, prompter, passages, list(open_), settings, seed, written)
    advance(len(numbers))
    return written


def _answer(
    model: Any,
    prompter: Prompter,
    passages: Sequence[Passage],
    questions: list[tuple[int, str]],
    settings: StudySettings,
    seed: int,
    written: Written,
) -> None:
    """The host's own answers, with the passage in view."""
    prompts = [prompter.ask(question + SHORTLY, passages[number].text) for number, question in questions]
    texts = write(model, prompter.tokenizer, prompts, settings.new_tokens, seed)
    for (number, question), text in zip(questions, texts, strict=True):
        answer = answer_in(text)
        if answer is None:
            written.refuse("got no answer")
        elif not _from(passages[number].text, answer):
            written.refuse("have an answer without a word of the passage")
        else:
            written.pairs.append(Pair(ASKED, question, answer, number))


def _from(passage: str, answer: str) -> bool:
    """Whether a word of the answer that can be asked for, or else any, stands in the passage."""
    there = set(re.findall(r"\w+", passage.lower()))
    words = [answer[a:b] for a, b in words_of(answer)] or answer.split()
    return any(part in there for word in words for part in re.findall(r"\w+", word.lower()))
