"""A UTF-8 text file read forward, once: its beginning as text, all that was read as a digest."""

import codecs
import hashlib
import io
import os
import stat
from pathlib import Path

_BLOCK = 1 << 20  # bytes


class TextFile:
    """A context manager over a text file, whose `text` grows as it is asked for.

    text: what was read so far, with every line end as a line feed and without the mark that some editors put before a text
    ended: whether that is the whole file
    """

    def __init__(self, path: Path):
        self.path, self.text, self.ended = path, "", False
        self._file = open(path, "rb", buffering=0)
        self._is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
        self._sha256, self._position = hashlib.sha256(), 0

    def __enter__(self) -> "TextFile":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def read_to(self, characters: int | None) -> None:
        """Reads until `text` has so many characters or the file ends; None: all of it. Raises ValueError if not UTF-8."""
        parts, count = [self.text], len(self.text)
        while not self.ended and (characters is None or count < characters):
            # A character has at least a byte, so that no more is read than is needed.
            block = self._read(_BLOCK if characters is None else min(_BLOCK, characters - count))
            parts.append(self._decode(block))
            count += len(parts[-1])
            self.ended = not block
        self.text = "".join(parts)

    def _read(self, size: int) -> bytes:
        block = self._file.read(size) or b""
        self._sha256.update(block)
        self._position += len(block)
        return block

    def _decode(self, block: bytes) -> str:
        try:
            return self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = self._position - len(error.object) + error.start  # what is decoded ends where the block does
            raise ValueError(f"{self.path} is not UTF-8 text (byte {place})") from None

    def digest(self) -> str:
        """SHA-256 of a regular file's bytes, those after `text` included; of anything else, of the bytes that were read."""
        while self._is_regular and self._read(_BLOCK):
            pass
        return self._sha256.hexdigest()
