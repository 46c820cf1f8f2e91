"""The operations of the memory on torch tensors, differentiable, each with a plain-torch twin in `reference.py`.

x is [..., d]; slots are [3, r, d] = (gate G, key K, value V), those of a Locas-MLP memory [2, r, d] = (K, V), in x's
dtype or float32, and their gradient comes in their own dtype. The host's weights are frozen: they get no gradient, and
asking for one is an error. dtypes: float32, bfloat16, float16 (backend "reference": float64 too). Backends: "fused" is
our own products, on CUDA for bfloat16 and float16, on the CPU for float32 with AVX-512 and bfloat16 with AVX-512 BF16;
"matmul" is torch's GEMMs with native code between them; "reference" is plain torch; "auto" is "fused" where that was
measured to be faster (fused.py, fused_cpu.py), else "matmul".

All raise ValueError for a shape, dtype, device or setting that does not fit, naming the tensor, and TypeError for an
argument of another type. The mathematics is in docs/method.md (the paper: arXiv 2602.05085, section 3).
"""

import torch
from torch import Tensor

from . import fused, fused_cpu, kernels, library, reference  # noqa: F401  (library registers the operators)
from .activations import activation_index
from .autograd import GluFFNFunction, SidewayGluFunction, SidewayMlpFunction, TokenNLLFunction
from .config import BACKENDS
from .kernels import HostWeights, SlotViews

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- argument checks ----------------------------------------------------------------------------------------
def _expect(op: str, name: str, tensor: Tensor, shape: tuple, like: Tensor, dtypes: tuple) -> None:
    """`shape` may hold letters for sizes that are free."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected [{expected}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; expected {like.device} as x")


def _check_x(op: str, x: Tensor, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}; expected a torch.Tensor")
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions; expected [..., d]")
    if backend == "reference":
        if not x.is_floating_point():
            raise ValueError(f"{op}: x is {x.dtype}; expected a float dtype")
    elif x.dtype not in _KERNEL_DTYPES:
        raise ValueError(
            f"{op}: x is {x.dtype}; expected float32, bfloat16 or float16 (backend='reference' takes float64 too)"
        )


def _check_host(
    op: str, x: Tensor, gate_weight, up_weight, down_weight, biases: tuple, has_down: bool = True
) -> None:
    d, same = x.shape[-1], (x.dtype,)
    _expect(op, "gate_weight", gate_weight, ("m", d), x, same)
    m = gate_weight.shape[0]
    _expect(op, "up_weight", up_weight, (m, d), x, same)
    named = [("gate_weight", gate_weight), ("up_weight", up_weight)]
    if has_down:
        _expect(op, "down_weight", down_weight, (d, m), x, same)
        named.append(("down_weight", down_weight))
    for name, bias, size in zip(("gate_bias", "up_bias", "down_bias"), biases, (m, m, d)):
        if bias is not None:
            _expect(op, name, bias, (size,), x, same)
            named.append((name, bias))
    if torch.is_grad_enabled():
        for name, weight in named:
            if weight.requires_grad:
                raise ValueError(
                    f"{op}: {name} requires a gradient; the host is frozen here: call {name}.requires_grad_(False)"
                )


def _plainly_fits(x, gate_weight, up_weight, down_weight, slots, biases) -> bool:
    """Whether all is as it should be in the common case, in a few microseconds; if not, the checks above say why."""
    if not isinstance(x, Tensor) or x.dim() == 0 or biases != (None, None, None):
        return False
    dtype, device, d = x.dtype, x.device, x.shape[-1]
    for weight in (gate_weight, up_weight, down_weight):
        if not isinstance(weight, Tensor) or weight.dtype is not dtype or weight.device != device:
            return False
        if weight.requires_grad and torch.is_grad_enabled():
            return False
    shape = gate_weight.shape
    return (
        len(shape) == 2
        and shape[1] == d
        and up_weight.shape == shape
        and down_weight.shape == (d, shape[0])
        and isinstance(slots, Tensor)
        and (slots.dtype is dtype or slots.dtype is torch.float32)
        and slots.device == device
        and slots.dim() == 3
        and slots.shape[0] == 3
        and slots.shape[2] == d
        and dtype in _KERNEL_DTYPES
    )


def _check_slots(op: str, x: Tensor, slots: Tensor, parts: int) -> None:
    _expect(op, "slots", slots, (parts, "r", x.shape[-1]), x, tuple({x.dtype, torch.float32}))


def fused_backend(x: Tensor):
    """The module of the fused backend where x lies."""
    return fused_cpu if x.is_cpu else fused


def native_backend(op: str, x: Tensor, gate_weight: Tensor, backend: str):
    """The module that computes for a backend other than "reference": `kernels` or a fused one; ValueError says why not."""
    if backend == "matmul":
        return kernels
    m, d = gate_weight.shape
    module = fused_backend(x)
    if backend == "auto":
        return module if module.is_faster(x, x.numel() // d, d, m) else kernels
    if problem := module.obstacle(x, d, m):
        raise ValueError(f"{op}: backend is 'fused', but {problem}")
    return module


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x lives, or None."""
    if not isinstance(x, Tensor):
        return None  # _check_x says so
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


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
        cast = [t if t is None else t.to(dtype) for t in (x, gate_weight, up_weight, down_weight)]
        biases = [t if t is None else t.to(dtype) for t in biases]
        with torch.autocast(x.device.type, enabled=False):
            return glu_ffn(*cast, slots, scale, activation, *biases, backend=backend)
    if backend not in ("auto", "fused", "matmul") or not _plainly_fits(x, gate_weight, up_weight, down_weight, slots, biases):
        _check_x("glu_ffn", x, backend)
        _check_host("glu_ffn", x, gate_weight, up_weight, down_weight, biases)
        _check_slots("glu_ffn", x, slots, 3)
    if backend == "reference":
        return reference.glu_ffn(x, gate_weight, up_weight, down_weight, slots, scale, activation, *biases)
    x2d = x.reshape(-1, x.shape[-1])
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or slots.requires_grad)
    module = native_backend("glu_ffn", x, gate_weight, backend)
    if torch.compiler.is_compiling():
        name = library.name_of(module)
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
    op: str, function: type, parts: int, why_not_fused: str, x: Tensor, slots: Tensor, scale: float, activation: str,
    backend: str,
) -> Tensor:
    """The memory alone, for slots of `parts` planes: the operation `op` of every module, `function` in eager code."""
    index = activation_index(activation)
    if (dtype := _autocast_dtype(x)) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _sideway(op, function, parts, why_not_fused, x.to(dtype), slots, scale, activation, backend)
    _check_x(op, x, backend)
    _check_slots(op, x, slots, parts)
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


