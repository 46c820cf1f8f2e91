"""Which way an operation's tensors go.

plain tensors in eager code                      to the native kernels, which read them by address
anything else                                    to the registered operators (torch_library.py), which whoever traces,
                                                 intercepts or wraps tensors can see and record
in a transform of torch.func or forward-mode AD  through plain torch (reference.py), the only one with all their rules
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active


def by_address(*tensors: Tensor) -> bool:
    """Whether all of these are plain tensors with data on a CPU or a GPU, and nobody but eager code computes with them.

    Each condition is one that must hold, so a kind of tensor that nobody thought of is not a reason to read its address.
    Takes about 1.7 us and 0.2 us more per tensor (on a busy EPYC; bench/ffn.py measures whole calls).
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _tracing_state() is not None or transformed():
        return False
    # torch.set_default_device only changes where new tensors are made; the operations here always say where.
    if _function_modes() and any(type(_function_mode(i)) is not DeviceContext for i in range(_function_modes())):
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if tensor.layout is not torch.strided or tensor.is_neg() or (not tensor.data_ptr() and tensor.numel()):
            return False
    return True


def transformed() -> bool:
    """Whether the code runs in a transform of torch.func (vmap, grad, jvp, ...) or in forward-mode AD.

    torch.compile knows both conditions, so a compiled function may ask too.
    """
    return _transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """RuntimeError in a transform, for an operation that works in place."""
    if transformed():
        raise RuntimeError(f"{op}: works in place and cannot run in a transform of torch.func or in forward-mode AD")
