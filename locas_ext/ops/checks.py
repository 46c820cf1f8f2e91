"""Checks of the operations' tensors: each names the operation, the tensor, what it is and what was expected."""

import torch
from torch import Tensor

from locas_ext.checks import MOST_FLOAT32, number, one_of
from locas_ext.config import BACKENDS

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALAR_DTYPES = (torch.int64, torch.float32, torch.float64)  # of what the updates read on the device


def finite_float(name: str, value: object) -> float:
    """The number as a float that float32 holds, in a fraction of a microsecond where it is one."""
    if type(value) is float and -MOST_FLOAT32 <= value <= MOST_FLOAT32:
        return value
    if torch.compiler.is_compiling():
        return value  # type: ignore[return-value]  # may be symbolic
    return number(name, value, -MOST_FLOAT32, MOST_FLOAT32)


def is_tensor(op: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected a torch.Tensor")


def expect(
    op: str,
    name: str,
    tensor: object,
    shape: tuple[int | str, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
    like_name: str = "x",
) -> None:
    """`shape` may hold letters for sizes that are free; the tensor has to be where `like` is."""
    is_tensor(op, name, tensor)
    assert isinstance(tensor, Tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=False)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected [{expected}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; expected {like.device} as {like_name}")


# ---- x, the host's weights, slots, logits ---------------------------------------------------------------------
def check_x(op: str, x: Tensor, backend: str) -> None:
    one_of(f"{op}: backend", backend, BACKENDS)
    is_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions; expected [..., d]")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [..., d] with d at least 1")
    if backend == "reference":
        if not x.is_floating_point():
            raise ValueError(f"{op}: x is {x.dtype}; expected a float dtype")
    elif x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{op}: x is {x.dtype}; expected float32, bfloat16 or float16 (backend='reference' takes float64 too)")


def check_host(
    op: str,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor | None,
    biases: tuple[Tensor | None, ...],
    has_down: bool = True,
) -> None:
    d, same = x.shape[-1], (x.dtype,)
    expect(op, "gate_weight", gate_weight, ("m", d), x, same)
    m = gate_weight.shape[0]
    expect(op, "up_weight", up_weight, (m, d), x, same)
    named: list[tuple[str, Tensor | None]] = [("gate_weight", gate_weight), ("up_weight", up_weight)]
    if has_down:
        expect(op, "down_weight", down_weight, (d, m), x, same)
        named.append(("down_weight", down_weight))
    for name, bias, size in zip(("gate_bias", "up_bias", "down_bias"), biases, (m, m, d), strict=False):
        if bias is not None:
            expect(op, name, bias, (size,), x, same)
            named.append((name, bias))
    if torch.is_grad_enabled():
        for name, weight in named:
            if weight is not None and weight.requires_grad:
                raise ValueError(
                    f"{op}: {name} requires a gradient; the host is frozen here: call {name}.requires_grad_(False)"
                )


def plainly_fits(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    slots: Tensor,
    biases: tuple[Tensor | None, ...],
) -> bool:
    """Whether all is as it should be in the common case, in a few microseconds; if not, the checks above say why."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0 or biases != (None, None, None):
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
        and dtype in KERNEL_DTYPES
    )


def check_slots(op: str, x: Tensor, slots: Tensor, planes: int) -> None:
    expect(op, "slots", slots, (planes, "r", x.shape[-1]), x, tuple({x.dtype, torch.float32}))


def check_logits(op: str, logits: Tensor, targets: Tensor) -> None:
    is_tensor(op, "logits", logits)
    is_tensor(op, "targets", targets)
    if logits.dim() == 0 or logits.shape[-1] == 0 or not logits.is_floating_point():
        shape = list(logits.shape)
        raise ValueError(f"{op}: logits is {logits.dtype} of shape {shape}; expected a float dtype and [..., V], V at least 1")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"{op}: targets has shape {list(targets.shape)}; expected {list(logits.shape[:-1])}")
    expect(op, "targets", targets, tuple(targets.shape), logits, (torch.int64,), "logits")


# ---- updates ----------------------------------------------------------------------------------------------------
def scalar_tensor(op: str, name: str, value: object, like: Tensor) -> Tensor:
    """A 0-d tensor on `like`'s device; numbers are taken too."""
    if not isinstance(value, Tensor):
        plain = value if torch.compiler.is_compiling() else number(f"{op}: {name}", value)
        return torch.tensor(plain, dtype=torch.float64, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}; expected a 0-d tensor")
    if value.dtype not in SCALAR_DTYPES:
        raise ValueError(f"{op}: {name} is {value.dtype}; expected {' or '.join(map(str, SCALAR_DTYPES))}")
    return value


def check_update(op: str, slots: Tensor, named: dict[str, Tensor | None]) -> None:
    """`named`: tensors of the slots' shape and dtype."""
    if not isinstance(slots, Tensor) or slots.dtype != torch.float32 or slots.dim() < 1:
        raise ValueError(f"{op}: slots must be a float32 tensor [..., d]")
    for name, tensor in {"slots": slots, **named}.items():
        if tensor is None:
            continue
        expect(op, name, tensor, tuple(slots.shape), slots, (torch.float32,), "slots")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")


def check_writing(
    op: str, slots: Tensor, inputs: Tensor, gradients: Tensor, compute: Tensor | None, gradient_norm: Tensor | None
) -> None:
    if not isinstance(slots, Tensor) or slots.dtype != torch.float32 or slots.dim() != 4 or slots.shape[1] != 2:
        raise ValueError(f"{op}: slots must be a float32 tensor [L, 2, capacity, d]")
    layers, _, capacity, d = slots.shape
    expect(op, "inputs", inputs, (layers, "n", d), slots, KERNEL_DTYPES, "slots")
    expect(op, "gradients", gradients, tuple(inputs.shape), slots, (inputs.dtype,), "slots")
    if compute is not None:
        expect(op, "compute", compute, tuple(slots.shape), slots, KERNEL_DTYPES, "slots")
    for name, tensor in (("slots", slots), ("compute", compute)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    if gradient_norm is not None:
        expect(op, "gradient_norm", gradient_norm, (inputs.shape[1],), slots, (torch.float32,), "slots")
    if inputs.shape[1] > capacity:
        raise ValueError(f"{op}: inputs holds {inputs.shape[1]} tokens; expected at most {capacity}, the capacity of slots")
