"""Weights that are spread over processes by FSDP2 (fully_shard), which gathers them for each forward.

Nothing here imports torch.distributed.fsdp: whose weights are sharded has done so.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from locas_ext.ops.ranks import Ranks

from .split import is_split, local, ranks_of


def _fsdp_module() -> Any:
    """The class of modules that fully_shard was applied to; None where there are none, and no model need be walked through."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind if kind is not None and kind.__subclasses__() else None  # which fully_shard makes, one per class of modules


def fsdp_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that fully_shard was applied to, each with its name, from the outside in."""
    kind = _fsdp_module()
    return [] if kind is None else [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def own_class(module: nn.Module) -> type:
    """A module's class, without what fully_shard has put before it."""
    kind, order = _fsdp_module(), type(module).__mro__
    return order[order.index(kind) + 1] if kind in order else order[0]


def fsdp_obstacle(model: nn.Module) -> str | None:
    """What of a model FSDP2 has sharded, for messages; None: nothing."""
    if not (names := [name or "the model" for name, _ in fsdp_modules(model)]):
        return None
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"FSDP2 (fully_shard) gathers the weights of {told} for each forward"


def fsdp_ranks(model: nn.Module) -> Ranks | None:
    """The processes over which FSDP2 shards a model; None where it does not. ValueError for a mesh that has no one group."""
    if not fsdp_modules(model):
        return None
    let_go(model)
    parts = [parameter for parameter in model.parameters() if is_split(parameter)]
    if not parts:
        return None
    mesh: Any = parts[0].device_mesh  # type: ignore[attr-defined]
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        raise ValueError(
            f"FSDP2 shards {type(model).__name__} over a mesh {tuple(mesh.shape)} of some of {dist.get_world_size()} "
            "processes; expected a mesh of one dimension, or one of all processes"
        )
    return Ranks(group, dist.get_rank(group), mesh.size(), local(parts[0]).device)


def check_not_flattened(model: object) -> None:
    """ValueError for a model in which the FSDP before fully_shard has made one vector of each module's weights."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, kind):
            raise ValueError(
                f"{name or 'the model'} is a FullyShardedDataParallel, which flattens its weights; expected FSDP2, "
                "torch.distributed.fsdp.fully_shard, or a host that is whole"
            )


def companions(model: nn.Module) -> Ranks | None:
    """The processes that run a model together, each with a part of its weights; None: this one runs it alone."""
    return ranks_of(model) or fsdp_ranks(model)


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Inside, outside of forwards, the weights of one module of a model are whole. All processes have to ask at once."""
    modules, inside = [unit for _, unit in fsdp_modules(model)], set(module.modules())
    around = next((unit for unit in reversed(modules) if module in set(unit.modules()) - {unit}), None)
    units = [unit for unit in modules if unit in inside] + ([] if around is None else [around])
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()


def let_go(model: nn.Module) -> None:
    """Frees weights that FSDP2 still holds gathered, so that the model's parameters are the sharded ones."""
    for _, module in fsdp_modules(model):
        module.reshard()
