"""The fused updates: one launch steps and clips the slots of all layers on a device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

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


def _gradient(arena: SlotArena, scale: float, from_grad: Callable, from_factors: Callable) -> tuple:
    """-> the update function for what the backward left, and its arguments for the gradient."""
    if arena.factors is not None:
        return from_factors, arena.factors, scale
    if scale != 1.0:
        arena.grad *= scale
    return from_grad, arena.grad


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
        update, *gradient = _gradient(arena, gradient_scale, slot_updates.adamw_slots_, slot_updates.adamw_slots_from_factors_)
        update(
            arena.slots,
            *gradient,
            arena.exp_avg,
            arena.exp_avg_sq,
            arena.step,
            _learning_rate_tensor(learning_rate, arena),
            AdamW(*betas, eps, weight_decay, clip),
            _kernel_copy(arena),
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
        update, *gradient = _gradient(arena, gradient_scale, slot_updates.sgd_slots_, slot_updates.sgd_slots_from_factors_)
        update(
            arena.slots,
            *gradient,
            buffer,
            _learning_rate_tensor(learning_rate, arena),
            SGD(momentum, weight_decay, clip),
            _kernel_copy(arena),
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


def _check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not (low <= value < high):
        raise ValueError(f"{name} is {value}; expected a number in [{low}, {high})")


class _SlotOptimizer(torch.optim.Optimizer, ABC):
    _states: ClassVar[tuple[str, ...]]  # the tensors of a MemoryState that are this optimizer's

    @abstractmethod
    def _update(self, state: MemoryState, group: dict) -> None:
        """One step of all slots with the settings of a parameter group."""

    def __init__(self, memory, defaults: dict):
        for name in ("lr", "eps", "weight_decay"):
            _check_range(name, defaults.get(name, 0.0), 0.0)
        self.memory = memory
        super().__init__(memory.parameters(), defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One fused update of all slots from the gradients of memory.parameters(). Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self.memory.state
        state.sync()
        for arena in state.arenas:
            arena.gather_grad()
        self._update(state, self.param_groups[0])
        return loss

    # The states live in the arenas, where save_pretrained(optimizer=True) finds them.
    def state_dict(self) -> dict:
        tensors = self.memory.state.tensors()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {name: tensors[name] for name in self._states if name in tensors}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        state, tensors = self.memory.state, state_dict["state"]
        if unknown := set(tensors) - set(self._states):
            raise ValueError(f"optimizer state holds {sorted(unknown)}; expected {list(self._states)}")
        for name, tensor in tensors.items():
            shape = torch.Size() if name == "step" else state.shape
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
        state.load_optimizer(tensors)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)


class SlotAdamW(_SlotOptimizer):
    """AdamW for a memory as a torch optimizer: the fused update with the norm clip (docs/method.md, "Learning").

    Args:
        memory: a Memory
        lr: learning rate >= 0
        betas, eps, weight_decay: as in torch.optim.AdamW; the defaults are the memory's own (no decay)

    Whether rows are clipped is the memory's config. Raises ValueError for a value out of range.
    """

    _states = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, memory, lr: float = 4e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        for beta in betas:
            _check_range("betas", beta, 0.0, 1.0)
        super().__init__(memory, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _update(self, state, group):
        clip = self.memory.config.clip
        adamw_step(state, group["lr"], group["betas"], group["eps"], group["weight_decay"], clip)


class SlotSGD(_SlotOptimizer):
    """SGD for a memory as a torch optimizer: the fused update with the norm clip.

    Args:
        memory: a Memory
        lr: learning rate >= 0
        momentum: in [0, 1)
        weight_decay: >= 0
    """

    _states = ("momentum_buffer",)

    def __init__(self, memory, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        _check_range("momentum", momentum, 0.0, 1.0)
        super().__init__(memory, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, state, group):
        sgd_step(state, group["lr"], group["momentum"], group["weight_decay"], self.memory.config.clip)
