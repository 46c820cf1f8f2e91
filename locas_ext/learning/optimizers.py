"""The fused updates: one launch steps and clips the slots of all layers on a device."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from locas_ext.checks import number
from locas_ext.errors import LocasError
from locas_ext.ops.backends import slot_updates
from locas_ext.ops.types import SGD, AdamW
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState


def _learning_rate_tensor(learning_rate: float | torch.Tensor, arena: SlotArena) -> torch.Tensor:
    if isinstance(learning_rate, torch.Tensor):
        return learning_rate
    # float64, as a Python float is: the kernels read it on the device
    return torch.tensor(learning_rate, dtype=torch.float64, device=arena.slots.device)


def _kernel_copy(arena: SlotArena) -> torch.Tensor | None:
    """The compute copy if the kernels can write its dtype."""
    copy = arena.rounded_copy()
    return copy if copy is not None and copy.dtype != torch.float64 else None


def _finish(state: MemoryState) -> None:
    for arena in state.arenas:
        if arena.compute.dtype == torch.float64:
            arena.compute.copy_(arena.slots)
    state.finish_update()


def _allocate(state: MemoryState, *names: str) -> None:
    """Makes the optimizer states of every arena, so that no arena is updated if another's find no room."""
    for arena in state.arenas:
        for name in names:
            arena.state(name)


def _scale_gradient(arena: SlotArena, scale: float) -> None:
    if arena.factors is None and scale != 1.0:
        arena.grad *= scale


def _gradient(arena: SlotArena, part: slice, scale: float, from_grad: Callable, from_factors: Callable) -> tuple:
    """-> the update function for what the backward left, and its arguments for the gradient of some layers."""
    if arena.factors is not None:
        return from_factors, arena.factors[part], scale
    return from_grad, arena.grad[part]


