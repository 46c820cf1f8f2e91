"""A study on disk: what the host wrote, and how far the memory has learned, so that an ended study goes on.

study.json          what it is a study of: texts, host, settings
pairs.jsonl         the questions and answers, a line each; a line {"done": [passages]} after those of some passages
progress.json       how far the memory in memory/ has learned
memory/             that memory, with its optimizer
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locas_ext.errors import LocasError
from locas_ext.storage.config_file import strict_json
from locas_ext.storage.files import write_atomically
from locas_ext.storage.schema import Kind, Wrong, integer, list_of, nullable, number, record, text

from .asking import Written
from .pairs import Pair

_MOST = 1 << 31
_PAIR = record({"kind": text, "question": text, "answer": text, "passage": integer(0, _MOST), "begin": text})


def _refused(value: Any, place: str) -> None:
    if type(value) is not dict or not all(type(count) is int for count in value.values()):
        raise Wrong(f"{place} is not a count for each reason")


_DONE = record({"done": list_of(integer(0, _MOST)), "asked": integer(0, _MOST), "refused": _refused})
_PROGRESS = record(
    {
        "start": text,
        "step": integer(0, _MOST),
        "guard": number(0, 1e30),
        "rate": number(0, 1),
        "retreats": integer(0, _MOST),
        "first": nullable(number(-1e30, 1e30)),
    }
)


def _parsed(raw: bytes, source: str, kind: Kind) -> Any:
    try:
        content = strict_json(raw)
        kind(content, "")
    except ValueError as error:
        raise LocasError(f"{source} is damaged: not valid JSON ({error})") from None
    except Wrong as wrong:
        raise LocasError(f"{source} is damaged: {wrong}") from None
    return content


class Store:
    """The folder of a study; with folder=None everything stays in memory."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        """identity: what the study is of, JSON-ready. ValueError, naming what differs, if the folder is of another one."""
        self.folder = folder
        self._lines: list[str] = []
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"cache: {folder} is a file; expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
        wanted, file = json.loads(json.dumps(identity)), folder / "study.json"
        if file.exists():
            before = _parsed(file.read_bytes(), str(file), lambda value, place: None)
            different = [name for name in wanted if not isinstance(before, dict) or before.get(name) != wanted[name]]
            if different:
                raise ValueError(
                    f"cache: {folder} is of another study (different: {', '.join(different)}); choose another folder"
                )
        elif foreign := next((entry.name for entry in folder.iterdir()), None):
            raise FileExistsError(f"cache: {folder} holds something else ({foreign}); expected an empty or new folder")
        else:
            write_atomically(file, json.dumps(wanted, indent=1).encode())

    # ---- what the host wrote -----------------------------------------------------------------------------------
    def written(self) -> tuple[Written, set[int]]:
        """What there is already, and the passages that it is about; lines after the last {"done"} are left out."""
        result, done, waiting = Written(), set[int](), list[Pair]()
        file = None if self.folder is None else self.folder / "pairs.jsonl"
        if file is None or not file.exists():
            return result, done
        lines = file.read_bytes().split(b"\n")
        for place, line in enumerate(lines[:-1], start=1):  # behind the last newline is a line that was cut off, or nothing
            content = _parsed(line, f"{file}, line {place}", _line)
            if "done" not in content:
                waiting.append(Pair(**content))
                continue
            result.pairs += waiting
            result.asked += content["asked"]
            for why, count in content["refused"].items():
                result.refused[why] = result.refused.get(why, 0) + count
            done |= set(content["done"])
            waiting = []
        self._lines = [line.decode() for line in lines[: _last_done(lines)]]
        return result, done

    def add(self, passages: Sequence[int], part: Written) -> None:
        """What the host wrote about some more passages."""
        if self.folder is None:
            return
        self._lines += [json.dumps(pair.to_record()) for pair in part.pairs]
        self._lines.append(json.dumps({"done": list(passages), "asked": part.asked, "refused": part.refused}))
        write_atomically(self.folder / "pairs.jsonl", "".join(f"{line}\n" for line in self._lines).encode())

    # ---- how far the memory has learned ------------------------------------------------------------------------
    @property
    def memory(self) -> Path | None:
        """Where the memory that is learning lies."""
        return None if self.folder is None else self.folder / "memory"

    def progress(self, start: str) -> dict[str, Any] | None:
        """How far a memory that began as `start`, a digest, has learned; None if there is none."""
        file = None if self.folder is None else self.folder / "progress.json"
        if file is None or not file.exists():
            return None
        progress = _parsed(file.read_bytes(), str(file), _PROGRESS)
        return progress if progress["start"] == start else None

    def keep_progress(self, progress: dict[str, Any]) -> None:
        """Called after the memory itself was saved."""
        if self.folder is not None:
            write_atomically(self.folder / "progress.json", json.dumps(progress).encode())


def _line(value: Any, place: str) -> None:
    (_DONE if isinstance(value, dict) and "done" in value else _PAIR)(value, place)


def _last_done(lines: list[bytes]) -> int:
    """How many lines there are up to the last {"done"}."""
    return max((number for number, line in enumerate(lines, start=1) if line.startswith(b'{"done"')), default=0)


def digest(*parts: object) -> str:
    """SHA-256 of the JSON of some values, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
