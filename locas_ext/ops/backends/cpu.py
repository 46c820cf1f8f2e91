"""The FFN with memory on the CPU with its own matrix products: the `fused` backend where there is no GPU.

One native call each for forward and backward (csrc/cpu/ffn.cpp): the memory is r more neurons behind the host's m, and
what lies between two products stays in the layout in which the next one reads it. The interface is base.py's. Takes float32
with AVX-512, bfloat16 with AVX-512 BF16.
"""

import torch
from torch import Tensor

from locas_ext import _C
from locas_ext.ops.types import HostWeights, Saved, SlotViews

from . import matmul

NAME = "cpu"
DTYPES = tuple(getattr(torch, name) for name in _C.build_info()["cpu_ffn"])
# From how many tokens it beats torch's products. On 2 cores of an EPYC 9004 the forward takes 0.3 to 1.02 of their time for 2
# to 64 tokens (d 256 to 2048, both dtypes); a single one, which fills a lane of 16, takes 0.5 to 1.5. More: bench/RESULTS.md.
LEAST_TOKENS = 2


def obstacle(like: Tensor, d: int, m: int) -> str | None:
    """Why the kernels cannot take an FFN of these sizes on tensors like this one, or None."""
    if not like.is_cpu:
        return f"these kernels are for the CPU; this is {like.device.type}"
    if not DTYPES:
        return "on the CPU the fused kernels need a processor with AVX-512"
    if like.dtype not in DTYPES:
        names = " and ".join(str(dtype) for dtype in DTYPES)
        return f"on this processor the fused kernels take {names}; this is {like.dtype}"
    if like.dtype == torch.bfloat16 and (d % 2 or m % 2):
        return f"the fused kernels need even sizes in bfloat16; here hidden_size is {d} and intermediate_size {m}"
    return None


def is_faster(like: Tensor, tokens: int, d: int, m: int) -> bool:
    """What backend "auto" goes by for inputs like this tensor: whether the kernels take them and were faster."""
    return tokens >= LEAST_TOKENS and obstacle(like, d, m) is None


def choice(like: Tensor, d: int, m: int) -> str:
    """What backend "auto" comes to for tensors like this one, in words."""
    return f"fused from {LEAST_TOKENS} tokens, else matmul" if obstacle(like, d, m) is None else "matmul"


def family(like: Tensor) -> str:
    """The instruction set that the kernels were compiled for."""
    return _C.build_info()["cpu_isa"]


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def saved_shapes(tokens: int, m: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what the backward needs: gate and up, tokens in whole vectors of 16, neurons of host and memory."""
    return [(2, -(-tokens // _C.CPU_TOKEN_MULTIPLE) * _C.CPU_TOKEN_MULTIPLE, m + rank)]


def glu_ffn_forward(
    x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
) -> tuple[Tensor, Saved]:
    """-> y [T, d] and, with `save`, the pre-activations that the backward needs, in an order of the kernels' own."""
    tokens, d = x.shape
    y = x.new_empty(tokens, d)
    saved = x.new_empty(saved_shapes(tokens, len(host.gate) if needs_dx else 0, len(slots.value))[0]) if save else None
    _C.cpu_glu_ffn_forward(
        _rows(x),
        _rows(host.gate),
        _rows(host.up),
        _rows(host.down),
        host.gate_bias,
        host.up_bias,
        host.down_bias,
        *slots,
        y,
        saved,
        activation,
        scale,
    )
    return y, (saved,) if save else ()


def glu_ffn_backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    host: HostWeights,
    slots: SlotViews,
    scale: float,
    activation: int,
    needs_dx: bool,
    slots_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [T, d] and the slots' gradient [3, r, d] in float32."""
    dx = x.new_empty(x.shape) if needs_dx else None
    rank, d = slots.value.shape
    d_slots = torch.zeros(3, rank, d, dtype=torch.float32, device=x.device) if slots_grad is None else slots_grad
    _C.cpu_glu_ffn_backward(
        _rows(dy),
        _rows(x),
        saved[0],
        _rows(host.gate),
        _rows(host.up),
        _rows(host.down),
        *slots,
        dx,
        d_slots,
        activation,
        scale,
    )
    return dx, d_slots if slots_grad is None else None


# Without a host's products there is nothing to fuse.
neuron_importance = matmul.neuron_importance
sideway_glu_forward, sideway_glu_backward = matmul.sideway_glu_forward, matmul.sideway_glu_backward
sideway_mlp_forward, sideway_mlp_backward = matmul.sideway_mlp_forward, matmul.sideway_mlp_backward
