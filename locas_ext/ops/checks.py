"""Checks of the operations' arguments: each names the operation, the tensor, what it is and what was expected."""

import torch
from torch import Tensor

from locas_ext.config import BACKENDS

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect(
    op: str, name: str, tensor: object, shape: tuple[int | str, ...], like: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """`shape` may hold letters for sizes that are free."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=False)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected [{expected}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; expected {like.device} as x")


def check_x(op: str, x: Tensor, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}; expected a torch.Tensor")
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions; expected [..., d]")
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
        and dtype in KERNEL_DTYPES
    )


def check_slots(op: str, x: Tensor, slots: Tensor, parts: int) -> None:
    expect(op, "slots", slots, (parts, "r", x.shape[-1]), x, tuple({x.dtype, torch.float32}))
