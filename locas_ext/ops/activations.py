"""The activations by their transformers names."""

import torch
import torch.nn.functional as F

# The index is the kernels' enum (csrc/common/types.h). Several transformers names mean one function.
INDEX = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3}
NAMES = ("silu", "gelu_pytorch_tanh", "gelu", "relu")  # one name of each index

_FUNCTIONS = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.gelu,
    F.relu,
)


def activation_index(name: str) -> int:
    """The kernels' number of an activation; ValueError names the known ones."""
    try:
        return INDEX[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(INDEX)}") from None


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """act(x) in plain torch."""
    return _FUNCTIONS[activation_index(name)](x)
