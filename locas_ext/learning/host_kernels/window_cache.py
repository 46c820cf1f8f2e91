"""Keys and values of a window in buffers that every window of a run is written into.

      keys, values of a layer [W, G, D]      rows -> | context .......... | chunk ...... |
                                                     0                    length
The context's forward writes rows 0 .. c-1 and sets length to c; the chunk's writes its own behind them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class _ContextReady(Exception):
    """The last layer's keys and values of the context are in their buffers."""


class WindowBuffers:
    """Each layer's rows for keys and values, made when they are first asked for and kept for the run.

    A CUDA graph has their addresses: they are never made anew.
    """

    def __init__(self, rows: int) -> None:
        """rows: the tokens of the longest window"""
        self.rows = rows
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, groups: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) [rows, groups, D] of a layer, in the dtype and on the device of `like` [..., groups * D]."""
        if layer not in self.layers:
            shape = (self.rows, groups, like.shape[-1] // groups)
            self.layers[layer] = (like.new_empty(shape), like.new_empty(shape))
        return self.layers[layer]


class WindowCache(DynamicCache):
    """What transformers takes for a KV cache of `length` tokens; attentions of ours find their buffers in it."""

    def __init__(self, buffers: WindowBuffers, last_layer: int | None):
        """last_layer: as in ContextCache"""
        super().__init__()
        self.buffers, self.last_layer = buffers, last_layer
        self.length = 0
        self.is_filling = False
        self.masks: dict[Any, Tensor] = {}  # made once for all layers that share them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def written(self, layer: int) -> None:
        """A layer's keys and values are in their buffers: the last layer's end the context's forward."""
        if self.is_filling and layer == self.last_layer:
            raise _ContextReady

    @torch.no_grad()
    def fill(self, model: Any, context: Tensor) -> None:
        """Runs the context [c] through the model: nobody reads its logits."""
        self.is_filling = True
        try:
            model(input_ids=context[None], past_key_values=self, use_cache=True, logits_to_keep=1)
        except _ContextReady:
            pass
        finally:
            self.is_filling = False
        self.length = len(context)
        self.masks.clear()
