"""Windows read through the pieces found in a host, as far as they gave what the host's own code gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from locas_ext.hosts.registry import Host
from locas_ext.hosts.window_reading import misfit, tolerance
from locas_ext.learning.report import HostKernelsReport
from locas_ext.ops import token_nll

from .binding import bound
from .find import TOKENS, Found, find
from .window_cache import WindowBuffers, WindowCache

# Names no mask that transformers knows how to make: attentions of ours read none.
_NO_MASK = "locas_window"


class Level(IntEnum):
    """How much of a window's reading is ours."""

    ALL = 0  # keys and values in buffers of ours, attention and loss included
    PIECES = 1  # norms and residuals only
    NONE = 2


@contextmanager
def _without_masks(decoder: Any) -> Iterator[None]:
    """Inside, transformers makes no attention mask for this decoder."""
    config = decoder.config
    twin = object.__new__(type(config))
    twin.__dict__.update(config.__dict__, _attn_implementation_internal=_NO_MASK)
    decoder.__dict__["config"] = twin
    try:
        yield
    finally:
        decoder.__dict__["config"] = config


class HostKernels:
    """What stands in for a host's own code while windows of one run are read."""

    def __init__(self, host: Host, found: Found, rows: int, last_layer: int | None):
        """rows: the tokens of the longest window; last_layer: as in ContextCache"""
        self.host, self.found, self.last_layer = host, found, last_layer
        self.buffers = WindowBuffers(rows)
        self.pieces, self.levels = found.pieces(), found.levels
        self.all_pieces = self.pieces + found.attention_pieces()

    def level(self, context: int, tokens: int, short: bool) -> Level:
        """How a window of so many tokens is read, `context` of them before the chunk's inputs."""
        known = [least for behind, how, least in self.levels if (behind, how) == (context > 0, short) and least <= tokens]
        return Level(self.levels[context > 0, short, max(known)]) if known else Level.NONE

    @torch.no_grad()
    def settle(self, kind: int, window: tuple[Tensor, Tensor, Tensor], read: Callable[[], Tensor], short: bool) -> None:
        """Compares the levels for a window that is the first of its kind, and takes the first that reads it right.

        kind: the least number of tokens that the outcome holds for; window: context, inputs and targets
        read: -> logits [n, V], by the host's own code; short: whether that reads it as Way.SHORT
        """
        context, inputs, targets = window
        key = (len(context) > 0, short, kind)
        if key in self.levels:
            return
        own = read()
        levels = {Level.PIECES: lambda: self._with_pieces(read)} if self.pieces else {}
        if short and self.found.attentions:
            levels = {Level.ALL: lambda: self.logits(context, inputs), **levels}
        self.levels[key] = Level.NONE
        for level, ours in levels.items():
            error = misfit(ours(), own, targets)
            if level == Level.ALL:
                loss = self.nll(context, inputs, targets).mean() - token_nll(own, targets).mean()
                error = max(error, abs(loss.item()))
            if error <= tolerance(own, self.host.reading.coarse):
                self.levels[key] = level
                return
            behind = " behind a context" if len(context) else ""
            self.found.own[f"windows of {len(context) + len(inputs)} tokens{behind}"] = (
                f"the kernels' logits differ from the host's own by {error:.2g} of their spread"
            )

    def report(self) -> HostKernelsReport:
        taken = set(self.levels.values())
        ours = []
        if taken - {Level.NONE}:
            ours += ["norms"] + ["residuals"] * any(layer is not None for layer in self.found.layers)
        if Level.ALL in taken:
            ours += ["attention"] + ["loss"] * (self.found.head is not None)
        return HostKernelsReport(tuple(ours), dict(self.found.own))

    def _with_pieces(self, read: Callable[[], Tensor]) -> Tensor:
        with bound(self.pieces):
            return read()

    @contextmanager
    def pieces_bound(self) -> Iterator[None]:
        """Inside, norms and residuals are ours."""
        with bound(self.pieces):
            yield

    def logits(self, context: Tensor, inputs: Tensor) -> Tensor:
        """[n, V] of inputs [n] behind a context [c], with a graph over the inputs."""
        return self._read(self.host.model, context, inputs).logits[0]

    def nll(self, context: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """[n] float32 of targets [n], which follow the last n inputs, with a graph over the inputs."""
        if self.found.head is None:
            return token_nll(self.logits(context, inputs)[-len(targets) :], targets)
        hidden = self._read(self.host.model.get_decoder(), context, inputs).last_hidden_state[0]
        return self.found.head.nll(hidden[-len(targets) :], targets)

    def _read(self, part: Any, context: Tensor, inputs: Tensor) -> Any:
        """What the model or its decoder returns for inputs [n] behind a context [c]."""
        cache = WindowCache(self.buffers, self.last_layer)
        with bound(self.all_pieces), _without_masks(self.host.model.get_decoder()):
            if len(context):
                cache.fill(self.host.model, context)
            return part(input_ids=inputs[None], past_key_values=cache, use_cache=True, return_dict=True)


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
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or module._compiled_call_impl is not None:
            return f"{name or 'the model'} has hooks of accelerate or is compiled"
    return None


def _found(host: Host, ids: Tensor) -> Found:
    """The pieces of a host, remembered until something about it changes."""
    key = (host.model.dtype, host.input_device())
    remembered = host.reading.kernels
    if remembered is None or remembered[0] != key or not remembered[1].holds():
        host.reading.kernels = remembered = (key, find(host.model, ids))
    return remembered[1]


def host_kernels(host: Host, ids: Tensor, rows: int, ends_early: bool) -> HostKernels | str:
    """What of a host runs through kernels of ours, or why nothing does.

    ids: [n], the text; rows: the tokens of the longest window; ends_early: whether a context's forward may be left midway
    """
    if not host.reading.compares:
        return "LOCAS_PROBE is 0, so they are not compared with the host"
    if (why := _obstacle(host)) is not None:
        return why
    if len(ids) < 2:
        return "the text has fewer than 2 tokens"
    try:
        found = _found(host, ids[:TOKENS].to(host.input_device()))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"its forward could not be recorded: {type(error).__name__}: {error}"
    return HostKernels(host, found, rows, host.reading.last_layer if ends_early else None)
