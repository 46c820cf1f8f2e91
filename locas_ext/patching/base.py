"""A host FFN with its memory: what the two variants (patched_glu.py, patched_mlp.py) share, and the binding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .activations import activation_index
from .arena import SlotArena
from .host_ffn import HostFFN
from .rehome import RehomedFFN

if TYPE_CHECKING:
    from .patch import Attachment


class Stand:
    """A module whose forward another function stands in for."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward
        # accelerate keeps the real forward in _old_forward and calls it from its hook: bind beneath it.
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.replaced = module.__dict__.get(name)
        self.original = getattr(module, name)
        setattr(module, name, forward)

    def end(self) -> None:
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) != self.forward:  # equal, not identical: deepcopy makes a second method object
                continue
            if self.replaced is None:
                del attributes[name]
            else:
                attributes[name] = self.replaced


class PatchedFFN(ABC):
    """What the variants share: where the memory is, how it is computed, and the binding."""

    def __init__(self, attachment: "Attachment", ffn: HostFFN, arena: SlotArena, index: int):
        """index: the layer's place in its arena."""
        self.attachment, self.ffn, self.arena, self.index = attachment, ffn, arena, index
        self.state, self.backend = attachment.state, attachment.backend
        self.beside = "reference" if self.backend == "reference" else "auto"  # for a memory beside the host's FFN
        self.activation = ffn.activation
        self.activation_index = activation_index(ffn.activation)
        self.home: RehomedFFN | None = None  # with attach(rehome=True)
        self.observer = None  # called with the FFN input [..., d] during initialization
        self.attached = False
        self.stands: list[Stand] = []

    # ---- binding ---------------------------------------------------------------------------------------------
    @abstractmethod
    def forwards(self) -> list[tuple[nn.Module, Callable]]:
        """The modules to bind, each with the forward that stands in for its own."""

    def bind(self) -> None:
        self.stands = [Stand(module, forward) for module, forward in self.forwards()]
        self.attached = True

    def unbind(self) -> None:
        self.attached = False  # whoever wrapped our forward since and still holds it gets the original's result
        for stand in self.stands:
            stand.end()

    def original(self, *arguments: Tensor) -> Tensor:
        """The host's own forward of the first module bound."""
        return self.stands[0].original(*arguments)

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
