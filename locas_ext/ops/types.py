"""What the backends pass to each other: a host's weights, a layer's slots, a gradient that nobody has formed yet."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HostWeights(NamedTuple):
    """A host FFN in Hugging Face layout: gate and up [m, d], down [d, m], biases [m], [m], [d] or None."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class InputProjections(NamedTuple):
    """The projections that feed a host FFN's neurons: gate and up [m, d], biases [m] or None."""

    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None


class AdamW(NamedTuple):
    """The hyper-parameters of an AdamW step, and whether it clips rows; in the order in which the kernels take them."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: bool = True


class SGD(NamedTuple):
    """The hyper-parameters of an SGD step, and whether it clips rows; in the order in which the kernels take them."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: bool = True


# What a backend's forward keeps for its own backward; of no meaning to anyone between.
Saved = tuple[Any, ...]


class SlotViews(NamedTuple):
    """One layer's slots in the compute dtype: the rows that x is multiplied by, and the values [r, d].

    gate_key holds gate and key rows stacked [2r, d]; of Locas-MLP slots, which have no gate, the key rows [r, d].
    """

    gate_key: Tensor
    value: Tensor

    @classmethod
    def of(cls, slots: Tensor) -> "SlotViews":
        """The views of slots [3, r, d] = (gate, key, value) or [2, r, d] = (key, value).

        They are views of the slots where these are contiguous, or (key, value) and the first r rows of a larger memory.
        """
        parts, rank, d = slots.shape
        if parts == 2:
            return cls(*slots.unbind())
        return cls(*slots.reshape(3 * rank, d).split((2 * rank, rank)))


def stream_of(tensor: Tensor) -> int:
    """The CUDA stream that work on this tensor belongs on, as an integer handle; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


class SlotFactors:
    """One layer's slots' gradient as factors: dG = d_gate^T x, dK = d_key^T x, dV = hidden^T dy.

    d_gate, d_key, hidden: [T, r] in the compute dtype (of their rows r' >= r columns may exist); x, dy: [T, d].
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] | None = None

    def keep(self, *tensors: Tensor) -> None:
        if self.tensors is not None:
            raise RuntimeError("a layer ran twice in one step; its slots' gradient cannot be kept as factors")
        self.tensors = tensors

    def kept(self) -> tuple[Tensor, ...]:
        if self.tensors is None:
            raise RuntimeError("a layer did not run in this step; its slots have no gradient")
        return self.tensors

    def norm_bound(self) -> Tensor:
        """[] float32, at least the gradient's norm; not finite if a factor is not, or if their product may not be."""
        d_gate, d_key, hidden, x, dy = torch._foreach_norm(self.kept(), dtype=torch.float32)
        return (d_gate + d_key) * x + hidden * dy
