"""A host FFN with its memory: what the two variants (patched_glu.py, patched_mlp.py) share, and the binding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from locas_ext.hosts.ffn import HostFFN
from locas_ext.hosts.registry import Host
from locas_ext.ops.activations import activation_index
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState

from .forward_patch import ForwardPatch
from .rehome import RehomedFFN

FFN = TypeVar("FFN", bound=HostFFN)


@dataclass(frozen=True)
class Binding:
    """What a patched FFN knows of the memory and the host it belongs to.

    relocate(arena, device, dtype): takes an arena to where its layers were moved
    """

    state: MemoryState
    backend: str
    host: Host
    relocate: Callable[[SlotArena, torch.device, torch.dtype], None]


class PatchedFFN(ABC, Generic[FFN]):
    """What the variants share: where the memory is, how it is computed, and the binding."""

    def __init__(self, binding: Binding, ffn: FFN, arena: SlotArena, index: int):
        """index: the layer's place in its arena."""
        self.binding, self.ffn, self.arena, self.index = binding, ffn, arena, index
        self.state, self.backend = binding.state, binding.backend
        self.beside = "reference" if self.backend == "reference" else "auto"  # for a memory beside the host's FFN
        self.activation = ffn.activation
        self.activation_index = activation_index(ffn.activation)
        self.home: RehomedFFN | None = None  # with attach(rehome=True)
        self.observer: Callable[[Tensor], None] | None = None  # called with the FFN input [..., d] during initialization
        self.attached = False
        self.patches: list[ForwardPatch] = []

    # ---- binding ---------------------------------------------------------------------------------------------
    @abstractmethod
    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        """The modules to bind, each with the forward that stands in for its own."""

    def bind(self) -> None:
        self.patches = [ForwardPatch(module, forward) for module, forward in self.forwards()]
        self.attached = True

    def unbind(self) -> None:
        self.attached = False  # whoever wrapped our forward since and still holds it gets the original's result
        for patch in self.patches:
            patch.end()

    def original(self, *arguments: Tensor) -> Tensor:
        """The host's own forward of the first module bound."""
        return self.patches[0].original(*arguments)

    # ---- what the verbs ask ----------------------------------------------------------------------------------
    @abstractmethod
    def importance(self, x: Tensor) -> Tensor:
        """How strongly each host neuron fires on x [T, d]: [m] float32 (`ops.neuron_importance`)."""

    @abstractmethod
    def host_rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """The host's rows [m, d] that a slot's can be copies of, in the order of the planes."""

    @abstractmethod
    def path(self) -> tuple[str, str]:
        """("whole", why) where host and memory run as one op, ("sideway", why) where the memory is added beside the host."""

    @abstractmethod
    def backend_name(self) -> str:
        """The backend, "auto" resolved for where the memory lies."""

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        """Whether so many tokens go through the fused CUDA kernels (fused.py)."""
        return False
