"""A module's forward replaced by another function, and back."""

from collections.abc import Callable

from torch import nn


class ForwardPatch:
    """A module whose forward another function stands in for."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward
        # accelerate keeps the real forward in _old_forward and calls it from its hook: bind beneath it.
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.replaced = module.__dict__.get(name)
        self.original = getattr(module, name)
        setattr(module, name, forward)

    def end(self) -> None:
        attributes = self.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) != self.forward:  # equal, not identical: deepcopy makes a second method object
                continue
            if self.replaced is None:
                del attributes[name]
            else:
                attributes[name] = self.replaced
