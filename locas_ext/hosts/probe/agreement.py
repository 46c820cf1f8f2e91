"""When two results of a host count as the same, by the dtype they were computed in."""

from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.hosts.split import is_split

# What a host that rounds whole texts to one grid of int8 numbers may make of the same tokens in two texts.
COARSE = 0.1


def rounds_whole_texts(model: nn.Module) -> bool:
    """Whether a linear layer's weight is not a plain parameter of floating point numbers: its input may then be rounded too."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(module, "in_features") and not any(module.children()):
            if not (type(weight) is nn.Parameter or is_split(weight)) or not weight.is_floating_point():
                return True
    return False


def rounding(x: Tensor) -> float:
    """The relative rounding of a product in this dtype, on this device."""
    eps = torch.finfo(x.dtype).eps
    tf32 = x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return max(eps, 2.0**-10) if tf32 else eps


def distances(logits: Tensor, expected: Tensor) -> Tensor:
    """[n]: how far logits [n, V] are from the expected ones at each position, as a part of how far those spread."""
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return (logits - expected).norm(dim=-1) / spread.clamp_min(torch.finfo(torch.float32).tiny)
