"""The activations by their transformers names."""

import functools
import re
import struct

import torch
import torch.nn.functional as F

from locas_ext import _C

# Several transformers names mean one function.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}
# The kernels' number of each.
INDEX = {name: _C.ACTIVATIONS.index(function) for name, function in _NAMES.items()}

_EXPECTED = f"expected one of {', '.join(INDEX)}, xielu(POSITIVE,NEGATIVE)"

_FUNCTIONS = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


_XIELU = re.compile(r"xielu\(([\d.e+-]+),([\d.e+-]+)\)")


def xielu(positive: float, negative: float) -> str:
    """The name of xIELU with these two numbers: positive x^2 + x / 2 above 0, negative (exp(x) - 1 - x) + x / 2 below."""
    return f"xielu({_float32(positive)!r},{_float32(negative)!r})"


def _float32(value: float) -> float:
    result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return result


@functools.lru_cache(maxsize=1024)
def _xielu_numbers(name: str) -> tuple[float, float] | None:
    """The two numbers in the name of an xIELU; None for other names, or numbers that it cannot have."""
    found = _XIELU.fullmatch(name)
    try:
        numbers = () if found is None else tuple(map(float, found.groups()))
    except ValueError:
        return None
    return (numbers[0], numbers[1]) if numbers and all(0 < number < 1e30 for number in numbers) else None


def has_parameters(name: str) -> bool:
    """Whether an activation is made with numbers of its own, which the fused kernels do not take."""
    return name not in INDEX


def activation_index(name: str) -> int:
    """The kernels' number of an activation: an index, or bit 62 and the bits of xIELU's numbers. ValueError names the known."""
    if isinstance(name, str):
        if (index := INDEX.get(name)) is not None:
            return index
        if (numbers := _xielu_numbers(name)) is not None:
            positive, negative = (struct.unpack("<I", struct.pack("<f", number))[0] for number in numbers)
            return int(1 << 62 | positive << 31 | negative)
    raise ValueError(f"activation is {name!r}; {_EXPECTED}")


def activation_name(number: int) -> str:
    """The name of an activation from its number."""
    if number < 1 << 62:
        return str(_C.ACTIVATIONS[number])
    bits = struct.pack("<II", number >> 31 & 0x7FFFFFFF, number & 0x7FFFFFFF)
    return xielu(*struct.unpack("<ff", bits))


def activation_function(name: str) -> str:
    """The one name of the function that `name` means: "gelu_pytorch_tanh" for "gelu_new". ValueError as activation_index."""
    return _C.ACTIVATIONS[activation_index(name)]


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """act(x) in plain torch."""
    if name in _NAMES:
        return _FUNCTIONS[_NAMES[name]](x)
    if (numbers := _xielu_numbers(name)) is None:
        raise ValueError(f"activation is {name!r}; {_EXPECTED}")
    positive, negative = numbers
    below = torch.clamp(x, max=0)
    return torch.where(x > 0, positive * x * x + 0.5 * x, (torch.expm1(below) - x) * negative + 0.5 * x)
