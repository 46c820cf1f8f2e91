"""Attention of a window's last rows over all of it, forward and backward.

        rows ->   context k - n ....... | chunk n
        queries n [   all of it         | causal ]       a sliding layer sees its last `window` rows only

CUDA: flash attention, whose backward makes dK and dV of the context too; they are left. A long context, which nobody
learns from, goes through cuDNN's, which takes half the time.
CPU: chunk_attention.py's, whose backward stops at the context.

Rows may also stay in place while ever more of them count (Span): one graph then reads windows of any length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext.learning.chunk_attention import attention, attention_backward

_LONG = 1024  # rows from which cuDNN is worth its preparation


class Heads(NamedTuple):
    """The attention of one layer.

    window: how many rows, its own included, a query of a sliding layer sees; None: all before it
    """

    head_size: int
    scaling: float
    window: int | None


class Span(NamedTuple):
    """Which of a buffer's rows count, as numbers on the device: the queries' own, at the end, and those right before them.

    queries: [2] int32: 0, n; keys: [2] int32: the first row that counts, and the end of them all
    """

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, count: Tensor, before: int, n: int) -> "Span":
        """count: 0-d, how many rows count of the `before` rows before n queries. Waits for nothing."""
        first = (before - count).clamp_(min=0)
        keys = torch.stack([first, torch.full_like(first, before + n)]).int()
        return cls(torch.arange(0, n + 1, n, dtype=torch.int32, device=count.device), keys)


def obstacle(heads: Heads, like: Tensor) -> str | None:
    """Why these heads cannot be computed here, or None. like: a layer's keys"""
    if like.is_cpu:
        return None
    if like.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16 and float16, and the keys are {str(like.dtype).removeprefix('torch.')}"
    if heads.head_size % 8 or heads.head_size > 256:
        return f"flash attention takes heads of up to 256 numbers, a multiple of 8; the host's have {heads.head_size}"
    return None


def additive_mask(n: int, k: int, window: int | None, like: Tensor, span: Span | None = None) -> Tensor:
    """[1, 1, n, k]: 0 where a query sees a key, -inf elsewhere; the last n of k rows are the queries' own."""
    queries = torch.arange(k - n, k, device=like.device)[:, None]
    keys = torch.arange(k, device=like.device)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    if span is not None:
        seen &= keys >= span.keys[0]
    return torch.zeros(n, k, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)[None, None]


def _reach(heads: Heads, k: int) -> int | None:
    """flash attention's window_size_left."""
    return None if heads.window is None or heads.window >= k else heads.window - 1


def _by_cudnn(query: Tensor, key: Tensor, heads: Heads) -> bool:
    """Whether cuDNN takes this attention over all rows of a window; it prepares itself anew for every number of rows."""
    return (
        len(query) == len(key) >= _LONG
        and _reach(heads, len(key)) is None
        and heads.head_size <= 128
        and torch.backends.cudnn.is_available()
    )


def _batch(span: Span | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [n, ...] as flash attention takes them: a batch of one, or with a span, which stands for batches, as they are."""
    return tensors if span is not None else tuple(x[None] for x in tensors)


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: Heads, mask: Tensor | None, span: Span | None, learns: bool
) -> tuple[Tensor, tuple]:
    """-> [n, H, D], what the backward needs.

    query: [n, H, D]; key, value: [k, G, D]; mask: as `additive_mask` (CPU); span: which rows count (CUDA); None: all
    learns: whether a backward follows
    """
    n, k = len(query), len(key)
    if query.is_cuda and not learns and span is None and _by_cudnn(query, key, heads):
        across = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(*across, None, False, 0.0, True, False, scale=heads.scaling)[0]
        return out[0].transpose(0, 1), ()
    if query.is_cuda:
        out, *saved = torch.ops.aten._flash_attention_forward(
            *_batch(span, query, key, value), *(span or (None, None)), n, k, 0.0, True, False,
            scale=heads.scaling, window_size_left=_reach(heads, k), window_size_right=0,
        )  # fmt: skip
        return out.view(query.shape), (out, *saved[:3])
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=heads.scaling, enable_gqa=True)
        return out[0].transpose(0, 1), ()
    out, kept = attention(query, key, value, mask, heads.scaling)
    return out[0].transpose(0, 1), (out, kept)


def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Heads,
    mask: Tensor | None,
    span: Span | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of query [n, H, D] and of the queries' own rows of key and value [n, G, D]."""
    n, k = len(query), len(key)
    if query.is_cuda:
        out, logsumexp, rng_state, unused = saved
        gradients = torch.ops.aten._flash_attention_backward(
            *_batch(span, d_out, query, key, value), out, logsumexp, *(span or (None, None)), n, k, 0.0, True,
            rng_state, unused, scale=heads.scaling, window_size_left=_reach(heads, k), window_size_right=0,
        )  # fmt: skip
        d_query, d_key, d_value = gradients if span is not None else (gradient[0] for gradient in gradients)
        return d_query, d_key[k - n :], d_value[k - n :]
    d_out, query, key, value = (x.transpose(0, 1)[None] for x in (d_out, query, key, value))
    assert mask is not None, "made wherever a backward follows"
    out, kept = saved
    d_query, d_key, d_value = attention_backward(d_out, query, key, value, mask, out, kept, heads.scaling)
    return d_query[0].transpose(0, 1), d_key[0].transpose(0, 1), d_value[0].transpose(0, 1)
