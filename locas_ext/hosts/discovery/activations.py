"""Which activation stands between two recorded tensors."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.hosts.probe.recording import Recording
from locas_ext.hosts.tried import tried
from locas_ext.ops.activations import INDEX, activate, xielu

from .forward import here, input_of, is_linear, nearness, output_of

# One transformers name of each function that has kernels.
KERNELS = tuple({index: name for name, index in reversed(INDEX.items())}.values())


@dataclass(frozen=True)
class Activated:
    """What an activation may have made of a tensor.

    value: the result; name: the function's transformers name, None if it is none of those with kernels
    module: the name of the activation module in the layer; "" where the layer calls a function
    """

    value: Tensor
    name: str | None
    module: str


def _is_elementwise(module: Any, x: Tensor) -> bool:
    """Whether each number is activated alone: a norm is not."""
    half = x.clone()
    half[..., ::2] = 0
    with tried():
        return torch.equal(module(x.clone())[..., 1::2], module(half)[..., 1::2])
    return False


def _value(module: Any, grid: Tensor) -> Tensor | None:
    """What an activation module makes of float32 numbers, on the CPU; None if it does not take these."""
    with tried():
        value: Tensor = module(grid).float().cpu()
        return value
    return None


def function_of(module: Any, like: Tensor) -> str | None:
    """The function with kernels that an activation module computes, up to roundings; None if none."""
    ends = torch.tensor([1.0, -1.0], dtype=torch.float32, device=like.device)
    grid = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float32, device=like.device), ends])
    value = _value(module, grid)
    if value is None:
        grid = grid.to(like.dtype)
        value = module(grid).float().cpu()
    if value.shape != grid.shape:
        return None
    grid = grid.float().cpu()  # many small comparisons, each of which would wait for a device
    names = [*KERNELS, *_as_xielu(*value[-2:].double().tolist())]
    apart = (torch.stack([activate(grid, name) for name in names]) - value).abs().amax(1) / value.abs().max()
    least, index = apart.nan_to_num(math.inf).min(0)
    return names[index] if least <= 8 * torch.finfo(like.dtype).eps else None


def _as_xielu(above: float, below: float) -> list[str]:
    """The xIELU that gives these numbers at 1 and -1, if there is one."""
    positive, negative = above - 0.5, (below + 0.5) / math.exp(-1)
    return [xielu(positive, negative)] if positive > 0 and negative > 0 else []


def nearest_with_kernels(module: Any, like: Tensor) -> str:
    """The function with kernels that an activation module is most like, by direction."""
    grid = torch.linspace(-4, 4, 401, dtype=torch.float32, device=like.device)
    if (value := _value(module, grid)) is None:
        return "silu"
    grid = grid.cpu()
    scores = {name: torch.cosine_similarity(activate(grid, name), value, dim=0).item() for name in KERNELS}
    return max(scores, key=scores.__getitem__)


class Activations:
    """The activations of one layer: its activation modules as they ran, and the functions with kernels."""

    def __init__(self, layer: nn.Module, recording: Recording, rows: int):
        self.rows = rows
        self.modules = []
        for name, module in layer.named_modules():
            if module is layer or is_linear(module) or len(list(module.parameters())) > 8:
                continue
            for call in recording.of(module):
                x, y = input_of(call), output_of(call)
                if x is not None and y is not None and x.shape == y.shape and x.numel() == rows * x.shape[-1]:
                    self.modules.append((name, module, x, y))

    def of(self, pre: Tensor) -> list[Activated]:
        """What may have become of a pre-activation [rows, m]: by the modules that took it in, else by any known function."""
        found = []
        for name, module, x, y in self.modules:
            if x.numel() != pre.numel() or not torch.equal(here(x, self.rows), pre):
                continue
            if _is_elementwise(module, x):
                found.append(Activated(here(y, self.rows).float(), function_of(module, x), name))
        return found or [Activated(activate(pre.float(), name), name, "") for name in KERNELS]


def closest(options: list[Activated], expected: Tensor, up: Tensor | None, most: float) -> tuple[Activated, float] | None:
    """The option that gives the expected tensor, times `up` if there is one, and how near; None if none is near enough."""
    best = None
    for option in options:
        error = nearness(option.value if up is None else option.value * up, expected)
        if error <= most and (best is None or error < best[1]):
            best = option, error
    return best
