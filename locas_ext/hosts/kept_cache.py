"""The KV cache of one forward over keys and values that were kept: it adds nothing to them and shows what came new."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .context_cache import ContextCache


class KeptLayer(DynamicLayer):
    """One layer's kept rows, as transformers' own layers would hold them behind a context of `context` tokens."""

    def __init__(self, context: int, is_sliding: bool, rows: Sequence[Tensor]):
        """rows: keys and values [H, n, D], the latest that this layer sees; none: no context"""
        super().__init__()
        self.context, self.is_sliding, self.rows = context, is_sliding, rows
        self.held = rows[0].shape[1] if rows else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.held:
            return key_states, value_states
        keys, values = self.rows
        return torch.cat([keys[None], key_states], dim=2), torch.cat([values[None], value_states], dim=2)

    def get_seq_length(self) -> int:
        return self.context

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # transformers up to 5.2 hands over the queries' positions
        count = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.held + count, self.context - self.held


class KeptCache(ContextCache):
    """Attributes:
    left: per layer the keys and the values [H, n, D] that a forward came with, without a gradient; [2 L] in all
    """

    def __init__(self, model, device: torch.device, context: int, rows: Sequence[Tensor], writes: int | None = None):
        """context: the tokens before; rows: 2 L tensors, keys before values, as in KeptLayer; none: no context"""
        super().__init__(model, device, writes)
        plain: list[Any] = self.layers  # type: ignore[has-type]
        self.layers = [
            KeptLayer(context, getattr(layer, "is_sliding", False), rows[2 * number : 2 * number + 2])
            for number, layer in enumerate(plain)
        ]
        self.left: list[Tensor] = [torch.empty(0)] * (2 * len(plain))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self.left[2 * layer_idx : 2 * layer_idx + 2] = key_states[0].detach(), value_states[0].detach()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
