"""The backends of the FFN with memory, and which one computes. Each module has the same functions:

matmul     torch's matrix products between native kernels: any device
cuda       hand-written CUDA kernels ("fused" on a GPU)
cpu        matrix products of our own on the CPU ("fused" on the CPU)
"""

from types import ModuleType

from torch import Tensor

from . import cpu, cuda, matmul


def fused_backend(x: Tensor) -> ModuleType:
    """The module of the fused backend where x lies."""
    return cpu if x.is_cpu else cuda


def native_backend(op: str, x: Tensor, gate_weight: Tensor, backend: str) -> ModuleType:
    """The module that computes for a backend other than "reference": `matmul` or a fused one; ValueError says why not."""
    if backend == "matmul":
        return matmul
    m, d = gate_weight.shape
    module = fused_backend(x)
    if backend == "auto":
        return module if module.is_faster(x, x.numel() // d, d, m) else matmul
    if problem := module.obstacle(x, d, m):
        raise ValueError(f"{op}: backend is 'fused', but {problem}")
    return module
