"""The host's requires_grad: off while a memory is attached, and on again where it was attach that turned it off."""

import copy
from typing import Any
from weakref import WeakSet

from torch import Tensor, inference_mode, nn
from torch.utils.weak import WeakIdKeyDictionary

# Of each host tensor that attach froze, the freezes that still hold: a fork's host is the same tensors.
_holders: Any = WeakIdKeyDictionary()


class HostFreeze:
    """What one memory froze of its host."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.frozen: dict[str, Tensor] = {}

    def hold(self) -> None:
        """Turns requires_grad off wherever it is on."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen[name] = parameter
            elif _holders.get(parameter):  # frozen by the memory of another model on the same weights
                self.frozen[name] = parameter
        self._register()

    def _register(self) -> None:
        for parameter in self.frozen.values():
            _holders.setdefault(parameter, WeakSet()).add(self)

    def release(self) -> None:
        """Turns requires_grad on again where it is still as `hold` left it and no other memory needs it so.

        Where a library has since built modules of its own around the host's (PEFT's adapters), what is trainable is its
        affair, and stays.
        """
        now = {id(parameter): name for name, parameter in self.model.named_parameters()}
        rebuilt = any(id(parameter) in now and now[id(parameter)] != name for name, parameter in self.frozen.items())
        for parameter in self.frozen.values():
            holders = _holders.get(parameter, WeakSet())
            holders.discard(self)
            if not holders and not rebuilt:
                with inference_mode(parameter.is_inference()):  # only there may such a tensor be asked for a gradient
                    parameter.requires_grad_(True)
        self.frozen = {}

    def follow(self) -> None:
        """The model's present parameters of the same names stand for those frozen: merging put wider ones in their place."""
        now = dict(self.model.named_parameters())
        for name, parameter in self.frozen.items():
            if now.get(name, parameter) is not parameter:
                _holders.get(parameter, WeakSet()).discard(self)
        self.frozen = {name: now.get(name, parameter) for name, parameter in self.frozen.items()}
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostFreeze":
        """Of a copied model: it holds what the original held, of tensors of its own or, in a fork, of the same ones."""
        new = memo[id(self)] = object.__new__(HostFreeze)
        new.model, new.frozen = copy.deepcopy((self.model, self.frozen), memo)
        new._register()
        return new
