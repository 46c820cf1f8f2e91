"""Corrections of LoCoMo's published answers: what an audit of its questions found wrong, put in their place.

A file of corrections is a JSON list of {"dialogue", "question", "category", "published", "correct", "error_type"}. Where
only the citation was wrong the answer stays; every other type replaces it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.schemas import anything
from locas_ext.storage.schema import short

from .data import ADVERSARIAL, CATEGORIES, Dialogue, Place

RIGHT_ANSWER = "WRONG_CITATION"  # the type of an entry whose answer was right


@dataclass(frozen=True)
class Correction:
    """An entry of the file. place: how messages call it; dialogue: a number or name, as in `applies_to`"""

    place: str
    dialogue: str
    question: str
    category: int
    published: str
    correct: str
    error_type: str

    @property
    def wrong(self) -> bool:
        """Whether the published answer itself was wrong."""
        return self.error_type != RIGHT_ANSWER

    def applies_to(self, name: str) -> bool:
        """Whether a dialogue of this name is meant: 26 is the dialogue "26" and "conv-26"."""
        return name == self.dialogue or name == f"conv-{self.dialogue}"


def read_corrections(file: Path) -> list[Correction]:
    """Raises OSError for a file that cannot be read, ValueError or LocasError, naming file and key, for other content."""
    return [_correction(place) for place in Place(str(file), read_json(file, anything)).items()]


def _correction(place: Place) -> Correction:
    category = place.get("category", int)
    if category not in CATEGORIES or category == ADVERSARIAL:
        raise ValueError(f"{place.name}: category is {category}; expected one with an answer, 1 to {ADVERSARIAL - 1}")
    return Correction(
        place.name,
        str(place.get("dialogue", int | str)),
        place.get("question", str),
        category,
        *(place.get(key, str) for key in ("published", "correct", "error_type")),
    )


def correct(dialogues: list[Dialogue], corrections: list[Correction]) -> list[Dialogue]:
    """The dialogues with the corrected answers; a corrected Question keeps the published one.

    Entries of other dialogues are passed over. Raises ValueError, naming the entry, where a dialogue has no such question
    with the answer that the entry calls the published one, and for a second entry about a question.
    """
    result = []
    for dialogue in dialogues:
        questions, entries = list(dialogue.questions), dict[int, Correction]()
        for entry in corrections:
            if entry.applies_to(dialogue.name):
                index = _find(entry, dialogue, entries)
                entries[index] = entry
                if entry.wrong:
                    questions[index] = replace(questions[index], answer=entry.correct, published=entry.published)
        result.append(replace(dialogue, questions=tuple(questions)))
    return result


def _find(entry: Correction, dialogue: Dialogue, earlier: dict[int, Correction]) -> int:
    """The place of the question that an entry is about; earlier: the entries about others, by their places."""
    name, questions = dialogue.name, dialogue.questions
    asked = [i for i, q in enumerate(questions) if (q.text, q.category) == (entry.question, entry.category)]
    if not asked:
        raise ValueError(f"{entry.place}: dialogue {name} has no question {short(entry.question)} of category {entry.category}")
    answered = [index for index in asked if questions[index].answer == entry.published]
    if not answered:
        answer = questions[asked[0]].answer
        raise ValueError(
            f"{entry.place}: published is {short(entry.published)}, but the answer of dialogue {name} is {short(answer)}"
        )
    free = [index for index in answered if index not in earlier]
    if not free:
        raise ValueError(f"{entry.place}: {earlier[answered[-1]].place} is about the same question; expected one entry")
    return free[0]


def counts(dialogues: list[Dialogue], corrections: list[Correction]) -> dict[str, dict[str, int]]:
    """{dialogue: {"audited", "wrong"}}: the entries about each, and those whose published answer was replaced."""
    result = {}
    for dialogue in dialogues:
        entries = [entry for entry in corrections if entry.applies_to(dialogue.name)]
        result[dialogue.name] = {"audited": len(entries), "wrong": sum(entry.wrong for entry in entries)}
    return result
