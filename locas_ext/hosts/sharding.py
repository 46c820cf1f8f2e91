"""Weights that are spread over processes by FSDP2 (fully_shard), which gathers them for each forward.

Nothing here imports torch.distributed.fsdp: whose weights are sharded has done so.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def _fsdp_module() -> Any:
    """The class of modules that fully_shard was applied to; None where nobody has imported it, so that there are none."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


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
