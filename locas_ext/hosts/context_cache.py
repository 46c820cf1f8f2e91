"""The two forwards of a window: the context into a KV cache, then the chunk on top of it; and the one plain forward."""

import torch
from torch import Tensor
from transformers import DynamicCache


class _ContextReady(Exception):
    """The last layer's keys and values of the context are in the cache."""


class EndingCache(DynamicCache):
    """A KV cache that ends the context's forward as soon as nothing more is needed of it.

    Of the last layer only keys and values are read later, so its attention and FFN over the context are not computed.
    """

    last_layer: int | None = None  # the `layer_idx` of the attention that runs last; None: the forward runs to its end
    is_filling = False

    def written(self, layer_idx: int) -> None:
        """A layer's keys and values are in their place: while the context is read, the last layer's end its forward."""
        if self.is_filling and layer_idx == self.last_layer:
            raise _ContextReady

    @torch.no_grad()
    def fill(self, model, context: Tensor, positions: Tensor | None = None) -> None:
        """Runs the context [1, n] through the model: nobody reads its logits. positions: [1, n]; None: from 0 on."""
        self.is_filling = True
        try:
            model(input_ids=context, position_ids=positions, past_key_values=self, use_cache=True, logits_to_keep=1)
        except _ContextReady:
            return
        finally:
            self.is_filling = False


class ContextCache(EndingCache):
    """Keys and values of a context as transformers itself keeps them."""

    def __init__(self, model, device: torch.device, last_layer: int | None):
        """last_layer: as in EndingCache"""
        super().__init__(config=model.config)
        for layer in self.layers:  # transformers copies this number to the device, which a CUDA graph cannot
            if hasattr(layer, "_sliding_window_tensor"):
                layer._sliding_window_tensor = torch.full((), layer.sliding_window, device=device)
        self.last_layer = last_layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.written(layer_idx)
        return result


class NoContext(DynamicCache):
    """Stands for a context of no tokens and keeps nothing.

    Given a cache, transformers neither looks for several texts in one nor reads the answer back from the device.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


def two_forwards(model, context: Tensor, inputs: Tensor, last_layer: int | None = None) -> Tensor:
    """Logits [n, V] of inputs [n] behind a context [c] that is read first, without a gradient."""
    cache = ContextCache(model, context.device, last_layer)
    cache.fill(model, context[None])
    return logits_on(model, inputs, cache)


def logits_on(model, inputs: Tensor, cache: ContextCache) -> Tensor:
    """Logits [n, V] of inputs [n] behind what the cache holds."""
    return model(input_ids=inputs[None], past_key_values=cache, use_cache=True, return_dict=True).logits[0]


def one_forward(model, context: Tensor, inputs: Tensor, cache: NoContext | None = None) -> Tensor:
    """Logits [n, V] of inputs [n] from one forward over context and inputs. Without a cache it is the plainest there is."""
    return model(
        input_ids=torch.cat([context, inputs])[None],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=len(inputs),
        return_dict=True,
    ).logits[0]
