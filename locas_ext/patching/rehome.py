"""Re-homing: a host FFN's weights move into buffers with spare rows for the memory, so that one product sees both.

      gate_up [2, n, d]    host gate  m rows | G        r rows | 0        n = m + r, rounded up to a multiple of 8
                           host up    m rows | tau * K  r rows | 0
      down    [d, n]       host down  m columns | V^T  r columns | 0

The host's parameters become views of the buffers and stay the same objects, so the host computes, saves and loads as
before. An FFN with memory then is two products and one elementwise kernel, its backward three products and the memory's
own gradient. The memory's rows are written again whenever the slots have changed. Whatever takes the parameters out of
the buffers (`.to()` another dtype or device, a swapped projection) is noticed at the next forward, which moves them in
again, or runs without the buffers where it cannot. `Attachment.detach` moves them out.

Tools take two tensors of one storage for tied ones, and refuse parts of a larger one. So state_dict() gives copies, each in
storage of its own: while it is held, it costs a second copy of the FFNs' weights.
"""

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from locas_ext import _C
from locas_ext.hosts.gated_ffn import FusedGatedFFN, GatedFFN
from locas_ext.ops.types import stream_of
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import VALUE

_ALIGNMENT = 8  # elements: rows of 16 bytes in half precision, which cuBLAS's fastest kernels ask for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storage_users(model: nn.Module) -> Counter:
    """How many of the model's parameter names each storage serves."""
    return Counter(_storage(p) for _, p in model.named_parameters(remove_duplicate=False) if not p.is_meta)


def obstacle(ffn: GatedFFN, users: Counter) -> str | None:
    """Why this FFN's weights cannot move into buffers, or None. users: what storage_users(model) returned."""
    if isinstance(ffn, FusedGatedFFN):
        return "its gate and up rows are one parameter (gate_up_proj), which cannot be a view of two buffers"
    if (problem := ffn.obstacle()) is not None:
        return problem
    weights = ffn.weights()
    for name, weight in zip(weights._fields, weights, strict=False):
        if weight is None:
            continue
        if users[_storage(weight)] > 1 or weight.untyped_storage().nbytes() != weight.numel() * weight.itemsize:
            return f"{name} is tied to another parameter or shares its storage"
        if weight.dtype not in _DTYPES or weight.dtype != weights.gate.dtype or weight.device != weights.gate.device:
            return f"{name} is {weight.dtype} on {weight.device}; gate is {weights.gate.dtype} on {weights.gate.device}"
    return None


