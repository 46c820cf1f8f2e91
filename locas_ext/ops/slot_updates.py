"""The updates of a memory's slots: AdamW and SGD steps with the row clip, and slots written in closed form. All in place."""

import torch
from torch import Tensor

from .backends import slot_updates
from .checks import KERNEL_DTYPES, expect


def _scalar_tensor(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
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
        expect(op, name, tensor, tuple(slots.shape), slots, (torch.float32,))
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    if learning_rate.is_cpu and not (0.0 <= float(learning_rate) < float("inf")):
        raise ValueError(f"{op}: learning_rate is {float(learning_rate)}; expected a finite number >= 0")


def _check_writing(
    op: str,
    slots: Tensor,
    start: int,
    inputs: Tensor,
    gradients: Tensor,
    epsilon: float,
    compute: Tensor | None,
    gradient_norm: Tensor | None,
) -> None:
    if not isinstance(slots, Tensor) or slots.dtype != torch.float32 or slots.dim() != 4 or slots.shape[1] != 2:
        raise ValueError(f"{op}: slots must be a float32 tensor [L, 2, capacity, d]")
    layers, _, capacity, d = slots.shape
    expect(op, "inputs", inputs, (layers, "n", d), slots, KERNEL_DTYPES)
    expect(op, "gradients", gradients, tuple(inputs.shape), slots, (inputs.dtype,))
    if compute is not None:
        expect(op, "compute", compute, tuple(slots.shape), slots, KERNEL_DTYPES)
    for name, tensor in (("slots", slots), ("compute", compute)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    n = inputs.shape[1]
    if gradient_norm is not None:
        expect(op, "gradient_norm", gradient_norm, (n,), slots, (torch.float32,))
    if not isinstance(start, int):
        raise TypeError(f"{op}: start is {type(start).__name__}; expected an int")
    last = capacity - n
    if not 0 <= start <= last:
        raise ValueError(f"{op}: start is {start}; expected 0 <= start <= {last} ({n} tokens, capacity {capacity})")
    if not 0.0 < epsilon <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: epsilon is {epsilon}; expected a finite number > 0, in float32's range")


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
    slot_updates.update_slots_(
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
        torch.ops.locas.sgd_slots_(slots, grad, learning_rate, momentum_buffer, momentum, weight_decay, clip, compute, finite)
        return
    learning_rate = _scalar_tensor(op, "learning_rate", learning_rate, slots)
    _check_update(op, slots, learning_rate, {"grad": grad, "momentum_buffer": momentum_buffer})
    if momentum != 0.0 and momentum_buffer is None:
        raise ValueError(f"{op}: momentum is {momentum} but momentum_buffer is None; pass a float32 tensor of zeros")
    slot_updates.sgd_slots_(slots, grad, learning_rate, momentum_buffer, momentum, weight_decay, clip, compute, finite)
    torch.autograd.graph.increment_version([t for t in (slots, momentum_buffer, compute) if t is not None])


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
    norm = slot_updates.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    torch.autograd.graph.increment_version([t for t in (slots, compute) if t is not None])
    return norm
