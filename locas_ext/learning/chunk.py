"""One chunk of a text: the window it is read in, and its loss.

Chunk [s, e), in a window of at most W tokens:

        b ........... s-2 | s-1 ......... e-2          inputs; b = max(0, e - W)
        context, no_grad  | S positions, gradient
        -> KV cache       | -> logits of tokens s .. e-1

The S positions that predict the chunk's own tokens run with gradient on top of the context's cache, which is dropped after
the chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from locas_ext.hosts.registry import Host
from locas_ext.ops import token_nll

from .chunk_attention import chunk_attention


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
            token = torch.tensor([bos], dtype=ids.dtype, device=ids.device)
            context = torch.cat([token, context])
        return cls(context, inputs, ids[first:end])

    def to(self, device: torch.device) -> "Window":
        """The window on a device, in one copy; itself where it lies there."""
        if self.inputs.device == device:
            return self
        return Window(*torch.cat(self).to(device).split([len(part) for part in self]))


class _ContextReady(Exception):
    """The last layer's keys and values of the context are in the cache."""


class ContextCache(DynamicCache):
    """A KV cache that ends the context's forward as soon as nothing more is needed of it.

    Of the last layer only keys and values are read later, so its attention and FFN over the context are not computed.
    """

    def __init__(self, model, device: torch.device):
        super().__init__(config=model.config)
        for layer in self.layers:  # transformers copies this number to the device, which a CUDA graph cannot
            if hasattr(layer, "_sliding_window_tensor"):
                layer._sliding_window_tensor = torch.full((), layer.sliding_window, device=device)
        self.last_layer = model.config.get_text_config(decoder=True).num_hidden_layers - 1
        self.ends_forward = False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.ends_forward and layer_idx == self.last_layer:
            raise _ContextReady
        return result

    @torch.no_grad()
    def fill(self, host: Host, context: Tensor, may_end_early: bool) -> None:
        """Runs the context [1, n] through the decoder."""
        self.ends_forward = may_end_early
        try:
            host.read(input_ids=context, past_key_values=self, use_cache=True)
        except _ContextReady:
            return
        finally:
            self.ends_forward = False


class NoContext(DynamicCache):
    """Stands for a context of no tokens and keeps nothing.

    Given a cache, transformers neither looks for several texts in one nor reads the answer back from the device.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


def may_end_early(model) -> bool:
    """Whether a forward may be left midway: not where hooks of another library or a compiled graph surround a layer."""
    return not any(hasattr(module, "_hf_hook") or module._compiled_call_impl is not None for module in model.modules())


def chunk_logits(host: Host, window: Window, context_gradient: bool, ends_early: bool) -> Tensor:
    """The logits [n, V] of a window's targets, with a graph over its inputs (context_gradient: over its context too)."""
    model, device = host.model, host.input_device()
    window = window.to(device)
    context, inputs = window.context[None], window.inputs[None]
    if context.shape[1] == 0 or context_gradient:
        everything = torch.cat([context, inputs], dim=1)
        logits = model(input_ids=everything, past_key_values=NoContext(), use_cache=True, logits_to_keep=inputs.shape[1]).logits
    else:
        cache = ContextCache(model, device)
        cache.fill(host, context, ends_early)
        with chunk_attention(host):
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
    return logits[0]


def chunk_loss(host: Host, window: Window, context_gradient: bool, ends_early: bool) -> Tensor:
    """Summed negative log-likelihood, float32 0-d, of a window's targets, with a graph as `chunk_logits`."""
    window = window.to(host.input_device())
    logits = chunk_logits(host, window, context_gradient, ends_early)
    return token_nll(logits, window.targets.to(logits.device)).sum()  # a spread host's logits lie elsewhere
