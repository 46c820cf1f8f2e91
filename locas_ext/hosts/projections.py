"""One projection of a host's FFN, whatever it is: whether its weight can be used directly, where it lies, what it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .formula import bound_forward, class_name
from .split import is_split

NO_WEIGHTS = (
    "the host is on the meta device, where it has no weights; load them first: model.to_empty(device=...), then "
    "model.load_state_dict(...)"
)


def _only_moves_the_input(linear: nn.Module) -> bool:
    """Whether the forward in an instance's dict is its class's, behind what a memory or accelerate has put before it.

    accelerate's hook of a device_map brings the input to the weight. The FFN's own hook has then brought it already, so
    the weight may be used directly.
    """
    if bound_forward(linear) is not None:
        return False
    hook: Any = linear.__dict__.get("_hf_hook")
    if hook is None:
        return True
    forward: Any = linear.__dict__["forward"]
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not (hook.offload or hook.io_same_device)
        and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
    )


def linear_obstacle(linear: nn.Module, plain: type[nn.Module] = nn.Linear, gathered: bool = False) -> str | None:
    """Why this projection's weight cannot be used directly, or None. Runs on every call, so it is kept short.

    gathered: whether a sharded weight is taken for the plain one that it is during a forward
    """
    if type(linear) is not plain:
        return f"is a {class_name(linear)}, not a plain {plain.__name__}"
    own = linear.__dict__  # looked into directly, which takes less than an attribute
    if "forward" in own and not _only_moves_the_input(linear):
        return "has a forward of its own (a hook of another library)"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks"
    if _has_any_global_hook():
        return "has hooks that all modules have"
    parameters = own["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) is not nn.Parameter and not (gathered and is_split(weight)):
        return f"holds a {type(weight).__name__}, not a plain Parameter"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "requires a gradient"
    if weight.is_meta:
        return "is on the meta device"
    return None


def projection_device(projection: nn.Module) -> torch.device | None:
    """Where a projection is computed: where its weights lie, or where accelerate's hook brings them.

    None if it has no tensors, or if its hook is not one that says. ValueError for weights that are not loaded.
    """
    for module in projection.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if not tensor.is_meta:
                return tensor.device
            if not hasattr(module, "_hf_hook"):
                raise ValueError(NO_WEIGHTS)
            device = getattr(module._hf_hook, "execution_device", None)
            return None if device is None else torch.device(device)
    return None


@torch.no_grad()
def dense_weight(linear: nn.Module, like: Tensor) -> Tensor:
    """The weight [out, in] of any linear module, in `like`'s dtype where it has to be computed.

    A quantized, LoRA-wrapped or offloaded projection is asked what it does to the unit vectors, which is its weight. One that
    is split among processes is gathered, by all of them.
    """
    weight: Any = linear._parameters.get("weight")
    if is_split(weight):
        return weight.full_tensor()
    if type(linear) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta:
        return weight if type(linear) is nn.Linear else weight.T
    if (size := getattr(linear, "nx" if type(linear) is Conv1D else "in_features", None)) is None:
        raise ValueError(f"{type(linear).__name__} has no in_features, so its weight cannot be read")
    training = [module for module in linear.modules() if module.training]
    linear.eval()  # LoRA's dropout off
    try:
        zero = linear(like.new_zeros(1, size))
        block = 1024
        columns = [
            linear(torch.eye(min(block, size - start), size, dtype=like.dtype, device=like.device).roll(start, dims=1)) - zero
            for start in range(0, size, block)
        ]
    finally:
        for module in training:
            module.training = True
    return torch.cat(columns).T.contiguous()


def value_norms(down_weight: Tensor) -> Tensor:
    """[m]: L2 norms of the host's value rows, that is of the columns of W_down [d, m], in float32 or better."""
    dtype = torch.promote_types(down_weight.dtype, torch.float32)
    squares = down_weight.new_zeros(down_weight.shape[1], dtype=dtype)
    # Blocks of rows in one small buffer, which stay in the cache; vector_norm(dim=0) takes ten times as long.
    buffer = down_weight.new_empty(min(128, len(down_weight)), down_weight.shape[1], dtype=dtype)
    for rows in down_weight.detach().split(len(buffer)):
        squares += buffer[: len(rows)].copy_(rows).square_().sum(0)
    return squares.sqrt()
