"""What a run over a text leaves behind: its chunks, its report, and the place where it can be taken up again."""

import math
from dataclasses import asdict, dataclass, field


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
class MemorizeReport:
    """What a run over a text measured. `seconds` counts this call; a resumed run's `chunks` are all of the text's.

    cuda_graph: how many updates of this call ran as a CUDA graph, or why none did
    """

    chunks: list[Chunk] = field(default_factory=list)
    seconds: float = 0.0
    cuda_graph: str = ""

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def nll(self) -> float:
        return math.fsum(chunk.nll for chunk in self.chunks)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens) if self.tokens else math.nan


@dataclass
class Stream:
    """Where memorize() stands in a text: what a resumed run needs to know and to check."""

    settings: dict
    position: int
    text_digest: str  # of the tokens before `position`
    chunks: list[Chunk]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Stream":
        return cls(**{**fields, "chunks": [Chunk(**chunk) for chunk in fields["chunks"]]})