def _of(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[part]


@torch.no_grad()
def adamw_step(
    state: MemoryState,
    learning_rate: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: bool = True,
    gradient_scale: float = 1.0,
    finite: torch.Tensor | None = None,
) -> None:
    """AdamW with bias correction on the arenas' gradient times gradient_scale, then the row clip.

    finite: [] int64, 1 or 0, on the arena's device; at 0 nothing happens. Whoever passes it calls state.finish_update()
    when the host knows that it was 1. A captured graph passes it, and the learning rate as a tensor.
    """
    _allocate(state, "exp_avg", "exp_avg_sq")
    for arena in state.arenas:
        arena.step += 1 if finite is None else finite
        _scale_gradient(arena, gradient_scale)
        rate, copy = _learning_rate_tensor(learning_rate, arena), _kernel_copy(arena)
        kernels = slot_updates.adamw_slots_, slot_updates.adamw_slots_from_factors_
        for part in arena.learning_parts():  # neither moments nor decay nor clip move the others
            update, *gradient = _gradient(arena, part, gradient_scale, *kernels)
            update(
                arena.slots[part],
                *gradient,
                arena.state("exp_avg")[part],
                arena.state("exp_avg_sq")[part],
                arena.step,
                rate,
                AdamW(*betas, eps, weight_decay, clip),
                _of(copy, part),
                finite,
            )
    if finite is None:
        _finish(state)


@torch.no_grad()
def sgd_step(
    state: MemoryState,
    learning_rate: float | torch.Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: bool = True,
    gradient_scale: float = 1.0,
    finite: torch.Tensor | None = None,
) -> None:
    """SGD on the arenas' gradient times gradient_scale, then the row clip; finite as in `adamw_step`."""
    if momentum:
        _allocate(state, "momentum_buffer")
    for arena in state.arenas:
        buffer = arena.momentum_buffer if momentum else None
        _scale_gradient(arena, gradient_scale)
        rate, copy = _learning_rate_tensor(learning_rate, arena), _kernel_copy(arena)
        kernels = slot_updates.sgd_slots_, slot_updates.sgd_slots_from_factors_
        for part in arena.learning_parts():
            update, *gradient = _gradient(arena, part, gradient_scale, *kernels)
            update(
                arena.slots[part],
                *gradient,
                _of(buffer, part),
                rate,
                SGD(momentum, weight_decay, clip),
                _of(copy, part),
                finite,
            )
    if finite is None:
        _finish(state)


class Update(Protocol):
    """What memorizing asks of an optimizer."""

    def __call__(
        self,
        state: MemoryState,
        learning_rate: float | torch.Tensor,
        *,
        clip: bool,
        gradient_scale: float,
        finite: torch.Tensor | None = None,
    ) -> None: ...


OPTIMIZERS: dict[str, Update] = {"adamw": adamw_step, "sgd": sgd_step}


# ---- as torch optimizers --------------------------------------------------------------------------------------
class _SlotOptimizer(torch.optim.Optimizer, ABC):
    _states: ClassVar[tuple[str, ...]]  # the tensors of a MemoryState that are this optimizer's

    @staticmethod
    @abstractmethod
    def _checked(settings: dict) -> dict:
        """A parameter group's settings as plain numbers; TypeError or ValueError for one out of range."""

    @abstractmethod
    def _update(self, state: MemoryState, group: dict) -> None:
        """One step of all slots with the settings of a parameter group."""

    def __init__(self, memory, settings: dict):
        settings = self._checked(settings)
        self.memory = memory
        super().__init__(memory.parameters(), settings)

    def add_param_group(self, param_group: dict) -> None:
        """The memory's own group, once; ValueError for another, as one update steps all slots and nothing else."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} steps the memory's slots, all together; give other parameters an optimizer of their own"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One fused update of all slots from the gradients of memory.parameters().

        Returns the closure's loss. LocasError, with the memory unchanged, if a gradient is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self.memory.state
        state.sync()
        for arena in state.arenas:
            arena.gather_grad()
        if not all([arena.gradient_norm().isfinite() for arena in state.arenas]):
            raise LocasError(f"the gradient is not finite; the memory stays at version {state.version}")
        self._update(state, self.param_groups[0])
        return loss

    # ---- the states live in the arenas, where save_pretrained(optimizer=True) finds them ----------------------
    def state_dict(self) -> dict:
        """{"state": the memory's tensors by name, as far as there are any; "param_groups": as of torch's optimizers}."""
        tensors = self.memory.state.tensors()
        places = list(range(len(self.param_groups[0]["params"])))
        groups = [{**group, "params": places} for group in self.param_groups]
        return {"state": {name: tensors[name] for name in self._states if name in tensors}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes over what state_dict() returned; a state that is missing there starts anew.

        ValueError or TypeError, with nothing taken over, for states or settings that are not this optimizer's.
        """
        state, tensors, groups = self.memory.state, state_dict["state"], state_dict["param_groups"]
        if unknown := set(tensors) - set(self._states):
            raise ValueError(f"optimizer state holds {sorted(unknown)}; expected {list(self._states)}")
        for name, tensor in tensors.items():
            shape = torch.Size() if name == "step" else state.shape
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
        if len(groups) != 1:
            raise ValueError(f"param_groups holds {len(groups)} groups; expected 1, as all slots are stepped together")
        saved = {name: value for name, value in groups[0].items() if name != "params"}
        saved.update(self._checked({name: saved.get(name, value) for name, value in self.defaults.items()}))
        self._forget()
        state.load_optimizer(tensors)
        self.param_groups[0].update(saved)

    def _forget(self) -> None:
        for arena in self.memory.state.arenas:
            for name in self._states:
                if name == "step":
                    arena.step.zero_()
                else:
                    setattr(arena, name, None)


class SlotAdamW(_SlotOptimizer):
    """AdamW for a memory as a torch optimizer: the fused update with the norm clip (docs/method.md, "Learning").

    Args:
        memory: a Memory
        lr: float >= 0: learning rate
        betas: two floats in [0, 1): as in torch.optim.AdamW
        eps, weight_decay: floats >= 0: as there; the defaults are the memory's own (no decay)

    Whether rows are clipped is the memory's config. Raises TypeError or ValueError for a value out of range.

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> model, ids = tiny_host(), torch.arange(3, 35)[None]
    >>> memory = locas.attach(model, locas.LocasConfig(rank=4))
    >>> memory.initialize(ids)
    >>> optimizer = locas.SlotAdamW(memory, lr=1e-2)
    >>> model(input_ids=ids, labels=ids).loss.backward()
    >>> optimizer.step()
    >>> memory.version
    1
    """

    _states = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, memory, lr: float = 4e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(memory, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def _checked(settings):
        beta1, beta2 = settings["betas"]
        betas = number("betas[0]", beta1, 0, below=1), number("betas[1]", beta2, 0, below=1)
        return {"betas": betas, **{name: number(name, settings[name], 0) for name in ("lr", "eps", "weight_decay")}}

    def _update(self, state, group):
        clip = self.memory.config.clip
        adamw_step(state, group["lr"], group["betas"], group["eps"], group["weight_decay"], clip)


class SlotSGD(_SlotOptimizer):
    """SGD for a memory as a torch optimizer: the fused update with the norm clip.

    Args:
        memory: a Memory
        lr: float >= 0: learning rate
        momentum: float in [0, 1)
        weight_decay: float >= 0

    Raises TypeError or ValueError for a value out of range.
    """

    _states = ("momentum_buffer",)

    def __init__(self, memory, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(memory, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def _checked(settings):
        momentum = number("momentum", settings["momentum"], 0, below=1)
        return {"momentum": momentum, **{name: number(name, settings[name], 0) for name in ("lr", "weight_decay")}}

    def _update(self, state, group):
        sgd_step(state, group["lr"], group["momentum"], group["weight_decay"], self.memory.config.clip)
