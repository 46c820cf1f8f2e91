"""The updates of a memory's slots: AdamW and SGD steps with the row clip, and slots written in closed form. All in place."""

import torch
from torch import Tensor

from locas_ext.checks import boolean, integer, number

from .backends import slot_updates
from .checks import check_update, check_writing, scalar_tensor
from .routes import by_address, refuse_transforms
from .types import SGD, AdamW

_LARGEST = torch.finfo(torch.float32).max


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _check_rate(op: str, learning_rate: Tensor, step: Tensor | None = None) -> None:
    """ValueError for values out of range, on the CPU only: on a GPU this would wait for the kernels."""
    if learning_rate.is_cpu:
        number(f"{op}: learning_rate", learning_rate, low=0)
    if step is not None and step.is_cpu and not float(step) >= 1:
        raise ValueError(f"{op}: step is {float(step)}; expected the number of this update, counted from 1")


def _checked_adamw(op: str, adamw: AdamW) -> AdamW:
    return AdamW(
        number(f"{op}: beta1", adamw.beta1, low=0, below=1),
        number(f"{op}: beta2", adamw.beta2, low=0, below=1),
        number(f"{op}: eps", adamw.eps, low=0),
        number(f"{op}: weight_decay", adamw.weight_decay),
        boolean(f"{op}: clip", adamw.clip),
    )


