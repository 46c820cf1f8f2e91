"""Ablations: lists of arms, each a preset of `locas perplexity --ablate`.

What a preset does not vary is as the command line says.
"""

from typing import Any

from locas_ext.config import INITS
from locas_ext.evaluation.methods.arm import Arm, make_arm

PAPER_RANKS = (16, 32, 64, 128)
LOCAS_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TEMP_LORA_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
# The paper found that normalized activations converge at this rate only.
ACTIVATION_RATE = 1e-6


def _init(base: dict[str, dict]) -> list[Arm]:
    """No memory, then every initialization."""
    inits = [make_arm(base, "locas", init=init) for init in reversed(INITS)]
    slow = make_arm(base, "locas", init="activation", learning_rate=ACTIVATION_RATE)
    return [make_arm(base, "truncation"), *inits, slow]


def _rank(base: dict[str, dict]) -> list[Arm]:
    """The paper's widths, for both kinds of memory."""
    arms = [make_arm(base, method, rank=rank) for method in ("locas", "temp-lora") for rank in PAPER_RANKS]
    return [make_arm(base, "truncation"), *arms]


def _learning_rate(base: dict[str, dict]) -> list[Arm]:
    """Both kinds of memory from a timid to a reckless rate."""
    locas = [make_arm(base, "locas", learning_rate=rate) for rate in LOCAS_RATES]
    temp_lora = [make_arm(base, "temp-lora", learning_rate=rate) for rate in TEMP_LORA_RATES]
    return [make_arm(base, "truncation"), *locas, *temp_lora]


def _scale(base: dict[str, dict]) -> list[Arm]:
    """The frontier of learning against forgetting: what a memory gains on its book, and what it costs elsewhere.

    Locas from the paper's scale to the host's, which is 64 times as large at rank 64, at rates that fit; then epochs,
    rank and clip around what learns most without forgetting. Temp-LoRA over learning rate and rank.
    """
    points: list[dict[str, Any]] = [
        *(dict(scale="paper", learning_rate=rate) for rate in (4e-3, 1e-2)),
        dict(scale="2x", learning_rate=4e-3),
        *(dict(scale="4x", learning_rate=rate) for rate in (4e-3, 1e-2)),
        dict(scale="4x", learning_rate=4e-3, epochs=2),
        dict(scale="8x", learning_rate=4e-3),
        *(dict(scale="16x", learning_rate=rate) for rate in (4e-3, 1e-2)),
        *(dict(scale="16x", learning_rate=rate, epochs=2) for rate in (2e-3, 4e-3)),
        *(dict(scale="16x", learning_rate=1e-2, rank=rank) for rank in (16, 128)),
        dict(scale="16x", learning_rate=1e-2, clip=False),
        dict(scale="32x", learning_rate=4e-3),
        *(dict(scale="32x", learning_rate=rate, epochs=2) for rate in (1e-3, 1.5e-3, 2e-3)),
        dict(scale="32x", learning_rate=1e-3, epochs=3),
        *(dict(scale="host", learning_rate=rate) for rate in (1e-3, 1.5e-3, 2e-3, 4e-3)),
        *(dict(scale="host", learning_rate=rate, epochs=2) for rate in (1e-3, 1.5e-3, 2e-3)),
        dict(scale="host", learning_rate=2e-3, rank=128),
    ]
    locas = [make_arm(base, "locas", **point) for point in points]
    temp_lora = [make_arm(base, "temp-lora", learning_rate=rate) for rate in TEMP_LORA_RATES]
    temp_lora += [make_arm(base, "temp-lora", rank=rank, learning_rate=5e-4) for rank in (4, 16, 128)]
    temp_lora += [make_arm(base, "temp-lora", epochs=1, learning_rate=rate) for rate in (5e-4, 1e-3)]
    return [make_arm(base, "truncation"), *locas, *temp_lora]


def _context(base: dict[str, dict]) -> list[Arm]:
    """Windows read anew and contexts kept, without a memory and with one."""
    refreshed = [make_arm(base, "locas", context="keep", refresh_every=every) for every in (4, 16)]
    anew, kept = make_arm(base, "locas", context="recompute"), make_arm(base, "locas", context="keep")
    return [make_arm(base, "truncation"), make_arm(base, "sliding"), anew, kept, *refreshed]


PRESETS = {"context": _context, "init": _init, "rank": _rank, "learning-rate": _learning_rate, "scale": _scale}
NEED_HELD_OUT = ("scale",)  # presets that are about forgetting