def sideway_glu(
    x: Tensor, slots: Tensor, scale: float, activation: str = "silu", backend: str = "auto"
) -> Tensor:
    """The memory alone: scale * [act(x G^T) * (x K^T)] V.

    For hosts whose own FFN cannot be fused (quantized, LoRA-wrapped, mixture of experts). Arguments as in `glu_ffn`.

    Returns y: [..., d] in x's dtype. Gradients flow to x and slots.
    """
    why_not_fused = "computes host and memory in one"
    return _sideway("sideway_glu", SidewayGluFunction, 3, why_not_fused, x, slots, scale, activation, backend)


def sideway_mlp(
    x: Tensor, slots: Tensor, scale: float, activation: str = "relu", backend: str = "auto"
) -> Tensor:
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
    _check_x("neuron_importance", x, backend)
    _check_host("neuron_importance", x, gate_weight, up_weight, None, (gate_bias, up_bias), has_down=False)
    x2d = x.reshape(-1, x.shape[-1])
    if x2d.shape[0] == 0:
        raise ValueError("neuron_importance: x holds no tokens; the mean needs at least one")
    if backend == "reference":
        return reference.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
    module = native_backend("neuron_importance", x, gate_weight, backend)
    if torch.compiler.is_compiling():
        return torch.ops.locas.neuron_importance(x2d, gate_weight, up_weight, activation, gate_bias, up_bias)
    host = HostWeights(gate_weight, up_weight, None, gate_bias, up_bias)
    return module.neuron_importance(x2d, host, index)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Each token's negative log-likelihood, in nats: what memorizing learns from.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64 (in plain torch); computed in float32 or better
        targets: [...] int64, each in [0, V)

    Returns [T], float32 (float64 for float64 logits), T tokens in all. The gradient flows to logits, once.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    _expect("token_nll", "targets", targets, (logits.shape[0],), logits, (torch.int64,))
    if logits.dtype not in _KERNEL_DTYPES:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if targets.is_cpu and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"token_nll: targets holds an id outside [0, {logits.shape[1]})")
    return TokenNLLFunction.apply(logits, targets)


