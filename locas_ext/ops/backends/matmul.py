"""The `matmul` backend: GEMMs are torch's (cuBLAS, oneDNN, MKL), everything between them is native code from `locas_ext._C`.

The interface is base.py's. `functional.py` puts checks around these functions, `autograd.py` autograd, `torch_library.py`
registers them as operators.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import HostWeights, InputProjections, Saved, SlotViews, stream_of

NAME = "matmul"


def saved_shapes(tokens: int, m: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what the backward needs: the host's gate and up, the memory's gate and key side by side."""
    return [(tokens, m), (tokens, m), (tokens, 2 * rank)]


def memory_hidden(memory_gate_key: Tensor, scale: float, activation: int) -> Tensor:
    """scale * act(x G^T) * (x K^T), [T, r], from the pre-activations [T, 2r]."""
    gate, key = memory_gate_key.tensor_split(2, dim=1)
    hidden = gate.new_empty(gate.shape)
    _C.glu_activation_forward(gate, key, hidden, activation, scale, stream_of(hidden))
    return hidden


def sideway_glu_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]:
    """-> y [T, d] and the pre-activations [T, 2r]."""
    memory_gate_key = F.linear(x, slots.gate_key)
    return memory_hidden(memory_gate_key, scale, activation) @ slots.value, (memory_gate_key,)


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, Saved]:
    """-> y [T, d] and, with `save`, the host's pre-activations gate and up [T, m] (None unless `needs_dx`) and the
    memory's [T, 2r]."""
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
        return y, ()
    return y, (gate, up, memory_gate_key) if keep else (None, None, memory_gate_key)


def _add_product(grad: Tensor, coefficients: Tensor, rows: Tensor) -> None:
    """grad [r, d] float32 += coefficients^T rows, for coefficients [T, r] and rows [T, d]."""
    if rows.dtype == grad.dtype:
        grad.addmm_(coefficients.T, rows)
    else:
        grad.add_(coefficients.T @ rows)


def _pre_activation_gradient(
    dy: Tensor,
    x: Tensor,
    memory_gate_key: Tensor,
    slots: SlotViews,
    scale: float,
    activation: int,
    slots_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """-> the gradient of the memory's pre-activations [T, 2r] and that of the slots, as `sideway_glu_backward`."""
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


def sideway_glu_backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_dx: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [T, d] and the slots' gradient [3, r, d] in dy's dtype."""
    d_gate_key, d_slots = _pre_activation_gradient(dy, x, saved[0], slots, scale, activation, slots_grad)
    return d_gate_key @ slots.gate_key if needs_dx else None, d_slots


def sideway_mlp_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]:
    """-> y [T, d] and the pre-activations x K^T [T, r]."""
    key = F.linear(x, slots.gate_key)
    hidden = torch.empty_like(key)
    _C.glu_activation_forward(key, None, hidden, activation, scale, stream_of(x))
    return hidden @ slots.value, (key,)


def sideway_mlp_backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_dx: bool,
    needs_slots: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [T, d] and the slots' gradient [2, r, d] in dy's dtype; slots_grad needs contiguous rows only."""
    (pre,) = saved
    d_pre = dy @ slots.value.T  # the gradient of hidden, until the kernel replaces it
    hidden = torch.empty_like(pre) if needs_slots else None
    _C.glu_activation_backward(d_pre, pre, None, d_pre, None, hidden, activation, scale, stream_of(dy))
    dx = d_pre @ slots.gate_key if needs_dx else None
    if hidden is None:
        return dx, None
    if slots_grad is None:
        d_slots = dy.new_empty(2, *slots.value.shape)
        torch.mm(d_pre.T, x, out=d_slots[0])
        torch.mm(hidden.T, dy, out=d_slots[1])
        return dx, d_slots
    _add_product(slots_grad[0], d_pre, x)
    _add_product(slots_grad[1], hidden, dy)
    return dx, None


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
    """-> dx [T, d] and the slots' gradient [3, r, d] in dy's dtype."""
    gate, up, memory_gate_key = saved
    d_gate_key, d_slots = _pre_activation_gradient(dy, x, memory_gate_key, slots, scale, activation, slots_grad)
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
