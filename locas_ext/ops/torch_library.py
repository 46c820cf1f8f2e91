"""The same kernels as torch.library operators: what torch.compile and whoever else traces or intercepts code records.

Eager code calls the autograd Functions of `autograd.py` instead: they cost about half as much per call. Schemas, fake
kernels and autograd formulas stand together for each operator. An operator without a formula refuses a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .activations import activation_index
from .backends import cpu, cuda, matmul, slot_updates
from .backends.base import Backend
from .registration import define
from .types import SGD, AdamW, HostWeights, InputProjections, SlotViews

_HOST = "Tensor gate_weight, Tensor up_weight, Tensor down_weight"
_BIASES = "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None"


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient, or an empty tensor in the place of one that was not needed."""
    return like.new_empty(0) if gradient is None else gradient


# ---- glu_ffn: y, and what the backward needs ----------------------------------------------------------------
_BACKENDS: dict[str, Backend] = {matmul.NAME: matmul, cuda.NAME: cuda, cpu.NAME: cpu}


def _glu_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    host = HostWeights(gate, up, down, gate_bias, up_bias, down_bias)
    y, saved = _BACKENDS[backend].glu_ffn_forward(x, host, SlotViews.of(slots), scale, activation_index(activation), save=True)
    return (y, *saved, *(x.new_empty(0, 0) for _ in range(3 - len(saved))))


def _glu_ffn_fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
    *_: Tensor | None,
    **__: Tensor | None,
) -> tuple[Tensor, ...]:
    shapes = _BACKENDS[backend].saved_shapes(x.shape[0], gate.shape[0], slots.shape[1])
    return (
        x.new_empty(x.shape),
        *[x.new_empty(shape) for shape in shapes],
        *(x.new_empty(0, 0) for _ in range(3 - len(shapes))),
    )


def _glu_ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, up, down, slots, ctx.scale, ctx.activation, ctx.backend = inputs[:8]
    ctx.save_for_backward(x, *output[1:], gate, up, down, slots)


def _glu_ffn_autograd(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx = ctx.needs_input_grad[0]
    dx, d_slots = torch.ops.locas.glu_ffn_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation, ctx.backend, needs_dx)
    return (dx if needs_dx else None, None, None, None, d_slots, *[None] * 6)


define(
    f"glu_ffn(Tensor x, {_HOST}, Tensor slots, float scale, str activation, str backend, {_BIASES})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _glu_ffn,
    _glu_ffn_fake,
    _glu_ffn_autograd,
    _glu_ffn_setup,
)


