"""SlotAdamW and SlotSGD: the fused updates as torch optimizers, for training loops outside `memorize`."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from locas_ext.checks import LEAST_FLOAT32, number
from locas_ext.config import MOST_RATE
from locas_ext.errors import LocasError
from locas_ext.state.memory_state import MemoryState
from locas_ext.storage.schema import Wrong
from locas_ext.storage.tensor_file import check_values

from .optimizers import adamw_step, sgd_step


def _rates(settings: dict, **lowest: float) -> dict[str, float]:
    """Settings as plain numbers from these on up."""
    return {name: number(name, settings[name], low, MOST_RATE) for name, low in lowest.items()}


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
        if not isinstance(getattr(memory, "state", None), MemoryState):
            raise TypeError(f"memory is {type(memory).__name__}; expected a locas.Memory")
        settings = self._checked(settings)
        self.memory = memory
        super().__init__(memory.parameters(), settings)

    def add_param_group(self, param_group: dict) -> None:
        """Called by torch with the memory's parameters; there is no second group, as one update steps all slots.

        Args:
            param_group: dict: a parameter group of torch's optimizers

        Raises:
            ValueError: there is one already

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> model = tiny_host()
        >>> optimizer = locas.SlotSGD(locas.attach(model, locas.LocasConfig(rank=4)), lr=1e-2)
        >>> optimizer.add_param_group({"params": [model.lm_head.weight]})
        Traceback (most recent call last):
        ValueError: SlotSGD steps the memory's slots, all together; give other parameters an optimizer of their own
        """
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} steps the memory's slots, all together; give other parameters an optimizer of their own"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One fused update of all slots from the gradients of memory.parameters(); the memory's version is one more.

        Args:
            closure: a function that computes the gradients anew and returns the loss; None: they are there

        Returns:
            The closure's loss, or None.

        Raises:
            LocasError: a gradient is not finite; the memory is unchanged
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> model, ids = tiny_host(), torch.arange(3, 35)[None]
        >>> memory = locas.attach(model, locas.LocasConfig(rank=4))
        >>> memory.initialize(ids)
        >>> optimizer = locas.SlotSGD(memory, lr=1e-2)
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> memory.version
        1
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self.memory.state
        with state.exclusion.held("step"):
            state.sync()
            for arena in state.arenas:
                arena.gather_grad()
            finite = all([bool(arena.gradient_norm().isfinite()) for arena in state.arenas])
            if not (finite if state.ranks is None else state.ranks.all(finite)):
                raise LocasError(f"the gradient is not finite; the memory stays at version {state.version}")
            self._update(state, self.param_groups[0])
        return loss

    # ---- the states live in the arenas, where save_pretrained(optimizer=True) finds them ----------------------
    def state_dict(self) -> dict:
        """The optimizer's states and settings.

        Returns:
            {"state": the memory's optimizer tensors by name, those there are; "param_groups": as torch's optimizers}

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> optimizer = locas.SlotAdamW(locas.attach(tiny_host(), locas.LocasConfig(rank=4)))
        >>> list(optimizer.state_dict()["state"])  # nothing was stepped yet
        ['step']
        """
        tensors = self.memory.state.tensors()
        places = list(range(len(self.param_groups[0]["params"])))
        groups = [{**group, "params": places} for group in self.param_groups]
        return {"state": {name: tensors[name] for name in self._states if name in tensors}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes over what state_dict() returned; a state that is missing there starts anew.

        Args:
            state_dict: what state_dict() returned, of an optimizer of this class for a memory of the same shape

        Raises:
            ValueError: a state or setting is not this optimizer's, or does not fit; nothing is taken over
            TypeError: a setting is of another type; nothing is taken over
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> optimizer = locas.SlotAdamW(memory)
        >>> optimizer.load_state_dict(locas.SlotAdamW(memory, lr=1e-3).state_dict())
        >>> optimizer.param_groups[0]["lr"]
        0.001
        """
        state, tensors, groups = self.memory.state, state_dict["state"], state_dict["param_groups"]
        if unknown := set(tensors) - set(self._states):
            raise ValueError(f"optimizer state holds {sorted(unknown)}; expected {list(self._states)}")
        for name, tensor in tensors.items():
            shape = torch.Size() if name == "step" else state.shape
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
        try:
            check_values(tensors, state.layers)
        except Wrong as error:
            raise ValueError(f"optimizer state: {error}") from None
        if len(groups) != 1:
            raise ValueError(f"param_groups holds {len(groups)} groups; expected 1, as all slots are stepped together")
        saved = {name: value for name, value in groups[0].items() if name != "params"}
        saved.update(self._checked({name: saved.get(name, value) for name, value in self.defaults.items()}))
        with state.exclusion.held("load_state_dict"):
            self._forget()
            state.load_optimizer(tensors)
            self.param_groups[0].update(saved)

    def __getstate__(self) -> dict:
        """With the memory before its parameters: in a copy they are those of the memory's copy. Pickling is refused by it."""
        return {"memory": self.memory, **super().__getstate__()}

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
        memory: a Memory; its config says whether rows are clipped
        lr: float from 0 to 1e6: learning rate
        betas: two floats in [0, 1): as in torch.optim.AdamW
        eps, weight_decay: floats up to 1e6, eps > 0 and weight_decay >= 0: as there; the defaults are those of
            `Memory.memorize` (no decay)

    Raises:
        TypeError: memory is not a Memory, or a setting is not a number
        ValueError: a setting is out of range

    Source: arXiv 2602.05085, section 3; docs/method.md, "Scale and clip" and "Learning".

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
        betas = settings["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas is {betas!r}; expected two numbers >= 0 and < 1")
        betas = number("betas[0]", betas[0], 0, below=1), number("betas[1]", betas[1], 0, below=1)
        return {"betas": betas, **_rates(settings, lr=0, eps=LEAST_FLOAT32, weight_decay=0)}

    def _update(self, state, group):
        clip = bool(self.memory.config.clip)
        adamw_step(state, group["lr"], group["betas"], group["eps"], group["weight_decay"], clip)


class SlotSGD(_SlotOptimizer):
    """SGD for a memory as a torch optimizer: the fused update with the norm clip.

    Args:
        memory: a Memory; its config says whether rows are clipped
        lr: float from 0 to 1e6: learning rate
        momentum: float in [0, 1)
        weight_decay: float from 0 to 1e6

    Raises:
        TypeError: memory is not a Memory, or a setting is not a number
        ValueError: a setting is out of range

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> locas.SlotSGD(memory, lr=0.1, momentum=0.9).param_groups[0]["momentum"]
    0.9
    """

    _states = ("momentum_buffer",)

    def __init__(self, memory, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(memory, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def _checked(settings):
        momentum = number("momentum", settings["momentum"], 0, below=1)
        return {"momentum": momentum, **_rates(settings, lr=0, weight_decay=0)}

    def _update(self, state, group):
        sgd_step(state, group["lr"], group["momentum"], group["weight_decay"], bool(self.memory.config.clip))
