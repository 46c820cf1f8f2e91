"""Keeps `generate` from continuing on a KV cache that the memory, as it was then, no longer stands for.

Every forward stamps its cache with the state of the memory that filled it; `generate` compares.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from locas_ext.state.memory_state import MemoryState

_STAMP = "_locas_memory_state"


class StaleCacheGuard:
    """Binds a forward hook and a `generate` to a model; unbind() takes both away."""

    def __init__(self, model: PreTrainedModel, state: MemoryState):
        self.model, self.state = model, state

    def bind(self) -> None:
        self.handle = self.model.register_forward_hook(self._stamp)
        self.replaced = self.model.__dict__.get("generate")
        self.original: Callable[..., Any] | None = getattr(self.model, "generate", None)
        if self.original is not None:
            self.model.generate = self._generate

    def unbind(self) -> None:
        self.handle.remove()
        if self.original is None:
            return
        if self.replaced is None:
            self.model.__dict__.pop("generate", None)
        else:
            self.model.generate = self.replaced

    def _stamp(self, model, arguments, output) -> None:
        if torch.compiler.is_compiling():
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not hasattr(cache, _STAMP):
            setattr(cache, _STAMP, self.state.output_state())

    def _generate(self, *args, allow_stale_cache: bool = False, **kwargs):
        """The model's own generate.

        A `past_key_values` that was filled under another state of the memory is refused with ValueError unless
        allow_stale_cache is True.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and not allow_stale_cache and cache.get_seq_length() > 0:
            # A cache without a stamp comes from before attach: the host alone filled it.
            if getattr(cache, _STAMP, 0) != self.state.output_state():
                raise ValueError(
                    "past_key_values was filled before the memory changed, so the text in it was read with another "
                    "memory; start from a fresh cache, or pass allow_stale_cache=True to go on with it"
                )
        assert self.original is not None, "bind() puts this in the place of an original only"
        return self.original(*args, **kwargs)