class RehomedFFN:
    """One host FFN's weights in buffers of their own.

    Attributes: gate_up [2, n, d], down [d, n], bias [2, n] or None, all in the host's dtype; memory, the slice of the n
    that is the memory's; factors, 1 for the gate rows and tau for the key rows, [2, 1, 1] float32. None of them is there
    while `reason` says why.
    """

    gate_up: Tensor
    down: Tensor
    bias: Tensor | None
    memory: slice
    factors: Tensor

    def __init__(self, ffn: GatedFFN, state: MemoryState, arena: SlotArena, index: int, model: nn.Module):
        """index: the layer's place in its arena."""
        self.ffn, self.state, self.arena, self.index, self.model = ffn, state, arena, index, model
        self.reason: str | None = "not moved in yet"  # why the buffers are not used
        self.shared = False  # whether the weights lie in another memory's buffers
        self.parameters: tuple[Tensor | None, ...] = ()
        self._addresses: tuple[int, ...] = ()
        self._refused_at: tuple[int, ...] | None = None  # where the weights lay when they could not be moved
        self.scale: float | None = None  # tau, as in factors
        self.generation = 0  # of the slots that the memory's rows were written from
        self.handle: RemovableHandle | None = None  # of the hook on the FFN's state_dict

    # ---- moving ----------------------------------------------------------------------------------------------
    def adopt(self, users: Counter) -> None:
        """Moves the weights into new buffers; where that cannot be, `reason` says why and nothing has changed."""
        if (problem := obstacle(self.ffn, users)) is not None:
            self.reason = problem
            return
        host = self.ffn.weights()
        m, d = host.gate.shape
        rank = self.state.rank
        n = -(-(m + rank) // _ALIGNMENT) * _ALIGNMENT
        with torch.inference_mode(False), torch.no_grad():
            gate_up, down = host.gate.new_zeros(2, n, d), host.gate.new_zeros(d, n)
            bias = None if host.gate_bias is None and host.up_bias is None else host.gate.new_zeros(2, n)
            places = [
                gate_up[0, :m],
                gate_up[1, :m],
                down[:, :m],
                None if bias is None or host.gate_bias is None else bias[0, :m],
                None if bias is None or host.up_bias is None else bias[1, :m],
            ]
            for parameter, place in zip(host, places, strict=False):
                if parameter is not None and place is not None:
                    place.copy_(parameter)
                    parameter.data = place
        self.gate_up, self.down, self.bias, self.memory = gate_up, down, bias, slice(m, m + rank)
        self.parameters = tuple(host[: len(places)])
        self._addresses = self._where(self.parameters)
        self.reason, self.generation = None, 0
        if self.handle is None:
            self.handle = self.ffn.module.register_state_dict_post_hook(_with_storage_of_its_own)

    def release(self) -> None:
        """Gives the parameters that are still here contiguous storage of their own, bitwise the same."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter, address in zip(self.parameters, self._addresses, strict=False):
                if parameter is not None and parameter.data_ptr() == address:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self.reason, self.parameters, self._addresses = "detached", (), ()
        self.scale = None
        for buffer in ("gate_up", "down", "bias", "factors"):
            self.__dict__.pop(buffer, None)

    @staticmethod
    def _where(parameters) -> tuple[int, ...]:
        return tuple(0 if parameter is None else parameter.data_ptr() for parameter in parameters)

    def _is_in_place(self) -> bool:
        return bool(self._addresses) and self._where(self.ffn.weights()[: len(self._addresses)]) == self._addresses

    # ---- using it --------------------------------------------------------------------------------------------
    def ready(self) -> bool:
        """Whether the buffers hold host and memory as they are now; moves the weights and refreshes as needed."""
        if self.shared:
            return False
        if not self._is_in_place():
            with self.state.exclusion.lock:
                if not (self._is_in_place() or self._adopt_again()):
                    return False
        if self.generation != self.state.generation:
            with self.state.exclusion.lock:
                self.refresh()
        return True

    def _adopt_again(self) -> bool:
        refused = self._where(self.ffn.weights())
        if refused == self._refused_at:
            return False
        self.release()
        self.adopt(storage_users(self.model))
        self._refused_at = None if self.reason is None else refused
        return self.reason is None

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the memory's rows from the slots."""
        slots, scale = self.arena.slots[self.index].detach(), self.arena.scales[self.index]
        if scale != self.scale:
            self.factors, self.scale = slots.new_tensor([1.0, scale]).view(2, 1, 1), scale
        torch.mul(slots[:VALUE], self.factors, out=self.gate_up[:, self.memory])
        self.down[:, self.memory].copy_(slots[VALUE].T)
        self.generation = self.state.generation

    def status(self) -> str:
        """Where the weights are, in words for Memory.status()."""
        if self.shared:
            return "not rehomed: the weights are shared with the memory this one was forked from"
        if self.reason is None and not self._is_in_place():
            return "rehomed; the weights have been moved since and move back in at the next forward"
        return "rehomed: host and memory in one matrix" if self.reason is None else f"not rehomed: {self.reason}"

    def __deepcopy__(self, memo):
        """In a copied model the copied weights move at the next forward; in a fork they stay where they are."""
        new = memo[id(self)] = object.__new__(RehomedFFN)
        parts = self.ffn, self.state, self.arena, self.index, self.model
        RehomedFFN.__init__(new, *copy.deepcopy(parts, memo))
        gate = self.ffn.weights().gate
        new.shared = memo.get(id(gate)) is gate
        new.handle = copy.deepcopy(self.handle, memo)  # of the hook that the copied FFN has
        return new


def _with_storage_of_its_own(module: nn.Module, state_dict: dict, prefix: str, _: dict) -> None:
    """A state_dict hook: what is a part of a larger storage becomes a copy. Parameters themselves (keep_vars) stay."""
    for name, tensor in state_dict.items():
        if name.startswith(prefix) and not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
                state_dict[name] = tensor.clone(memory_format=torch.contiguous_format)


# ---- the mathematics -----------------------------------------------------------------------------------------
def rehomed_forward(x: Tensor, rehomed: RehomedFFN, down_bias: Tensor | None, activation: int, save: bool):
    """-> y [T, d] and the pre-activations [T, 2, n] of host and memory, None unless `save`."""
    n, d = rehomed.gate_up.shape[1:]
    gate_up = F.linear(x, rehomed.gate_up.view(2 * n, d), None if rehomed.bias is None else rehomed.bias.view(2 * n))
    gate, up = gate_up.tensor_split(2, dim=1)
    hidden = gate.new_empty(gate.shape)
    _C.glu_activation_forward(gate, up, hidden, activation, 1.0, stream_of(x))
    return F.linear(hidden, rehomed.down, down_bias), gate_up.view(-1, 2, n) if save else None


def rehomed_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    gate_up_weight: Tensor,
    down: Tensor,
    memory: slice,
    factors: Tensor,
    activation: int,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """-> dx [T, d] or None, the products [2, r, d] that times `factors` are the gradient of G and K, and that of V [r, d].

    gate_up: the saved pre-activations [T, 2, n]; only the memory's, [T, 2, r], where dx is not needed.
    """
    if not needs_dx:
        down, memory = down[:, memory], slice(0, memory.stop - memory.start)
    gate, up = gate_up.unbind(1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.unbind(1)
    stream = stream_of(x)
    _C.glu_activation_backward(dy @ down, gate, up, d_gate, d_up, None, activation, 1.0, stream)
    hidden = gate.new_empty(len(x), memory.stop - memory.start)
    _C.glu_activation_forward(gate[:, memory], up[:, memory], hidden, activation, 1.0, stream)
    d_gate_key = torch.bmm(d_gate_up[:, :, memory].permute(1, 2, 0), x.expand(2, *x.shape))
    dx = d_gate_up.flatten(1) @ gate_up_weight.flatten(0, 1) if needs_dx else None
    return dx, d_gate_key, hidden.T @ dy


class RehomedFunction(torch.autograd.Function):
    """apply(x [T, d], slots, rehomed, down_bias, activation index, slots_grad) -> y [T, d]; as autograd.GluFfnFunction."""

    @staticmethod
    def forward(ctx, x, slots, rehomed, down_bias, activation, slots_grad):
        y, gate_up = rehomed_forward(x, rehomed, down_bias, activation, save=True)
        if not ctx.needs_input_grad[0]:
            gate_up = gate_up[:, :, rehomed.memory].contiguous()
        ctx.save_for_backward(x, gate_up, rehomed.gate_up, rehomed.down, rehomed.factors)
        ctx.memory, ctx.activation = rehomed.memory, activation
        ctx.slots_grad, ctx.slots_dtype = slots_grad, slots.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate_up, gate_up_weight, down, factors = ctx.saved_tensors
        needs_dx, needs_slots = ctx.needs_input_grad[:2]
        dx, d_gate_key, d_value = rehomed_backward(
            dy, x, gate_up, gate_up_weight, down, ctx.memory, factors, ctx.activation, needs_dx
        )
        if ctx.slots_grad is not None:
            ctx.slots_grad[:VALUE].addcmul_(d_gate_key, factors)
            ctx.slots_grad[VALUE].add_(d_value)
            return dx, None, None, None, None, None
        d_slots = torch.cat([d_gate_key * factors, d_value[None]]).to(ctx.slots_dtype) if needs_slots else None
        return dx, d_slots, None, None, None, None
