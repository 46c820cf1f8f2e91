"""The same kernels as torch.library operators, which is how torch.compile reaches them.

Eager code calls the autograd Functions of `autograd.py` instead: they cost about half as much per call. Schemas, fake
kernels and autograd formulas stand together for each operator.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .activations import activation_index
from .backends import cpu, cuda, matmul, slot_updates
from .types import HostWeights, InputProjections, SlotViews

_library = torch.library.Library("locas", "DEF")


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=torch.Tag.needs_exact_strides)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"locas::{name}", fake, lib=_library)


_HOST = "Tensor gate_weight, Tensor up_weight, Tensor down_weight"
_BIASES = "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None"


# ---- glu_ffn: y, and what the backward needs ----------------------------------------------------------------
_BACKENDS: dict[str, ModuleType] = {"matmul": matmul, "fused": cuda, "fused_cpu": cpu}


def name_of(backend: ModuleType) -> str:
    """What the operators call the module that computes."""
    return next(name for name, module in _BACKENDS.items() if module is backend)


def _saved_shapes(tokens: int, m: int, rank: int, backend: str) -> list[tuple[int, ...]]:
    """Shapes of the three tensors between forward and backward; the fused backends have two and one."""
    if backend == "fused_cpu":
        return [cpu.saved_shape(tokens, m, rank), (0, 0), (0, 0)]
    if backend == "fused":
        width = cuda.saved_width(m, rank)
        return [(tokens, width), (tokens, width), (0, 0)]
    return [(tokens, m), (tokens, m), (tokens, 2 * rank)]


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
    return (y, *[x.new_empty(0, 0) if tensor is None else tensor for tensor in saved])


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
    shapes = _saved_shapes(x.shape[0], gate.shape[0], slots.shape[1], backend)
    return (x.new_empty(x.shape), *[x.new_empty(shape) for shape in shapes])


_define(
    f"glu_ffn(Tensor x, {_HOST}, Tensor slots, float scale, str activation, str backend, {_BIASES})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _glu_ffn,
    _glu_ffn_fake,
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


_define(
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
    return x.new_empty(0) if dx is None else dx, d_slots.to(slots.dtype)


_define(
    "glu_ffn_backward(Tensor dy, Tensor x, Tensor saved_gate, Tensor saved_up, Tensor saved_memory,"
    f" {_HOST}, Tensor slots, float scale, str activation, str backend, bool needs_dx) -> (Tensor, Tensor)",
    _glu_ffn_backward,
    lambda dy, x, saved_gate, saved_up, saved_memory, gate, up, down, slots, scale, activation, backend, needs_dx: (
        x.new_empty(x.shape if needs_dx else 0),
        slots.new_empty(slots.shape),
    ),
)


def _glu_ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, up, down, slots, ctx.scale, ctx.activation, ctx.backend = inputs[:8]
    ctx.save_for_backward(x, *output[1:], gate, up, down, slots)


def _glu_ffn_autograd(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx = ctx.needs_input_grad[0]
    dx, d_slots = torch.ops.locas.glu_ffn_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation, ctx.backend, needs_dx)
    return (dx if needs_dx else None, None, None, None, d_slots, *[None] * 6)


torch.library.register_autograd("locas::glu_ffn", _glu_ffn_autograd, setup_context=_glu_ffn_setup, lib=_library)


# ---- sideway_glu --------------------------------------------------------------------------------------------
def _sideway_glu(x: Tensor, slots: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return matmul.sideway_forward(x, SlotViews.of(slots), scale, activation_index(activation))


_define(
    "sideway_glu(Tensor x, Tensor slots, float scale, str activation) -> (Tensor, Tensor)",
    _sideway_glu,
    lambda x, slots, scale, activation: (x.new_empty(x.shape), x.new_empty(x.shape[0], 2 * slots.shape[1])),
)


def _sideway_glu_backward(
    dy: Tensor, x: Tensor, memory_gate_key: Tensor, slots: Tensor, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    views = SlotViews.of(slots)
    d_gate_key, d_slots = matmul.sideway_backward(
        dy.contiguous(), x, memory_gate_key, views, scale, activation_index(activation), None
    )
    assert d_slots is not None, "without a place to add the gradient to, it comes back"
    return d_gate_key @ views.gate_key, d_slots


_define(
    "sideway_glu_backward(Tensor dy, Tensor x, Tensor memory_gate_key, Tensor slots, float scale, str activation)"
    " -> (Tensor, Tensor)",
    _sideway_glu_backward,
    lambda dy, x, memory_gate_key, slots, scale, activation: (x.new_empty(x.shape), slots.new_empty(slots.shape)),
)


def _sideway_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, slots, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(x, output[1], slots)


def _sideway_glu_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_slots = torch.ops.locas.sideway_glu_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation)
    return dx, d_slots, None, None


torch.library.register_autograd("locas::sideway_glu", _sideway_glu_autograd, setup_context=_sideway_setup, lib=_library)


# ---- sideway_mlp --------------------------------------------------------------------------------------------
def _sideway_mlp(x: Tensor, slots: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return matmul.sideway_mlp_forward(x, SlotViews.of(slots), scale, activation_index(activation))


_define(
    "sideway_mlp(Tensor x, Tensor slots, float scale, str activation) -> (Tensor, Tensor)",
    _sideway_mlp,
    lambda x, slots, scale, activation: (x.new_empty(x.shape), x.new_empty(x.shape[0], slots.shape[1])),
)


def _sideway_mlp_backward(
    dy: Tensor, x: Tensor, pre: Tensor, slots: Tensor, scale: float, activation: str, needs_slots: bool
) -> tuple[Tensor, Tensor]:
    views = SlotViews.of(slots)
    d_pre, d_slots = matmul.sideway_mlp_backward(
        dy.contiguous(), x, pre, views, scale, activation_index(activation), needs_slots, None
    )
    return d_pre @ views.gate_key, slots.new_empty(0) if d_slots is None else d_slots


_define(
    "sideway_mlp_backward(Tensor dy, Tensor x, Tensor pre, Tensor slots, float scale, str activation, bool needs_slots)"
    " -> (Tensor, Tensor)",
    _sideway_mlp_backward,
    lambda dy, x, pre, slots, scale, activation, needs_slots: (
        x.new_empty(x.shape),
        slots.new_empty(slots.shape if needs_slots else 0),
    ),
)


def _sideway_mlp_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs_slots = ctx.needs_input_grad[1]
    dx, d_slots = torch.ops.locas.sideway_mlp_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.activation, needs_slots)
    return dx, d_slots if needs_slots else None, None, None


torch.library.register_autograd("locas::sideway_mlp", _sideway_mlp_autograd, setup_context=_sideway_setup, lib=_library)


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


_define(
    "neuron_importance(Tensor x, Tensor gate_weight, Tensor up_weight, str activation, Tensor? gate_bias=None,"
    " Tensor? up_bias=None) -> Tensor",
    _neuron_importance,
    lambda x, gate_weight, *_, **__: x.new_empty(gate_weight.shape[0], dtype=torch.float32),
)


_define(
    "update_slots_(Tensor(a!) slots, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step,"
    " Tensor learning_rate, float beta1, float beta2, float eps, float weight_decay, bool clip,"
    " Tensor(d!)? compute=None, Tensor? finite=None) -> ()",
    slot_updates.update_slots_,
    lambda *_, **__: None,
)
_define(
    "sgd_slots_(Tensor(a!) slots, Tensor grad, Tensor learning_rate, Tensor(b!)? momentum_buffer, float momentum,"
    " float weight_decay, bool clip, Tensor(c!)? compute=None, Tensor? finite=None) -> ()",
    slot_updates.sgd_slots_,
    lambda *_, **__: None,
)
_define(
    "write_slots_(Tensor(a!) slots, SymInt start, Tensor inputs, Tensor gradients, float epsilon,"
    " Tensor(b!)? compute=None, Tensor? gradient_norm=None) -> Tensor",
    slot_updates.write_slots_,
    lambda slots, start, inputs, *_, **__: slots.new_empty(inputs.shape[1]),
)
