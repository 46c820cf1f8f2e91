"""The activations by their transformers names."""

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

_FUNCTIONS = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation_index(name: str) -> int:
    """The kernels' number of an activation; ValueError names the known ones."""
    try:
        return INDEX[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(INDEX)}") from None


def activation_function(name: str) -> str:
    """The one name of the function that `name` means: "gelu_pytorch_tanh" for "gelu_new". ValueError as activation_index."""
    return _C.ACTIVATIONS[activation_index(name)]


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """act(x) in plain torch."""
    return _FUNCTIONS[activation_function(name)](x)
