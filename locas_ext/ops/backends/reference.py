"""The operations in plain torch, by the backends' interface: any device, any float dtype, no native code.

The formulas are those of locas_ext/ops/reference.py. Nothing is saved: a backward runs the formula again under autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from locas_ext.ops import reference
from locas_ext.ops.activations import activation_name
from locas_ext.ops.types import HostWeights, InputProjections, Saved, SlotViews

NAME = "reference"


def saved_shapes(tokens: int, m: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of the up to three tensors that glu_ffn_forward saves."""
    return []


def _stacked(slots: SlotViews, planes: int) -> Tensor:
    """The slots [planes, r, d]."""
    return torch.cat(slots).view(planes, *slots.value.shape)


def _gradients(
    formula: Callable[[Tensor, Tensor], Tensor],
    dy: Tensor,
    x: Tensor,
    slots: SlotViews,
    planes: int,
    needs_dx: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    leaves = x.detach().requires_grad_(needs_dx), _stacked(slots, planes).detach().requires_grad_()
    with torch.enable_grad():
        y = formula(*leaves)
    *dx, d_slots = torch.autograd.grad(y, leaves if needs_dx else leaves[1:], dy)
    if slots_grad is not None:
        slots_grad.add_(d_slots)
    return dx[0] if needs_dx else None, d_slots if slots_grad is None else None


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, Saved]:
    gate, up, down, *biases = host
    return reference.glu_ffn(x, gate, up, down, _stacked(slots, 3), scale, activation_name(activation), *biases), ()


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
    gate, up, down, *biases = host

    def formula(x: Tensor, slots: Tensor) -> Tensor:
        return reference.glu_ffn(x, gate, up, down, slots, scale, activation_name(activation), *biases)

    return _gradients(formula, dy, x, slots, 3, needs_dx, slots_grad)


def sideway_glu_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]:
    return reference.sideway_glu(x, _stacked(slots, 3), scale, activation_name(activation)), ()


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
    formula = lambda x, slots: reference.sideway_glu(x, slots, scale, activation_name(activation))
    return _gradients(formula, dy, x, slots, 3, needs_dx, slots_grad)


def sideway_mlp_forward(x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]:
    return reference.sideway_mlp(x, _stacked(slots, 2), scale, activation_name(activation)), ()


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
    formula = lambda x, slots: reference.sideway_mlp(x, slots, scale, activation_name(activation))
    dx, d_slots = _gradients(formula, dy, x, slots, 2, needs_dx, slots_grad if needs_slots else None)
    return dx, d_slots if needs_slots else None


def neuron_importance(x: Tensor, host: HostWeights | InputProjections, activation: int) -> Tensor:
    return reference.neuron_importance(x, host.gate, host.up, activation_name(activation), host.gate_bias, host.up_bias)
