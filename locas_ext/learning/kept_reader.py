"""Reads a text's chunks over a kept context: `WindowReader`'s interface for a run with context="keep"."""

from collections.abc import Hashable
from contextlib import nullcontext

from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.hosts.registry import Host
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.hosts.window_reading import ONE, SHORT
from locas_ext.state.kept_rows import KeptRows
from locas_ext.state.stream import Stream

from .chunk import Window, WindowReader
from .chunk_attention import chunk_attention
from .host_kernels.attend import Span
from .host_kernels.kernels import HostKernels, Level
from .host_kernels.reading import KernelReading
from .host_kernels.window_cache import WindowCache
from .keep import Keep
from .kept_context import KeptContext, check_positions
from .protocol import Protocol
from .run_guards import eager_host

# A run with so many windows of a stride before the first full one replays these too: fewer are not worth another capture.
WORTH_REPLAYING = 8


class KeptReader(KernelReading):
    """Attributes:
    context: what stands before the inputs
    left: what the last forward left of its inputs
    replayed: whether windows may be replayed from a graph; those that grow are then read from rows that stay in place
    """

    replayed = False

    def __init__(self, host: Host, protocol: Protocol, keep: Keep, epochs: int, length: int):
        """length: of the text, as far as it is known. ValueError for a host whose context cannot be kept."""
        check_positions(host.model, length - 1 + protocol.bos)
        if (verdict := host.reading.verdict(1, 2)).way == ONE:
            raise ValueError(f"context is 'keep', but {verdict.why}; expected context='recompute'")
        self.host, self.keep, self.epochs, self.protocol = host, keep, epochs, protocol
        self.bos = bos_token_id(host.model) if protocol.bos else None
        self.anew = WindowReader(host)
        self.context = KeptContext(host.model, host.input_device(), protocol.window, keep.sinks, protocol.stride)
        self.chunks = 0
        self.left: list[Tensor] | None = None
        self.way = SHORT
        self.scored_rows: list[Tensor] = []

    def resume(self, stream: Stream) -> None:
        """Continues where another run stood."""
        if stream.kept is None:
            raise LocasError("the run's record holds no kept context")
        self.chunks = len(stream.chunks)
        self.context.resume(stream.kept, stream.position - 1 + (self.bos is not None))

    # ---- one chunk, from settle to learned -------------------------------------------------------------------
    def settle(self, window: Window, full: int) -> str | None:
        """Puts the context of a chunk in its place, read anew where it is time to.

        full: as in WindowReader.settle

        LocasError for a host that reads a chunk behind a cache otherwise than in one forward.
        """
        why = self.anew.settle(window, full)
        if why is not None:
            raise LocasError(f"context is 'keep', but {why}; expected context='recompute'")
        self.way = self.host.reading.verdict(len(window.context), window.tokens).way
        self.context.writes = self.host.reading.writes if self.way.ends_early and self.anew.ends_early else None
        if self.bos is not None and not self.context.rows.seen:
            with eager_host(self.host.model):
                self.context.put_before(self.bos)
        self.context.prepare(len(window.inputs))
        if self._is_refreshed(self.chunks):
            with eager_host(self.host.model):
                self.context.refresh(window.context)
        self.settle_kernels(window, full - 1, whole=self.way == SHORT)
        return None

    def _is_refreshed(self, chunk: int) -> bool:
        """Whether the window of a chunk is read anew; before the first one there is nothing to read."""
        every = self.keep.refresh_every
        return every is not None and chunk > 0 and chunk % every == 0

    def is_in_one(self, window: Window) -> bool:
        """Never: what is kept has no gradient."""
        return False

    def fixes(self, window: Window) -> bool:
        """Whether all of ours reads it, from rows that stay in place: nothing in that depends on how long the context is."""
        return self._grows(window) and self._level(window) == Level.ALL

    def _grows(self, window: Window) -> bool:
        """Whether a window is one of many that are not full, in a run that may replay them."""
        full = self.context.room.before + 1 - len(window.inputs)
        many = self.protocol.window >= WORTH_REPLAYING * self.protocol.stride
        return self.replayed and many and self.context.context < full

    def _kind(self, window: Window) -> tuple[Hashable, int, int]:
        return "kept", self.context.context, self.context.context + len(window.inputs)

    def _by_the_host(self, window: Window) -> Tensor:
        attention = chunk_attention(self.host, not self.anew.ends_early) if self.way.own_attention else nullcontext()
        with eager_host(self.host.model), attention:
            logits = self.context.read(window.inputs)
        self.left = self.context.left
        return logits

    def _behind(self, window: Window) -> tuple[HostKernels, WindowCache]:
        """The inputs' rows are written where they will be kept."""
        assert self.kernels is not None
        self.left = []
        before, rows, span = self.context.context, self.context.rows, None
        if self._grows(window):
            before, span = rows.before, Span.of(self.context.begin, rows.before, len(window.inputs))
        layers = rows.layers(rows.before - before, rows.before + self.context.room.inputs)
        return self.kernels, self.kernels.behind_rows(list(zip(layers[::2], layers[1::2], strict=True)), before, span)

    def _ours(self, window: Window) -> Tensor:
        kernels, cache = self._behind(window)
        return kernels.logits(cache, window.inputs, self.context.positions(window.inputs))

    def _our_nll(self, window: Window) -> Tensor:
        kernels, cache = self._behind(window)
        return kernels.nll(cache, window.inputs, window.targets, self.context.positions(window.inputs))

    def look_ahead(self) -> None:
        """While the device still works on a chunk: turns the first rows to where they stand before a next one as long."""
        self.context.look_ahead()

    def scored(self) -> None:
        """After a chunk's first forward: what it left is what will be kept, whatever further epochs leave."""
        assert self.left is not None, "a forward has just left it"
        self.scored_rows = self.left
        if self.epochs > 1:
            rows, inputs = self.context.rows, self.context.inputs
            left = self.left or [layer.transpose(0, 1) for layer in rows.layers(rows.before, rows.before + inputs)]
            self.scored_rows = [layer.clone() for layer in left]

    def learned(self, window: Window) -> KeptRows:
        """After a chunk's last update: keeps what it left, and returns all that is kept."""
        self.context.keep(window.inputs, self.scored_rows)
        self.chunks += 1
        if self._is_refreshed(self.chunks):
            self.context.rows.forget()
        return self.context.rows
