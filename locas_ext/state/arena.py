"""An arena: the slots of all layers on one device, in one tensor, with optimizer states, gradient and compute copy.

slots is float32 [l, planes, capacity, d]: for each layer the gate rows G, the key rows K and the value rows V; of Locas-MLP
the key and the value rows. One update launch serves all layers of a device, and clipping is one rule: no row longer than 1.
What the layers compute with is `compute`, the slots in the host's dtype (the same tensor for a float32 host).
"""

import torch
from torch import Tensor, nn

from locas_ext.ops.types import SlotFactors, SlotViews

from .planes import VALUE

ON_DEMAND = ("exp_avg", "exp_avg_sq", "momentum_buffer", "value_gram", "lengths")  # made when they are first needed


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits, to be compared: NaN is itself. In the widest integers that fit, which takes half the time."""
    return tensor.view(-1).view(torch.int32 if tensor.numel() % 2 else torch.int64)


class SlotArena:
    """The slots of the layers that lie on one device.

    Attributes:
        positions: which of the memory's L layers these l are, ascending
        slots: [l, planes, capacity, d] float32, the master
        used: how many slots, the first ones, hold something; those behind them are zero
        grad: as slots
        parameters: l nn.Parameters [planes, capacity, d], views of slots; their .grad are views of grad
        seen: a copy of the slots as last looked at, once somebody outside may write them; else None
        factors: l SlotFactors where the gradient is kept unformed for the update, else None
        compute, views: the slots in the host's dtype, and per layer the used ones as (gate and key rows, value rows)
        scale, scales: [l] float32 on the CPU, tau of each layer, and the same as a list
        longest: [l, planes] float32, the length at which rows are clipped; None: 1
        lengths: [l, planes, capacity, 1] float32, the same for rows that a study has made longer; None: there are none such
        step: [] int64, the number of AdamW updates so far
        exp_avg, exp_avg_sq, momentum_buffer: as slots, or None until an optimizer needs them
        value_gram: [l, r, r] float32, r the slots of all processes: mean inner products of value rows' gradients; or None
    """

    def __init__(
        self,
        positions: list[int],
        planes: int,
        capacity: int,
        hidden_size: int,
        scale: list[float],
        device: torch.device,
        dtype: torch.dtype,
        processes: int = 1,
    ):
        """processes: that the slots are split among"""
        self.positions, self.used, self.processes = positions, 0, processes
        self.exp_avg: Tensor | None = None
        self.exp_avg_sq: Tensor | None = None
        self.momentum_buffer: Tensor | None = None
        self.value_gram: Tensor | None = None
        self.seen: Tensor | None = None
        self._grads_are_bound = True
        self.placement = 0  # how often the tensors were put in place
        self.factors: list[SlotFactors] | None = None
        self.longest: Tensor | None = None
        self.lengths: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            self.slots = torch.zeros(len(positions), planes, capacity, hidden_size, dtype=torch.float32, device=device)
            self.grad = torch.zeros_like(self.slots)
            self.scale = torch.tensor(scale, dtype=torch.float32, device="cpu")
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.parameters = [nn.Parameter(layer) for layer in self.slots]
            self._bind(dtype)

    # ---- what points into slots and grad --------------------------------------------------------------------
    def _bind(self, dtype: torch.dtype) -> None:
        self.placement += 1
        self.scales = self.scale.tolist()
        self.compute = self.slots if dtype == torch.float32 else self.slots.to(dtype)
        self.grads = list(self.grad)
        self._pointers = [layer.data_ptr() for layer in self.slots]
        self.set_used(self.used)
        self._bind_grads()
        self.record_versions()

    def _bind_grads(self) -> None:
        if not self._grads_are_bound:
            return
        for parameter, grad in zip(self.parameters, self.grads, strict=False):
            parameter.grad = grad

    @property
    def capacity(self) -> int:
        return self.slots.shape[2]

    @property
    def clips_by_row(self) -> bool:
        """Whether rows have lengths of their own to be clipped at."""
        return self.longest is not None or self.lengths is not None

    def set_used(self, used: int) -> None:
        self.used = used
        self.views = [SlotViews.of(layer) for layer in self.compute[:, :, :used].unbind()]

    def use_scale(self, scale: Tensor) -> None:
        """Takes over tau of each layer [l]; what value rows may add at most stays, where rows have lengths of their own."""
        if self.longest is not None:
            self.longest[:, VALUE] *= (self.scale / scale).abs().to(self.longest)
        self.scale.copy_(scale)
        self.scales = self.scale.tolist()

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves everything to a device and compute dtype; the parameters stay the same objects."""
        with torch.inference_mode(False), torch.no_grad():
            self.replace_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()}, dtype)

    @torch.no_grad()
    def write_rows(self, rows: Tensor, start: int) -> None:
        """Writes rows [l, planes, n, d] over the slots from `start` on; `finish_update` is to follow."""
        for tensor in (self.slots,) if self.compute is self.slots else (self.slots, self.compute):
            tensor[:, :, start : start + rows.shape[2]] = rows

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        names = ("slots", "grad", "step", *ON_DEMAND)
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def replace_tensors(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Puts other tensors in the place of those of the same names."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in tensors.items():
                setattr(self, name, tensor)
            for parameter, layer in zip(self.parameters, self.slots, strict=False):
                parameter.grad = None
                parameter.data = layer
            self.longest = None if self.longest is None else self.longest.to(self.slots.device)
            self.used = min(self.used, self.capacity)
            self._bind(dtype)

    # ---- changes by others, whoever they are ------------------------------------------------------------------
    def watch(self) -> None:
        """From now on changes are found by content: somebody outside holds tensors of this arena.

        Version counters alone miss fused optimizers, numpy, pointers and `.data`.
        """
        if self.seen is None:
            with torch.inference_mode(False), torch.no_grad():
                self.seen = self.slots.clone()

    def record_versions(self) -> None:
        self._seen_version = self.slots._version
        self._seen_parameters = [parameter._version for parameter in self.parameters]
        if self.seen is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.seen = self.slots.clone() if self.seen.shape != self.slots.shape else self.seen.copy_(self.slots)

    def is_current(self, index: int) -> bool:
        """Whether the version counters of a layer's slots are those last seen."""
        return self.slots._version == self._seen_version and self.parameters[index]._version == self._seen_parameters[index]

    def refresh(self, by_content: bool) -> bool:
        """Takes over a change of the slots made from outside. Returns whether there was one.

        by_content: whether numbers are compared too, where the arena is watched
        """
        adopted = self._adopt_replaced_data()
        changed = adopted or self.slots._version != self._seen_version
        changed = changed or [parameter._version for parameter in self.parameters] != self._seen_parameters
        capturing = self.seen is not None and self.slots.is_cuda and torch.cuda.is_current_stream_capturing()
        if not changed and by_content and self.seen is not None and not capturing:  # in a capture nothing can be compared
            changed = not torch.equal(_bits(self.slots), _bits(self.seen))
        if changed:
            self.round_slots()
        return changed

    def _adopt_replaced_data(self) -> bool:
        """Brings tensors that replaced a parameter's `.data` back into the arena. Returns whether there were any."""
        places = zip(self.parameters, self._pointers, strict=True)
        if all([parameter.data_ptr() == pointer and parameter.dtype is torch.float32 for parameter, pointer in places]):
            return False
        replaced = False
        with torch.inference_mode(False), torch.no_grad():
            for position, parameter, layer in zip(self.positions, self.parameters, self.slots, strict=True):
                if parameter.data_ptr() == layer.data_ptr() and parameter.dtype == layer.dtype:
                    continue
                if parameter.shape != layer.shape:
                    raise ValueError(
                        f"the memory's parameter {position} was replaced by a tensor of shape {list(parameter.shape)}; "
                        f"expected {list(layer.shape)}"
                    )
                layer.copy_(parameter.data)
                grad, parameter.grad = parameter.grad, None
                parameter.data = layer
                parameter.grad = None if grad is None else grad.to(layer)
                replaced = True
        return replaced

    @torch.no_grad()
    def round_slots(self) -> None:
        """Brings the compute copy up to the slots."""
        if self.compute is not self.slots:
            self.compute.copy_(self.slots)
        self.record_versions()

    # ---- gradient and optimizer states -----------------------------------------------------------------------
    def zero_grad(self) -> None:
        if self.factors is None:
            self.grad.zero_()
        self.factors = None
        self._bind_grads()

    def sink(self, index: int) -> Tensor | SlotFactors:
        """What a backward while memorizing adds a layer's gradient into: its slice of grad, or its factors."""
        return self.grads[index] if self.factors is None else self.factors[index]

    def unbind_grads(self) -> None:
        """Takes `grad` away from the parameters: a backward of somebody else no longer reaches it."""
        self._grads_are_bound = False
        for parameter in self.parameters:
            parameter.grad = None

    def rebind_grads(self) -> None:
        """The reverse; what others' backwards brought meanwhile stays."""
        self._grads_are_bound = True
        with torch.no_grad():
            for parameter, grad in zip(self.parameters, self.grads, strict=True):
                if parameter.grad is not None:
                    grad.add_(parameter.grad)
        self._bind_grads()

    def learning_parts(self) -> list[slice]:
        """The layers that learn, whose parameters require a gradient, as runs of neighbours: nearly always one of all."""
        parts: list[slice] = []
        for index, parameter in enumerate(self.parameters):
            if parameter.requires_grad:
                start = parts.pop().start if parts and parts[-1].stop == index else index
                parts.append(slice(start, index + 1))
        return parts

    def gradient_norm(self) -> Tensor:
        """[] float32, not finite if the gradient is not; of factors an upper bound."""
        if self.factors is None:
            return self.grad.norm()
        return torch.stack([layer.norm_bound() for part in self.learning_parts() for layer in self.factors[part]]).sum()

    def gather_grad(self) -> None:
        """Brings back gradients that a `zero_grad(set_to_none=True)` moved out of the arena."""
        with torch.no_grad():
            for parameter, grad in zip(self.parameters, self.grads, strict=False):
                if parameter.grad is None:
                    grad.zero_()
                elif parameter.grad is not grad:
                    grad.copy_(parameter.grad)
        self._bind_grads()

    def on_demand(self, name: str) -> Tensor:
        """An optimizer state or `lengths`, zero when first asked for."""
        if getattr(self, name) is None:
            slots = self.capacity * self.processes
            shapes = {"lengths": (*self.slots.shape[:3], 1), "value_gram": (len(self.slots), slots, slots)}
            with torch.inference_mode(False):
                setattr(self, name, self.slots.new_zeros(shapes.get(name, self.slots.shape)))
        return getattr(self, name)

    def forget_optimizer(self) -> None:
        self.zero_grad()
        self.step.zero_()
        self.exp_avg = self.exp_avg_sq = self.momentum_buffer = self.value_gram = None

    # ---- for the update kernels ------------------------------------------------------------------------------
    def rounded_copy(self) -> Tensor | None:
        """Where an update kernel should write the rounded slots, or None for a float32 host."""
        return None if self.compute is self.slots else self.compute

    def finish_update(self) -> None:
        """Called when an update kernel has written slots (and compute)."""
        with torch.inference_mode(False):
            torch.autograd.graph.increment_version([self.slots, *self.parameters])
        self.record_versions()

    # ---- copies ----------------------------------------------------------------------------------------------
    def __deepcopy__(self, memo):
        copy = memo[id(self)] = object.__new__(SlotArena)
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.__dict__.items():
                if isinstance(value, Tensor):
                    setattr(copy, name, value.detach().clone())
                elif name not in ("parameters", "views", "grads"):
                    setattr(copy, name, value)
            layers = zip(copy.slots, self.parameters, strict=True)
            copy.parameters = [nn.Parameter(slots, old.requires_grad) for slots, old in layers]
            memo.update({id(old): new for old, new in zip(self.parameters, copy.parameters, strict=False)})
            copy._grads_are_bound = True
            copy._bind(self.compute.dtype)
        return copy

    def __reduce_ex__(self, protocol):
        ways = "memory.save_pretrained(path) and model.save_pretrained(path), or memory.merge_and_unload() first"
        raise TypeError(f"a model with a memory attached cannot be pickled: use {ways}")