def _glu_ffn_inference(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    host = HostWeights(gate, up, down, gate_bias, up_bias, down_bias)
    return _BACKENDS[backend].glu_ffn_forward(x, host, SlotViews.of(slots), scale, activation_index(activation), save=False)[0]


define(
    f"glu_ffn_inference(Tensor x, {_HOST}, Tensor slots, float scale, str activation, str backend, {_BIASES}) -> Tensor",
    _glu_ffn_inference,
    lambda x, *_, **__: x.new_empty(x.shape),
)


def _glu_ffn_backward(
    dy: Tensor,
    x: Tensor,
    saved_gate: Tensor,
    saved_up: Tensor,
    saved_memory: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    slots: Tensor,
    scale: float,
    activation: str,
    backend: str,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    dx, d_slots = _BACKENDS[backend].glu_ffn_backward(
        dy.contiguous(),
        x,
        (saved_gate, saved_up, saved_memory),
        HostWeights(gate, up, down),
        SlotViews.of(slots),
        scale,
        activation_index(activation),
        needs_dx,
        None,
    )
    return _given(dx, x), _given(d_slots, slots).to(slots.dtype)


define(
    "glu_ffn_backward(Tensor dy, Tensor x, Tensor saved_gate, Tensor saved_up, Tensor saved_memory,"
    f" {_HOST}, Tensor slots, float scale, str activation, str backend, bool needs_dx) -> (Tensor, Tensor)",
    _glu_ffn_backward,
    lambda dy, x, saved_gate, saved_up, saved_memory, gate, up, down, slots, scale, activation, backend, needs_dx: (
        x.new_empty(x.shape if needs_dx else 0),
        slots.new_empty(slots.shape),
    ),
)


# ---- sideway_glu --------------------------------------------------------------------------------------------
def _sideway_glu(x: Tensor, slots: Tensor, scale: float, activation: str) -> tuple[Tensor, ...]:
    y, saved = matmul.sideway_glu_forward(x, SlotViews.of(slots), scale, activation_index(activation))
    return y, *saved


def _sideway_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, slots, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(x, output[1], slots)


def _sideway_glu_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_slots = torch.ops.locas.sideway_glu_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation)
    return dx, d_slots, None, None


define(
    "sideway_glu(Tensor x, Tensor slots, float scale, str activation) -> (Tensor, Tensor)",
    _sideway_glu,
    lambda x, slots, scale, activation: (x.new_empty(x.shape), x.new_empty(x.shape[0], 2 * slots.shape[1])),
    _sideway_glu_autograd,
    _sideway_setup,
)


def _sideway_glu_backward(
    dy: Tensor, x: Tensor, memory_gate_key: Tensor, slots: Tensor, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    index = activation_index(activation)
    gradients = matmul.sideway_glu_backward(
        dy.contiguous(), x, (memory_gate_key,), SlotViews.of(slots), scale, index, needs_dx=True, slots_grad=None
    )
    return _given(gradients[0], x), _given(gradients[1], slots)


define(
    "sideway_glu_backward(Tensor dy, Tensor x, Tensor memory_gate_key, Tensor slots, float scale, str activation)"
    " -> (Tensor, Tensor)",
    _sideway_glu_backward,
    lambda dy, x, memory_gate_key, slots, scale, activation: (x.new_empty(x.shape), slots.new_empty(slots.shape)),
)


# ---- sideway_mlp --------------------------------------------------------------------------------------------
def _sideway_mlp(x: Tensor, slots: Tensor, scale: float, activation: str) -> tuple[Tensor, ...]:
    y, saved = matmul.sideway_mlp_forward(x, SlotViews.of(slots), scale, activation_index(activation))
    return y, *saved


def _sideway_mlp_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs_slots = ctx.needs_input_grad[1]
    dx, d_slots = torch.ops.locas.sideway_mlp_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation, needs_slots)
    return dx, d_slots if needs_slots else None, None, None


define(
    "sideway_mlp(Tensor x, Tensor slots, float scale, str activation) -> (Tensor, Tensor)",
    _sideway_mlp,
    lambda x, slots, scale, activation: (x.new_empty(x.shape), x.new_empty(x.shape[0], slots.shape[1])),
    _sideway_mlp_autograd,
    _sideway_setup,
)


def _sideway_mlp_backward(
    dy: Tensor, x: Tensor, pre: Tensor, slots: Tensor, scale: float, activation: str, needs_slots: bool
) -> tuple[Tensor, Tensor]:
    index = activation_index(activation)
    gradients = matmul.sideway_mlp_backward(
        dy.contiguous(), x, (pre,), SlotViews.of(slots), scale, index, True, needs_slots, slots_grad=None
    )
    return _given(gradients[0], x), _given(gradients[1], slots)


define(
    "sideway_mlp_backward(Tensor dy, Tensor x, Tensor pre, Tensor slots, float scale, str activation, bool needs_slots)"
    " -> (Tensor, Tensor)",
    _sideway_mlp_backward,
    lambda dy, x, pre, slots, scale, activation, needs_slots: (
        x.new_empty(x.shape),
        slots.new_empty(slots.shape if needs_slots else 0),
    ),
)


# ---- neuron_importance, the updates and writing ---------------------------------------------------------------
def _neuron_importance(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    host = InputProjections(gate_weight, up_weight, gate_bias, up_bias)
    return matmul.neuron_importance(x, host, activation_index(activation))


define(
    "neuron_importance(Tensor x, Tensor gate_weight, Tensor up_weight, str activation, Tensor? gate_bias=None,"
    " Tensor? up_bias=None) -> Tensor",
    _neuron_importance,
    lambda x, gate_weight, *_, **__: x.new_empty(gate_weight.shape[0], dtype=torch.float32),
)


def _adamw_slots_(
    slots: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, learning_rate: Tensor, *rest: Any
) -> None:
    adamw, copies = AdamW(*rest[:5]), rest[5:]
    slot_updates.adamw_slots_(slots, grad, exp_avg, exp_avg_sq, step, learning_rate, adamw, *copies)


def _sgd_slots_(slots: Tensor, grad: Tensor, momentum_buffer: Tensor | None, learning_rate: Tensor, *rest: Any) -> None:
    sgd, copies = SGD(*rest[:3]), rest[3:]
    slot_updates.sgd_slots_(slots, grad, momentum_buffer, learning_rate, sgd, *copies)


define(
    "adamw_slots_(Tensor(a!) slots, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step,"
    " Tensor learning_rate, float beta1, float beta2, float eps, float weight_decay, bool clip,"
    " Tensor(d!)? compute=None, Tensor? finite=None) -> ()",
    _adamw_slots_,
    lambda *_, **__: None,
)
define(
    "sgd_slots_(Tensor(a!) slots, Tensor grad, Tensor(b!)? momentum_buffer, Tensor learning_rate, float momentum,"
    " float weight_decay, bool clip, Tensor(c!)? compute=None, Tensor? finite=None) -> ()",
    _sgd_slots_,
    lambda *_, **__: None,
)
define(
    "write_slots_(Tensor(a!) slots, SymInt start, Tensor inputs, Tensor gradients, float epsilon,"
    " Tensor(b!)? compute=None, Tensor? gradient_norm=None) -> Tensor",
    slot_updates.write_slots_,
    lambda slots, start, inputs, *_, **__: slots.new_empty(inputs.shape[1]),
)
