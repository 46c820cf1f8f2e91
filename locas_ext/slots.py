"""The arena: the memory of all layers in one tensor, with its optimizer states, gradient and compute copy.

slots is float32 [L, 3, r, d]: for each layer the gate rows G, the key rows K and the value rows V. One update launch
serves all layers, a file holds one tensor, and clipping is one rule: no row longer than 1. What the layers compute
with is `compute`, the slots in the host's dtype (the same tensor for a float32 host).
"""

import itertools

import torch
from torch import Tensor, nn

from .config import LocasConfig
from .kernels import SlotViews

GATE, KEY, VALUE = 0, 1, 2
_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_generations = itertools.count(1)  # one number for every state that any memory has been in


class SlotArena:
    """The state of a memory.

    Attributes:
        layers: the decoder layers that have slots, ascending
        slots: [L, 3, r, d] float32, the master
        grad: [L, 3, r, d] float32
        parameters: L nn.Parameters [3, r, d], views of slots; their .grad are views of grad
        compute, views: the slots in the host's dtype, and per layer (gate and key rows, value rows)
        scale: [L] float32, tau of each layer
        step: [] int64, the number of AdamW updates so far
        exp_avg, exp_avg_sq, momentum_buffer: as slots, or None until an optimizer needs them
        version: the number of updates so far; at 0 the memory is a no-op
        initialized: whether gate and key rows have been set
        disabled: how many `disabled()` blocks are open
        accumulate: whether the backward adds into grad in place instead of handing the gradient to autograd
    """

    def __init__(self, layers: tuple[int, ...], rank: int, hidden_size: int, scale: list[float], device, dtype):
        self.layers = layers
        self.version = 0
        self.initialized = False
        self.disabled = 0
        self.accumulate = False
        self.exp_avg = self.exp_avg_sq = self.momentum_buffer = None
        with torch.inference_mode(False), torch.no_grad():
            self.slots = torch.zeros(len(layers), 3, rank, hidden_size, device=device)
            self.grad = torch.zeros_like(self.slots)
            self.scale = torch.tensor(scale, dtype=torch.float32)
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.parameters = [nn.Parameter(layer) for layer in self.slots]
            self._bind(dtype)

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, value: int) -> None:
        self._version = value
        self.generation = next(_generations)
        self.learned = value > 0  # what compiled graphs guard on: a counter would recompile them at every update

    @property
    def rank(self) -> int:
        return self.slots.shape[2]

    @property
    def hidden_size(self) -> int:
        return self.slots.shape[3]

    # ---- what points into slots and grad --------------------------------------------------------------------
    def _bind(self, dtype: torch.dtype) -> None:
        self.scales = self.scale.tolist()
        self.compute = self.slots if dtype == torch.float32 else self.slots.to(dtype)
        self.views = [SlotViews.of(layer) for layer in self.compute]
        self.grads = list(self.grad)
        self._bind_grads()
        self._record_versions()

    def _bind_grads(self) -> None:
        for parameter, grad in zip(self.parameters, self.grads):
            parameter.grad = grad

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves everything to a device and compute dtype; the parameters stay the same objects."""
        with torch.inference_mode(False), torch.no_grad():
            for name in ("slots", "grad", "step", *_STATES):
                if (tensor := getattr(self, name)) is not None:
                    setattr(self, name, tensor.to(device))
            for parameter, layer in zip(self.parameters, self.slots):
                parameter.grad = None
                parameter.data = layer
            self._bind(dtype)

    # ---- changes by others, such as a stock torch optimizer --------------------------------------------------
    def _record_versions(self) -> None:
        self._seen = self.slots._version
        self._seen_parameters = [parameter._version for parameter in self.parameters]

    def is_current(self, index: int) -> bool:
        """Whether the compute copy of a layer still is what its slots say."""
        return (
            self.slots._version == self._seen
            and self.parameters[index]._version == self._seen_parameters[index]
        )

    def sync(self) -> None:
        """Takes over a change of the slots made from outside, which counts as one update."""
        if all(self.is_current(index) for index in range(len(self.layers))):
            return
        if self.compute is not self.slots:
            self.compute.copy_(self.slots.detach())
        self.initialized = True
        self.version += 1
        self._record_versions()

    # ---- life ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def set_slots(self, slots: Tensor, version: int, initialized: bool) -> None:
        """Puts a whole memory in place; optimizer states start anew."""
        self.slots.copy_(slots)
        if self.compute is not self.slots:
            self.compute.copy_(self.slots)
        self.version, self.initialized = version, initialized
        self.forget_optimizer()
        self._record_versions()

    def reset(self) -> None:
        self.set_slots(torch.zeros_like(self.slots), version=0, initialized=False)

    def forget_optimizer(self) -> None:
        self.zero_grad()
        self.step.zero_()
        self.exp_avg = self.exp_avg_sq = self.momentum_buffer = None

    def zero_grad(self) -> None:
        self.grad.zero_()
        self._bind_grads()

    def gather_grad(self) -> None:
        """Brings back gradients that a `zero_grad(set_to_none=True)` moved out of the arena."""
        with torch.no_grad():
            for parameter, grad in zip(self.parameters, self.grads):
                if parameter.grad is None:
                    grad.zero_()
                elif parameter.grad is not grad:
                    grad.copy_(parameter.grad)
        self._bind_grads()

    def output_state(self) -> int:
        """A number that changes whenever the model's outputs may have: 0 while the host computes alone."""
        self.sync()
        return self.generation if self.learned and not self.disabled else 0

    def state_tensors(self, optimizer: bool = True) -> dict[str, Tensor]:
        """slots and scale, with `optimizer` also step and the states there are; the arena's own tensors."""
        names = ("slots", "scale", "step", *_STATES) if optimizer else ("slots", "scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], version: int, initialized: bool) -> None:
        """Takes over what state_tensors() returned; an optimizer state that is missing starts anew."""
        self.scale = tensors["scale"].to(self.scale)
        self.scales = self.scale.tolist()
        self.set_slots(tensors["slots"], version, initialized)
        for name in set(tensors) - {"slots", "scale"}:
            (self.step if name == "step" else self.state(name)).copy_(tensors[name])

    def state(self, name: str) -> Tensor:
        """An optimizer state, zero when first asked for."""
        if getattr(self, name) is None:
            with torch.inference_mode(False):
                setattr(self, name, torch.zeros_like(self.slots))
        return getattr(self, name)

    def finish_update(self) -> None:
        """Called when an update kernel has written slots (and compute)."""
        torch.autograd.graph.increment_version([self.slots, *self.parameters])
        self.version += 1
        self._record_versions()

    def rounded_copy(self) -> Tensor | None:
        """Where an update kernel should write the rounded slots, or None for a float32 host."""
        return None if self.compute is self.slots else self.compute

    def __deepcopy__(self, memo):
        copy = object.__new__(SlotArena)
        memo[id(self)] = copy
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.__dict__.items():
                if isinstance(value, Tensor):
                    setattr(copy, name, value.detach().clone())
                elif name not in ("parameters", "views", "grads"):
                    setattr(copy, name, value)
            copy.parameters = [nn.Parameter(layer) for layer in copy.slots]
            memo.update({id(old): new for old, new in zip(self.parameters, copy.parameters)})
            copy._bind(self.compute.dtype)
        return copy

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a model with a memory attached cannot be pickled: use memory.save_pretrained(path) for the memory and "
            "model.save_pretrained(path) for the host, or memory.merge_and_unload() first"
        )


