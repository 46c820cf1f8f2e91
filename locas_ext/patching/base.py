"""A host FFN with its memory: what the two variants (glu.py, mlp.py) share, the route of a call, and the binding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from locas_ext.hosts.ffn import HostFFN, Place, Rows, entries
from locas_ext.hosts.projections import NO_WEIGHTS, projection_device
from locas_ext.hosts.registry import Host
from locas_ext.hosts.seen import Entry
from locas_ext.ops.activations import activation_index
from locas_ext.ops.routes import by_address
from locas_ext.ops.types import SlotFactors
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import Scope, scopes

from .forward_patch import ForwardPatch, forward_name, the_input
from .rehome import RehomedFFN

FFN = TypeVar("FFN", bound=HostFFN)

# The FFN whose first projection ran last in this context, and its input, until its last projection runs.
_entered: ContextVar[tuple[Any, Tensor] | None] = ContextVar("locas_entered", default=None)


class Route(Enum):
    """What computes a call of a patched FFN."""

    HOST = auto()  # the host's own forward alone, bit for bit: the memory adds exactly 0 or is off
    BESIDE = auto()  # the host's own forward, and the memory's output added to it
    WHOLE = auto()  # host and memory as one op
    REHOMED = auto()  # the same on weights that lie in the memory's buffers
    PUBLIC_BESIDE = auto()  # as BESIDE through the public ops: reference backend, float64, autocast
    PUBLIC_WHOLE = auto()  # as WHOLE through the reference
    TRACED = auto()  # the public ops, which are all that a tracer, an interception or a transform can see


@dataclass(frozen=True)
class Binding:
    """What a patched FFN knows of the memory and the host it belongs to."""

    state: MemoryState
    backend: str
    host: Host
    number: int  # by which compiled graphs find the state

    def relocate(self, arena: SlotArena, device: torch.device, dtype: torch.dtype) -> None:
        """Takes an arena to where its layers were moved. ValueError if they no longer are together."""
        ffns = [self.host.ffns[self.state.layers[position]] for position in arena.positions]
        projections = [projection for ffn in ffns for projection in ffn.projections()]
        devices = {place for projection in projections if (place := projection_device(projection))}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise ValueError(
                f"the host was spread over {names} after the memory was attached; "
                "save the memory, detach it, and load it into the spread host"
            )
        with self.state.exclusion.lock:
            if arena.compute.device != device or arena.compute.dtype != dtype:
                arena.move_to(device, dtype)


class RunningForward(NamedTuple):
    """A forward of the decoder in this context; decoder_watch.py begins and ends it."""

    state: MemoryState
    epoch: int  # of the memory when it began
    fresh_cache: bool
    looking: Any  # the scope to leave at its end, or None
    outer: "RunningForward | None"


running_forward: ContextVar[RunningForward | None] = ContextVar("locas_running_forward", default=None)


class PatchedFFN(ABC, Generic[FFN]):
    """What the variants share: where the memory is, how it is computed, and the binding.

    Where the module does more than the FFN, both of its outer projections are bound: the first one's forward keeps its input,
    the last one's adds the memory, so that what the host does to the sum, such as dropout, is done to the memory too.
    """

    traced_input: Tensor | None = None  # while a graph is traced, which knows no contexts

    def __init__(self, binding: Binding, ffn: FFN, arena: SlotArena, index: int):
        """index: the layer's place in its arena."""
        self.binding, self.ffn, self.arena, self.index = binding, ffn, arena, index
        self.state, self.backend = binding.state, binding.backend
        self.activation = ffn.activation
        self.activation_index = activation_index(ffn.activation)
        self.rehomed: RehomedFFN | None = None  # with attach(rehome=True)
        self.attached = False
        self.patches: list[ForwardPatch] = []
        self.formula: str | None = None  # what HostFFN.formula_obstacle said last, for compiled graphs
        self._resolved: tuple[Any, Route] = ((), Route.HOST)  # what the latest route depends on, and the route

    # ---- binding ---------------------------------------------------------------------------------------------
    def modules(self) -> list[nn.Module]:
        """The modules to bind, as the host has them now."""
        if self.ffn.place is Place.MODULE:
            return [self.ffn.module]
        projections = self.ffn.projections()
        return [projections[0], projections[-1]]

    def places(self) -> list[Entry]:
        """Where the host keeps those of them that lie inside its FFN."""
        if self.ffn.place is Place.MODULE:
            return []
        return [place for name in (self.ffn.names[0], self.ffn.names[-1]) for place in entries(self.ffn.module, name)]

    def forwards(self) -> list[Callable]:
        """The forwards that stand in for theirs."""
        return [self.forward] if self.ffn.place is Place.MODULE else [self.enter, self.leave]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The forward of an FFN's module: what it gives out, with the memory's added to the first tensor."""
        x, y = the_input(arguments, named), self.original(*arguments, **named)
        if isinstance(y, Tensor):
            return self.with_memory(x, y)
        first = self.with_memory(x, y[0])
        return type(y)((first, *y[1:]))

    def enter(self, *arguments: Any, **named: Any) -> Tensor:
        """The first projection's forward, where the memory stands between two of them."""
        if torch.compiler.is_compiling():
            self.traced_input = the_input(arguments, named)
        else:
            _entered.set((self, the_input(arguments, named)))
        return self.patches[0].original(*arguments, **named)

    def leave(self, *arguments: Any, **named: Any) -> Tensor:
        """The last projection's forward."""
        if torch.compiler.is_compiling():
            x, self.traced_input = self.traced_input, None
        else:
            entered = _entered.get()
            x = entered[1] if entered is not None and entered[0] is self else None
            _entered.set(None)
        y = self.patches[1].original(*arguments, **named)
        return y if x is None else self.with_memory(x, y)  # None: a call of this projection alone, which is no FFN

    def observed_scope(self, x: Tensor) -> Scope | None:
        """What holds for this memory in this context, whose observer is shown the FFN's input."""
        scope = scopes.get().get(self.state)
        if scope is not None and scope.observer is not None:
            scope.observer(self, x)
        return scope

    @abstractmethod
    def with_memory(self, x: Tensor, y: Tensor) -> Tensor:
        """The FFN's output y [..., d] for its input x [..., d], with the memory's added."""

    def is_taken(self) -> bool:
        """Whether the memory of another model that has these modules too stands here."""
        forwards = [module.__dict__.get(forward_name(module)) for module in self.modules()]
        owners = [getattr(forward, "__self__", None) for forward in forwards]
        return any(isinstance(owner, PatchedFFN) and owner.attached for owner in owners)

    def bind(self) -> None:
        self.patches = [ForwardPatch(*pair) for pair in zip(self.modules(), self.forwards(), strict=True)]
        self.formula = self.ffn.formula_obstacle()
        self.attached = True

    def unbind(self) -> None:
        self.attached = False  # whoever wrapped our forward since and still holds it gets the original's result
        for patch in self.patches:
            patch.end(self)
        self.ffn.forget()

    def follow(self, module: nn.Module) -> bool:
        """Binds anew where somebody has put other modules in the place of those bound. Returns whether somebody has.

        module: the FFN as it is now
        """
        if module is self.ffn.module and [patch.module for patch in self.patches] == self.modules():
            return False
        with self.state.exclusion.lock:
            for patch in self.patches:
                patch.end(self)
            self.ffn.replace_module(module)
            self.bind()
        return True

    def original(self, *arguments: Any, **named: Any) -> Tensor:
        """The host's own forward of the first module bound."""
        return self.patches[0].original(*arguments, **named)

    # ---- the route -------------------------------------------------------------------------------------------
    def _obstacle_now(self) -> str | None:
        """obstacle() for a call."""
        return self.ffn.seen_obstacle()

    def route(self, x: Tensor, scope: Scope | None) -> Route:
        """What computes this call: found once, and again only where what it depends on has changed."""
        state, arena = self.state, self.arena
        if not self.attached or (scope is not None and scope.disabled):
            return Route.HOST
        if state.exclusion.holder is not None:
            state.exclusion.check_reader()
        if not arena.is_current(self.index) or (state.watched and not (scope is not None and scope.looked)):
            state.sync()
        # A memory that has learned nothing adds exactly 0: then the host computes alone, bit for bit.
        if not (state.learned or self.learns()):
            return Route.HOST
        if not by_address(x):
            if x.is_meta:
                raise ValueError(f"{NO_WEIGHTS}, or read shapes inside memory.disabled()")
            return Route.TRACED
        autocast = torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")  # by_address takes no others
        depends_on = (state.generation, arena.placement, self._obstacle_now(), x.dtype, x.device, autocast)
        resolved = self._resolved  # one tuple: other threads replace it whole
        if resolved[0] != depends_on:
            resolved = self._resolved = self._resolve(x, autocast)
        return resolved[1]

    def _resolve(self, x: Tensor, autocast: bool) -> tuple[Any, Route]:
        obstacle, self.formula = self.obstacle(), self.ffn.formula_obstacle()
        beside = not self.state.learned or obstacle is not None
        if autocast or self.backend == "reference" or x.dtype == torch.float64:
            route = Route.PUBLIC_BESIDE if beside or autocast else Route.PUBLIC_WHOLE
        else:
            self.binding.relocate(self.arena, x.device, x.dtype)
            route = Route.BESIDE if beside else Route.WHOLE if self.rehomed is None else Route.REHOMED
        depends_on = (self.state.generation, self.arena.placement, obstacle, x.dtype, x.device, autocast)
        return depends_on, route

    def traced_slots(self) -> Tensor:
        """The slots for the public ops. torch.jit.trace takes no constants that require a gradient."""
        return self.arena.slots[self.index] if torch.jit.is_tracing() else self.arena.parameters[self.index]

    def beside_backend(self, x: Tensor) -> str:
        """The backend of the public ops for a memory beside the host's FFN: a host may be moved to float64 after attach."""
        return "reference" if self.backend == "reference" or x.dtype == torch.float64 else "auto"

    def is_host_alone(self) -> bool:
        """Whether a compiled graph may leave the memory out."""
        state = self.state
        return not self.attached or not (state.learned or state.watched or (torch.is_grad_enabled() and state.initialized))

    def entered(self, x: Tensor) -> Tensor:
        """The input as the memory of this process takes it in, where the memory is split among several."""
        ranks = self.ffn.ranks
        return x if ranks is None else ranks.enter(x)

    def total(self, y: Tensor) -> Tensor:
        """The sum of what all processes have computed, in its place."""
        ranks = self.ffn.ranks
        return y if ranks is None else ranks.total(y)

    def learns(self) -> bool:
        """Whether the slots' gradient may be asked for here."""
        return torch.is_grad_enabled() and self.state.initialized and self.arena.parameters[self.index].requires_grad

    def sink(self, scope: Scope | None) -> Tensor | SlotFactors | None:
        """Where a backward adds the slots' gradient; None: autograd gets it."""
        return self.arena.sink(self.index) if scope is not None and scope.accumulates else None

    # ---- what the verbs ask ----------------------------------------------------------------------------------
    def obstacle(self) -> str | None:
        """Why host and memory cannot be one op, or None."""
        return self.ffn.formula_obstacle() or self.ffn.projection_obstacle()

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        """How strongly each host neuron fires on x [T, d]: [m] float32 (`ops.neuron_importance`)."""
        result = self.ffn.importance(x, self.original)
        _entered.set(None)  # what the first projection's forward kept just now
        return result

    @abstractmethod
    def host_rows(self, like: Tensor) -> tuple[Rows, ...]:
        """The host's rows [m, d] that a slot's can be copies of, in the order of the planes."""

    @abstractmethod
    def path(self) -> tuple[str, str]:
        """("whole", why) where host and memory run as one op, ("sideway", why) where the memory is added beside the host."""

    @abstractmethod
    def backend_name(self) -> str:
        """The backend, "auto" resolved for where the memory lies."""

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        """Whether so many tokens go through the fused CUDA kernels (ops/backends/cuda.py)."""
        return False
