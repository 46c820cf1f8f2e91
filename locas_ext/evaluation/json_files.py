"""JSON from strangers: one reader that either returns plain values or raises a LocasError naming the file."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from locas_ext.errors import LocasError
from locas_ext.storage.config_file import strict_json
from locas_ext.storage.schema import Kind, Wrong

MOST_BYTES = 1 << 27
_SUSPICIOUS = re.compile(rb"\\u[dD]|[0-9][eE]\+?[0-9]{3}")  # what half a character, or a number beyond all floats, begins with


def read_json(path: Path, kind: Kind, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file that is of this kind.

    Raises OSError for a file that cannot be opened, LocasError for one that is too large, not JSON or not of the kind.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0  # a pipe has none; reading it stops at the limit
        raw = file.read(most_bytes + 1) if size <= most_bytes else b""
    if max(size, len(raw)) > most_bytes:
        raise LocasError(f"{path} is too large: {max(size, len(raw)):,} bytes; expected at most {most_bytes:,}")
    return parse_json(raw, str(path), kind)


def parse_json(raw: bytes, source: str, kind: Kind) -> Any:
    """The same for bytes that are read already; `source` is how messages call them."""
    try:
        content = strict_json(raw)
        if _SUSPICIOUS.search(raw):
            json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise LocasError(f"{source} is damaged: not valid JSON ({error})") from None
    try:
        kind(content, "")
    except Wrong as wrong:
        raise LocasError(f"{source} is damaged: {wrong}") from None
    return content
