"""The two forwards of a window: the context into a KV cache, then the chunk on top of it; and the one plain forward."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache_names import cache_argument

# Layers of a KV cache that hold keys and values and nothing else.
_PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class _ContextReady(Exception):
    """All that is read later of the context is in the cache."""


class EndingCache(DynamicCache):
    """A KV cache that ends the context's forward as soon as nothing more is needed of it.

    Later forwards read what is in the cache, so nothing behind the last write into it is computed: of a last layer that is
    attention only keys and values.

    Attributes:
        writes: how often one forward writes into it; None: not known, and a context's forward runs to its end
        written: how often the context's forward has
        is_filled: whether what it holds is the context, for a chunk behind it to read
    """

    writes: int | None = None
    written = 0
    is_filling = is_filled = False

    @property
    def ends_here(self) -> bool:
        """Whether the next write is the last one of a context's forward that ends there."""
        return self.is_filling and self.written + 1 == self.writes

    def wrote(self) -> None:
        """Something was written: while the context is read, its last write ends its forward."""
        if self.is_filling:
            self.written += 1
            if self.written == self.writes:
                raise _ContextReady

    @torch.no_grad()
    def fill(self, model, context: Tensor, positions: Tensor | None = None) -> None:
        """Runs the context [1, n] through the model: nobody reads its logits. positions: [1, n]; None: from 0 on."""
        self.is_filling, self.written = True, 0
        try:
            own = cache_argument(model, self)
            model(input_ids=context, position_ids=positions, **own, use_cache=True, logits_to_keep=1)
        except _ContextReady:
            pass
        finally:
            self.is_filling = False
        self.is_filled = True


def _of(states: Any, index: int) -> Any:
    """One of a layer's states: versions of transformers differ in whether a layer has several."""
    return states[index] if isinstance(states, dict) else states


class ContextCache(EndingCache):
    """What a host itself keeps of a context: keys and values, states of convolutions and recurrences, keys of an indexer.

    A chunk behind it leaves the states as they are: its backward still needs them, and nobody reads those that it leaves.
    """

    def __init__(self, model, device: torch.device, writes: int | None):
        """writes: as in EndingCache"""
        super().__init__(config=model.config)
        for layer in self.layers:  # transformers copies this number to the device, which a CUDA graph cannot
            if hasattr(layer, "_sliding_window_tensor"):
                layer._sliding_window_tensor = torch.full((), layer.sliding_window, device=device)
        self.writes = writes

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.wrote()
        return result

    def update_indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().update_indexer(*args, **kwargs)
        self.wrote()
        return result

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if self.is_filled:
            layer = self.layers[layer_idx]
            return torch.cat([_of(layer.conv_states, state_idx), conv_states], dim=-1)
        result: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        self.wrote()
        return result

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        if self.is_filled:
            return recurrent_states
        result: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        self.wrote()
        return result


def holds_keys_and_values_only(model) -> bool:
    """Whether a KV cache made for a model holds keys and values, and no states of other kinds."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # kinds that transformers does not know
        return False
    return {type(layer).__name__ for layer in layers} <= _PLAIN


class NoContext(DynamicCache):
    """Stands for a context of no tokens and keeps nothing. For hosts that keep keys and values only.

    Given a cache, transformers neither looks for several texts in one nor reads the answer back from the device.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


def two_forwards(model, context: Tensor, inputs: Tensor, positions: bool = False) -> Tensor:
    """Logits [n, V] of inputs [n] behind a context [c] that is read first, without a gradient and to its end.

    positions: as in `logits_on`
    """
    cache = ContextCache(model, context.device, None)
    cache.fill(model, context[None])
    return logits_on(model, inputs, cache, len(context) if positions else None)


def logits_on(model, inputs: Tensor, cache: ContextCache, begin: int | None = None) -> Tensor:
    """Logits [n, V] of inputs [n] behind what the cache holds.

    begin: the tokens before, for a host that does not count them itself; None: it does
    """
    places = {}
    if begin is not None:
        places["position_ids"] = torch.arange(begin, begin + len(inputs), device=inputs.device)[None]
    behind = cache_argument(model, cache)
    return model(input_ids=inputs[None], **behind, use_cache=True, return_dict=True, **places).logits[0]


def one_forward(model, context: Tensor, inputs: Tensor, cache: NoContext | None = None) -> Tensor:
    """Logits [n, V] of inputs [n] from one forward over context and inputs. Without a cache it is the plainest there is."""
    logits: Tensor = model(
        input_ids=torch.cat([context, inputs])[None],
        **cache_argument(model, cache),
        use_cache=cache is not None,
        logits_to_keep=len(inputs),
        return_dict=True,
    ).logits[0]
    return logits[-len(inputs) :]  # not every host knows logits_to_keep
