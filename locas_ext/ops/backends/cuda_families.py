"""Which family of the fused CUDA kernels each GPU runs, and for how many tokens a family is the faster backend.

csrc/cuda/ffn/ffn_kernels.h says which GPU takes which family; LOCAS_CUDA_FAMILY asks for one of them.
"""

import os
from typing import NamedTuple

from torch import Tensor

from locas_ext import _C

FAMILIES = ("80", "90")
_of_device: list[str] = []  # "" where no kernel runs; empty before somebody asked


def _known(name: str | None) -> str | None:
    if name is not None and name not in FAMILIES:
        raise ValueError(f"LOCAS_CUDA_FAMILY is {name!r}; expected {' or '.join(FAMILIES)}")
    return name


_asked = _known(os.environ.get("LOCAS_CUDA_FAMILY") or None)


def use_family(name: str | None) -> None:
    """From now on this family on all GPUs; None: each GPU's own. ValueError for one that does not exist or cannot run."""
    _C.use_cuda_family(int(_known(name) or 0))
    _of_device[:] = _C.cuda_families()


def families() -> list[str]:
    """The family of each GPU. The first question starts the driver, which an import must not do: a process that forks later
    would have no CUDA in its children, and CUDA_VISIBLE_DEVICES would come too late."""
    if not _of_device:
        use_family(_asked)
    return _of_device


def _family_of(device: int) -> str:
    known = families()
    return known[device] if device < len(known) else ""


# As torch.compiler.assume_constant_result does, which would load the compiler: nothing of this is traced.
_family_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def family(like: Tensor) -> str:
    """The family that runs where a CUDA tensor lies, such as "sm90"; "" where no kernel does."""
    return _family_of(like.device.index or 0)


class Faster(NamedTuple):
    """Where a family was measured to take less time than the matmul backend, forward and backward.

    Attributes:
        source: the measurement
        tokens: hidden sizes -> ranges of tokens, both ends included; None: no end
    """

    source: str
    tokens: dict[int, tuple[tuple[int, int | None], ...]]

    def ranges(self, d: int) -> tuple[tuple[int, int | None], ...]:
        """Those of the next hidden size that was measured."""
        next_width = max(self.tokens)
        for width in self.tokens:
            if d <= width < next_width:
                next_width = width
        return self.tokens[next_width]

    def holds(self, tokens: int, d: int) -> bool:
        for first, last in self.ranges(d):
            if first <= tokens and (last is None or tokens <= last):
                return True
        return False

    def words(self, d: int) -> str:
        """What a backend chosen by this comes to, such as "fused up to 64 tokens, else matmul"."""
        ranges = self.ranges(d)
        if ranges == ((1, None),):
            return "fused"
        named = [f"up to {last}" if first == 1 else f"{first} to {last}" if last else f"from {first}" for first, last in ranges]
        return f"fused {' and '.join(named)} tokens, else matmul" if named else "matmul"


# `python -m bench.ffn_report FILE.json --auto` prints a family's entry from a measurement.
FASTER = {
    "sm80": Faster("H200, bench/results/ffn_h200.json", {1024: ((1, 64),), 2048: ((1, 32),)}),
    # Up to 16 tokens these are sm80's kernels.
    "sm90": Faster("H200, bench/results/ffn_h200.json", {1024: ((1, None),), 2048: ((1, None),)}),
}
