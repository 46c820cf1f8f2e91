"""The forward and backward of the FFN with memory on [T, d] matrices, without autograd: the `matmul` backend.

GEMMs are torch's (cuBLAS, oneDNN, MKL); everything between them is native code from `locas_ext._C`. `functional.py` puts
checks around these functions, `autograd.py` autograd, `torch_library.py` registers them for torch.compile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import HostWeights, InputProjections, Saved, SlotViews, stream_of


def memory_hidden(memory_gate_key: Tensor, scale: float, activation: int) -> Tensor:
    """scale * act(x G^T) * (x K^T), [T, r], from the pre-activations [T, 2r]."""
    gate, key = memory_gate_key.tensor_split(2, dim=1)
    hidden = gate.new_empty(gate.shape)
    _C.glu_activation_forward(gate, key, hidden, activation, scale, stream_of(hidden))
    return hidden


def sideway_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Tensor]:
    """-> y [T, d] and the pre-activations [T, 2r] that the backward needs."""
    memory_gate_key = F.linear(x, slots.gate_key)
    return memory_hidden(memory_gate_key, scale, activation) @ slots.value, memory_gate_key


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, Saved | None]:
    """-> y [T, d] and, with `save`, what the backward needs: the host's pre-activations gate and up [T, m] (None unless
    `needs_dx`) and the memory's [T, 2r]."""
    gate = F.linear(x, host.gate, host.gate_bias)
    up = F.linear(x, host.up, host.up_bias)
    keep = save and needs_dx
    hidden = torch.empty_like(gate) if keep else gate
    _C.glu_activation_forward(gate, up, hidden, activation, 1.0, stream_of(gate))
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
    _C.glu_activation_backward(d_hidden, gate, key, d_gate, d_key, hidden, activation, scale, stream_of(dy))
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
    _C.glu_activation_forward(key, None, hidden, activation, scale, stream_of(x))
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
    _C.glu_activation_backward(d_pre, pre, None, d_pre, None, hidden, activation, scale, stream_of(dy))
    if hidden is None:
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
    saved: Saved,
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
    _C.glu_activation_backward(d_gate, gate, up, d_gate, d_up, None, activation, 1.0, stream_of(dy))
    dx = d_gate @ host.gate
    del d_gate
    return dx.addmm_(d_up, host.up).addmm_(d_gate_key, slots.gate_key), d_slots


def neuron_importance(x: Tensor, host: HostWeights | InputProjections, activation: int) -> Tensor:
    """Mean over the tokens of |act(gate) * up|: [m] float32."""
    gate = F.linear(x, host.gate, host.gate_bias)
    up = F.linear(x, host.up, host.up_bias)
    importance = torch.empty(gate.shape[1], dtype=torch.float32, device=x.device)
    _C.neuron_importance_of_products(gate, up, importance, activation, stream_of(x))
    return importance
