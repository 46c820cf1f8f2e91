"""Blocks that a memory can only stand beside: token-wise modules, with experts or of a formula that is not known."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.hosts.probe.recording import Call, Recording
from locas_ext.hosts.tried import tried

from .forward import input_of, nearness, output_of, tolerance


def _matrices(module: nn.Module, d: int) -> list[nn.Parameter]:
    """The parameters that take in or give out vectors of the hidden size."""
    return [parameter for parameter in module.parameters() if parameter.dim() >= 2 and d in parameter.shape]


def _is_wide(module: nn.Module, d: int) -> bool:
    """Whether there are two matrices, one of them with at least half as many neurons as the stream is wide."""
    matrices = _matrices(module, d)
    return len(matrices) >= 2 and max(2 * matrix.numel() // d for matrix in matrices) >= d


def _turned(value: Any) -> Any:
    """A tensor with its tokens in the opposite order: ids [.., T], hidden states [.., T, d]."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.flip(-2) if value.is_floating_point() else value.flip(-1)


def _is_tokenwise(module: nn.Module, call: Call) -> bool:
    """Whether the output under another order of the tokens is the output in that order."""
    expected = output_of(call)
    result = None
    with tried():
        result = module(*map(_turned, call.args), **{name: _turned(value) for name, value in call.kwargs.items()})
    got, x = None if result is None else output_of(call._replace(output=result)), input_of(call)
    if expected is None or got is None or x is None or got.shape != expected.shape:
        return False
    return nearness(got.reshape(x.shape).float().flip(-2), expected.reshape(x.shape).float()) <= tolerance(expected.dtype)


def _candidates(layer: nn.Module, recording: Recording, d: int, rows: int) -> Iterator[tuple[str, nn.Module, Call]]:
    """The modules of a layer that take every token's vector to one of the same size, the outermost first."""
    for name, module in layer.named_modules():
        calls = recording.of(module)
        if module is layer or not calls or not _is_wide(module, d):
            continue
        x, y = input_of(calls[0]), output_of(calls[0])
        if x is not None and y is not None and x.shape[-1] == d and x.dim() >= 2 and x.numel() == y.numel() == rows * d:
            yield name, module, calls[0]


@torch.no_grad()
def token_wise_blocks(layer: nn.Module, recording: Recording, d: int, rows: int) -> list[str]:
    """The names of a layer's outermost token-wise modules, in the order in which they end."""
    taken, found = set[nn.Module](), []
    for name, module, call in _candidates(layer, recording, d, rows):
        if module not in taken and _is_tokenwise(module, call):
            taken.update(module.modules())
            found.append((recording.order(call), name))
    return [name for _, name in sorted(found)]


def check_gradient(layer: int, name: str, call: Call) -> None:
    """ValueError for a block whose output hands no gradient back to its input: layers below it would learn from a part only."""

    def tracked(value: Any) -> Any:
        return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(tracked, call.args)), {key: tracked(value) for key, value in call.kwargs.items()}
    x = input_of(call._replace(args=args, kwargs=kwargs))
    try:
        with torch.enable_grad():
            y = output_of(call._replace(output=call.module(*args, **kwargs)))
            assert x is not None and y is not None, "seen in the recorded call"
            (gradient,) = torch.autograd.grad(y.float().sum(), x, allow_unused=True)
        problem = None if gradient is not None else "its output does not depend on its input"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(
            f"layer {layer}'s {name}, a {type(call.module).__name__}, gives no gradient back ({problem}); experts in MXFP4 "
            "have none: load the model with quantization_config=Mxfp4Config(dequantize=True)"
        )
