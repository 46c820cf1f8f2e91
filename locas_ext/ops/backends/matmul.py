"""The forward and backward of the FFN with memory on [T, d] matrices, without autograd: the `matmul` backend.

GEMMs are torch's (cuBLAS, oneDNN, MKL); everything between them is native code from `locas_ext._C`. `ops.py` puts
checks and autograd around these functions, `library.py` registers them for torch.compile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C


class HostWeights(NamedTuple):
    """A host FFN in Hugging Face layout: gate and up [m, d], down [d, m], biases [m], [m], [d] or None."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class SlotViews(NamedTuple):
    """One layer's slots in the compute dtype: the rows that x is multiplied by, and the values [r, d].

    gate_key holds gate and key rows stacked [2r, d]; of Locas-MLP slots, which have no gate, the key rows [r, d].
    """

    gate_key: Tensor
    value: Tensor

    @classmethod
    def of(cls, slots: Tensor) -> "SlotViews":
        """Of slots [3, r, d] = (gate, key, value) or [2, r, d] = (key, value).

        They are views of the slots where these are contiguous, or (key, value) and the first r rows of a larger memory.
        """
        parts, rank, d = slots.shape
        if parts == 2:
            return cls(*slots.unbind())
        return cls(*slots.reshape(3 * rank, d).split((2 * rank, rank)))


def stream_of(tensor: Tensor) -> int:
    """The CUDA stream that work on this tensor belongs on, as an integer handle; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def memory_hidden(memory_gate_key: Tensor, scale: float, activation: int) -> Tensor:
    """scale * act(x G^T) * (x K^T), [T, r], from the pre-activations [T, 2r]."""
    gate, key = memory_gate_key.tensor_split(2, dim=1)
    hidden = gate.new_empty(gate.shape)
    _C.glu_forward(gate, key, hidden, activation, scale, stream_of(hidden))
    return hidden


def sideway_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Tensor]:
    """-> y [T, d] and the pre-activations [T, 2r] that the backward needs."""
    memory_gate_key = F.linear(x, slots.gate_key)
    return memory_hidden(memory_gate_key, scale, activation) @ slots.value, memory_gate_key


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, tuple | None]:
    """-> y [T, d] and, with `save`, what the backward needs: the host's pre-activations gate and up [T, m] (None unless
    `needs_dx`) and the memory's [T, 2r]."""
    gate = F.linear(x, host.gate, host.gate_bias)
    up = F.linear(x, host.up, host.up_bias)
    keep = save and needs_dx
    hidden = torch.empty_like(gate) if keep else gate
    _C.glu_forward(gate, up, hidden, activation, 1.0, stream_of(gate))
    y = F.linear(hidden, host.down, host.down_bias)
    del hidden
    memory_gate_key = F.linear(x, slots.gate_key)
    y.addmm_(memory_hidden(memory_gate_key, scale, activation), slots.value)
    if not save:
        return y, None
    return y, (gate, up, memory_gate_key) if keep else (None, None, memory_gate_key)


def _add_product(grad: Tensor, coefficients: Tensor, rows: Tensor) -> None:
    """grad [r, d] float32 += coefficients^T rows, for coefficients [T, r] and rows [T, d]."""
    if rows.dtype == grad.dtype:
        grad.addmm_(coefficients.T, rows)
    else:
        grad.add_(coefficients.T @ rows)


def sideway_backward(
    dy: Tensor,
    x: Tensor,
    memory_gate_key: Tensor,
    slots: SlotViews,
    scale: float,
    activation: int,
    slots_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """-> the gradient of the memory's pre-activations [T, 2r] and that of the slots [3, r, d].

    With `slots_grad` (float32, [3, r, d]) the latter is added there and None comes back.
    """
    gate, key = memory_gate_key.tensor_split(2, dim=1)
    d_gate_key = torch.empty_like(memory_gate_key)
    d_gate, d_key = d_gate_key.tensor_split(2, dim=1)
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    d_hidden = dy @ slots.value.T
    _C.glu_backward(d_hidden, gate, key, d_gate, d_key, hidden, activation, scale, stream_of(dy))
    if slots_grad is None:
        rank, d = slots.value.shape
        d_slots = dy.new_empty(3, rank, d)
        torch.mm(d_gate_key.T, x, out=d_slots[:2].view(2 * rank, d))
        torch.mm(hidden.T, dy, out=d_slots[2])
        return d_gate_key, d_slots
    grad = SlotViews(slots_grad[:2].view(slots.gate_key.shape), slots_grad[2])
    _add_product(grad.gate_key, d_gate_key, x)
    _add_product(grad.value, hidden, dy)
    return d_gate_key, None


def sideway_mlp_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Tensor]:
    """-> y [T, d] and the pre-activations x K^T [T, r] that the backward needs."""
    key = F.linear(x, slots.gate_key)
    hidden = torch.empty_like(key)
    _C.glu_forward(key, None, hidden, activation, scale, stream_of(x))
    return hidden @ slots.value, key


