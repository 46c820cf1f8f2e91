"""A memory's whole state in memory: taken, put back, forked."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from locas_ext.hosts.fingerprint import differences, fingerprint
from locas_ext.hosts.registry import Host
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.stream import Stream, TextRecord


@dataclass(frozen=True)
class Snapshot:
    """What `Memory.snapshot` returns: independent copies, to be given to `Memory.restore`.

    Attributes:
        layers: the decoder layers that have slots
        rank: the slots per layer that the memory began with
        host: the host's fingerprint
        tensors: "slots", "scale" and "step", and the optimizer states there are, by name
        memory_version: the memory's version
        slots_used: the slots per layer that hold something
        stream: where the memory stands in its text; None if it has read none
        texts: a TextRecord for each text learned

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> snapshot = locas.attach(tiny_host(), locas.LocasConfig(rank=4)).snapshot()
    >>> sorted(snapshot.tensors), snapshot.memory_version
    (['scale', 'slots', 'step'], 0)
    """

    layers: tuple[int, ...]
    rank: int
    host: dict
    tensors: dict[str, Tensor]
    memory_version: int
    slots_used: int
    stream: Stream | None
    texts: list[TextRecord] = field(default_factory=list)


def take(state: MemoryState, host: Host, stream: Stream | None, texts: list[TextRecord]) -> Snapshot:
    """See `Memory.snapshot`."""
    state.sync()
    return Snapshot(
        layers=state.layers,
        rank=state.rank,
        host=fingerprint(host),
        tensors={name: tensor.clone() for name, tensor in state.tensors().items()},
        memory_version=state.version,
        slots_used=state.used,
        stream=copy.deepcopy(stream),
        texts=list(texts),
    )


def restore(state: MemoryState, host: Host, snapshot: Snapshot) -> tuple[Stream | None, list[TextRecord]]:
    """See `Memory.restore`. Returns where the memory then stands in its text, and the texts that it has learned."""
    if not isinstance(snapshot, Snapshot):
        raise TypeError(f"snapshot is {type(snapshot).__name__}; expected what Memory.snapshot() returned")
    if different := differences(snapshot.host, host):
        raise ValueError(f"the snapshot is of another host: {', '.join(different)}")
    shape = snapshot.tensors["slots"].shape
    rows = shape[2] if state.grows else state.rank
    fits = shape == (*state.shape[:2], rows, state.hidden_size)
    if (snapshot.layers, snapshot.rank) != (state.layers, state.rank) or not fits:
        raise ValueError(
            f"the snapshot has slots {list(shape)} of rank {snapshot.rank} in layers {list(snapshot.layers)}; "
            f"attached are {list(state.shape)} of rank {state.rank} in layers {list(state.layers)}"
        )
    state.load(snapshot.tensors, snapshot.memory_version, snapshot.slots_used)
    return copy.deepcopy(snapshot.stream), list(snapshot.texts)


def copy_sharing_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A second model on the same weights (shared, not copied), with a memory of its own if there is one."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
