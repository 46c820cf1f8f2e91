"""Where a memory stands in a text: the chunks it has scored, and what a resumed run needs to know and to check."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Chunk:
    """One scored chunk.

    start, end: its own tokens are [start, end) of the text
    tokens: how many of them were scored (the first token of a text never is)
    nll: their summed negative log-likelihood, in nats, before the chunk was learned from
    memory_version: the version of the memory that scored them
    """

    start: int
    end: int
    tokens: int
    nll: float
    memory_version: int


@dataclass
class Stream:
    """Where memorize() stands in a text: what a resumed run needs to know and to check."""

    settings: dict
    position: int
    text_digest: str  # of the tokens before `position`
    chunks: list[Chunk]
    tail: list[int] | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Stream":
        return cls(**{**fields, "chunks": [Chunk(**chunk) for chunk in fields["chunks"]]})
