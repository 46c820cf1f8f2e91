"""Keys and values of a window in buffers that every window of a run is written into.

      keys, values of a layer [W, G, D]      rows -> | context .......... | chunk ...... |
                                                     0                    length
The context's forward writes rows 0 .. c-1, or rows that were kept are put there; the chunk's writes its own behind them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locas_ext.hosts.context_cache import EndingCache


class WindowBuffers:
    """Each layer's rows for keys and values, made when they are first asked for and kept for the run.

    A CUDA graph has their addresses: they are never made anew.
    """

    def __init__(self, rows: int) -> None:
        """rows: the tokens of the longest window"""
        self.rows = rows
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, groups: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) [rows, groups, head_size] of a layer, in the dtype and on the device of `like`.

        Zeros at first: what a mask hides is still multiplied by 0, which NaN would survive.
        """
        if layer not in self.layers:
            shape = (self.rows, groups, head_size)
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def left(self, begin: int, end: int) -> list[Tensor]:
        """The rows [begin, end) of every layer in turn, its keys before its values, as [G, n, D]."""
        return [rows[begin:end].transpose(0, 1) for layer in sorted(self.layers) for rows in self.layers[layer]]


class WindowCache(EndingCache):
    """What transformers takes for a KV cache of `length` tokens; attentions of ours find their buffers in it."""

    def __init__(self, buffers: WindowBuffers, writes: int | None):
        """writes: as in EndingCache"""
        super().__init__()
        self.buffers, self.writes = buffers, writes
        self.length = 0
        self.masks: dict[Any, Tensor] = {}  # made once for all layers that share them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @torch.no_grad()
    def put(self, rows: Sequence[Sequence[Tensor]], context: int) -> None:
        """Puts the latest keys and values of `context` tokens into the buffers, as HostKernels.behind_rows takes them."""
        self.length = context
        for number, parts in enumerate(rows):
            begin = context - sum(part.shape[1] for part in parts)
            for part in parts:
                groups, count, size = part.shape
                buffer = self.buffers.of(number // 2, groups, size, part)[number % 2]
                buffer[begin : begin + count].transpose(0, 1).copy_(part)
                begin += count

    def fill(self, model: Any, context: Tensor, positions: Tensor | None = None) -> None:
        """As EndingCache.fill, into the first rows."""
        super().fill(model, context, positions)
        self.length = context.shape[1]
        self.masks.clear()
