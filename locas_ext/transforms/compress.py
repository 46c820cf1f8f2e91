"""Compressing a Locas-MLP memory: each layer's many slots as few that agree with them (docs/method.md, "NL-SVD")."""

import warnings
from dataclasses import dataclass

import torch

from locas_ext.caller import caller_stacklevel
from locas_ext.checks import integer, number
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import KEY, VALUE

from .nl_svd import nl_svd


@dataclass(frozen=True)
class CompressReport:
    """What a compression kept. The lists have one entry per layer.

    Attributes:
        slots_before, slots_used: the slots per layer before and after
        kept_energy: the share of the slots' energy (docs/method.md) that the probes hold, 0 to 1
        error_bound: the most that the memory's output can differ for an input x, per unit of x outside the probes' span,
            tau included
        dtype: the dtype that it was computed in

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(gated=False), locas.LocasConfig("mlp", rank=4))
    >>> _ = memory.write(list(range(3, 35)))
    >>> report = memory.compress(8)
    >>> report.slots_before, report.slots_used, len(report.kept_energy)
    (31, 8, 2)
    """

    slots_before: int
    slots_used: int
    kept_energy: list[float]
    error_bound: list[float]
    dtype: str


def compress_slots(state: MemoryState, activation: str, rank: int, threshold: float = 0.0) -> CompressReport:
    """Puts at most `rank` slots per layer in the place of the used ones; the capacity stays. One update.

    ValueError, with the memory unchanged, for what nl_svd does not take.
    """
    before = state.used
    layers = state.in_layer_order(lambda arena: arena.slots[:, :, :before])
    compressed = [nl_svd(slots[KEY], slots[VALUE], rank, activation, threshold) for slots in layers]
    device = state.arenas[0].slots.device
    slots = torch.zeros(len(layers), state.planes, state.capacity, state.hidden_size, dtype=torch.float32, device=device)
    for layer, small in zip(slots, compressed, strict=True):
        layer[KEY, : len(small.key)], layer[VALUE, : len(small.key)] = small.key.to(device), small.value.to(device)
    used = max(1, *(len(small.key) for small in compressed))
    state.set_slots(slots, state.version + 1, used)
    energies = [(small.kept_energy, small.kept_energy + small.discarded_energy) for small in compressed]
    return CompressReport(
        slots_before=before,
        slots_used=used,
        kept_energy=[kept / whole if whole else 1.0 for kept, whole in energies],
        error_bound=[abs(scale) * small.error_bound for scale, small in zip(state.scales, compressed, strict=True)],
        dtype="float64",
    )


def compress(state: MemoryState, activation: str, rank: int, threshold: float) -> CompressReport:
    """See `Memory.compress`."""
    state.sync()
    if not state.grows:
        raise ValueError("compress: the variant is 'glu'; only a Locas-MLP memory (variant='mlp') can be compressed")
    if not state.used:
        raise ValueError("compress: the memory holds no slots yet")
    if not state.learned:
        raise ValueError("compress: the memory's values are all 0; it must have learned or written something first")
    most = min(state.used, state.hidden_size)
    rank = integer("rank", rank, 1, most, f"the {state.used} slots in use, and the hidden size {state.hidden_size}")
    threshold = number("threshold", threshold, 0)
    host_dtype = state.arenas[0].compute.dtype
    if host_dtype in (torch.float16, torch.bfloat16):
        warnings.warn(
            f"compress: computed in float64 from the float32 slots; the {host_dtype} host uses a rounded copy",
            stacklevel=caller_stacklevel(),
        )
    with state.exclusive("compress"):
        report = compress_slots(state, activation, rank, threshold)
        state.resize(report.slots_used)
    return report
