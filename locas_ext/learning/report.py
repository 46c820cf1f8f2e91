"""What a run over a text measured."""

import math
from dataclasses import dataclass, field

from locas_ext.state.stream import Chunk

from .perplexity import perplexity


@dataclass(frozen=True)
class GraphReport:
    """How far a run's updates were replayed from a CUDA graph.

    Attributes:
        replayed: the updates that ran as a graph
        updates: all updates by backpropagation in this call
        why_not: what kept the run, or its rest, from using a graph; None if nothing did

    >>> import locas_ext as locas
    >>> print(locas.GraphReport(replayed=3, updates=5, why_not="the last chunk is shorter"))
    3 of 5 updates, then not: the last chunk is shorter
    """

    replayed: int = 0
    updates: int = 0
    why_not: str | None = None

    def __str__(self) -> str:
        if self.why_not is not None and not self.replayed:
            return f"not used: {self.why_not}"
        return f"{self.replayed} of {self.updates} updates" + (f", then not: {self.why_not}" if self.why_not else "")


@dataclass
class MemorizeReport:
    """What a run over a text measured; print() shows one line of it.

    Attributes:
        chunks: every scored Chunk, oldest first; for a run that was resumed or fed, earlier calls' chunks too
        seconds: the time that this call took
        graph: a GraphReport: how many updates of this call ran as a CUDA graph, and what kept the others from it
        one_forward: the reasons why windows of this call were read in one forward, and learned from as with
            context_gradient=True; empty if two forwards gave the same result as one

    >>> import locas_ext as locas
    >>> report = locas.MemorizeReport([locas.Chunk(0, 9, 8, 16.0, 0), locas.Chunk(9, 13, 4, 5.0, 1)], seconds=1.0)
    >>> report.tokens, report.nll
    (12, 21.0)
    >>> print(report)
    12 tokens in 2 chunks, perplexity 5.75, 1.0 s
    """

    chunks: list[Chunk] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    graph: GraphReport = GraphReport()
    one_forward: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """int: the number of scored tokens: all of the text but its first."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def nll(self) -> float:
        """float: the scored tokens' summed negative log-likelihood in nats, each token's before it was learned from."""
        return math.fsum(chunk.nll for chunk in self.chunks)

    @property
    def perplexity(self) -> float:
        """float: exp(nll / tokens); infinite where no float can hold it, NaN without tokens."""
        return perplexity(self.nll, self.tokens)

    @property
    def cuda_graph(self) -> str:
        """`graph` as a sentence."""
        return str(self.graph)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {len(self.chunks):,} chunks, perplexity {self.perplexity:.2f}, {self.seconds:.1f} s"
