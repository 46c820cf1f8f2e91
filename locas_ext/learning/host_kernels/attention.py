"""A layer's attention: per-head norm and rotary embedding in one kernel, keys and values written into the window's buffers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locas_ext.hosts.cache_names import given_cache
from locas_ext.ops.backends import elementwise

from .attend import Heads, Span, additive_mask, attend, attend_backward
from .binding import why_not_bound
from .norms import FastRMSNorm, fast_norm
from .projections import Projections
from .window_cache import WindowCache


class _Rotation(NamedTuple):
    """The rotary embedding of a window's last n rows; cos and sin [n, R], or None where a layer turns nothing.

    interleaved: as the kernels' own
    """

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    query_norm: FastRMSNorm | None
    key_norm: FastRMSNorm | None

    @property
    def how(self) -> dict[str, Any]:
        if self.query_norm is None or self.key_norm is None:
            return {"interleaved": self.interleaved}
        return {
            "interleaved": self.interleaved,
            "weights": (self.query_norm.weight, self.key_norm.weight),
            "weight_offset": self.query_norm.weight_offset,
            "eps": self.query_norm.eps,
        }


class _Place(NamedTuple):
    """Where the rows of one forward lie: keys and values [W, G, D], of which `start` rows are the context's.

    span: which of those count; None: all; learns: whether a backward follows
    """

    keys: Tensor
    values: Tensor
    start: int
    heads: Heads
    mask: Tensor | None
    span: Span | None
    learns: bool


def _turned(query: Tensor, key: Tensor, value: Tensor, rotation: _Rotation, place: _Place) -> Tensor:
    """Turns query [n, H * D] and key [n, G * D], and writes key and value into their rows. -> the query [n, H, D]"""
    n, size = len(query), place.heads.head_size
    rows = slice(place.start, place.start + n)
    key_rows, value_rows = (buffer[rows].view(n, -1) for buffer in (place.keys, place.values))
    if rotation.cos is None or rotation.sin is None:
        key_rows.copy_(key)
        value_rows.copy_(value)
        return query.reshape(n, -1, size)
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    elementwise.rotary_forward(
        query, key, rotation.cos, rotation.sin, size, turned, key_rows, value, value_rows, **rotation.how
    )
    return turned.view(n, -1, size)


class WindowAttentionFunction(torch.autograd.Function):
    """apply(query [n, H * D], key, value [n, G * D], rotation, place) -> [n, H * D].

    Projections in, attention out; the gradient stops at the context.
    """

    @staticmethod
    def forward(ctx, query, key, value, rotation, place):
        turned = _turned(query, key, value, rotation, place)
        keys, values = (buffer[: place.start + len(query)] for buffer in (place.keys, place.values))
        out, saved = attend(turned, keys, values, place.heads, place.mask, place.span, place.learns)
        ctx.rotation, ctx.place = rotation, place
        own = (query, key) if rotation.query_norm is not None else (None, None)
        ctx.save_for_backward(*own, turned, keys, values, *saved)
        return out.reshape(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        query, key, turned, keys, values, *saved = ctx.saved_tensors
        rotation, place = ctx.rotation, ctx.place
        d_out = d_out.reshape(turned.shape)
        gradients = attend_backward(d_out, turned, keys, values, place.heads, place.mask, place.span, saved)
        d_query, d_key, d_value = (gradient.reshape(len(d_out), -1) for gradient in gradients)
        if rotation.cos is not None:
            d_query, d_key = elementwise.rotary_backward(
                d_query, d_key, rotation.cos, rotation.sin, place.heads.head_size, query, key, **rotation.how
            )
        return d_query, d_key, d_value, None, None


class FastAttention:
    """Stands in for the forward of one attention module, which projects, turns, attends and projects."""

    def __init__(self, module: Any, interleaved: bool):
        """interleaved: as the kernels' own. AttributeError, TypeError or ValueError, which says why, for any other module."""
        self.module, self.interleaved = module, interleaved
        if (why := why_not_bound(module)) is not None:
            raise ValueError(why)
        self.layer: int = module.layer_idx
        config = module.config
        if getattr(module, "attn_logit_softcapping", None):
            raise ValueError("its scores are capped")
        if config._attn_implementation != "sdpa":
            raise ValueError(f"its attention is {config._attn_implementation!r}, not 'sdpa'")
        if any(hasattr(module, name) for name in ("sinks", "alibi", "kv_a_proj_with_mqa")):
            raise ValueError("it does more than attend")
        window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
        size = module.head_size if hasattr(module, "head_size") else module.head_dim
        self.heads = Heads(size, float(module.scaling), window)
        self.projections = Projections(module, size, config.num_attention_heads)
        self.query_norm, self.key_norm = (self._norm(name) for name in ("q_norm", "k_norm"))
        self.turns = bool(getattr(module, "use_rope", True))

    def _norm(self, name: str) -> FastRMSNorm | None:
        norm: nn.Module | None = getattr(self.module, name, None)
        if norm is None:
            return None
        fast = fast_norm(norm)
        if not isinstance(fast, FastRMSNorm):
            raise ValueError(f"its {name} is not a plain RMS norm")
        return fast

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the module's own, for a WindowCache."""
        return self.over(hidden_states, kwargs.get("position_embeddings"), given_cache(kwargs)), None

    def over(self, hidden_states: Tensor, turns: tuple[Tensor, Tensor] | None, cache: WindowCache) -> Tensor:
        """hidden_states [1, n, d] -> [1, n, d]; turns: cos and sin [1, n, R]; None where positions are learned."""
        query, key, value = self.projections.into(hidden_states)
        query_norm, key_norm, size = self.query_norm, self.key_norm, self.heads.head_size
        if query_norm is not None and key_norm is not None and len(query_norm.weight) != size:
            query, key = query_norm.forward(query), key_norm.forward(key)  # over all heads at once
            query_norm = key_norm = None
        keys, values = cache.buffers.of(self.layer, key.shape[-1] // size, size, key)
        cos, sin = (turn[0] for turn in turns) if self.turns and turns is not None else (None, None)
        rotation = _Rotation(cos, sin, self.interleaved, query_norm, key_norm)
        learns = torch.is_grad_enabled() and query.requires_grad
        place = _Place(keys, values, cache.length, self.heads, self._mask(len(query), query, cache), cache.span, learns)
        if cache.ends_here:
            _turned(query, key, value, rotation, place)
            cache.wrote()
        out = WindowAttentionFunction.apply(query, key, value, rotation, place)
        cache.wrote()
        return self.projections.out(out)

    def _mask(self, n: int, like: Tensor, cache: WindowCache) -> Tensor | None:
        """The mask that the CPU's attention needs; None where causal is all there is to say, or nobody reads one."""
        k, window = cache.length + n, self.heads.window
        causal = n == k and cache.span is None and (window is None or window >= k)
        if like.is_cuda or (causal and not like.requires_grad):
            return None
        kind = (n, k, window)
        if kind not in cache.masks:
            cache.masks[kind] = additive_mask(n, k, window, like, cache.span)
        return cache.masks[kind]


def fast_attention(module: Any, interleaved: bool) -> FastAttention:
    """What computes this module's attention; ValueError, which says why, where that is not known how."""
    try:
        return FastAttention(module, interleaved)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"it is built otherwise: {error}") from None
