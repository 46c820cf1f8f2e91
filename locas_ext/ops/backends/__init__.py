"""The backends of the operations, and which one computes. Each is a module with the interface of base.py:

matmul     torch's matrix products between native kernels: any device
cuda       hand-written CUDA kernels ("fused" on a GPU)
cpu        matrix products of our own on the CPU ("fused" on the CPU)
reference  plain torch: any device, any float dtype
"""

from torch import Tensor

from locas_ext.ops.activations import has_parameters

from . import cpu, cuda, matmul, reference
from .base import Backend, FusedBackend


def fused_backend(x: Tensor) -> FusedBackend:
    """The fused backend where x lies."""
    return cpu if x.is_cpu else cuda


def sideway_backend(backend: str) -> Backend:
    """What computes a memory alone."""
    return reference if backend == "reference" else matmul


def glu_ffn_backend(op: str, x: Tensor, gate_weight: Tensor, backend: str, activation: str = "silu") -> Backend:
    """What computes a host's FFN, with or without memory; ValueError says why it cannot be the fused one."""
    if backend == "reference":
        return reference
    if backend == "matmul":
        return matmul
    if has_parameters(activation):
        if backend == "fused":
            raise ValueError(f"{op}: backend is 'fused', whose kernels do not take {activation!r}; expected auto or matmul")
        return matmul
    m, d = gate_weight.shape
    fused = fused_backend(x)
    if backend == "auto":
        return fused if fused.is_faster(x, x.numel() // d, d, m) else matmul
    if problem := fused.obstacle(x, d, m):
        raise ValueError(f"{op}: backend is 'fused', but {problem}")
    return fused
