"""What a memory says of itself."""

import torch
from torch import Tensor, nn

from locas_ext.config import LocasConfig
from locas_ext.patching.attachment import Attachment
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.stream import TextRecord

from .status import LayerStatus, layer_status


class MemoryFacts:
    """The part of `Memory` that changes nothing."""

    def __init__(self, attachment: Attachment):
        self._attachment = attachment

    @property
    def config(self) -> LocasConfig:
        """The settings that the memory was attached with."""
        return self._attachment.config

    @property
    def model(self) -> nn.Module:
        """The host."""
        return self._attachment.host.model

    @property
    def state(self) -> MemoryState:
        """All state: slots, gradient, optimizer states (locas_ext/state/memory_state.py)."""
        return self._attachment.state

    @property
    def slots(self) -> Tensor:
        """[L, 3, r, d] float32: gate, key and value rows per layer; Locas-MLP: [L, 2, capacity, d], key and value rows.

        It is the memory itself, not a copy, and may be written. Raises RuntimeError where the host lies on several devices.
        Where transformers has split the host among n processes (tp_plan), it is this process's part, r / n slots: those from
        r / n * its rank on. `gather_slots` returns all of them.
        """
        if len(self.state.arenas) > 1:
            raise RuntimeError(
                f"the slots lie on {len(self.state.arenas)} devices, so they are not one tensor; use memory.gather_slots()"
            )
        return self.state.whole("slots")

    def gather_slots(self) -> Tensor:
        """A copy of all slots, whether the host lies on one device or on several, or is split among processes.

        On a split host, all processes must call it.

        Returns:
            As `slots`, on the first layer's device, with all r slots.

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> list(memory.gather_slots().shape)
        [2, 3, 4, 16]
        """
        slots = torch.stack(self.state.in_layer_order(lambda arena: arena.slots.to(self.state.arenas[0].slots.device)))
        return slots if self.state.ranks is None else self.state.ranks.gathered(slots, 2)

    @property
    def num_parameters(self) -> int:
        """int: the values in the used slots, or in `rank` slots if none is used yet."""
        return self.state.shape.numel() * self.state.processes

    @property
    def scale(self) -> Tensor:
        """[L] float32: tau of each layer."""
        return self.state.whole("scale")

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the decoder layers that have a memory, ascending."""
        return self.state.layers

    @property
    def version(self) -> int:
        """int: the number of updates so far; 0 after attach, initialize and reset."""
        self.state.sync()
        return self.state.version

    @property
    def tokens_seen(self) -> int:
        """int: how far into its text the latest memorize() run has read."""
        return self._attachment.stream.position if self._attachment.stream else 0

    @property
    def texts(self) -> tuple[TextRecord, ...]:
        """Every text the memory has learned from, oldest first; a run that is resumed or fed extends its text's record."""
        return tuple(self._attachment.texts)

    def parameters(self) -> list[nn.Parameter]:
        """The slots as parameters, for a training loop of your own (see `locas.SlotAdamW`).

        On a split host, they are the slots of this process.

        Returns:
            L parameters [3, r, d] (Locas-MLP: [2, capacity, d]), views of `slots`.

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> [list(parameter.shape) for parameter in memory.parameters()]
        [[3, 4, 16], [3, 4, 16]]
        """
        return self.state.parameters

    def status(self) -> list[LayerStatus]:
        """How each layer's memory is computed, and how full it is.

        Returns:
            One LayerStatus per layer with a memory, in the order of `layers`.

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> [(layer.layer, layer.path, layer.slots_used) for layer in memory.status()]
        [(0, 'whole', 0), (1, 'whole', 0)]
        """
        return layer_status(self._attachment)

    def __repr__(self) -> str:
        state = self.state
        layers, _, rank, d = state.shape
        room = f" of {state.capacity}" if rank != state.capacity else ""
        parts = f" in {state.processes} parts" if state.processes > 1 else ""
        slots = f"{layers} layers x {rank * state.processes}{room} slots x {d}{parts}"
        return f"Memory({self.config.variant}, {slots}, version {self.version}, on {type(self.model).__name__})"
