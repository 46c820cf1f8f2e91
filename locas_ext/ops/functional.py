"""The operations of the memory on torch tensors, differentiable, each with a plain-torch twin in `reference.py`.

x is [..., d]; slots are [3, r, d] = (gate G, key K, value V), those of a Locas-MLP memory [2, r, d] = (K, V), in x's
dtype or float32, and their gradient comes in their own dtype. The host's weights are frozen: they get no gradient, and
asking for one is an error. dtypes: float32, bfloat16, float16 (backend "reference": float64 too). Backends: "fused" is
our own products, on CUDA for bfloat16 and float16, on the CPU for float32 with AVX-512 and bfloat16 with AVX-512 BF16;
"matmul" is torch's GEMMs with native code between them; "reference" is plain torch; "auto" is "fused" where that was
measured to be faster (cuda.py, cpu.py), else "matmul".

All raise ValueError for a shape, dtype, device or setting that does not fit, naming the tensor, and TypeError for an
argument of another type. The mathematics is in docs/method.md (the paper: arXiv 2602.05085, section 3).
"""

from typing import TypeVar

import torch
from torch import Tensor

from . import reference, torch_library
from .activations import activation_index
from .autograd import GluFFNFunction, SidewayGluFunction, SidewayMlpFunction, TokenNLLFunction
from .backends import native_backend
from .checks import KERNEL_DTYPES, check_host, check_slots, check_x, expect, plainly_fits
from .types import HostWeights, InputProjections, SlotViews

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x lives, or None."""
    if not isinstance(x, Tensor):
        return None  # check_x says so
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _cast(tensor: _MaybeTensor, dtype: torch.dtype) -> _MaybeTensor:
    return tensor if tensor is None else tensor.to(dtype)


# ---- public operations --------------------------------------------------------------------------------------
def glu_ffn(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    slots: Tensor,
    scale: float,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A GLU feed-forward block plus its memory.

    y = [act(x W_gate^T + b_gate) * (x W_up^T + b_up)] W_down^T + b_down + scale * [act(x G^T) * (x K^T)] V

    Args:
        x: [..., d]
        gate_weight, up_weight: [m, d], x's dtype
        down_weight: [d, m]
        slots: [3, r, d], x's dtype or float32
        scale: tau, the memory's output scale
        activation: silu, gelu_pytorch_tanh, gelu, gelu_new or relu
        gate_bias, up_bias: [m] or None
        down_bias: [d] or None
        backend: auto, fused, matmul or reference

    Returns y: [..., d] in x's dtype. Gradients flow to x and slots. Saved for the backward: x and the
    pre-activations x W^T. Under autocast the operands are first cast to the autocast dtype.
    """
    index, biases = activation_index(activation), (gate_bias, up_bias, down_bias)
    if (dtype := _autocast_dtype(x)) is not None:
        x, gate_weight, up_weight, down_weight = (_cast(t, dtype) for t in (x, gate_weight, up_weight, down_weight))
        gate_bias, up_bias, down_bias = (_cast(t, dtype) for t in biases)
        with torch.autocast(x.device.type, enabled=False):
            return glu_ffn(
                x, gate_weight, up_weight, down_weight, slots, scale, activation, gate_bias, up_bias, down_bias, backend
            )
    if backend not in ("auto", "fused", "matmul") or not plainly_fits(x, gate_weight, up_weight, down_weight, slots, biases):
        check_x("glu_ffn", x, backend)
        check_host("glu_ffn", x, gate_weight, up_weight, down_weight, biases)
        check_slots("glu_ffn", x, slots, 3)
    if backend == "reference":
        return reference.glu_ffn(x, gate_weight, up_weight, down_weight, slots, scale, activation, *biases)
    x2d = x.reshape(-1, x.shape[-1])
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or slots.requires_grad)
    module = native_backend("glu_ffn", x, gate_weight, backend)
    if torch.compiler.is_compiling():
        name = torch_library.name_of(module)
        arguments = (x2d, gate_weight, up_weight, down_weight, slots.to(x.dtype), scale, activation, name, *biases)
        if wants_gradient:
            y = torch.ops.locas.glu_ffn(*arguments)[0]
        else:
            y = torch.ops.locas.glu_ffn_inference(*arguments)
        return y.view_as(x)
    host = HostWeights(gate_weight, up_weight, down_weight, *biases)
    with torch.no_grad():
        views = SlotViews.of(slots.to(x.dtype))
    if wants_gradient:
        y = GluFFNFunction.apply(x2d, slots, views, host, scale, index, None, module)
    else:
        y = module.glu_ffn_forward(x2d, host, views, scale, index, save=False)[0]
    return y.view_as(x)


