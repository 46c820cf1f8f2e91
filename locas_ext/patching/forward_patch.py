"""A module's forward replaced by another function, and back."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def forward_name(module: nn.Module) -> str:
    """accelerate keeps the real forward in _old_forward and calls it from its hook: what stands in is bound beneath it."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


class ForwardPatch:
    """A module whose forward a method of another object stands in for. It does not keep that object alive."""

    def __init__(self, module: nn.Module, forward: Callable):
        """forward: a bound method"""
        self.module = module
        self.method: Any = forward.__func__  # type: ignore[attr-defined]
        name = forward_name(module)
        self.replaced = module.__dict__.get(name)
        setattr(module, name, forward)

    def original(self, *arguments: Any, **named: Any) -> Any:
        """Calls the module's own forward: that of its class as it is now, unless the module had one of its own."""
        if self.replaced is not None:
            return self.replaced(*arguments, **named)
        return type(self.module).forward(self.module, *arguments, **named)

    def end(self, owner: object) -> None:
        """Gives the module's own forward back where `owner`'s method still stands in for it."""
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            now = attributes.get(name)
            if getattr(now, "__self__", None) is not owner or getattr(now, "__func__", None) is not self.method:
                continue
            if self.replaced is None:
                del attributes[name]
            else:
                attributes[name] = self.replaced


def the_input(arguments: tuple, named: dict) -> Tensor:
    """What a module is given first, by position or by name."""
    return arguments[0] if arguments else next(iter(named.values()))
