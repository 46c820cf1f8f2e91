"""The FFN with memory as hand-written CUDA kernels: the `fused` backend, for bfloat16 and float16.

Host and memory go through the same kernels as two sources of one product, so nothing of [T, m] but what the backward
needs is written to memory, and the memory costs no launch of its own (docs/kernels.md). Functions and arguments are those
of the `matmul` backend (matmul.py).
"""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import HostWeights, InputProjections, Saved, SlotFactors, SlotViews, stream_of

from . import matmul
from .cuda_families import FASTER, family

NAME = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
BUILT = _C.build_info()["cuda_architectures"] is not None


def obstacle(like: Tensor, d: int, m: int) -> str | None:
    """Why the kernels cannot take an FFN of these sizes on tensors like this one, or None."""
    if not like.is_cuda:
        return f"the fused kernels need a CUDA device; this is {like.device.type}"
    if not BUILT:
        return "this build has no CUDA kernels"
    if not family(like):
        return "the fused kernels need a GPU of compute capability 8.0 or newer"
    if like.dtype not in DTYPES:
        return f"the fused kernels take bfloat16 and float16; this is {like.dtype}"
    if d % _C.PIECE_ELEMENTS or m % _C.PIECE_ELEMENTS:
        sizes = f"hidden_size is {d} and intermediate_size {m}"
        return f"the fused kernels need sizes that are multiples of {_C.PIECE_ELEMENTS}; here {sizes}"
    return None


def is_faster(like: Tensor, tokens: int, d: int, m: int) -> bool:
    """What backend "auto" goes by for inputs like this tensor: whether the kernels take them and were faster."""
    return obstacle(like, d, m) is None and FASTER[family(like)].holds(tokens, d)


def choice(like: Tensor, d: int, m: int) -> str:
    """What backend "auto" comes to for tensors like this one, in words."""
    return FASTER[family(like)].words(d) if obstacle(like, d, m) is None else "matmul"


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows can be read in 16-byte pieces, else a copy that can."""
    if matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def saved_shapes(tokens: int, m: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what the backward needs: gate and up, host then memory, its slots in whole pieces of 16 bytes."""
    return [(tokens, m + -(-rank // _C.PIECE_ELEMENTS) * _C.PIECE_ELEMENTS)] * 2


def _workspace(x: Tensor, floats: int) -> Tensor | None:
    return torch.empty(floats, dtype=torch.float32, device=x.device) if floats else None


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, Saved]:
    """-> y [T, d] and, with `save`, the pre-activations gate and up."""
    x = _rows(x)
    tokens, d = x.shape
    m, rank = host.gate.shape[0], slots.value.shape[0]
    hidden = x.new_empty(saved_shapes(tokens, m, rank)[0])
    gate, up = (torch.empty_like(hidden), torch.empty_like(hidden)) if save else (None, None)
    y = x.new_empty(tokens, d)
    if tokens:
        workspace = _workspace(x, _C.glu_ffn_forward_workspace(tokens, d, m, rank, x.device.index))
        _C.glu_ffn_forward(x, *host, *slots, hidden, gate, up, y, workspace, activation, scale, stream_of(x))
    return y, (gate, up) if save else ()


def glu_ffn_backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    host: HostWeights,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_dx: bool,
    slots_grad: Tensor | SlotFactors | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [T, d] and the slots' gradient [3, r, d] in float32. SlotFactors keep its factors instead."""
    x, dy = _rows(x), _rows(dy)
    gate, up, *_ = saved  # a registered operator has a third, empty one
    tokens, d = x.shape
    m, rank = host.gate.shape[0], slots.value.shape[0]
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    memory_hidden = x.new_empty(tokens, gate.shape[1] - m)
    dx = x.new_empty(tokens, d) if needs_dx else None
    d_slots: Tensor | None
    if slots_grad is None:
        d_slots = torch.zeros(3, rank, d, dtype=torch.float32, device=x.device)
    else:
        d_slots = None if isinstance(slots_grad, SlotFactors) else slots_grad
    if tokens:
        workspace = _workspace(x, _C.glu_ffn_backward_workspace(tokens, d, m, rank, x.device.index))
        _C.glu_ffn_backward(
            dy,
            x,
            *host,
            *slots,
            gate,
            up,
            d_gate,
            d_up,
            memory_hidden,
            dx,
            d_slots,
            workspace,
            activation,
            scale,
            stream_of(x),
        )
    if isinstance(slots_grad, SlotFactors):
        slots_grad.keep(d_gate[:, m : m + rank], d_up[:, m : m + rank], memory_hidden[:, :rank], x, dy)
    return dx, d_slots if slots_grad is None else None


def neuron_importance(x: Tensor, host: HostWeights | InputProjections, activation: int) -> Tensor:
    """Mean over the tokens of |act(gate) * up|: [m] float32."""
    x = _rows(x)
    m = host.gate.shape[0]
    importance = torch.empty(m, dtype=torch.float32, device=x.device)
    workspace = _workspace(x, _C.neuron_importance_workspace(x.shape[0], m, x.device.index))
    _C.neuron_importance(x, host.gate, host.up, host.gate_bias, host.up_bias, importance, workspace, activation, stream_of(x))
    return importance


# Without a host's products there is nothing to fuse.
sideway_glu_forward, sideway_glu_backward = matmul.sideway_glu_forward, matmul.sideway_glu_backward
sideway_mlp_forward, sideway_mlp_backward = matmul.sideway_mlp_forward, matmul.sideway_mlp_backward