def _sideway(
    op: str,
    function: type[torch.autograd.Function],
    parts: int,
    why_not_fused: str,
    x: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The memory alone, for slots of `parts` planes: the operation `op` of every module, `function` in eager code."""
    index = activation_index(activation)
    if (dtype := _autocast_dtype(x)) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _sideway(op, function, parts, why_not_fused, x.to(dtype), slots, scale, activation, backend)
    check_x(op, x, backend)
    check_slots(op, x, slots, parts)
    if backend == "fused":
        raise ValueError(f"{op}: backend is 'fused', which {why_not_fused}; expected auto, matmul or reference")
    if backend == "reference":
        return getattr(reference, op)(x, slots, scale, activation)
    x2d = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return getattr(torch.ops.locas, op)(x2d, slots.to(x.dtype), scale, activation)[0].view_as(x)
    with torch.no_grad():
        views = SlotViews.of(slots.to(x.dtype))
    return function.apply(x2d, slots, views, scale, index, None).view_as(x)


def sideway_glu(x: Tensor, slots: Tensor, scale: float, activation: str = "silu", backend: str = "auto") -> Tensor:
    """The memory alone: scale * [act(x G^T) * (x K^T)] V.

    For hosts whose own FFN cannot be fused (quantized, LoRA-wrapped, mixture of experts). Arguments as in `glu_ffn`.

    Returns y: [..., d] in x's dtype. Gradients flow to x and slots.
    """
    why_not_fused = "computes host and memory in one"
    return _sideway("sideway_glu", SidewayGluFunction, 3, why_not_fused, x, slots, scale, activation, backend)


def sideway_mlp(x: Tensor, slots: Tensor, scale: float, activation: str = "relu", backend: str = "auto") -> Tensor:
    """A Locas-MLP memory's output: scale * act(x K^T) V, to be added to a two-layer host's FFN.

    Args as in `glu_ffn`, but slots: [2, r, d] = (key K, value V).

    Returns y: [..., d] in x's dtype. Gradients flow to x and slots.
    """
    why_not_fused = "exists for hosts with a GLU"
    return _sideway("sideway_mlp", SidewayMlpFunction, 2, why_not_fused, x, slots, scale, activation, backend)


@torch.no_grad()
def neuron_importance(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How strongly each host neuron fires on x: the mean over all tokens of |act(x W_gate^T) * (x W_up^T)|.

    The paper's criterion for which neurons a memory starts from (docs/method.md, "Initialization").

    Args as in `glu_ffn`; x must hold at least one token. Returns [m] float32; no gradient.
    """
    index = activation_index(activation)
    check_x("neuron_importance", x, backend)
    check_host("neuron_importance", x, gate_weight, up_weight, None, (gate_bias, up_bias), has_down=False)
    x2d = x.reshape(-1, x.shape[-1])
    if x2d.shape[0] == 0:
        raise ValueError("neuron_importance: x holds no tokens; the mean needs at least one")
    if backend == "reference":
        return reference.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
    module = native_backend("neuron_importance", x, gate_weight, backend)
    if torch.compiler.is_compiling():
        return torch.ops.locas.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
    host = InputProjections(gate_weight, up_weight, gate_bias, up_bias)
    return module.neuron_importance(x2d, host, index)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Each token's negative log-likelihood, in nats: what memorizing learns from.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64 (in plain torch); computed in float32 or better
        targets: [...] int64, each in [0, V)

    Returns [T], float32 (float64 for float64 logits), T tokens in all. The gradient flows to logits, once.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    expect("token_nll", "targets", targets, (logits.shape[0],), logits, (torch.int64,))
    if logits.dtype not in KERNEL_DTYPES:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if targets.is_cpu and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"token_nll: targets holds an id outside [0, {logits.shape[1]})")
    return TokenNLLFunction.apply(logits, targets)
