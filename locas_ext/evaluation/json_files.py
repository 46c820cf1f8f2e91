"""JSON from strangers: one reader that either returns plain values or raises a LocasError naming the file."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from locas_ext.errors import LocasError
from locas_ext.storage.schema import Kind, Wrong

MOST_BYTES = 1 << 27


def read_json(path: Path, kind: Kind, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file that is of this kind.

    Raises OSError for a file that cannot be opened, LocasError for one that is too large, no JSON or not of the kind.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0  # a pipe has none; reading it stops at the limit
        raw = file.read(most_bytes + 1) if size <= most_bytes else b""
    if max(size, len(raw)) > most_bytes:
        raise LocasError(f"{path} is too large: {max(size, len(raw)):,} bytes; expected at most {most_bytes:,}")
    return parse_json(raw, str(path), kind)


def parse_json(raw: bytes | str, source: str, kind: Kind) -> Any:
    """The same for a text that is read already; `source` is how messages call it."""
    try:
        content = json.loads(
            raw, object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
        _check_characters(content, raw)
    except RecursionError:
        raise LocasError(f"{source} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise LocasError(f"{source} is damaged: {error}") from None
    try:
        kind(content, "")
    except Wrong as wrong:
        raise LocasError(f"{source} is damaged: {wrong}") from None
    except RecursionError:
        raise LocasError(f"{source} is damaged: it is nested too deeply") from None
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is too large for a number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"{digits[:20]}... is too large for an integer")
    return int(digits)


def _check_characters(content: Any, raw: bytes | str) -> None:
    """ValueError for half a character: an escape such as \\ud800 alone, which no file or terminal can take."""
    if (b"\\ud" if isinstance(raw, bytes) else "\\ud") in raw.lower():
        json.dumps(content, ensure_ascii=False).encode()
