"""LoCoMo's dialogues, in either shape they are published in: flat files of one dialogue, or one file with a list.

Sessions without turns and dates without a session, which the published files have, hold no text and add none.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.schemas import anything
from locas_ext.storage.schema import short
from locas_ext.terminal import neutral

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
ADVERSARIAL = 5


@dataclass(frozen=True)
class Turn:
    """What a speaker says; `caption` describes the image shared with it, if one was."""

    speaker: str
    text: str
    caption: str | None


@dataclass(frozen=True)
class Session:
    date: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """A question of one of the CATEGORIES.

    answer: None for most adversarial questions, whose answer is in no dialogue
    trap: the wrong answer that an adversarial question leads to; None for the others
    published: the wrong answer that `answer` was put in the place of (corrections.py); None: `answer` is the published one
    """

    text: str
    category: int
    answer: str | None
    trap: str | None
    published: str | None = None


@dataclass(frozen=True)
class Dialogue:
    name: str
    speakers: tuple[str, str]
    sessions: tuple[Session, ...]
    questions: tuple[Question, ...]

    def digest(self) -> str:
        """Tells dialogues of one name but other content apart: the start of a SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def read_dialogues(paths: list[Path], but: Path | None = None) -> list[Dialogue]:
    """The dialogues of files, and of the *.json files of folders in the order of their names.

    but: a file in these folders that holds no dialogues

    A file holds one dialogue, named after the file, with the sessions beside `qa`; or a list of dialogues (or one),
    each with `sample_id`, its name, and the sessions in `conversation`.

    Raises OSError for a path that cannot be read, and ValueError, naming file and key, where the content is not this,
    for a folder without such files and for two dialogues of one name.
    """
    places: dict[str, Path] = {}
    dialogues = []
    for file in (file for path in paths for file in _files(path, but)):
        for dialogue in dialogues_in(file, read_json(file, anything)):
            if dialogue.name in places:
                raise ValueError(f"dialogue {dialogue.name} is in {places[dialogue.name]} and again in {file}")
            places[dialogue.name] = file
            dialogues.append(dialogue)
    return dialogues


def _files(path: Path, but: Path | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.json") if but is None or file.resolve() != but.resolve())
    if not files:
        raise ValueError(f"{path} holds no *.json files")
    return files


def dialogues_in(file: Path, content: Any) -> list[Dialogue]:
    """Those of a file's content. ValueError, naming file and key, for another content."""
    root = Place(str(file), content)
    if isinstance(content, list):
        if not content:
            raise ValueError(f"{file} is an empty list; expected dialogues")
        return [_listed(place) for place in root.items()]
    return [_listed(root)] if "conversation" in root.need_object() else [_dialogue(neutral(file.stem), root, root)]


def _listed(place: "Place") -> Dialogue:
    return _dialogue(place.get("sample_id", str), place.child("conversation"), place)


def _dialogue(name: str, conversation: "Place", top: "Place") -> Dialogue:
    matches = (re.fullmatch(r"session_(\d{1,9})", key, re.ASCII) for key in conversation.need_object())
    numbers = sorted(int(match[1]) for match in matches if match)
    if not numbers:
        raise ValueError(f"{conversation.name}: session_1 is missing")
    questions = top.child("qa").items()
    if not questions:
        raise ValueError(f"{top.name}: qa holds no questions")
    return Dialogue(
        name,
        (conversation.get("speaker_a", str), conversation.get("speaker_b", str)),
        tuple(_session(conversation, f"session_{number}") for number in numbers),
        tuple(_question(place) for place in questions),
    )


def _session(conversation: "Place", key: str) -> Session:
    date = conversation.get(f"{key}_date_time", str)
    return Session(date, tuple(_turn(place) for place in conversation.child(key).items()))


def _turn(place: "Place") -> Turn:
    fields = place.need_object()
    caption = place.get("blip_caption", str) if "blip_caption" in fields else None
    if caption is None and fields.get("img_url"):
        caption = "an image"
    return Turn(place.get("speaker", str), place.get("text", str), caption)


def _question(place: "Place") -> Question:
    category = place.get("category", int)
    if category not in CATEGORIES:
        raise ValueError(f"{place.name}: category is {category}; expected 1 to {len(CATEGORIES)}")
    adversarial = category == ADVERSARIAL
    answered = not adversarial or "answer" in place.need_object()
    return Question(
        place.get("question", str),
        category,
        str(place.get("answer", str | int | float)) if answered else None,
        str(place.get("adversarial_answer", str | int | float)) if adversarial else None,
    )


@dataclass(frozen=True)
class Place:
    """A part of a file's content, with the file and the keys that lead there as its name, for messages."""

    name: str
    content: object

    def need_object(self) -> dict:
        if not isinstance(self.content, dict):
            raise ValueError(f"{self.name} is {type(self.content).__name__}; expected an object")
        return self.content

    def items(self) -> list["Place"]:
        if not isinstance(self.content, list):
            raise ValueError(f"{self.name} is {type(self.content).__name__}; expected a list")
        return [Place(f"{self.name}[{index}]", item) for index, item in enumerate(self.content)]

    def child(self, key: str) -> "Place":
        content = self.need_object()
        if key not in content:
            raise ValueError(f"{self.name}: {key} is missing")
        return Place(f"{self.name}: {key}", content[key])

    def get(self, key: str, kind):
        """The value of `key`, which must be of `kind`, a type or a union; a bool is not an int here."""
        place = self.child(key)
        if not isinstance(place.content, kind) or isinstance(place.content, bool):
            raise ValueError(f"{place.name} is {short(place.content)}; expected {getattr(kind, '__name__', kind)}")
        return place.content