def _checked_sgd(op: str, sgd: SGD) -> SGD:
    return SGD(
        number(f"{op}: momentum", sgd.momentum),
        number(f"{op}: weight_decay", sgd.weight_decay),
        boolean(f"{op}: clip", sgd.clip),
    )


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
        slots: [..., d], float32, contiguous; a row is a vector of the last dimension
        grad: as slots
        exp_avg: as slots, AdamW's first moment
        exp_avg_sq: as slots, AdamW's second moment
        step: 0-d, int64, float32 or float64, on the slots' device, or a number: the number of this update, counted from
            1. It is read, not advanced, so that one counter can serve several calls
        learning_rate: 0-d, float32 or float64, on the slots' device, or a number >= 0. It and step are read on the device,
            so a captured CUDA graph can be replayed with other values
        beta1: in [0, 1), the decay of exp_avg
        beta2: in [0, 1), the decay of exp_avg_sq
        eps: >= 0, added to the denominator
        weight_decay: decoupled, times the learning rate
        clip: whether rows are clipped
        compute: as slots, float32, bfloat16 or float16: receives the rounded copy of the new slots; or None
        finite: 0-d, float32, float64 or int64, on the slots' device: where it is 0 nothing is written, which lets a captured
            CUDA graph refuse a gradient that is not finite; or None

    Returns:
        Nothing.

    Raises:
        TypeError: an argument is neither a tensor nor a number where one is expected
        ValueError: a shape, dtype, device or range does not fit
        RuntimeError: in a transform of torch.func

    Source: arXiv 2602.05085, section 3; docs/method.md, "Scale and clip" and "Learning".

    >>> slots, exp_avg, exp_avg_sq = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    >>> update_slots_(slots, torch.ones(3, 2, 4), exp_avg, exp_avg_sq, step=1, learning_rate=0.25)
    >>> bool(torch.allclose(slots, torch.tensor(-0.25)))  # the first step has the learning rate's length
    True
    """
    op = "update_slots_"
    step, learning_rate = scalar_tensor(op, "step", step, slots), scalar_tensor(op, "learning_rate", learning_rate, slots)
    check_update(op, slots, {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    adamw = AdamW(beta1, beta2, eps, weight_decay, clip)
    if torch.compiler.is_compiling():
        torch.ops.locas.adamw_slots_(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, *adamw, compute, finite)
        return
    adamw = _checked_adamw(op, adamw)
    if by_address(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, *_given(compute, finite)):
        _check_rate(op, learning_rate, step)
        slot_updates.adamw_slots_(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, adamw, compute, finite)
    else:
        refuse_transforms(op)
        torch.ops.locas.adamw_slots_(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, *adamw, compute, finite)
    torch.autograd.graph.increment_version(_given(slots, exp_avg, exp_avg_sq, compute))


adamw_slots_ = update_slots_


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

    Args:
        slots: [..., d], float32, contiguous; a row is a vector of the last dimension
        grad: as slots
        learning_rate: 0-d, float32 or float64, on the slots' device, or a number >= 0
        momentum_buffer: as slots, or None where momentum is 0. It becomes momentum * momentum_buffer + grad, and the slots
            move along it
        momentum: a finite number
        weight_decay: decoupled, times the learning rate
        clip: whether rows are clipped
        compute: as slots, float32, bfloat16 or float16: receives the rounded copy of the new slots; or None
        finite: 0-d, float32, float64 or int64, on the slots' device: where it is 0 nothing is written; or None

    Returns:
        Nothing.

    Raises:
        TypeError: an argument is neither a tensor nor a number where one is expected
        ValueError: a shape, dtype, device or range does not fit, or momentum without a buffer
        RuntimeError: in a transform of torch.func

    Source: arXiv 2602.05085, section 3; docs/method.md, "Scale and clip" and "Learning".

    >>> slots = torch.zeros(3, 2, 4)
    >>> sgd_slots_(slots, torch.ones(3, 2, 4), learning_rate=1.0)
    >>> bool(torch.allclose(slots.norm(dim=-1), torch.tensor(1.0)))  # rows of length 2, clipped
    True
    """
    op = "sgd_slots_"
    learning_rate = scalar_tensor(op, "learning_rate", learning_rate, slots)
    check_update(op, slots, {"grad": grad, "momentum_buffer": momentum_buffer})
    sgd = SGD(momentum, weight_decay, clip)
    if torch.compiler.is_compiling():
        torch.ops.locas.sgd_slots_(slots, grad, momentum_buffer, learning_rate, *sgd, compute, finite)
        return
    sgd = _checked_sgd(op, sgd)
    if sgd.momentum != 0.0 and momentum_buffer is None:
        raise ValueError(f"{op}: momentum is {momentum} but momentum_buffer is None; pass a float32 tensor of zeros")
    if by_address(slots, grad, learning_rate, *_given(momentum_buffer, compute, finite)):
        _check_rate(op, learning_rate)
        slot_updates.sgd_slots_(slots, grad, momentum_buffer, learning_rate, sgd, compute, finite)
    else:
        refuse_transforms(op)
        torch.ops.locas.sgd_slots_(slots, grad, momentum_buffer, learning_rate, *sgd, compute, finite)
    torch.autograd.graph.increment_version(_given(slots, momentum_buffer, compute))


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
    """Writes one closed-form slot per token and layer, in place.

    Token t goes to row start + t of every layer: key = A / ||A||, value = epsilon * G / ||G||. A zero norm gives a row
    of zeros.

    Args:
        slots: [L, 2, capacity, d], float32, contiguous
        start: the first row that is written; start + n <= capacity
        inputs: [L, n, d], float32, bfloat16 or float16: A, what each layer's FFN took in
        gradients: [L, n, d], inputs' dtype: G, the log-likelihood's gradient at each FFN's output, times any constant:
            values depend only on its direction
        epsilon: a finite number > 0, in float32's range
        compute: [L, 2, capacity, d], float32, bfloat16 or float16, contiguous: receives the rounded copy of the new rows;
            or None
        gradient_norm: [n], float32: ||G|| of each token over the hidden dimensions of all layers together, or None to
            compute it from `gradients`. A host spread over several devices passes the norm over all of its layers

    Returns:
        The gradient norms [n] float32. Where an input, a gradient or a norm is not finite, that token's norm is NaN and
        nothing is written of any token; this is decided on the slots' device, without a wait.

    Raises:
        TypeError: an argument is not a tensor, an integer or a number where one is expected
        ValueError: a shape, dtype, device or range does not fit
        RuntimeError: in a transform of torch.func

    Source: arXiv 2602.05085, section 3; docs/method.md, "Writing".

    >>> slots = torch.zeros(1, 2, 8, 4)
    >>> norms = write_slots_(slots, 0, torch.ones(1, 3, 4), torch.ones(1, 3, 4), epsilon=0.5)
    >>> norms.tolist()
    [2.0, 2.0, 2.0]
    >>> slots[0].norm(dim=-1)[:, :4].tolist()  # three keys of length 1, three values of length epsilon
    [[1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.0]]
    """
    op = "write_slots_"
    check_writing(op, slots, inputs, gradients, compute, gradient_norm)
    if torch.compiler.is_compiling():
        return torch.ops.locas.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    n, capacity = inputs.shape[1], slots.shape[2]
    start = integer(f"{op}: start", start, 0, capacity - n, f"{n} tokens, capacity {capacity}")
    epsilon = number(f"{op}: epsilon", epsilon, above=0, high=_LARGEST, why="the slots are float32")
    if by_address(slots, inputs, gradients, *_given(compute, gradient_norm)):
        norm = slot_updates.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    else:
        refuse_transforms(op)
        norm = torch.ops.locas.write_slots_(slots, start, inputs, gradients, epsilon, compute, gradient_norm)
    torch.autograd.graph.increment_version(_given(slots, compute))
    return norm
