"""What a run over a text measured."""

import math
from dataclasses import dataclass, field

from locas_ext.state.stream import Chunk


@dataclass
class MemorizeReport:
    """What a run over a text measured. `seconds` counts this call; a resumed run's `chunks` are all of the text's.

    cuda_graph: how many updates of this call ran as a CUDA graph, or why none did
    one_forward: why windows of this call were read in one forward, and learned from as with context_gradient=True; empty
        where all were read in two
    """

    chunks: list[Chunk] = field(default_factory=list)
    seconds: float = 0.0
    cuda_graph: str = ""
    one_forward: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def nll(self) -> float:
        return math.fsum(chunk.nll for chunk in self.chunks)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens) if self.tokens else math.nan
