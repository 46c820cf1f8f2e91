"""Reads a text's chunks over a kept context: `WindowReader`'s interface for a run with context="keep"."""

from contextlib import nullcontext
from functools import partial

from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.hosts.registry import Host
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.hosts.window_reading import Way
from locas_ext.ops import token_nll
from locas_ext.state.kept_rows import KeptRows
from locas_ext.state.stream import Stream

from .chunk import Window, WindowReader
from .chunk_attention import chunk_attention
from .host_kernels.kernels import HostKernels, Kind, Level, Ours
from .host_kernels.window_cache import WindowCache
from .keep import Keep
from .kept_context import KeptContext, check_positions
from .protocol import Protocol
from .run_guards import eager_host


class KeptReader:
    """Attributes:
    host, context: what reads, and what stands before
    kernels: what of the host runs through kernels of ours; None: nothing
    left: what the last forward left of its inputs
    """

    def __init__(self, host: Host, protocol: Protocol, keep: Keep, epochs: int, length: int):
        """length: of the text, as far as it is known. ValueError for a host whose context cannot be kept."""
        check_positions(host.model, length - 1 + protocol.bos)
        if (verdict := host.reading.verdict(1, 2)).way == Way.ONE:
            raise ValueError(f"context is 'keep', but {verdict.why}; expected context='recompute'")
        self.host, self.keep, self.epochs = host, keep, epochs
        self.bos = bos_token_id(host.model) if protocol.bos else None
        self.anew = WindowReader(host)
        self.ends_early = self.anew.ends_early
        self.kernels: HostKernels | None = None
        last_layer = host.reading.last_layer if self.ends_early else None
        self.context = KeptContext(host.model, host.input_device(), protocol.window, keep.sinks, last_layer)
        self.chunks = 0
        self.left: list[Tensor] = []
        self.way = Way.SHORT
        self.scored_rows: list[Tensor] = []

    def take_up(self, stream: Stream) -> None:
        """Goes on where another run stood."""
        if stream.kept is None:
            raise LocasError("the run's record holds no kept context")
        self.chunks = len(stream.chunks)
        self.context.take_up(stream.kept, stream.position - 1 + (self.bos is not None))

    # ---- one chunk, from settle to learned -------------------------------------------------------------------
    def settle(self, window: Window, full: int) -> str | None:
        """Puts the context of a chunk in its place, read anew where it is time to.

        full: as in WindowReader.settle

        LocasError for a host that reads a chunk behind a cache otherwise than in one forward.
        """
        why = self.anew.settle(window, full)
        if why is not None:
            raise LocasError(f"context is 'keep', but {why}; expected context='recompute'")
        tokens = len(window.context) + len(window.inputs)
        self.way = self.host.reading.verdict(len(window.context), tokens).way
        with eager_host(self.host.model):
            if self.bos is not None and not self.context.rows.seen:
                self.context.put_before(self.bos)
            self.context.prepare(len(window.inputs))
            if self._is_refreshed(self.chunks):
                self.context.refresh(window.context)
        if self.kernels is not None:
            self._settle_kernels(self.kernels, window, full)
        return None

    def _settle_kernels(self, kernels: HostKernels, window: Window, full: int) -> None:
        inputs, targets = (part.to(self.host.input_device()) for part in (window.inputs, window.targets))
        context = self.context.context
        kind = Kind("kept", context > 0, self.host.reading.kind(context + len(inputs), full - 1))
        ours = Ours(partial(self._ours, inputs), partial(self._our_nll, inputs, targets)) if self.way == Way.SHORT else None
        kernels.settle(kind, targets, partial(self._by_the_host, inputs), ours)

    def _is_refreshed(self, chunk: int) -> bool:
        """Whether the window of a chunk is read anew; before the first one there is nothing to read."""
        every = self.keep.refresh_every
        return every is not None and chunk > 0 and chunk % every == 0

    def is_in_one(self, window: Window) -> bool:
        """Never: what is kept has no gradient."""
        return False

    def logits(self, window: Window) -> Tensor:
        """The logits [n, V] of a window's targets, with a graph over its inputs."""
        inputs = window.inputs.to(self.host.input_device())
        level = self._level(inputs)
        if self.kernels is None or level == Level.NONE:
            return self._by_the_host(inputs)
        if level == Level.ALL:
            return self._ours(inputs)
        with self.kernels.pieces_bound():
            return self._by_the_host(inputs)

    def loss(self, window: Window) -> Tensor:
        """As WindowReader.loss."""
        if self._level(window.inputs) == Level.ALL:
            return self._our_nll(*(part.to(self.host.input_device()) for part in (window.inputs, window.targets))).sum()
        logits = self.logits(window)
        return token_nll(logits, window.targets.to(logits.device)).sum()

    def _level(self, inputs: Tensor) -> Level:
        if self.kernels is None:
            return Level.NONE
        return self.kernels.level("kept", self.context.context, self.context.context + len(inputs))

    def _by_the_host(self, inputs: Tensor) -> Tensor:
        """`logits` by the host's own forward."""
        with eager_host(self.host.model), chunk_attention(self.host) if self.way == Way.SHORT else nullcontext():
            logits = self.context.read(inputs)
        self.left = self.context.left
        return logits

    def _behind(self) -> tuple[HostKernels, WindowCache]:
        assert self.kernels is not None
        return self.kernels, self.kernels.behind_rows(self.context.parts(), self.context.context)

    def _ours(self, inputs: Tensor) -> Tensor:
        kernels, cache = self._behind()
        logits = kernels.logits(cache, inputs, self.context.positions(inputs))
        self._leave(kernels, len(inputs))
        return logits

    def _our_nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        kernels, cache = self._behind()
        nll = kernels.nll(cache, inputs, targets, self.context.positions(inputs))
        self._leave(kernels, len(inputs))
        return nll

    def _leave(self, kernels: HostKernels, count: int) -> None:
        """Notes where the rows of the last `count` inputs are: in the buffers, until the next chunk's take their place."""
        self.left = kernels.buffers.left(self.context.context, self.context.context + count)

    def scored(self) -> None:
        """After a chunk's first forward: what it left is what will be kept, whatever further epochs leave."""
        self.scored_rows = self.left if self.epochs == 1 else [rows.clone() for rows in self.left]

    def learned(self, window: Window) -> KeptRows:
        """After a chunk's last update: keeps what it left, and returns all that is kept."""
        self.context.keep(window.inputs, self.scored_rows)
        self.chunks += 1
        if self._is_refreshed(self.chunks):
            self.context.rows.forget()
        return self.context.rows
