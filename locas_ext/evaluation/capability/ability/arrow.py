"""Arrow's streaming format, as far as data sets of questions need it: columns of text, of integers and of lists of text.

The format is a row of messages, each a flatbuffer and a body (arrow.apache.org/docs/format/Columnar.html, "IPC Streaming
Format"). MMLU comes in it; so small a part is read here, so that no library of data frames has to be there.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from locas_ext.errors import LocasError

_SCHEMA, _RECORD_BATCH = 1, 3
_INT, _UTF8, _LIST = 2, 5, 12


def read_table(file: Path) -> dict[str, list[Any]]:
    """The columns of a file by name, each a list of int, str, list[str] or None.

    Raises OSError for a file that cannot be read, LocasError for one that is not of the format or holds other types.
    """
    raw = file.read_bytes()
    try:
        return _columns(raw)
    except (struct.error, IndexError, KeyError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise LocasError(f"{file} is damaged: not an Arrow stream of texts and integers ({error})") from None


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer: its fields are found through a table of offsets."""

    raw: bytes
    place: int

    def _slot(self, field: int) -> int:
        """Where a field lies; 0 if it is left out."""
        offsets = self.place - self.number("<i", self.place)
        entry = 4 + 2 * field
        if entry >= self.number("<H", offsets):
            return 0
        inside = self.number("<H", offsets + entry)
        return self.place + inside if inside else 0

    def number(self, form: str, place: int) -> int:
        if place < 0:
            raise ValueError("an offset points before the file")
        return struct.unpack_from(form, self.raw, place)[0]

    def value(self, field: int, form: str, default: int = 0) -> int:
        slot = self._slot(field)
        return self.number(form, slot) if slot else default

    def _target(self, slot: int) -> int:
        return slot + self.number("<I", slot)

    def table(self, field: int) -> "_Table":
        slot = self._slot(field)
        if not slot:
            raise ValueError(f"field {field} is missing")
        return _Table(self.raw, self._target(slot))

    def _vector(self, field: int) -> tuple[int, int]:
        """-> where the first item lies, how many there are"""
        slot = self._slot(field)
        if not slot:
            return 0, 0
        begin, count = self._target(slot) + 4, self.number("<I", self._target(slot))
        if count > len(self.raw):
            raise ValueError(f"{count} items in {len(self.raw)} bytes")
        return begin, count

    def text(self, field: int) -> str:
        begin, count = self._vector(field)
        return self.raw[begin : begin + count].decode()

    def tables(self, field: int) -> list["_Table"]:
        begin, count = self._vector(field)
        return [_Table(self.raw, self._target(begin + 4 * index)) for index in range(count)]

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structs of two int64."""
        begin, count = self._vector(field)
        return [struct.unpack_from("<qq", self.raw, begin + 16 * index) for index in range(count)]


def _messages(raw: bytes) -> Iterator[tuple[_Table, bytes]]:
    """(message, its body) up to the end of the stream."""
    place = 0
    while place < len(raw):
        marker, size = struct.unpack_from("<Ii", raw, place)
        if marker != 0xFFFFFFFF or size < 0:
            raise ValueError(f"no message begins at byte {place}")
        if size == 0:
            return
        begin = place + 8
        message = _Table(raw, begin + struct.unpack_from("<I", raw, begin)[0])
        length = message.value(3, "<q")
        place = begin + size + length
        if length < 0 or place > len(raw):
            raise ValueError(f"the message at byte {begin - 8} ends after the file")
        yield message, raw[begin + size : place]


def _columns(raw: bytes) -> dict[str, list[Any]]:
    fields: list[_Table] = []
    columns: dict[str, list[Any]] = {}
    for message, body in _messages(raw):
        kind = message.value(1, "<B")
        if kind == _SCHEMA:
            fields = message.table(2).tables(1)
            columns = {field.text(0): [] for field in fields}
        elif kind == _RECORD_BATCH:
            batch = message.table(2)
            reader = _Batch(body, iter(batch.pairs(1)), iter(batch.pairs(2)))
            for field in fields:
                columns[field.text(0)] += reader.column(field)
        else:
            raise ValueError(f"a message of kind {kind}")
    if not fields:
        raise ValueError("no schema")
    return columns


@dataclass(frozen=True)
class _Batch:
    """A record batch: nodes (length, nulls) and buffers (offset, length) in the order of the columns."""

    body: bytes
    nodes: Iterator[tuple[int, int]]
    buffers: Iterator[tuple[int, int]]

    def _next(self, what: Iterator[tuple[int, int]]) -> tuple[int, int]:
        pair = next(what, None)
        if pair is None:
            raise ValueError("fewer buffers than columns")
        return pair

    def _buffer(self) -> bytes:
        offset, length = self._next(self.buffers)
        if offset < 0 or length < 0 or offset + length > len(self.body):
            raise ValueError("a buffer ends after its message")
        return self.body[offset : offset + length]

    def column(self, field: _Table) -> list[Any]:
        count, nulls = self._next(self.nodes)
        valid = self._buffer()
        values: list[Any]
        kind = field.value(2, "<B")
        if kind == _INT:
            values = self._integers(field.table(3), count)
        elif kind == _UTF8:
            bounds, data = self._bounds(count), self._buffer()
            values = [data[begin:end].decode() for begin, end in bounds]
        elif kind == _LIST:
            bounds = self._bounds(count)
            (child,) = field.tables(5)
            items = self.column(child)
            values = [items[begin:end] for begin, end in bounds]
        else:
            raise ValueError(f"a column of type {kind}")
        if not nulls:
            return values
        return [value if valid[n // 8] >> n % 8 & 1 else None for n, value in enumerate(values)]

    def _integers(self, kind: _Table, count: int) -> list[int]:
        bits = kind.value(0, "<i")
        if bits not in (8, 16, 32, 64):
            raise ValueError(f"integers of {bits} bits")
        form = f"<{'i' if kind.value(1, '<B') else 'u'}{bits // 8}"
        return np.frombuffer(self._buffer(), form, count).tolist()

    def _bounds(self, count: int) -> list[tuple[int, int]]:
        ends = np.frombuffer(self._buffer(), "<i4", count + 1 if count else 0).tolist()
        return list(pairwise(ends))
