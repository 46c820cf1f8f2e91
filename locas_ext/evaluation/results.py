"""results.json of a task, {"settings", "machine", "records"}: written whole after every record, so a run can be resumed."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from locas_ext.storage.files import write_atomically
from locas_ext.storage.lock import folder_lock
from locas_ext.terminal import neutral

from .json_files import parse_json, read_json
from .machine import machine
from .schemas import results as schema

NAME = "results.json"


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, paths are text; a number that is not finite, which JSON has not, is None."""
    return json.loads(json.dumps(value, default=lambda path: neutral(str(path))), parse_constant=lambda name: None)


def read(folder: Path) -> dict:
    """What `write` wrote. FileNotFoundError without results.json, LocasError if it is not one."""
    file = folder / NAME
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no {NAME}{_what_else(folder)}")
    return read_json(file, schema)


def _what_else(folder: Path) -> str:
    return ": it is a memory, which `locas info` describes" if (folder / "locas_config.json").exists() else ""


def differences(before: dict, wanted: dict) -> str:
    """In words, which settings differ now; empty if none does. For an object, or a list of them: what differs in it."""
    return ", ".join(_differences("", before, wanted))


def _differences(name: str, before, wanted) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*before, *wanted]):
            yield from _differences(f"{name}.{key}".lstrip("."), before.get(key), wanted.get(key))
    elif _is_table(before) and _is_table(wanted) and len(before) == len(wanted):
        for index, pair in enumerate(zip(before, wanted, strict=False)):
            yield from _differences(f"{name}[{index}]", *pair)
    elif before != wanted:
        yield f"{name} was {_brief(before)}, is {_brief(wanted)}"


def _is_table(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _brief(value) -> str:
    text = f"a list of {len(value)}" if _is_table(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def only_run(folder: Path) -> AbstractContextManager[None]:
    """Makes an output folder, and keeps other runs out of it in the block. LocasError that says who is in it already."""
    make(folder)
    return folder_lock(folder, wait=0)


def make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out: {folder} is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)


def open_folder(folder: Path, settings: dict) -> list[dict]:
    """Makes the output folder, or opens that of an earlier run. Returns the records that are there already.

    Raises ValueError if they are of other settings, naming those that differ, FileExistsError for a folder that
    holds something else, LocasError if results.json is damaged.
    """
    make(folder)
    with folder_lock(folder):
        return _earlier_records(folder, settings)


def _earlier_records(folder: Path, settings: dict) -> list[dict]:
    if not (folder / NAME).exists():
        if foreign := next((entry.name for entry in folder.iterdir()), None):
            raise FileExistsError(f"--out: {folder} holds something else ({foreign}); expected an empty or new folder")
        write(folder, settings, [])
        return []
    before, wanted = read(folder), plain(settings)
    if different := differences(before["settings"], wanted):
        raise ValueError(f"--out: {folder} holds a run with other settings: {different}; choose another folder")
    return before["records"]


def write(folder: Path, settings: dict, records: list[dict]) -> None:
    """Replaces results.json, atomically. LocasError for what `read` would refuse; then the old one is still there."""
    content = plain({"settings": settings, "machine": machine(), "records": records})
    raw = json.dumps(content, indent=1).encode()
    parse_json(raw, f"what was to be written into {folder / NAME}", schema)
    write_atomically(folder / NAME, raw)
