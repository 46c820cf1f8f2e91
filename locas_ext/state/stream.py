"""Where a memory stands in a text, what a resumed run needs to know and to check, and which texts it has learned."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from .kept_rows import KeptRows


@dataclass(frozen=True)
class Chunk:
    """One scored chunk.

    Attributes:
        start, end: its own tokens are [start, end) of the text
        tokens: how many of them were scored (the first token of a text never is)
        nll: their summed negative log-likelihood, in nats, before the chunk was learned from
        memory_version: the version of the memory that scored them

    >>> import locas_ext as locas
    >>> chunk = locas.Chunk(start=512, end=1024, tokens=512, nll=1843.2, memory_version=1)
    >>> round(chunk.nll / chunk.tokens, 2)
    3.6
    """

    start: int
    end: int
    tokens: int
    nll: float
    memory_version: int


class Beginning(Sequence[Chunk]):
    """A list as long as it is now, without a copy of it. Whoever holds the list may only append to it."""

    def __init__(self, growing: list[Chunk]):
        self._growing, self._length = growing, len(growing)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        places = range(self._length)[place]
        return self._growing[places] if isinstance(places, int) else [self._growing[each] for each in places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Chunk]:
        return list(self)


@dataclass(frozen=True)
class TextRecord:
    """A text that a memory has learned from.

    Attributes:
        title: the name it was given; None if none
        digest: `text_digest` of its token ids, as far as they were learned
        tokens: how many those are
        learned_at: when the latest of them was learned, UTC, ISO 8601

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False, title="a scale")
    >>> [(text.title, text.tokens) for text in memory.texts]
    [('a scale', 32)]
    """

    title: str | None
    digest: str
    tokens: int
    learned_at: str

    def to_dict(self) -> dict:
        """The fields as plain values, ready for JSON.

        Returns:
            A dict; TextRecord(**it) equals this record.

        >>> import locas_ext as locas
        >>> locas.TextRecord("a scale", "e3b0", 32, "2026-01-31T12:00:00+00:00").to_dict()["tokens"]
        32
        """
        return asdict(self)


@dataclass
class Stream:
    """Where memorize() stands in a text: what a run that is continued needs to know and to check.

    Attributes:
        settings: the run's, as `Settings.to_record` puts them, and the host's dtype
        position: how many tokens of the text were read
        text_digest: of those, up to the last whole block (`TextDigest`); in files of format 1 of all
        chunks: those scored so far
        tail: the latest ids read, as many as the window of a next chunk and the digest need; None in files of format 1
        kept: the keys and values that stand before the next chunk; None where its context is read anew
        ranks: where several processes learn one memory, each from its own text: the streams of all of them, including this one
    """

    settings: dict
    position: int
    text_digest: str
    chunks: Sequence[Chunk]
    tail: list[int] | None = None
    kept: KeptRows | None = field(default=None, compare=False, repr=False)
    ranks: "list[Stream]" = field(default_factory=list, compare=False, repr=False)

    def of_rank(self, rank: int) -> "Stream":
        """That of one of the processes, which knows all of them too."""
        return replace(self.ranks[rank], ranks=self.ranks)

    def to_dict(self) -> dict:
        """JSON-ready: of what is kept without the rows, and without the key where nothing is."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("kept", "ranks")}
        kept = {} if self.kept is None else {"kept": self.kept.to_record()}
        return {**values, "chunks": [asdict(chunk) for chunk in self.chunks], **kept}

    @classmethod
    def from_dict(cls, fields: dict, tensors: Mapping[str, Tensor]) -> "Stream":
        """tensors: what `KeptRows.tensors` gave, among others"""
        kept = KeptRows.from_record(fields["kept"], tensors) if "kept" in fields else None
        return cls(**{**fields, "chunks": [Chunk(**chunk) for chunk in fields["chunks"]], "kept": kept})
