"""Once per forward of the decoder: changes from outside are taken over, and a forward that a change overtook is refused."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from locas_ext.hosts.registry import Host
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scope_of, scoped

from .base import PatchedFFN
from .cache_guard import is_empty, stamp


@dataclass(frozen=True)
class _Running:
    """A forward of the decoder in this context."""

    watch: "DecoderWatch"
    epoch: int  # of the memory when it began
    fresh_cache: bool
    looking: Any  # the scope to leave at its end, or None
    outer: "_Running | None"


_running: ContextVar[_Running | None] = ContextVar("locas_running", default=None)


class DecoderWatch:
    """Two hooks on the host's decoder, through which the model, its base model and `generate` all go."""

    def __init__(self, host: Host, state: MemoryState, ffns: Sequence[PatchedFFN]):
        self.host, self.state, self.ffns = host, state, ffns
        self.handles: tuple[RemovableHandle, ...] = ()

    def bind(self) -> None:
        decoder: nn.Module = self.host.decoder()
        self.handles = (
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def unbind(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = ()

    def before(self, decoder: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        """Follows swapped modules, takes over slots written by others, notes down what the end is compared with."""
        if torch.compiler.is_compiling():
            return
        state, looking = self.state, None
        modules = self.host.ffn_modules()
        present = set(map(id, modules.values()))
        for ffn, layer in zip(self.ffns, state.layers, strict=True):
            bound = ffn.ffn.module
            ffn.follow(bound if id(bound) in present else modules.get(layer, bound))
        if state.watched and not scope_of(state).looked and not scope_of(state).disabled:
            state.sync()
            looking = scoped(state, looked=True)
            looking.__enter__()
        cache = named.get("past_key_values")
        fresh = cache is None or is_empty(cache)
        _running.set(_Running(self, state.exclusion.epoch, fresh, looking, _running.get()))

    def after(self, decoder: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        """Called after an error too, then without an output. RuntimeError where the memory has changed meanwhile."""
        running = None if torch.compiler.is_compiling() else _running.get()
        if running is None or running.watch is not self:
            return
        _running.set(running.outer)
        try:
            if output is None or self.state.disabled:
                overtaken = False
            else:
                overtaken = running.epoch != self.state.exclusion.epoch
            cache = getattr(output, "past_key_values", None)
            if cache is not None:
                stamp(cache, self.state, running.fresh_cache)
        finally:
            if running.looking is not None:
                running.looking.__exit__(None, None, None)
        if overtaken:
            raise RuntimeError("the memory was changed by another thread while this forward read it; run the forward again")
