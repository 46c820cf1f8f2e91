"""Keys and values of a window in buffers that every window of a run is written into.

      keys, values of a layer [W, G, D]      rows -> | context .......... | chunk ...... |
                                                     0                    length
The context's forward writes rows 0 .. c-1, or rows that were kept lie there; the chunk's writes its own behind them.
With a span only the latest of the rows before the chunk count.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from locas_ext.hosts.context_cache import EndingCache

from .attend import Span


class WindowBuffers:
    """Each layer's rows for keys and values, made when they are first asked for and kept for the run.

    A CUDA graph has their addresses: they are never made anew.
    """

    def __init__(self, rows: int, layers: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """rows: the tokens of the longest window; layers: buffers that there are already, as `of` returns them"""
        self.rows = rows
        self.layers = dict(enumerate(layers))

    def of(self, layer: int, groups: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) [rows, groups, head_size] of a layer, in the dtype and on the device of `like`.

        Zeros at first: what a mask hides is still multiplied by 0, which NaN would survive.
        """
        if layer not in self.layers:
            shape = (self.rows, groups, head_size)
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]


class WindowCache(EndingCache):
    """What transformers takes for a KV cache of `length` tokens; attentions of ours find their buffers in it."""

    def __init__(self, buffers: WindowBuffers, writes: int | None, length: int = 0, span: Span | None = None):
        """writes: as in EndingCache; length: the rows before the next ones; span: which of them count; None: all"""
        super().__init__()
        self.buffers, self.writes, self.length, self.span = buffers, writes, length, span
        self.masks: dict[Any, Tensor] = {}  # made once for all layers that share them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def fill(self, model: Any, context: Tensor, positions: Tensor | None = None) -> None:
        """As EndingCache.fill, into the first rows."""
        super().fill(model, context, positions)
        self.length = context.shape[1]
        self.masks.clear()
