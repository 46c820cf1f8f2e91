"""The operations of the memory on torch tensors, differentiable, each with a plain-torch twin in `reference.py`.

x is [..., d]; slots are [3, r, d] = (gate G, key K, value V), those of a Locas-MLP memory [2, r, d] = (K, V), in x's
dtype or float32, and their gradient comes in their own dtype. The host's weights are frozen: they get no gradient, and
asking for one is an error. dtypes: float32, bfloat16, float16 (backend "reference": float64 too). Backends: "fused" is
our own products, on CUDA for bfloat16 and float16, on the CPU for float32 with AVX-512 and bfloat16 with AVX-512 BF16;
"matmul" is torch's GEMMs with native code between them; "reference" is plain torch; "auto" is "fused" where that was
measured to be faster (cuda.py, cpu.py), else "matmul". routes.py says what computes where code is traced or transformed.

The mathematics is in docs/method.md (the paper: arXiv 2602.05085, section 3).
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import reference
from .activations import activation_index
from .autograd import GluFfnFunction, SidewayGluFunction, SidewayMlpFunction
from .backends import glu_ffn_backend, sideway_backend
from .backends.base import Backend
from .checks import check_host, check_slots, check_x, finite_float, plainly_fits
from .routes import by_address, transformed
from .types import HostWeights, InputProjections, SlotViews

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x lies, or None."""
    if not isinstance(x, Tensor):
        return None  # check_x says so
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _cast(tensor: _MaybeTensor, dtype: torch.dtype) -> _MaybeTensor:
    return tensor if tensor is None else tensor.to(dtype)


def _wants_gradient(x: Tensor, slots: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or slots.requires_grad)


def _with_rows(matrix: Tensor) -> Tensor:
    """The tensor, or a copy of one whose last dimension is not contiguous, which kernels do not take."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def _with_rows_all(weights: Iterable[Tensor | None]) -> list[Any]:
    return [weight if weight is None else _with_rows(weight) for weight in weights]


def _in_dtype(slots: Tensor, dtype: torch.dtype) -> SlotViews:
    with torch.no_grad():
        return SlotViews.of(_with_rows(slots if slots.dtype is dtype else slots.to(dtype)))


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
        x: [..., d], float32, bfloat16 or float16 (backend "reference": any float dtype)
        gate_weight: [m, d], x's dtype; the host's weights and biases must not require a gradient
        up_weight: [m, d], x's dtype
        down_weight: [d, m], x's dtype
        slots: [3, r, d], x's dtype or float32: gate, key and value rows
        scale: tau, the memory's output scale; a finite number
        activation: "silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "relu2", "quick_gelu" or xielu(0.8,0.3)
        gate_bias: [m], x's dtype, or None
        up_bias: [m], x's dtype, or None
        down_bias: [d], x's dtype, or None
        backend: "auto", "fused", "matmul" or "reference"

    Returns:
        y [..., d] in x's dtype. Gradients flow to x and slots, once. Under autocast the operands are first cast to the
        autocast dtype.

    Raises:
        TypeError: an argument is not a tensor, or scale is not a number
        ValueError: a shape, dtype, device, activation, scale or backend does not fit; a host weight requires a gradient

    Source: arXiv 2602.05085, section 3; docs/method.md, "Locas-GLU".

    >>> x, slots = torch.ones(2, 5, 8), torch.zeros(3, 4, 8)
    >>> gate, up, down = torch.eye(16, 8), torch.eye(16, 8), torch.eye(8, 16)
    >>> y = glu_ffn(x, gate, up, down, slots, scale=0.1)
    >>> list(y.shape)
    [2, 5, 8]
    >>> bool(torch.allclose(y, torch.nn.functional.silu(x)))  # slots of zeros add nothing
    True
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
    scale = finite_float("glu_ffn: scale", scale)
    host = HostWeights(gate_weight, up_weight, down_weight, *biases)
    if not by_address(x, slots, *[weight for weight in host if weight is not None]):
        return _traced_glu_ffn(x, host, slots, scale, activation, backend)
    host = HostWeights(*_with_rows_all(host))
    x2d = x.reshape(-1, x.shape[-1])
    module = glu_ffn_backend("glu_ffn", x, gate_weight, backend, activation)
    views = _in_dtype(slots, x.dtype)
    if _wants_gradient(x, slots):
        y = GluFfnFunction.apply(x2d, slots, views, host, scale, index, None, module)
    else:
        y = module.glu_ffn_forward(x2d, host, views, scale, index, save=False)[0]
    return y.view_as(x)


def _traced_glu_ffn(x: Tensor, host: HostWeights, slots: Tensor, scale: float, activation: str, backend: str) -> Tensor:
    """glu_ffn as plain torch or as a registered operator."""
    gate, up, down, *biases = host
    if backend == "reference" or transformed():
        return reference.glu_ffn(x, gate, up, down, slots, scale, activation, *biases)
    name = glu_ffn_backend("glu_ffn", x, gate, backend, activation).NAME
    arguments = (x.reshape(-1, x.shape[-1]), gate, up, down, slots.to(x.dtype), scale, activation, name, *biases)
    if _wants_gradient(x, slots):
        return torch.ops.locas.glu_ffn(*arguments)[0].view_as(x)
    return torch.ops.locas.glu_ffn_inference(*arguments).view_as(x)


def _sideway(
    op: str,
    function: type[torch.autograd.Function],
    planes: int,
    x: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The memory alone, for slots of so many planes: `op` of the reference and the registered one, `function` in eager code."""
    index = activation_index(activation)
    if (dtype := _autocast_dtype(x)) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _sideway(op, function, planes, x.to(dtype), slots, scale, activation, backend)
    check_x(op, x, backend)
    check_slots(op, x, slots, planes)
    scale = finite_float(f"{op}: scale", scale)
    if backend == "fused":
        why = "computes host and memory in one" if planes == 3 else "exists for hosts with a GLU"
        raise ValueError(f"{op}: backend is 'fused', which {why}; expected auto, matmul or reference")
    if not by_address(x, slots):
        if backend == "reference" or transformed():
            return getattr(reference, op)(x, slots, scale, activation)
        x2d = x.reshape(-1, x.shape[-1])
        return getattr(torch.ops.locas, op)(x2d, slots.to(x.dtype), scale, activation)[0].view_as(x)
    x2d, views, module = x.reshape(-1, x.shape[-1]), _in_dtype(slots, x.dtype), sideway_backend(backend)
    return function.apply(x2d, slots, views, scale, index, None, module).view_as(x)


