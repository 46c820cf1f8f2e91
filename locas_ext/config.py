"""LocasConfig: what a memory is made of, checked when it is made."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from locas_ext.checks import LEAST_FLOAT32, MOST_SIZE, boolean, integer, integers, number, one_of

VARIANTS = ("glu", "mlp")
INITS = ("topk", "bottomk", "random", "gaussian", "activation")
SCALES = ("paper", "host")
ROW_LENGTHS = ("unit", "host")
BACKENDS = ("auto", "fused", "matmul", "reference")
MOST_CLIP = 1e3  # times the host's own rows
MOST_SCALE = 1e6  # a thousand times the largest mean norm of a host's value rows
MOST_SLOT = 1e6  # of a number in the slots: squares must be far from infinity
MOST_RATE = 1e6  # of a learning rate or decay: a step of that length still has squares in float32


def paper_multiple(scale: object) -> float | None:
    """16.0 for "16x", 1.0 for "paper"; None for a scale that is not a multiple of the paper's."""
    if scale == "paper":
        return 1.0
    match = re.fullmatch(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)x", scale) if isinstance(scale, str) else None
    multiple = float(match[1]) if match else 0.0
    return multiple if LEAST_FLOAT32 <= multiple <= MOST_SCALE else None


def checked_scale(scale: object) -> str | float:
    """A scale as a config takes it; TypeError or ValueError for any other."""
    if not isinstance(scale, str):
        plain = number("scale", scale, -MOST_SCALE, MOST_SCALE)
        if abs(plain) < LEAST_FLOAT32:
            raise ValueError(f"scale is {scale}; expected a finite number other than 0, or 'paper', '16x' or 'host'")
        return plain
    if scale not in SCALES and paper_multiple(scale) is None:
        raise ValueError(
            f"scale is {scale!r}; expected paper, a multiple of it such as '16x' (at most {MOST_SCALE:g}), host or a number"
        )
    return scale


def _checked_clip(clip: object) -> bool | float:
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        return number("clip", clip, above=0, high=MOST_CLIP, why="times the mean length of the host's own rows")
    return boolean("clip", clip)


@dataclass(frozen=True)
class LocasConfig:
    """The settings of a memory. The defaults are the paper's but for the scale; `LocasConfig.paper()` has that too.

    Args:
        variant: "glu", for hosts with gate, up and down projections (the paper's Locas-GLU), or "mlp" (Locas-MLP), for
            hosts with two-layer FFNs
        rank: int >= 1: r, the slots per layer; Locas-MLP begins with so many and grows when slots are written
        layers: sequence of int: which decoder layers get a memory (negative ones count from the end); None: all
        init: how gate and key rows start (with variant "mlp": key rows) (docs/method.md, "Initialization"): "topk" clones
            the host neurons that the first chunk uses most, "bottomk" those it uses least, "random" any; "gaussian" draws
            directions; "activation" takes the FFN inputs of random tokens
        scale: tau, the memory's output scale: "host" (mean norm of the host's value rows), "paper" (the same divided by
            r), a multiple of that such as "16x", or a float other than 0, from -1e6 to 1e6
        clip: True: each slot row is kept at length 1 or less after every update; a float above 0: gate and key rows at so
            many times the mean length of the host's own gate and up rows, value rows where tau times their length is so
            many times the mean length of the host's value rows; False: no row is clipped. Rows that a study has made longer
            are kept at the length that it gave them
        backend: "fused" (our own products: CUDA in bfloat16 and float16, CPUs with AVX-512 in float32 and bfloat16),
            "matmul" (torch's products between native kernels), "reference" (plain torch), or "auto": whichever of the
            first two was measured to be faster
        seed: int from -2**63 to 2**64 - 1: of the random inits
        row_length: how long the rows of `init` are: "unit", each of length 1, or "host": clones as long as the neurons' own
            rows, other rows as long as these are on average

    Raises:
        TypeError: a setting is of another type
        ValueError: a setting is none of these values

    Source: arXiv 2602.05085, section 3 (Locas-GLU and Locas-MLP); docs/method.md.

    >>> LocasConfig(rank=16, layers=[0, -1]).layers
    (0, -1)
    """

    variant: str = "glu"
    rank: int = 64
    layers: Sequence[int] | None = None
    init: str = "topk"
    scale: str | float = "host"
    clip: bool | float = True
    backend: str = "auto"
    seed: int = 0
    row_length: str = "unit"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, VARIANTS)
        one_of("init", self.init, INITS)
        one_of("backend", self.backend, BACKENDS)
        one_of("row_length", self.row_length, ROW_LENGTHS)
        checked = {
            "rank": integer("rank", self.rank, 1, MOST_SIZE),
            "layers": None if self.layers is None else integers("layers", self.layers),
            "scale": checked_scale(self.scale),
            "clip": _checked_clip(self.clip),
            "seed": integer("seed", self.seed, -(2**63), 2**64 - 1),
        }
        if checked["layers"] == ():
            raise ValueError("layers is empty; expected at least one layer index, or None for all layers")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, **changes: Any) -> "LocasConfig":
        """The settings of the paper's ablations (arXiv 2602.05085, Qwen3-1.7B on PG-19), except for `changes`.

        Args:
            changes: fields with other values

        Returns:
            A LocasConfig.

        Raises:
            TypeError, ValueError: as LocasConfig does

        >>> LocasConfig.paper(rank=128).scale
        'paper'
        """
        defaults = {"variant": "glu", "rank": 64, "init": "topk", "scale": "paper", "clip": True}
        return cls(**{**defaults, "row_length": "unit", **changes})

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """`layers` for a host with so many layers.

        Args:
            num_layers: int: the host's decoder layers

        Returns:
            The layer indices, each from 0 to num_layers - 1, ascending.

        Raises:
            IndexError: an index is out of range
            ValueError: a layer is named twice

        >>> LocasConfig(layers=[-1, 0]).resolve_layers(24)
        (0, 23)
        """
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
        """The fields as plain values, ready for JSON.

        Returns:
            A dict; LocasConfig(**it) equals this config.

        >>> LocasConfig(rank=16).to_dict()["rank"]
        16
        """
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
