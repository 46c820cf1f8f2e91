"""Texts with questions, from files of several published shapes. What is missing is named with file and key."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from locas_ext.errors import LocasError
from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.locomo.data import ADVERSARIAL, Dialogue, dialogues_in
from locas_ext.evaluation.locomo.prompts import dialogue_text
from locas_ext.evaluation.schemas import anything, fields
from locas_ext.evaluation.texts import read_whole
from locas_ext.storage.schema import Wrong, list_of, short, text

CLOZE, QUESTION, REVERSED, CONFLICT, ABSENT = "cloze", "question", "reversed", "conflict", "absent"
KINDS = (CLOZE, QUESTION, REVERSED, CONFLICT, ABSENT)
SHIPPED = {"fairytaleqa": ASSETS / "fairytaleqa.json"}


@dataclass(frozen=True)
class Question:
    """Something asked about a text.

    Attributes:
        kind: one of KINDS: the beginning of a sentence, a question, one that asks from value to entity, one whose
            answer contradicts what is generally known, one about what the text does not hold
        text: the question, or the beginning of the sentence
        answers: each is right, the first is the gold; of "absent": what the text says of others, which would be made up
        distractors: wrong answers of the gold's type; empty: there is no choice to make
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A text and what is asked about it.

    Attributes:
        written: questions and answers that the text answers in other words, for memories that learn from given pairs
    """

    title: str
    text: str
    questions: tuple[Question, ...]
    written: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Tells documents of one title but other content apart: the start of a SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


# ---- the shapes of files ---------------------------------------------------------------------------------------
def _words(value: Any, place: str) -> None:
    text(value, place)
    if not value.strip():
        raise Wrong(f"{place} is empty; expected some text")


def _some(kind):
    """A list with at least one item."""
    check_all = list_of(kind)

    def check(value: Any, place: str) -> None:
        check_all(value, place)
        if not value:
            raise Wrong(f"{place} is empty; expected at least one")

    return check


def _question(value: Any, place: str) -> None:
    """`answers`, a list, or `answer`, one."""
    fields({"question": _words})(value, place)
    if "answers" not in value and "answer" not in value:
        raise Wrong(f"{place}.answers is missing; expected answers, a list, or answer")
    fields({"answers": _some(_words)} if "answers" in value else {"answer": _words})(value, place)


def _entry(value: Any, place: str) -> None:
    """A document; `context` is what SQuAD calls its text."""
    fields({"title": _words, "questions": _some(_question)})(value, place)
    key = "context" if "context" in value and "text" not in value else "text"
    fields({key: _words})(value, place)


def _novel(value: Any, place: str) -> None:
    """LiteraryQA's questions about a text that lies beside."""
    fields({"title": _words, "questions": _some(_question)})(value, place)


def _from_entry(entry: dict, story: str) -> Document:
    asked = []
    for item in entry["questions"]:
        answers = item["answers"] if "answers" in item else [item["answer"]]
        asked.append(Question(QUESTION, item["question"].strip(), tuple(dict.fromkeys(answer.strip() for answer in answers))))
    return Document(entry["title"], story, tuple(asked))


def _from_dialogue(file: Path, dialogue: Dialogue) -> Document:
    asked = [
        Question(QUESTION, question.text, (question.answer,))
        for question in dialogue.questions
        if question.answer is not None and question.category != ADVERSARIAL
    ]
    if not asked:
        raise LocasError(f"{file}: dialogue {dialogue.name} has no question that it answers; expected at least one")
    return Document(dialogue.name, dialogue_text(dialogue), tuple(asked))


def _checked(file: Path, content: Any, kind, place: str) -> None:
    try:
        kind(content, place)
    except Wrong as wrong:
        raise LocasError(f"{file}: {wrong}") from None


def _read_file(file: Path) -> list[Document]:
    """The documents of a file, told apart by their keys."""
    content = read_json(file, anything)
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise LocasError(f"{file} is an empty list; expected documents")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise LocasError(f"{file}: [{index}] is {short(entry)}; expected an object with title, text and questions")
    if any("conversation" in entry or "speaker_a" in entry for entry in entries):
        return [_from_dialogue(file, dialogue) for dialogue in dialogues_in(file, content)]
    beside = file.with_suffix(".txt")
    if isinstance(content, dict) and "text" not in content and "context" not in content and beside.exists():
        _checked(file, content, _novel, "")
        return [_from_entry(content, read_whole(beside))]
    for index, entry in enumerate(entries):
        _checked(file, entry, _entry, f"[{index}]" if isinstance(content, list) else "")
    return [_from_entry(entry, entry["text"] if "text" in entry else entry["context"]) for entry in entries]


def _files(source: str) -> list[Path]:
    path = SHIPPED.get(source, Path(source))
    if not path.is_dir():
        return [path]
    if not (files := sorted(path.glob("*.json"))):
        raise ValueError(f"{path} holds no *.json files")
    return files


def read_documents(source: str, most: int | None = None) -> list[Document]:
    """The first `most` documents of a file, a folder of *.json files or a set that is shipped.

    source: a path, or one of SHIPPED. A file holds an object or a list of objects {"title", "text" (or "context"),
        "questions": [{"question", "answers" (or "answer")}]}; LiteraryQA's questions, with the text in a .txt file of the
        same name; or LoCoMo's dialogues, without their adversarial questions

    Titles that are not unique get a number. Raises OSError for what cannot be read, LocasError or ValueError, naming file
    and key, for content of another shape.
    """
    documents: list[Document] = []
    for file in _files(source):
        documents += _read_file(file)
        if most is not None and len(documents) >= most:
            break
    return _unique_titles(documents[:most])


def _unique_titles(documents: list[Document]) -> list[Document]:
    titles: dict[str, Document] = {}
    for document in documents:
        title, number = document.title, 1
        while title in titles:
            number += 1
            title = f"{document.title} ({number})"
        titles[title] = replace(document, title=title)
    return list(titles.values())
