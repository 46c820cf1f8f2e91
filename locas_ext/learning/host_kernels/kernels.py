"""Windows read through the pieces found in a host, as far as they gave what the host's own code gives."""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from locas_ext.hosts.cache_names import cache_argument
from locas_ext.hosts.probe.gradient import embedded
from locas_ext.hosts.registry import Host
from locas_ext.hosts.window_reading import misfit, tolerance
from locas_ext.learning.report import HostKernelsReport
from locas_ext.learning.run_guards import surrounded
from locas_ext.ops import token_nll

from .attend import Span
from .binding import bound
from .find import TOKENS, Found, find
from .window_cache import WindowBuffers, WindowCache

# Names no mask that transformers knows how to make: attentions of ours read none.
_NO_MASK = "locas_window"
_READ_OTHERWISE = {"windows read otherwise": "our attention reads in two forwards, without the context's gradient"}


class Level(IntEnum):
    """How much of a window's reading is ours."""

    ALL = 0  # keys and values in buffers of ours, attention and loss included
    PIECES = 1  # norms and residuals only
    NONE = 2


class _Maskless:
    """A config as it is, but for the name of its attention in one thread."""

    def __init__(self, config: Any):
        self._config, self._thread = config, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation" and threading.get_ident() == self._thread:
            return _NO_MASK
        return getattr(self._config, name)


@contextmanager
def _without_masks(decoder: Any) -> Iterator[None]:
    """Inside, transformers makes no attention mask for this decoder, in this thread."""
    config = decoder.config
    decoder.__dict__["config"] = _Maskless(config)
    try:
        yield
    finally:
        decoder.__dict__["config"] = config


class Kind(NamedTuple):
    """Windows that are read alike.

    how: a Way, "whole" (with the context's gradient) or "kept"; behind: whether something stands before the inputs
    least: the least number of tokens
    """

    how: Hashable
    behind: bool
    least: int

    def __str__(self) -> str:
        return f"windows of {self.least} or more tokens" + (" behind a context" if self.behind else "")


class Settled(NamedTuple):
    """How much of a kind's windows is read by ours; own: as in HostKernelsReport, why not more."""

    level: Level
    own: dict[str, str]


class Ours(NamedTuple):
    """A window read by all of ours: its logits [n, V], and each target's loss [n]."""

    logits: Callable[[], Tensor]
    nll: Callable[[], Tensor]


