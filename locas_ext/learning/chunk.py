"""One chunk of a text: the window it is read in, and its loss.

Chunk [s, e), in a window of at most W tokens:

        b ........... s-2 | s-1 ......... e-2          inputs; b = max(0, e - W)
        context, no_grad  | S positions, gradient
        -> KV cache       | -> logits of tokens s .. e-1

The S positions that predict the chunk's own tokens run with gradient on top of the context's cache, which is dropped after
the chunk.
"""

import warnings
from collections.abc import Hashable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from locas_ext.caller import caller_stacklevel
from locas_ext.hosts.context_cache import ContextCache, NoContext, logits_on, one_forward
from locas_ext.hosts.probe.agreement import distances
from locas_ext.hosts.registry import Host
from locas_ext.hosts.window_reading import ONE, SHORT, Way, tolerance
from locas_ext.state.kept_rows import KeptRows
from locas_ext.state.stream import Stream

from .chunk_attention import chunk_attention
from .host_kernels.kernels import TakesKernels
from .host_kernels.reading import KernelReading
from .run_guards import surrounded


class Window(NamedTuple):
    """The tokens of one step: `context` may be empty, `inputs` predict `targets` one by one. All [n]."""

    context: Tensor
    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, ids: Tensor, start: int, end: int, window: int, bos: int | None) -> "Window":
        """The window of chunk [start, end); the first token of the text is never a target."""
        room = window if bos is None else window - 1
        begin = max(0, end - room)
        first = max(start, 1)  # the first target
        # With a stride as long as the window nothing stands before the chunk; its first token then needs one input.
        begin = min(begin, first - 1)
        context = ids[begin : first - 1]
        inputs = ids[first - 1 : end - 1]
        if bos is not None:
            context = torch.cat([ids.new_tensor([bos]), context])
        return cls(context, inputs, ids[first:end])

    @property
    def tokens(self) -> int:
        """Those that go into the host."""
        return len(self.context) + len(self.inputs)

    def to(self, device: torch.device) -> "Window":
        """The window on a device, in one copy; itself where it lies there."""
        if self.inputs.device == device:
            return self
        return Window(*torch.cat(self).to(device).split([len(part) for part in self]))


class Reader(TakesKernels, Protocol):
    """Reads the windows of a run one after another: `WindowReader`, or `KeptReader` over a kept context.

    A chunk's turn is settle, then loss or logits as often as it has epochs, with `scored` after the first, then `learned`.

    Attributes:
        left: what the last forward left for later chunks; None: nothing
        replayed: whether windows may be replayed from a graph
    """

    left: list[Tensor] | None
    replayed: bool

    def resume(self, stream: Stream) -> None:
        """Continues where another run stood."""

    def settle(self, window: Window, full: int) -> str | None:
        """Gets ready for a chunk. Returns why its window is read in one forward, or None."""

    def is_in_one(self, window: Window) -> bool:
        """Whether one forward reads the whole window, so that the gradient goes through its context too."""

    def runs_the_host(self, window: Window) -> bool:
        """Whether the host's own code alone reads a window, or what of it is split among processes."""

    def fixes(self, window: Window) -> bool:
        """Whether a window that grows is read as all that grow are: from rows that stay in place, whatever its context is."""

    def logits(self, window: Window) -> Tensor:
        """The logits [n, V] of a window's targets, with a graph over its inputs."""

    def loss(self, window: Window) -> Tensor:
        """Summed negative log-likelihood, float32 0-d, of a window's targets, with a graph as `logits`."""

    def look_ahead(self) -> None:
        """While the device still works on a chunk: gets ready what the next one can need whatever comes of this one."""

    def scored(self) -> None:
        """After a chunk's first forward."""

    def learned(self, window: Window) -> KeptRows | None:
        """After a chunk's last update: what is kept for the next one."""


def may_end_early(model) -> bool:
    """Whether a forward may be left midway: not where hooks of another library or a compiled graph surround a layer."""
    return surrounded(model) is None


