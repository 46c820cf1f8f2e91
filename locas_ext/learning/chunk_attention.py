"""The attention of a chunk over its cached context, with a backward that stops at the cache.

The context's keys and values need no gradient, but PyTorch's attention computes it for all of them. Here the backward
goes through the chunk's own keys and values only, and grouped heads are not repeated. CPU; entered through transformers'
attention interface while a chunk with context runs forward, and only for hosts that use "sdpa".

        keys ->   context k .......... | chunk n          P = softmax(Q K^T * scaling + mask), kept if small
        queries n [        P           |   P    ]         dQ from all of P; dK, dV from the right part only
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from locas_ext.hosts.registry import Host


class _Name(str):
    """By this name transformers finds our attention in its tables; to a host that asks, it is "sdpa".

    Some hosts look at the name to choose a mask or a branch of their own, and must go on as without us.
    """

    def __eq__(self, other: object) -> bool:
        return other == "sdpa" or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


NAME = _Name("locas_chunk")
_ADDITIVE = "_locas_additive"  # a boolean mask's attribute: itself as numbers
# Of up to this many elements P is kept from the forward; of more it is made again, this many at once, at least a key head's.
_KEPT, _PIECE = 1 << 19, 1 << 22


def _repeated(mask: Tensor, heads: int) -> Tensor:
    """mask [1, 1, n, k] for the queries of several heads, one below the other: [heads n, k]."""
    return mask[0, 0].repeat(heads, 1)


def _probabilities(mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(Q K^T + mask): mask [rows, k], queries [g, rows, D] (scaled), keys [g, k, D] -> [g, rows, k]."""
    return torch.baddbmm(mask, queries, keys.mT).softmax(-1)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    """query [1, H, n, D], key [1, G, k, D], value [1, G, k, E], mask [1, 1, n, k] additive -> [1, H, n, E], P where kept."""
    (_, heads, n, size), (_, groups, k, _) = query.shape, key.shape
    if heads * n * k > _KEPT:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True), None
    queries = query.reshape(groups, heads // groups * n, size) * scaling
    p = _probabilities(_repeated(mask, heads // groups), queries, key[0])
    return (p @ value[0]).view(1, heads, n, -1), p


def attention_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor, kept: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dQ [1, H, n, D], and dK [1, G, n, D] and dV [1, G, n, E] of the queries' own rows; kept: P from the forward."""
    (_, heads, n, size), (_, groups, k, _), value_size = query.shape, key.shape, value.shape[-1]
    shape, rows = query.shape, heads // groups * n  # the queries that share a key head, as one matrix
    query = query.reshape(groups, rows, size) * scaling
    d_out, out = d_out.reshape(groups, rows, value_size), out.reshape(groups, rows, value_size)
    d_query = torch.empty_like(query)
    d_key, d_value = (key.new_empty(1, groups, n, length) for length in (size, value_size))
    step = groups if kept is not None else max(1, _PIECE // (rows * k))
    for first in range(0, groups, step):
        part = slice(first, first + step)
        keys, values, queries, d_outs = key[0, part], value[0, part], query[part], d_out[part]
        p = _probabilities(_repeated(mask, heads // groups), queries, keys) if kept is None else kept
        d_value[0, part] = p[:, :, k - n :].mT @ d_outs
        dot = (d_outs * out[part]).sum(-1, keepdim=True)
        d_scores = (d_outs @ values.mT).sub_(dot).mul_(p)
        d_query[part] = d_scores @ keys
        d_key[0, part] = d_scores[:, :, k - n :].mT @ queries
    return d_query.mul_(scaling).view(shape), d_key, d_value


class ChunkAttentionFunction(torch.autograd.Function):
    """apply(query [1, H, n, D], key [1, G, k, D], value [1, G, k, E], mask [1, 1, n, k] additive, scaling) -> [1, H, n, E].

    The last n of the k keys are the queries' own; H is a multiple of G. The gradient of the first k - n keys and values
    is left 0.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        out, p = attention(query, key, value, mask, scaling)
        ctx.save_for_backward(query, key, value, mask, out, p)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        query, key, value, mask, out, kept = ctx.saved_tensors
        d_query, *d_own = attention_backward(d_out, query, key, value, mask, out, kept, ctx.scaling)
        context = key.shape[2] - query.shape[2]
        d_key, d_value = (F.pad(gradient, (0, 0, context, 0)) for gradient in d_own)
        return d_query, d_key, d_value, None, None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as 0 and -inf, made once for all layers that share it."""
    if mask.dtype != torch.bool:
        return mask
    additive = getattr(mask, _ADDITIVE, None)
    if additive is None:
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        setattr(mask, _ADDITIVE, additive)
    return additive


def _chunk_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **others):
    """transformers' attention interface: anything but the plain case goes to its own "sdpa"."""
    plain = (
        torch.is_grad_enabled()
        and query.is_cpu
        and not torch.is_autocast_enabled("cpu")  # which makes queries, keys and P of several dtypes
        and attention_mask is not None
        and attention_mask.shape == (1, 1, query.shape[2], key.shape[2])
        and query.shape[-1] == key.shape[-1]
        and dropout == 0.0
        and others.get("position_bias") is None
    )
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ChunkAttentionFunction.apply(query, key, value, _additive(attention_mask, query.dtype), scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _chunk_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attentions(host: Host) -> list[Any]:
    """The decoder's attention modules, which look up what they call in their config."""
    return [
        module
        for module in host.model.get_decoder().modules()
        if "layer_idx" in module.__dict__
        and getattr(module.__dict__.get("config"), "_attn_implementation", None) == "sdpa"
        and not isinstance(module, PreTrainedModel)
    ]


def _reading_chunks(config: Any) -> Any:
    """A shallow copy of a config that names this attention; copy.copy() would take a tenth of a millisecond."""
    twin = object.__new__(type(config))
    twin.__dict__.update(config.__dict__, _attn_implementation_internal=NAME)
    return twin


@contextmanager
def chunk_attention(host: Host) -> Iterator[None]:
    """Inside this block the host's attention stops its gradient at the cache; hosts it does not suit stay as they are.

    Each attention gets a copy of its config to read: the config itself may be another model's too, or that of a vision tower.
    """
    attentions = _attentions(host) if host.input_device().type == "cpu" else []
    configs = [module.config for module in attentions]
    copies = {id(config): _reading_chunks(config) for config in configs}
    try:
        for module, config in zip(attentions, configs, strict=True):
            module.__dict__["config"] = copies[id(config)]
        yield
    finally:
        for module, config in zip(attentions, configs, strict=True):
            module.__dict__["config"] = config
