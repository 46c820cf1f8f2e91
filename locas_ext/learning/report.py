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


@dataclass(frozen=True)
class Divergence:
    """A run whose memory made the text harder than the host alone does.

    Attributes:
        chunk: the Chunk at which it was noticed
        memory, host: nats per token, with the memory and by the host alone, over the chunks that showed it
        restored_version: the version of the state that was put back at the run's end; None if the run ended with a
            memory that had recovered, or was ended by an exception

    >>> import locas_ext as locas
    >>> print(locas.Divergence(locas.Chunk(1024, 1536, 512, 2560.0, 2), memory=5.0, host=4.0, restored_version=1))
    diverged at token 1,024: 5.00 nats per token, 4.00 by the host alone; put back: the state of version 1
    """

    chunk: Chunk
    memory: float
    host: float
    restored_version: int | None = None

    def __str__(self) -> str:
        back = "" if self.restored_version is None else f"; put back: the state of version {self.restored_version}"
        return (
            f"diverged at token {self.chunk.start:,}: {self.memory:.2f} nats per token, {self.host:.2f} by the host alone{back}"
        )


@dataclass(frozen=True)
class HostKernelsReport:
    """Which parts of the host ran through native kernels.

    Attributes:
        ours: those of "norms", "residuals", "attention", "loss" and, of a host that is split among processes, "sums" that did;
            the rotary embedding is part of "attention"
        own: why the host's own code ran the others, by part or by kind of window; by "host" if that ran everything

    >>> from locas_ext.learning.report import HostKernelsReport
    >>> print(HostKernelsReport(("norms", "loss"), {"attention": "eager attention"}))
    norms, loss; the host's own: attention: eager attention
    """

    ours: tuple[str, ...] = ()
    own: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        own = "; ".join(f"{part}: {why}" for part, why in self.own.items())
        return (", ".join(self.ours) or "none") + (f"; the host's own: {own}" if own else "")


@dataclass
class MemorizeReport:
    """What a run over a text measured; print() shows one line of it.

    Attributes:
        chunks: every scored Chunk, oldest first; for a run that was resumed or fed, earlier calls' chunks too
        seconds: the time that this call took
        graph: a GraphReport: how many updates of this call ran as a CUDA graph, and what kept the others from it
        host_kernels: a HostKernelsReport: which parts of the host ran through native kernels in this call
        one_forward: the reasons why windows of this call were read in one forward, and learned from as with
            context_gradient=True; empty if two forwards gave the same result as one
        diverged: a Divergence if the memory was found to make the text harder than the host alone does; else None
        ranks: in a data-parallel run, each rank's list of chunks, in the order of the ranks; empty in any other run. All other
            attributes describe this rank's text, except `diverged`, which is about all texts

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
    host_kernels: HostKernelsReport = HostKernelsReport()
    one_forward: list[str] = field(default_factory=list)
    diverged: Divergence | None = None
    ranks: list[list[Chunk]] = field(default_factory=list, repr=False)

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
        said = f"{self.tokens:,} tokens in {len(self.chunks):,} chunks, perplexity {self.perplexity:.2f}, {self.seconds:.1f} s"
        return said if self.diverged is None else f"{said}; {self.diverged}"