def sideway_glu(x: Tensor, slots: Tensor, scale: float, activation: str = "silu", backend: str = "auto") -> Tensor:
    """The memory alone: scale * [act(x G^T) * (x K^T)] V.

    For hosts whose own FFN cannot be fused (quantized, LoRA-wrapped, mixture of experts).

    Args:
        x: [..., d], float32, bfloat16 or float16 (backend "reference": any float dtype)
        slots: [3, r, d], x's dtype or float32: gate, key and value rows
        scale: tau, the memory's output scale; a finite number
        activation: "silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "relu2", "quick_gelu" or xielu(0.8,0.3)
        backend: "auto", "matmul" or "reference"

    Returns:
        y [..., d] in x's dtype. Gradients flow to x and slots, once.

    Raises:
        TypeError: an argument is not a tensor, or scale is not a number
        ValueError: a shape, dtype, device, activation, scale or backend does not fit

    Source: arXiv 2602.05085, section 3; docs/method.md, "Locas-GLU".

    >>> y = sideway_glu(torch.ones(2, 5, 8), torch.ones(3, 4, 8), scale=0.1)
    >>> list(y.shape), bool((y == y[0, 0, 0]).all())
    ([2, 5, 8], True)
    """
    return _sideway("sideway_glu", SidewayGluFunction, 3, x, slots, scale, activation, backend)


def sideway_mlp(x: Tensor, slots: Tensor, scale: float, activation: str = "relu", backend: str = "auto") -> Tensor:
    """A Locas-MLP memory's output: scale * act(x K^T) V, to be added to a two-layer host's FFN.

    Args:
        x: [..., d], float32, bfloat16 or float16 (backend "reference": any float dtype)
        slots: [2, r, d], x's dtype or float32: key and value rows
        scale: tau, the memory's output scale; a finite number
        activation: "silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "relu2", "quick_gelu" or xielu(0.8,0.3)
        backend: "auto", "matmul" or "reference"

    Returns:
        y [..., d] in x's dtype. Gradients flow to x and slots, once.

    Raises:
        TypeError: an argument is not a tensor, or scale is not a number
        ValueError: a shape, dtype, device, activation, scale or backend does not fit

    Source: arXiv 2602.05085, section 3; docs/method.md, "Locas-MLP".

    >>> y = sideway_mlp(torch.ones(5, 8), torch.ones(2, 4, 8), scale=0.5)
    >>> bool((y == 0.5 * 4 * 8).all())  # 4 slots, each fires with 8
    True
    """
    return _sideway("sideway_mlp", SidewayMlpFunction, 2, x, slots, scale, activation, backend)


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

    Args:
        x: [..., d], float32, bfloat16 or float16 (backend "reference": any float dtype); at least one token
        gate_weight: [m, d], x's dtype
        up_weight: [m, d], x's dtype
        activation: "silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "relu2", "quick_gelu" or xielu(0.8,0.3)
        gate_bias: [m], x's dtype, or None
        up_bias: [m], x's dtype, or None
        backend: "auto", "fused", "matmul" or "reference"

    Returns:
        [m] float32 (float64 for float64 x), without a gradient.

    Raises:
        TypeError: an argument is not a tensor
        ValueError: a shape, dtype, device, activation or backend does not fit, or x holds no token

    Source: arXiv 2602.05085, section 3 (which neurons a memory starts from); docs/method.md, "Initialization".

    >>> importance = neuron_importance(torch.ones(3, 4), torch.eye(6, 4), torch.eye(6, 4))
    >>> (importance > 0).tolist()
    [True, True, True, True, False, False]
    """
    index = activation_index(activation)
    check_x("neuron_importance", x, backend)
    check_host("neuron_importance", x, gate_weight, up_weight, None, (gate_bias, up_bias), has_down=False)
    x2d = x.reshape(-1, x.shape[-1])
    if x2d.shape[0] == 0:
        raise ValueError("neuron_importance: x holds no tokens; the mean needs at least one")
    host = InputProjections(gate_weight, up_weight, gate_bias, up_bias)
    if not by_address(x, *[weight for weight in host if weight is not None]):
        if backend == "reference" or transformed():
            return reference.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
        return torch.ops.locas.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
    host = InputProjections(*_with_rows_all(host))
    module: Backend = glu_ffn_backend("neuron_importance", x, gate_weight, backend, activation)
    return module.neuron_importance(x2d, host, index)