def _scalar_tensor(op: str, name: str, value, like: Tensor) -> Tensor:
    """A 0-d tensor on `like`'s device; plain numbers are taken too."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}; expected a 0-d tensor")
    return value


def _check_update(op: str, slots: Tensor, learning_rate: Tensor, named: dict[str, Tensor | None]) -> None:
    if not isinstance(slots, Tensor) or slots.dtype != torch.float32 or slots.dim() < 1:
        raise ValueError(f"{op}: slots must be a float32 tensor [..., d]")
    for name, tensor in {"slots": slots, **named}.items():
        if tensor is None:
            continue
        _expect(op, name, tensor, tuple(slots.shape), slots, (torch.float32,))
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    if learning_rate.is_cpu and not (0.0 <= float(learning_rate) < float("inf")):
        raise ValueError(f"{op}: learning_rate is {float(learning_rate)}; expected a finite number >= 0")


@torch.no_grad()
def update_slots_(
    slots: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: bool = True,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step over all slots, then every row longer than 1 is scaled back to length 1. In place.

    Args:
        slots, grad, exp_avg, exp_avg_sq: [..., d] float32, contiguous; a row is a vector of the last dimension
        step: the number of this update counted from 1, 0-d (int64, float32 or float64) on the slots' device. It is
            read, not advanced, so that one counter can serve several calls
        learning_rate: 0-d (float32 or float64) on the slots' device; both are read on the device, so a captured CUDA
            graph can be replayed with other values. Plain numbers are taken too
        beta1, beta2, eps, weight_decay: AdamW's (decoupled weight decay, bias correction)
        clip: whether rows are clipped
        compute: [..., d] float32, bfloat16 or float16: receives the rounded copy of the new slots
        finite: 0-d (float32, float64 or int64) on the slots' device: where it is 0 nothing is written, which lets a
            captured CUDA graph refuse a gradient that is not finite
    """
    op = "update_slots_"
    if torch.compiler.is_compiling():
        torch.ops.locas.update_slots_(
            slots, grad, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay, clip, compute, finite
        )
        return
    step = _scalar_tensor(op, "step", step, slots)
    learning_rate = _scalar_tensor(op, "learning_rate", learning_rate, slots)
    _check_update(op, slots, learning_rate, {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    if step.is_cpu and not float(step) >= 1:
        raise ValueError(f"{op}: step is {float(step)}; expected the number of this update, counted from 1")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{op}: {name} is {beta}; expected a number in [0, 1)")
    kernels.update_slots_(
        slots, grad, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay, clip, compute, finite
    )
    torch.autograd.graph.increment_version([t for t in (slots, exp_avg, exp_avg_sq, compute) if t is not None])


@torch.no_grad()
def sgd_slots_(
    slots: Tensor,
    grad: Tensor,
    learning_rate: Tensor,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: bool = True,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One SGD step over all slots, then every row longer than 1 is scaled back to length 1. In place.

    Args as in `update_slots_`. momentum_buffer: [..., d] float32, needed when momentum is not 0:
    momentum_buffer = momentum * momentum_buffer + grad, and the slots move along it.
    """
    op = "sgd_slots_"
    if torch.compiler.is_compiling():
        torch.ops.locas.sgd_slots_(
            slots, grad, learning_rate, momentum_buffer, momentum, weight_decay, clip, compute, finite
        )
        return
    learning_rate = _scalar_tensor(op, "learning_rate", learning_rate, slots)
    _check_update(op, slots, learning_rate, {"grad": grad, "momentum_buffer": momentum_buffer})
    if momentum != 0.0 and momentum_buffer is None:
        raise ValueError(f"{op}: momentum is {momentum} but momentum_buffer is None; pass a float32 tensor of zeros")
    kernels.sgd_slots_(
        slots, grad, learning_rate, momentum_buffer, momentum, weight_decay, clip, compute, finite
    )
    torch.autograd.graph.increment_version([t for t in (slots, momentum_buffer, compute) if t is not None])


def _check_writing(
    op: str, slots: Tensor, start: int, inputs: Tensor, gradients: Tensor, epsilon: float, compute, gradient_norm
) -> None:
    if not isinstance(slots, Tensor) or slots.dtype != torch.float32 or slots.dim() != 4 or slots.shape[1] != 2:
        raise ValueError(f"{op}: slots must be a float32 tensor [L, 2, capacity, d]")
    layers, _, capacity, d = slots.shape
    _expect(op, "inputs", inputs, (layers, "n", d), slots, _KERNEL_DTYPES)
    _expect(op, "gradients", gradients, tuple(inputs.shape), slots, (inputs.dtype,))
    if compute is not None:
        _expect(op, "compute", compute, tuple(slots.shape), slots, _KERNEL_DTYPES)
    for name, tensor in (("slots", slots), ("compute", compute)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    n = inputs.shape[1]
    if gradient_norm is not None:
        _expect(op, "gradient_norm", gradient_norm, (n,), slots, (torch.float32,))
    if not isinstance(start, int):
        raise TypeError(f"{op}: start is {type(start).__name__}; expected an int")
    last = capacity - n
    if not 0 <= start <= last:
        raise ValueError(f"{op}: start is {start}; expected 0 <= start <= {last} ({n} tokens, capacity {capacity})")
    if not 0.0 < epsilon <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: epsilon is {epsilon}; expected a finite number > 0, in float32's range")


@torch.no_grad()
def write_slots_(
    slots: Tensor,
    start: int,
    inputs: Tensor,
    gradients: Tensor,
    epsilon: float,
    compute: Tensor | None = None,
    gradient_norm: Tensor | None = None,
) -> Tensor:
    """Writes one closed-form slot a token a layer (docs/method.md, "Writing"), in place.

    Token t goes to row start + t of every layer: key = A / ||A||, value = epsilon * G / ||G||. A zero norm gives a row
    of zeros.

    Args:
        slots: [L, 2, capacity, d] float32, contiguous
        start: the first row that is written; start + n <= capacity
        inputs: [L, n, d] float32, bfloat16 or float16: A, what each layer's FFN took in
        gradients: [L, n, d], inputs' dtype: G, the log-likelihood's gradient at each FFN's output, times any
            constant: values depend only on its direction
        epsilon: a finite number > 0, in float32's range
        compute: [L, 2, capacity, d] float32, bfloat16 or float16, contiguous: receives the rounded copy of the new rows
        gradient_norm: [n] float32: ||G|| of each token over the hidden dimensions of all layers together. None:
            computed from `gradients`. A host spread over several devices passes the norm over all of its layers

    Returns the gradient norms [n] float32. Where an input, a gradient or a norm is not finite, that token's norm is NaN
    and nothing is written of any token; this is decided on the slots' device, without a wait.
    """
    op = "write_slots_"
    if torch.compiler.is_compiling():
        return torch.ops.locas.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    _check_writing(op, slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    norm = kernels.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    torch.autograd.graph.increment_version([t for t in (slots, compute) if t is not None])
    return norm