class HostKernels:
    """What stands in for a host's own code while windows of one run are read."""

    def __init__(self, host: Host, found: Found, rows: int):
        """rows: the tokens of the longest window"""
        self.host, self.found = host, found
        self.buffers = WindowBuffers(rows)
        self.pieces, self.settled = found.pieces(), found.settled
        self.all_pieces = self.pieces + found.attention_pieces()
        self.met = set[Kind]()  # in this run

    # ---- how much of it is right -----------------------------------------------------------------------------
    def level(self, how: Hashable, context: int, tokens: int) -> Level:
        """How a window of so many tokens is read, `context` of them before the chunk's inputs."""
        behind = context > 0
        known = [kind.least for kind in self.settled if kind[:2] == (how, behind) and kind.least <= tokens]
        return self.settled[Kind(how, behind, max(known))].level if known else Level.NONE

    @torch.no_grad()
    def settle(self, kind: Kind, targets: Tensor, read: Callable[[], Tensor], ours: Ours | None) -> None:
        """Compares the levels for a window that is the first of its kind, and takes the first that reads it right.

        targets: [n]; read: -> its logits [n, V] by the host's own code; ours: None where that is not for all of ours
        """
        own = read()
        levels = {Level.PIECES: lambda: self._pieces_error(read, own, targets)} if self.pieces else {}
        problem = _READ_OTHERWISE if ours is None and self.found.attentions else {}
        if ours is not None and self.found.attentions:
            levels = {Level.ALL: lambda: _error_of_all(ours, own, targets), **levels}
        for level, error_of in levels.items():
            try:
                error = error_of()
                why = f"the kernels' logits differ from the host's own by {error:.2g} of their spread"
            except torch.OutOfMemoryError:
                raise  # nothing is known of them
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as raised:
                error, why = float("nan"), f"with the kernels it raises {type(raised).__name__}: {raised}"
            if self.host.ranks is not None:
                error = self.host.ranks.largest(error)
            if error <= tolerance(own, self.host.reading.coarse):
                self.settled[kind] = Settled(level, problem)
                return
            problem = problem | {str(kind): why}
        self.settled[kind] = Settled(Level.NONE, problem)

    def _pieces_error(self, read: Callable[[], Tensor], own: Tensor, targets: Tensor) -> float:
        """How far the logits with our pieces are from the host's own. Raises what their backward raises, where a host holds
        more than attention, and so norms in places that are not known."""
        if self.host.reading.plain_cache:
            return misfit(self._with_pieces(read), own, targets)
        with embedded(self.host.model) as gradients:
            logits = self._with_pieces(read)
            gradients.pull(logits)
        return misfit(logits, own, targets)

    def report(self) -> HostKernelsReport:
        """Of the windows of this run."""
        settled = [self.settled[kind] for kind in self.met]
        taken = {level for level, _ in settled}
        ours = []
        if taken - {Level.NONE}:
            ours += ["norms"] * bool(self.found.norms) + ["residuals"] * any(layer is not None for layer in self.found.layers)
        if Level.ALL in taken:
            ours += ["attention"] + ["loss"] * (self.found.head is not None)
        own, ranks = dict(self.found.own), self.host.ranks
        if "attention" in own:
            own.setdefault("loss", "it goes with our attention")
        for _, problem in settled:
            own |= problem
        if ranks is not None and ranks.why_not is not None:
            own["sums"] = ranks.why_not
        ours += ["sums"] * (ranks is not None and ranks.why_not is None)
        return HostKernelsReport(tuple(ours), own)

    # ---- reading ---------------------------------------------------------------------------------------------
    def pieces_bound(self) -> AbstractContextManager[None]:
        """Inside, norms and residuals are ours."""
        return bound(self.pieces)

    def _with_pieces(self, read: Callable[[], Tensor]) -> Tensor:
        with self.pieces_bound():
            return read()

    @contextmanager
    def _all_bound(self) -> Iterator[None]:
        with bound(self.all_pieces), _without_masks(self.host.model.get_decoder()):
            yield

    def behind(self, context: Tensor) -> WindowCache:
        """What stands before the inputs: context [c], read now, without a gradient."""
        cache = WindowCache(self.buffers, self.host.reading.writes)
        if len(context):
            with self._all_bound():
                cache.fill(self.host.model, context[None])
        return cache

    def behind_rows(self, layers: Sequence[tuple[Tensor, Tensor]], before: int, span: Span | None = None) -> WindowCache:
        """What stands before the inputs: `before` rows of each layer's keys and values [rows, G, D].

        The inputs' rows are written behind them. span: which of them count; None: all
        """
        return WindowCache(WindowBuffers(len(layers[0][0]), layers), None, before, span)

    def logits(self, cache: WindowCache, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """[n, V] of inputs [n], with a graph over them. positions: [n], where they do not just continue the cache's."""
        return self._read(self.host.model, cache, inputs, positions).logits[0]

    def nll(self, cache: WindowCache, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """[n] float32 of targets [n], which follow the last n inputs, with a graph over the inputs."""
        if self.found.head is None:
            return token_nll(self.logits(cache, inputs, positions)[-len(targets) :], targets)
        hidden = self._read(self.host.model.get_decoder(), cache, inputs, positions).last_hidden_state[0]
        return self.found.head.nll(hidden[-len(targets) :], targets)

    def _read(self, part: Any, cache: WindowCache, inputs: Tensor, positions: Tensor | None) -> Any:
        """What the model or its decoder returns."""
        given = cache_argument(part, cache) | ({} if positions is None else {"position_ids": positions[None]})
        with self._all_bound():
            return part(input_ids=inputs[None], use_cache=True, return_dict=True, **given)


def _error_of_all(ours: Ours, own: Tensor, targets: Tensor) -> float:
    """How far the logits and the loss by all of ours are from the host's own."""
    loss = ours.nll().mean() - token_nll(own, targets.to(own.device)).mean()
    return max(misfit(ours.logits(), own, targets), abs(loss.item()))


def _obstacle(host: Host) -> str | None:
    """Why nothing of a host may be replaced, or None."""
    model = host.model
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return "the host lies on several devices"
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        return f"the host is on {device}"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return surrounded(model)


def _found(host: Host, ids: Tensor) -> Found:
    """The pieces of a host, remembered until something about it changes."""
    key = (host.model.dtype, host.input_device())
    remembered = host.reading.kernels
    if remembered is None or remembered[0] != key or not remembered[1].holds():
        host.reading.kernels = remembered = (key, find(host, ids))
    return remembered[1]


def host_kernels(host: Host, ids: Tensor, rows: int) -> HostKernels | str:
    """What of a host runs through kernels of ours, or why nothing does.

    ids: [n], the text; rows: the tokens of the longest window
    """
    if not host.reading.compares:
        return "LOCAS_PROBE is 0, so they are not compared with the host"
    if (why := _obstacle(host)) is not None:
        return why
    if len(ids) < 2:
        return "the text has fewer than 2 tokens"
    try:
        found = _found(host, ids[: min(TOKENS, rows - 1)].to(host.input_device()))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"its forward could not be recorded: {type(error).__name__}: {error}"
    return HostKernels(host, found, rows)


class TakesKernels(Protocol):
    """What reads windows. kernels: what of the host runs through kernels of ours; None: nothing"""

    host: Host
    kernels: HostKernels | None


@contextmanager
def fast_reader(reader: TakesKernels, ids: Tensor, rows: int) -> Iterator[Callable[[], HostKernelsReport]]:
    """Inside, windows are read by kernels of ours as far as they suit the host. Yields what says how far that is.

    ids: [n], the text; rows: the tokens of the longest window
    """
    found = host_kernels(reader.host, ids, rows)
    if isinstance(found, str):
        yield lambda: HostKernelsReport(own={"host": found})
        return
    reader.kernels = found
    try:
        yield found.report
    finally:
        reader.kernels = None
