"""A host's norms, rotary embedding and loss as native kernels, one call each, without autograd.

Rows may lie apart, as in slices of a larger product; the native function checks the rest and names the argument.
"""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import stream_of


def token_nll(
    logits: Tensor,
    targets: Tensor,
    gradient: bool,
    soft_cap: float = 0.0,
    logit_scale: float = 1.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """-> the negative log-likelihood of each row [T] float32 and, if asked for, its gradient [T, V] in logits' dtype.

    It is that of logits * logit_scale, z, or of soft_cap * tanh(z / soft_cap) where soft_cap > 0. The gradient, by the
    logits, is written over them with `in_place`.
    """
    nll = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    d_logits = (logits if in_place else torch.empty_like(logits)) if gradient else None
    _C.token_nll(logits, targets, nll, d_logits, soft_cap, logit_scale, stream_of(logits))
    return nll, d_logits


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    save: bool,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> the norm of the rows of x [n, d]; with a residual [n, d] that of residual + x, and the sum; with `save` 1 / rms [n].

    weight_offset 0: weight * x / rms, rounded before the weight as Llama's norms do; 1: (1 + weight) * x / rms as Gemma's.
    """
    x, residual = _with_rows(x), None if residual is None else _with_rows(residual)
    out, total = _like(x), None if residual is None else _like(x)
    inverse_rms = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if save else None
    _C.rms_norm(x, residual, weight, total, out, inverse_rms, weight_offset, eps, stream_of(x))
    return out, total, inverse_rms


def rms_norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    d_sum: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:
    """-> dx [n, d]; x is what was normed, the sum, and d_sum [n, d] what reaches it by other ways. The weight is frozen."""
    d_sum = None if d_sum is None else _with_rows(d_sum)
    dx = _like(x)
    _C.rms_norm_backward(_with_rows(d_out), _with_rows(x), weight, inverse_rms, d_sum, dx, weight_offset, stream_of(x))
    return dx


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    save: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """-> the layer norm of the rows of x [n, d]; with a residual [n, d] that of residual + x, and the sum; with `save` the
    statistics, mean [n] and 1 / standard deviation [n].
    """
    x, residual = _with_rows(x), None if residual is None else _with_rows(residual)
    out, total = _like(x), None if residual is None else _like(x)
    mean, inverse_std = torch.empty(2, x.shape[0], dtype=torch.float32, device=x.device).unbind() if save else (None, None)
    _C.layer_norm(x, residual, weight, bias, total, out, mean, inverse_std, eps, stream_of(x))
    return out, total, None if mean is None or inverse_std is None else (mean, inverse_std)


def layer_norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor],
    d_sum: Tensor | None = None,
) -> Tensor:
    """-> dx [n, d]; x and d_sum [n, d] as in `rms_norm_backward`. Weight and bias are frozen."""
    d_sum = None if d_sum is None else _with_rows(d_sum)
    dx = _like(x)
    _C.layer_norm_backward(_with_rows(d_out), _with_rows(x), weight, *statistics, d_sum, dx, stream_of(x))
    return dx


def rotary_forward(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_size: int,
    query_out: Tensor,
    key_out: Tensor,
    value: Tensor | None = None,
    value_out: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    weight_offset: float = 0.0,
    eps: float = 0.0,
    interleaved: bool = False,
) -> None:
    """Turns the heads of query [n, H * head_size] and key [n, G * head_size] into query_out and key_out, by rows.

    cos and sin: [n, R] in query's dtype or float32, R at most head_size: the first R of a head turn, the others are copied;
    value into value_out likewise. Element j's partner is j + R / 2, as in Llama, or with `interleaved` 2 j's is 2 j + 1, as in
    GLM. weights [head_size] each, of query and key: every head is first normed as by `rms_norm`. Without them query_out may
    be query, and key_out key.
    """
    query, key, value = _with_rows(query), _with_rows(key), None if value is None else _with_rows(value)
    query_weight, key_weight = weights or (None, None)
    inputs = query, key, value, _with_rows(cos), _with_rows(sin), query_weight, key_weight
    _C.rotary_forward(*inputs, query_out, key_out, value_out, head_size, weight_offset, eps, interleaved, stream_of(query))


def rotary_backward(
    d_query: Tensor,
    d_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_size: int,
    query: Tensor | None,
    key: Tensor | None,
    weights: tuple[Tensor, Tensor] | None = None,
    weight_offset: float = 0.0,
    eps: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> the gradients of `rotary_forward`'s query and key, from those of query_out and key_out.

    query and key, as the forward took them, are needed with weights only; the weights are frozen.
    """
    if weights is None:
        query = key = None
    query, key = (None if t is None else _with_rows(t) for t in (query, key))
    query_weight, key_weight = weights or (None, None)
    gradients = _like(d_query), _like(d_key)
    inputs = _with_rows(d_query), _with_rows(d_key), query, key, _with_rows(cos), _with_rows(sin), query_weight, key_weight
    _C.rotary_backward(*inputs, *gradients, head_size, weight_offset, eps, interleaved, stream_of(d_query))
    return gradients


def _with_rows(t: Tensor) -> Tensor:
    """The tensor, or a copy of one whose last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)
