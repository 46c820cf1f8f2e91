"""Once per forward of the decoder: changes from outside are taken over, and a forward that a change overtook is refused."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from locas_ext.hosts.cache_names import given_cache, returned_cache
from locas_ext.hosts.registry import Host
from locas_ext.hosts.seen import SeenPlaces
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scope_of, scoped

from .base import PatchedFFN, RunningForward, running_forward
from .cache_guard import is_first_filling, stamp


class DecoderWatch:
    """Two hooks on the host's decoder, through which the model, its base model and `generate` all go."""

    def __init__(self, host: Host, state: MemoryState, ffns: Sequence[PatchedFFN]):
        self.host, self.state, self.ffns = host, state, ffns
        self.handles: tuple[RemovableHandle, ...] = ()
        self.seen: SeenPlaces | None = None  # where the modules to be bound were found

    def bind(self) -> None:
        decoder: nn.Module = self.host.decoder()
        self.handles = (
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def unbind(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen = (), None

    def before(self, decoder: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        """Follows swapped modules, takes over slots written by others, notes down what the end is compared with."""
        if torch.compiler.is_compiling():
            return
        state, looking = self.state, None
        if self.seen is None or not self.seen.hold():
            self._follow(decoder)
        if state.watched and not scope_of(state).looked and not scope_of(state).disabled:
            state.sync()
            looking = scoped(state, looked=True)
            looking.__enter__()
        fresh = is_first_filling(given_cache(named), state)
        running_forward.set(RunningForward(state, state.exclusion.epoch, fresh, looking, running_forward.get()))

    def _follow(self, decoder: nn.Module) -> None:
        """Binds the FFNs that the decoder now has."""
        places = self.host.ffn_places(decoder) + [place for ffn in self.ffns for place in ffn.places()]
        seen, modules, swapped = SeenPlaces(places), self.host.ffn_modules(decoder), False
        present = set(map(id, modules.values()))  # a bound one elsewhere was moved with its layer
        for ffn, layer in zip(self.ffns, self.state.layers, strict=True):
            bound = ffn.ffn.module
            swapped |= ffn.follow(bound if id(bound) in present else modules.get(layer, bound))
        # From before the loop, so that no swap by another thread is missed. After a swap the next forward looks again.
        self.seen = None if swapped else seen

    def after(self, decoder: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        """Called after an error too, then without an output. RuntimeError where the memory has changed meanwhile."""
        running = None if torch.compiler.is_compiling() else running_forward.get()
        if running is None or running.state is not self.state:
            return
        running_forward.set(running.outer)
        try:
            now = self.state.output_state
            overtaken = running.epoch != self.state.exclusion.epoch and output is not None and not self.state.disabled
            cache = returned_cache(output)
            if cache is not None:
                stamp(cache, now, running.fresh_cache)
        finally:
            if running.looking is not None:
                running.looking.__exit__(None, None, None)
        if overtaken:
            raise RuntimeError("the memory was changed by another thread while this forward read it; run the forward again")
