"""Hosts whose weights transformers has split among processes (`tp_plan="auto"`): DTensors, of which each process has a part.

Columns of gate and up lie with the neurons that they make, rows of down too: a process has whole neurons.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from locas_ext.ops.ranks import Ranks, through_memory

from .formula import SPLITTING, bound_forward, class_name, has_hooks, sums_gradients

DTensor: Any = None  # in a torch without torch.distributed
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

# What goes into a projection and comes out of it, as `_along` says it: by which dimension the projection is split, joined last.
_LAYOUTS = (("not", -1), (-1, "not"), ("not", "not"))


def is_split(tensor: Any) -> bool:
    """Whether a tensor is one of which each process has a part."""
    return type(tensor) is DTensor


def local(tensor: Any) -> Any:
    """This process's part of a tensor that is split, or the tensor itself; None of None."""
    if not is_split(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that a model was split among; None for one that was not. ValueError for a way that is not known here."""
    size = getattr(model, "tp_size", None)
    if size is None or size < 2:
        return None
    parts: list[Any] = [parameter for parameter in model.parameters() if is_split(parameter)]
    if not parts:
        raise ValueError(
            f"{type(model).__name__} is split among {size} processes, but its parameters are not DTensors (transformers "
            f"{transformers.__version__}); expected transformers 5.17 or later, or a model loaded without tp_plan"
        )
    mesh = parts[0].device_mesh
    if mesh.ndim != 1 or any(part.device_mesh != mesh for part in parts):
        raise ValueError(
            f"{type(model).__name__} is split in more ways than one (tensor parallel together with FSDP or expert parallel); "
            "expected one that is split by tp_plan alone"
        )
    return through_memory(Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size(), local(parts[0]).device))


def style_of(linear: nn.Module) -> Any:
    """What transformers has put around the forward of a module's class to split it: one of its styles; None for none such."""
    forward = bound_forward(linear)
    if getattr(forward, "__module__", None) != SPLITTING or not getattr(forward, "__closure__", None):
        return None
    inside = {name: cell.cell_contents for name, cell in zip(forward.__code__.co_freevars, forward.__closure__, strict=True)}
    original, module = inside.get("original_forward"), inside.get("module")
    if getattr(original, "__func__", None) is not type(linear).forward or module is None:
        return None
    shares = module._parameters.get("weight") is linear._parameters.get("weight")  # a copy's are the same weights
    return inside.get("self") if shares else None


def only_sums_gradients(module: nn.Module) -> bool:
    """Whether a frozen module's own forward is its class's: transformers would add up its parameters' gradients behind it."""
    return sums_gradients(bound_forward(module)) and not any(
        parameter.requires_grad for parameter in module.parameters(recurse=False)
    )


def _along(placement: Any) -> Any:
    """The dimension that a tensor is split along; "not" where each process has all of it, None where it is split otherwise."""
    if placement.is_replicate():
        return "not"
    return placement.dim if type(placement).__name__ == "Shard" else None


def split_obstacle(linear: nn.Module, dim: int, joins: bool = False) -> str | None:
    """Why the local part of a projection's weight [out, in] cannot be used directly, or None.

    dim: along which it has to be split: 0 where its outputs stay apart, 1 where they are summed
    joins: whether its outputs are put side by side instead, as an LM head's
    """
    style = style_of(linear)
    if type(linear) is not nn.Linear:
        return f"is a {class_name(linear)}, not a plain Linear"
    if type(style).__name__ != ("ColwiseParallel", "RowwiseParallel")[dim]:
        return "is not split by its neurons" if style is None else f"is split by a {type(style).__name__}"
    layouts = _along(style.input_layouts), _along(style.output_layouts)
    if not style.use_local_output or layouts != _LAYOUTS[2 if joins else dim]:
        return f"is split from {style.input_layouts} to {style.output_layouts}"
    if has_hooks(linear):
        return "has hooks"
    parameters: dict[str, Any] = linear._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if not is_split(weight) or [_along(placement) for placement in weight.placements] != [dim]:
        return "holds a weight that is not split by its neurons"
    if bias is not None and (not is_split(bias) or [_along(placement) for placement in bias.placements] != [(0, "not")[dim]]):
        return "holds a bias that is not split as its weight is"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "requires a gradient"
    return None


class SplitRows:
    """Rows [m, d] that are split among processes: which are taken, all processes get."""

    def __init__(self, part: Tensor, ranks: Ranks, total: int):
        """part: [m of this rank, d]; total: m"""
        self.part, self.ranks = part, ranks
        self.shape, self.device = torch.Size((total, part.shape[1])), part.device
        self.first = ranks.before(len(part))

    def __getitem__(self, index: Tensor) -> Tensor:
        inside = (index >= self.first) & (index < self.first + len(self.part))
        rows = self.part[(index - self.first).clamp(0, len(self.part) - 1)].masked_fill(~inside[:, None], 0)
        return self.ranks.total(rows)