def sideway_mlp_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_slots: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """-> the gradient of the pre-activations [T, r] and that of the slots [2, r, d] (None unless `needs_slots`).

    With `slots_grad` (float32, [2, r, d], each row contiguous) the latter is added there and None comes back.
    """
    d_pre = dy @ slots.value.T  # the gradient of hidden, until the kernel replaces it
    hidden = torch.empty_like(pre) if needs_slots else None
    _C.glu_backward(d_pre, pre, None, d_pre, None, hidden, activation, scale, stream_of(dy))
    if not needs_slots:
        return d_pre, None
    if slots_grad is None:
        d_slots = dy.new_empty(2, *slots.value.shape)
        torch.mm(d_pre.T, x, out=d_slots[0])
        torch.mm(hidden.T, dy, out=d_slots[1])
        return d_pre, d_slots
    _add_product(slots_grad[0], d_pre, x)
    _add_product(slots_grad[1], hidden, dy)
    return d_pre, None


def glu_ffn_backward(
    dy: Tensor,
    x: Tensor,
    saved: tuple,
    host: HostWeights,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_dx: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [T, d] (None unless `needs_dx`) and the slots' gradient [3, r, d]; the host's weights are frozen.

    With `slots_grad` (float32, [3, r, d]) the latter is added there and None comes back.
    """
    gate, up, memory_gate_key = saved
    d_gate_key, d_slots = sideway_backward(dy, x, memory_gate_key, slots, scale, activation, slots_grad)
    if not needs_dx:
        return None, d_slots
    d_gate = dy @ host.down
    d_up = torch.empty_like(d_gate)
    _C.glu_backward(d_gate, gate, up, d_gate, d_up, None, activation, 1.0, stream_of(dy))
    dx = d_gate @ host.gate
    del d_gate
    return dx.addmm_(d_up, host.up).addmm_(d_gate_key, slots.gate_key), d_slots


def neuron_importance(x: Tensor, host: HostWeights, activation: int) -> Tensor:
    """Mean over the tokens of |act(gate) * up|: [m] float32."""
    gate = F.linear(x, host.gate, host.gate_bias)
    up = F.linear(x, host.up, host.up_bias)
    importance = torch.empty(gate.shape[1], dtype=torch.float32, device=x.device)
    _C.importance(gate, up, importance, activation, stream_of(x))
    return importance


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-> the negative log-likelihood of each row [T] float32 and, if asked for, its gradient [T, V] in logits' dtype."""
    nll = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    d_logits = torch.empty_like(logits) if gradient else None
    _C.cross_entropy(logits, targets, nll, d_logits, stream_of(logits))
    return nll, d_logits


def rms_norm(x: Tensor, weight: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """-> weight * x / rms(x) over the rows of x [n, d], and with `save` 1 / rms [n]. CPU."""
    out = torch.empty_like(x)
    inverse_rms = torch.empty(x.shape[0], dtype=torch.float32) if save else None
    _C.rms_norm(x, weight, out, inverse_rms, eps)
    return out, inverse_rms


def rms_norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """-> dx [n, d]; the weight is frozen. CPU."""
    dx = torch.empty_like(x)
    _C.rms_norm_backward(d_out, x, weight, inverse_rms, dx)
    return dx


def update_slots_(
    slots: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step over rows of the last dimension, then the row clip; in place."""
    _C.adamw(
        slots, grad, exp_avg, exp_avg_sq, step, learning_rate,
        beta1, beta2, eps, weight_decay, clip, compute, finite, stream_of(slots),
    )


def sgd_slots_(
    slots: Tensor,
    grad: Tensor,
    learning_rate: Tensor,
    momentum_buffer: Tensor | None,
    momentum: float,
    weight_decay: float,
    clip: bool,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One SGD step over rows of the last dimension, then the row clip; in place."""
    _C.sgd(
        slots, grad, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite, stream_of(slots)
    )


def write_slots_(
    slots: Tensor,
    start: int,
    inputs: Tensor,
    gradients: Tensor,
    epsilon: float,
    compute: Tensor | None = None,
    gradient_norm: Tensor | None = None,
) -> Tensor:
    """Closed-form slots of all layers and tokens, in place. -> the gradient norms [n] float32."""
    layers, n, _ = inputs.shape
    norms = torch.empty(n, dtype=torch.float32, device=slots.device)
    workspace = torch.empty(2 * layers * n + 1, dtype=torch.float64, device=slots.device)
    if gradient_norm is not None:
        gradient_norm = gradient_norm.contiguous()
    _C.write_slots(
        slots, start, inputs.contiguous(), gradients.contiguous(), epsilon, compute, gradient_norm, norms, workspace,
        stream_of(slots),
    )
    return norms