class WindowReader(KernelReading):
    """Reads windows with a host: logits and loss of their targets, with a graph over their inputs.

    Attributes:
        host: whose `reading` says in how many forwards a window is read
        context_gradient: whether the gradient goes through the context too
        ends_early: whether a context's forward may be left midway
        kernels: what of the host runs through kernels of ours; None: nothing
        left: what a forward leaves for later chunks: nothing
        replayed: as in Reader
    """

    left: list[Tensor] | None = None
    replayed = False

    def __init__(self, host: Host, context_gradient: bool = False):
        self.host, self.context_gradient = host, context_gradient
        self.ends_early = may_end_early(host.model)

    def resume(self, stream: Stream) -> None:
        """Continues where another run stood. Nothing was kept of it."""

    def settle(self, window: Window, full: int) -> str | None:
        """Compares the ways to read a window that is the first of its kind, and takes the cheapest that reads it right.

        full: the tokens of the run's full windows, of which the last is only a target

        Returns why the window is read in one forward, or None.
        """
        why, reading = None, self.host.reading
        if not self.context_gradient:
            known = len(reading.verdicts)
            verdict = reading.settle(len(window.context), window.targets, full - 1, partial(self._read, window))
            why = verdict.why if verdict.way == ONE else None
            if why is not None and len(reading.verdicts) > known:
                self._check_causal(window)
        self.settle_kernels(window, full - 1, whole=not self.context_gradient and self._way(window) == SHORT)
        return why

    @torch.no_grad()
    def _check_causal(self, window: Window) -> None:
        """Warns of a host whose tokens see later ones in windows as long as this one, which a short probe may not show."""
        model, (context, inputs, _) = self.host.model, window.to(self.host.input_device())
        half = len(inputs) // 2
        if not half:
            return
        others = torch.cat([inputs[:half], inputs[:1].expand(len(inputs) - half)])
        logits, moved_logits = (one_forward(model, context, tokens)[:half] for tokens in (inputs, others))
        moved = distances(moved_logits, logits).max().item()
        if not moved <= tolerance(logits, self.host.reading.coarse):
            warnings.warn(
                f"{type(model).__name__} is not causal in a text of {window.tokens} tokens: its last tokens move the logits of "
                f"earlier ones by up to {moved:.2g} of their spread, so a chunk is scored with its own tokens in sight; "
                "memorize with a shorter window",
                stacklevel=caller_stacklevel(),
            )

    def is_in_one(self, window: Window) -> bool:
        """Whether one forward reads the whole window, so that the gradient goes through its context too."""
        return self.context_gradient or self._way(window) == ONE

    def fixes(self, window: Window) -> bool:
        """Never: what is read of a context is as long as the context."""
        return False

    def look_ahead(self) -> None:
        """While the device still works on a chunk. Nothing is kept to get ready."""

    def scored(self) -> None:
        """After a chunk's first forward. Nothing is kept of it."""

    def learned(self, window: Window) -> None:
        """After a chunk's last update. Nothing is kept of it."""

    def _way(self, window: Window) -> Way:
        return self.host.reading.verdict(len(window.context), window.tokens).way

    def _kind(self, window: Window) -> tuple[Hashable, int, int]:
        return "whole" if self.context_gradient else self._way(window), len(window.context), window.tokens

    def _ours(self, window: Window) -> Tensor:
        assert self.kernels is not None
        return self.kernels.logits(self.kernels.behind(window.context), window.inputs)

    def _our_nll(self, window: Window) -> Tensor:
        assert self.kernels is not None
        return self.kernels.nll(self.kernels.behind(window.context), window.inputs, window.targets)

    def _by_the_host(self, window: Window) -> Tensor:
        if self.context_gradient:
            return self._whole(window)
        return self._read(window, self._way(window))

    def _whole(self, window: Window) -> Tensor:
        """The same in one forward, over a cache that keeps nothing where the host can be given one."""
        cache = NoContext() if self.host.reading.plain_cache else None
        return one_forward(self.host.model, window.context, window.inputs, cache)

    def _read(self, window: Window, way: Way) -> Tensor:
        """The same in one way, with a graph over what that leaves in it."""
        model, (context, inputs, _) = self.host.model, window.to(self.host.input_device())
        if len(context) == 0:
            return self._whole(window)
        if not way.in_two:
            return one_forward(model, context, inputs)
        cache = ContextCache(model, context.device, self.host.reading.writes if way.ends_early and self.ends_early else None)
        cache.fill(model, context[None])
        with chunk_attention(self.host, not self.ends_early) if way.own_attention else nullcontext():
            return logits_on(model, inputs, cache, len(context) if way.positions else None)
