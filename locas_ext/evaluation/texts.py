"""Text files as token ids: each file is read once, and its fingerprint is of the bytes that were read."""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from locas_ext.terminal import neutral

from .beginning import encode_beginning
from .text_file import TextFile

CHAPTER = re.compile(r"^CHAPTER [A-Z]+$", re.M)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text file, or its beginning.

    name: the file's name without its ending, or a title; what a terminal or a file of UTF-8 does not take is escaped in it
    sha256: of the whole file; of a pipe, of what was read from it
    ids: [n] int64 token ids
    words, bytes: of exactly the text that is scored, from the end of the first token to the end of the last: runs of
        characters that are not white space, and bytes of UTF-8
    chapters: positions in `ids` where a chapter of a novel begins: a line such as CHAPTER ONE
    """

    name: str
    sha256: str
    ids: torch.Tensor
    words: int
    bytes: int
    chapters: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> dict:
        return {"name": self.name, "sha256": self.sha256, "tokens": len(self.ids)}


def check_readable(path: Path, processes: int = 1) -> None:
    """OSError or ValueError, before anything is loaded, for a text that these processes cannot all read."""
    if not stat.S_ISREG(path.stat().st_mode):
        if processes > 1 and not path.is_dir():
            raise ValueError(f"{path} can be read once only, but {processes} processes read it; expected a regular file")
        if not path.is_dir():
            return  # a pipe whose reader leaves is closed to its writer
    path.open("rb").close()


def read_whole(path: Path) -> str:
    """A text file as it is. Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 text."""
    with TextFile(path) as file:
        file.read_to(None)
        return file.text


def read_text(path: Path, tokenizer, max_tokens: int | None, name: str | None = None) -> Text:
    """At most `max_tokens` tokens of a text file; None: all.

    name: what the text is called; None: the file's name without its ending

    Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 text or holds fewer
    than 2 tokens.
    """
    with TextFile(path) as file:
        ids, offsets = encode_beginning(tokenizer, file, max_tokens)
        if len(ids) < 2:
            raise ValueError(f"{path} holds {'1 token' if ids else 'no text'}; {_LEAST}")
        if offsets is None:
            scored = tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
        else:
            scored = file.text[offsets[0][1] : offsets[-1][1]]
        return Text(
            name=neutral(path.stem) if name is None else name,
            sha256=file.digest(),
            ids=torch.tensor(ids),
            words=len(scored.split()),
            bytes=len(scored.encode()),
            chapters=_chapters(file.text, offsets or []),
        )


_LEAST = "expected at least 2 tokens, one to predict the other from"


def _chapters(text: str, offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    headings = {match.start() for match in CHAPTER.finditer(text)}
    if not headings:
        return ()
    return tuple(index for index, (start, end) in enumerate(offsets) if not headings.isdisjoint(range(start, end)))


def read_texts(paths: list[Path], tokenizer, max_tokens: int | None = None) -> torch.Tensor:
    """The token ids [n] of text files one after another, with the end-of-text token between two.

    max_tokens: of each file; None: all

    Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 text or is empty, and for a
    single token in all.
    """
    ids: list[int] = []
    for path in paths:
        with TextFile(path) as file:
            tokens, _ = encode_beginning(tokenizer, file, max_tokens)
        if not tokens:
            raise ValueError(f"{path} holds no text")
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokens)
    if len(ids) < 2:
        raise ValueError(f"{paths[0]} holds 1 token; {_LEAST}")
    return torch.tensor(ids)
