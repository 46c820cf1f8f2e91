"""The state of a memory: what its arenas share.

Nearly always there is one. A host spread over several devices (accelerate's device_map) has one on each, so that a
layer's slots lie where its FFN is computed; files, snapshots and `Memory.slots` are in layer order all the same.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from locas_ext.ops.ranks import Ranks
from locas_ext.ops.types import SlotFactors
from locas_ext.signals import uninterrupted

from .arena import ON_DEMAND, SlotArena
from .exclusion import Exclusion
from .planes import PLANES
from .scope import scope_of, scoped
from .slot_rows import drop_oldest, of_first, resized

_Item = TypeVar("_Item")
_generations = itertools.count(1)  # one number for every state that any memory has been in


def grouped_by_device(devices: Sequence[torch.device]) -> list[list[int]]:
    """The positions of the layers on each device, devices in the order of their first layer."""
    return [[p for p, other in enumerate(devices) if other == device] for device in dict.fromkeys(devices)]


class MemoryState:
    """The state of a memory.

    Attributes:
        layers: the decoder layers that have slots, ascending
        arenas: the slots themselves; each layer is in one of them
        planes: 3 rows per slot (gate, key, value), or for Locas-MLP 2 (key, value)
        rank: the slots per layer at the start, those of this process; Locas-MLP can grow
        ranks: the processes that the slots are split among, in equal parts; None: all are here
        version: the number of updates so far; at 0 the memory is a no-op
        exclusion: who may change it
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        planes: int,
        rank: int,
        hidden_size: int,
        scale: list[float],
        devices: list[torch.device],
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ):
        """layers, scale, devices: one entry per layer; dtype: what the layers compute in; rank: of all processes."""
        self.ranks, self.processes = ranks, 1 if ranks is None else ranks.size
        rank //= self.processes
        self.layers, self.planes, self.rank, self.hidden_size = layers, planes, rank, hidden_size
        self.arenas = [
            SlotArena(places, planes, rank, hidden_size, [scale[p] for p in places], devices[places[0]], dtype, self.processes)
            for places in grouped_by_device(devices)
        ]
        self.exclusion = Exclusion()
        self.watched = False  # whether tensors of the slots were handed out, so that anybody may write them
        self.version = 0

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, value: int) -> None:
        self._version = value
        self.generation = next(_generations)
        self.learned = value > 0  # what compiled graphs guard on: a counter would recompile them at every update

    @property
    def output_state(self) -> int:
        """A number that changes whenever the model's outputs may have; 0 while the host computes alone. `sync` comes before."""
        return self.generation if self.learned and not self.disabled else 0

    def watch(self) -> None:
        """Called before tensors of the slots are handed out: from now on changes are found by content."""
        for arena in self.arenas:
            arena.watch()
        self.watched = True

    def sync(self) -> None:
        """Takes over a change of the slots made from outside, which counts as one update."""
        by_content = not scope_of(self).looked
        with self.exclusion.lock:
            if self.exclusion.elsewhere:
                return  # what a verb in another thread is writing is its own affair
            if any([arena.refresh(by_content) for arena in self.arenas]):
                if self.used == 0 or any([arena.slots[:, :, arena.used :].any() for arena in self.arenas]):
                    self.set_used(self.capacity)
                self.version += 1

    # ---- who uses it, and where ------------------------------------------------------------------------------
    @property
    def disabled(self) -> bool:
        """Whether the memory is off in this context."""
        return scope_of(self).disabled > 0

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside this block, in this context only, the model is the host alone."""
        with self.exclusion.counted_off(), scoped(self, disabled=1):
            yield

    @contextmanager
    def exclusive(self, verb: str) -> Iterator[None]:
        """The right to change the memory. RuntimeError if another thread has it; others' forwards raise one meanwhile."""
        with self.exclusion.held(verb) as outermost:
            if outermost:
                for arena in self.arenas:
                    arena.unbind_grads()
            try:
                yield
            finally:
                if outermost:
                    for arena in self.arenas:
                        arena.rebind_grads()

    # ---- how many slots --------------------------------------------------------------------------------------
    @property
    def capacity(self) -> int:
        """How many slots per layer there is room for."""
        return self.arenas[0].capacity

    @property
    def used(self) -> int:
        """How many of them, the first ones, hold something; 0 before anything is initialized or written."""
        return self.arenas[0].used

    @property
    def initialized(self) -> bool:
        return self.used > 0

    @property
    def grows(self) -> bool:
        """Whether the number of slots may change, as that of Locas-MLP may."""
        return self.planes == PLANES["mlp"]

    def set_used(self, used: int) -> None:
        for arena in self.arenas:
            arena.set_used(used)

    def resize(self, capacity: int) -> None:
        """Makes room for `capacity` slots per layer; what is in the first ones stays."""
        larger = [resized(arena, capacity) for arena in self.arenas]  # all or none find memory
        for arena, tensors in zip(self.arenas, larger, strict=True):
            arena.replace_tensors(tensors, arena.compute.dtype)

    def append(self, slots: list[Tensor]) -> None:
        """Writes new slots, [l, planes, n, d] per arena, behind those used. One update."""
        used = self.used + slots[0].shape[2]
        for arena, rows in zip(self.arenas, slots, strict=True):
            arena.write_rows(rows, self.used)
        self.set_used(used)
        self.finish_update()

    def drop_oldest(self, count: int) -> None:
        """Takes the first `count` slots out; the others move up, and zeros take their place."""
        for arena in self.arenas:
            drop_oldest(arena, count)
        self.set_used(self.used - count)

    # ---- all layers, in their order --------------------------------------------------------------------------
    def in_layer_order(self, of_arena: Callable[[SlotArena], Iterable[_Item]]) -> list[_Item]:
        """`of_arena` gives one item for each of an arena's layers; -> those of all arenas, [L]."""
        items = {p: item for arena in self.arenas for p, item in zip(arena.positions, of_arena(arena), strict=True)}
        return [items[position] for position in range(len(self.layers))]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """L parameters [planes, capacity, d], views of the arenas' slots, for whoever wants to write them."""
        self.watch()
        return self.in_layer_order(lambda arena: arena.parameters)

    @property
    def scales(self) -> list[float]:
        return self.in_layer_order(lambda arena: arena.scales)

    @property
    def shape(self) -> torch.Size:
        """[L, planes, r, d] of what tensors() gives: r is the slots used, or the rank while none is."""
        return torch.Size((len(self.layers), self.planes, self.used or self.rank, self.hidden_size))

    @overload
    def whole(self, name: Literal["slots", "grad", "scale", "step"]) -> Tensor: ...
    @overload
    def whole(self, name: str) -> Tensor | None: ...
    def whole(self, name: str) -> Tensor | None:
        """`slots`, `grad`, `scale`, `step` or an optimizer state (None if it is not in use) of all layers.

        It is the arena's own tensor where there is one arena; of several, a copy on the first one's device.
        """
        if name == "slots":
            self.watch()
        return self._whole(name)

    def _whole(self, name: str) -> Tensor | None:
        first = getattr(self.arenas[0], name)
        if len(self.arenas) == 1 or name == "step" or first is None:
            return first
        return torch.stack([layer.to(first.device) for layer in self.in_layer_order(lambda arena: getattr(arena, name))])

    def _put(self, name: str, tensor: Tensor) -> None:
        """The reverse of `whole`, for the first slots; an optimizer state comes into use by it."""
        for arena in self.arenas:
            target = arena.on_demand(name) if name in ON_DEMAND else getattr(arena, name)
            tensor_here = tensor if len(self.arenas) == 1 or name == "step" else tensor[arena.positions]
            target[tuple(map(slice, tensor_here.shape))].copy_(tensor_here)

    def tensors(self, optimizer: bool = True) -> dict[str, Tensor]:
        """slots, scale, lengths, with `optimizer` also step and the states, as far as there are, each as `whole` gives it."""
        names = ("slots", "scale", "step", *ON_DEMAND) if optimizer else ("slots", "scale", "lengths")
        tensors = {name: tensor for name in names if (tensor := self._whole(name)) is not None}
        return {name: of_first(tensor, self.shape[2] * self.processes) for name, tensor in tensors.items()}

    def clip_at(self, lengths: list[list[float]]) -> None:
        """Clips rows at lengths of their own, [L][planes], instead of 1."""
        for arena in self.arenas:
            arena.longest = arena.slots.new_tensor([lengths[position] for position in arena.positions])

    # ---- life ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def set_slots(self, slots: Tensor, version: int, used: int | None = None) -> None:
        """Puts a whole memory [L, planes, r, d] in place, of which `used` slots hold something (None: all).

        The capacity becomes r, optimizer states start anew.
        """
        with uninterrupted(), self.exclusive("putting slots in place"):
            if slots.shape[2] != self.capacity:
                self.resize(slots.shape[2])
            self._put("slots", slots)
            for arena in self.arenas:
                arena.round_slots()
                arena.forget_optimizer()
                arena.lengths = None
            self.set_used(slots.shape[2] if used is None else used)
            self.version = version

    def reset(self) -> None:
        with self.exclusive("reset"):
            shape = len(self.layers), self.planes, self.rank, self.hidden_size
            self.set_slots(self.arenas[0].slots.new_zeros(shape), version=0, used=0)

    def load(self, tensors: dict[str, Tensor], version: int, used: int) -> None:
        """Takes over what tensors() returned; an optimizer state that is missing starts anew."""
        with self.exclusive("load"), torch.no_grad():
            self.set_slots(tensors["slots"], version, used)
            self.load_optimizer({name: tensor for name, tensor in tensors.items() if name not in ("slots", "scale")})
            for arena in self.arenas:
                arena.use_scale(tensors["scale"][arena.positions])

    @torch.no_grad()
    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Takes over optimizer states [L, planes, r, d] and `step` []."""
        for name in tensors:
            self._put(name, tensors[name])

    # ---- learning --------------------------------------------------------------------------------------------
    def zero_grad(self) -> None:
        for arena in self.arenas:
            arena.zero_grad()

    @contextmanager
    def accumulating(self, as_factors: bool = False) -> Iterator[None]:
        """Inside, forwards make backwards that add the slots' gradient into the arenas instead of handing it to autograd.

        as_factors: whether they keep it as factors, which the update forms the gradient from. What others may have
        changed is not looked for: `sync` comes before.
        """
        if as_factors:
            for arena in self.arenas:
                arena.factors = [SlotFactors() for _ in arena.positions]
        with scoped(self, accumulates=True, looked=True):
            yield

    def backward(self, loss: Tensor) -> None:
        """Adds the slots' gradient of a loss into the arenas. Nothing else gets a gradient."""
        places = self.in_layer_order(lambda arena: zip(arena.parameters, arena.grads, strict=True))
        places = [(parameter, grad) for parameter, grad in places if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, [parameter for parameter, _ in places], allow_unused=True)
        for (_, grad), gradient in zip(places, gradients, strict=True):
            if gradient is not None:  # where it is, the forward went without a sink
                grad.add_(gradient)

    def finish_update(self) -> None:
        """Called when the update kernels have written every arena, of a memory that nobody has initialized too."""
        if self.used == 0:
            self.set_used(self.capacity)
        for arena in self.arenas:
            arena.finish_update()
        self.version += 1
