"""LocasConfig: what a memory is made of, checked when it is made."""

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

VARIANTS = ("glu", "mlp")
INITS = ("topk", "bottomk", "random", "gaussian", "activation")
SCALES = ("paper", "host")
BACKENDS = ("auto", "fused", "matmul", "reference")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def paper_multiple(scale: object) -> float | None:
    """16.0 for "16x", 1.0 for "paper"; None for a scale that is no multiple of the paper's."""
    if scale == "paper":
        return 1.0
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)x", scale) if isinstance(scale, str) else None
    return float(match[1]) or None if match else None


@dataclass(frozen=True)
class LocasConfig:
    """The settings of a memory.

    Args:
        variant: "glu", for hosts with gate, up and down projections (the paper's Locas-GLU), or "mlp" (Locas-MLP), for
            hosts with two-layer FFNs
        rank: r, the number of slots a layer, at least 1; Locas-MLP begins with so many and grows when slots are written
        layers: which decoder layers get a memory, as indices (negative ones count from the end); None: all
        init: how gate and key rows start (with variant "mlp": key rows) (docs/method.md, "Initialization"): "topk" clones
            the host neurons that the first chunk uses most, "bottomk" those it uses least, "random" any; "gaussian" draws
            directions;
            "activation" takes the FFN inputs of random tokens
        scale: tau, the memory's output scale: "paper" (mean norm of the host's value rows over r), a multiple of it
            such as "16x", "host" (the mean norm without 1/r) or a number
        clip: whether each slot row is kept at length 1 or less after every update
        backend: "fused" (our own products: CUDA in bfloat16 and float16, CPUs with AVX-512 in float32 and bfloat16),
            "matmul" (torch's products between native kernels), "reference" (plain torch), or "auto": whichever of the
            first two was measured to be faster
        seed: of the random inits

    Raises ValueError or TypeError for a setting outside these.
    """

    variant: str = "glu"
    rank: int = 64
    layers: Sequence[int] | None = None
    init: str = "topk"
    scale: str | float = "paper"
    clip: bool = True
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("variant", self.variant, VARIANTS)
        _choice("init", self.init, INITS)
        _choice("backend", self.backend, BACKENDS)
        if isinstance(self.rank, bool) or not isinstance(self.rank, numbers.Integral):
            raise TypeError(f"rank is {self.rank!r}; expected an integer >= 1")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected an integer >= 1")
        object.__setattr__(self, "rank", int(self.rank))
        if isinstance(self.scale, str):
            if self.scale not in SCALES and paper_multiple(self.scale) is None:
                raise ValueError(f"scale is {self.scale!r}; expected paper, a multiple of it such as '16x', host or a number")
        elif isinstance(self.scale, bool) or not isinstance(self.scale, numbers.Real):
            raise TypeError(f"scale is {self.scale!r}; expected 'paper', 'host' or a number")
        elif not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale is {self.scale}; expected a finite number other than 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"seed is {self.seed!r}; expected an integer")
        if not isinstance(self.clip, bool):
            raise TypeError(f"clip is {self.clip!r}; expected True or False")
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
                raise TypeError(f"layers is {self.layers!r}; expected None or a sequence of layer indices")
            if any(isinstance(i, bool) or not isinstance(i, numbers.Integral) for i in self.layers):
                raise TypeError(f"layers is {list(self.layers)}; expected integers")
            if not self.layers:
                raise ValueError("layers is empty; expected at least one layer index, or None for all layers")
            object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer indices in ascending order; IndexError out of range, ValueError for one named twice."""
        if self.layers is None:
            return tuple(range(num_layers))
        resolved = []
        for index in self.layers:
            if not -num_layers <= index < num_layers:
                raise IndexError(
                    f"layers holds {index}, but the host has {num_layers} layers; "
                    f"expected indices from {-num_layers} to {num_layers - 1}"
                )
            resolved.append(index % num_layers)
        if len(set(resolved)) != len(resolved):
            twice = next(i for i in resolved if resolved.count(i) > 1)
            raise ValueError(f"layers names layer {twice} twice: {list(self.layers)}")
        return tuple(sorted(resolved))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that LocasConfig(**it) takes back."""
        fields = asdict(self)
        fields["layers"] = None if self.layers is None else list(self.layers)
        return fields


def check_rank(config: LocasConfig, intermediate_size: int) -> None:
    """ValueError if an init that clones neurons asks for more than the host has."""
    if config.init in ("topk", "bottomk", "random") and config.rank > intermediate_size:
        raise ValueError(
            f"rank is {config.rank}, but the host's FFN has only {intermediate_size} neurons to clone with "
            f"init={config.init!r}; expected a rank from 1 to {intermediate_size}, or init='gaussian'"
        )