# ---- initialization (docs/method.md) -------------------------------------------------------------------------
def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def check_rank(config: LocasConfig, intermediate_size: int) -> None:
    """ValueError if an init that clones neurons asks for more than the host has."""
    if config.init in ("topk", "bottomk", "random") and config.rank > intermediate_size:
        raise ValueError(
            f"rank is {config.rank}, but the host's FFN has only {intermediate_size} neurons to clone with "
            f"init={config.init!r}; expected a rank from 1 to {intermediate_size}, or init='gaussian'"
        )


def initial_rows(
    config: LocasConfig,
    importance: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    ffn_input: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Gate and key rows [r, d] float32 of length 1 for one layer.

    importance: [m]; gate_weight, up_weight: [m, d]; ffn_input: [T, d], the layer's FFN inputs over the chunk.
    The generator is a CPU one, so a seed means the same memory on every device.
    """
    rank, d = config.rank, gate_weight.shape[1]
    if config.init == "gaussian":
        rows = torch.randn(2, rank, d, generator=generator).to(gate_weight.device)
        return _unit_rows(rows[0]), _unit_rows(rows[1])
    if config.init == "activation":
        tokens = ffn_input.shape[0]
        if rank > tokens:
            raise ValueError(
                f"init='activation' takes one token a slot: rank is {rank}, but the chunk has {tokens} tokens"
            )
        chosen = torch.randperm(tokens, generator=generator)[:rank].to(ffn_input.device)
        rows = _unit_rows(ffn_input[chosen])
        return rows, rows.clone()
    if config.init == "random":
        neurons = torch.randperm(importance.shape[0], generator=generator)[:rank].to(importance.device)
    else:
        neurons = importance.topk(rank, largest=config.init == "topk").indices
    return _unit_rows(gate_weight[neurons]), _unit_rows(up_weight[neurons])
