"""Whether a host's FFNs are as they were when they were last looked at: runs once per forward of the decoder."""

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .ffn import HostFFN
from .registry import Host

_requires_grad = attrgetter("requires_grad")


class SeenHost:
    """What decides how a host's patched FFNs compute, as it is now.

    The FFN of each layer, and inside it the modules, their classes and forwards, the projections' parameters and whether
    these require a gradient; and how many hooks anybody has registered anywhere. `holds` compares by identity, in loops
    that stay in C: a decode step of a small host takes a few milliseconds.
    """

    def __init__(self, host: Host, decoder: nn.Module, ffns: Sequence[HostFFN]):
        self._hooks = RemovableHandle.next_id
        places = host.ffn_places(decoder)
        modules: list[Any] = []
        parameters: list[Any] = []
        for ffn in ffns:
            places += ffn.places()
            modules += [ffn.module, *ffn.relevant_modules()]
            parameters += [each for part in ffn.projections() for each in part._parameters.values() if each is not None]
        self._dicts, self._keys = map(list, zip(*places, strict=True))
        self._values = list(map(dict.get, self._dicts, self._keys))
        self._objects = modules + parameters
        self._kinds = list(map(type, self._objects))
        self._classes: list[Any] = list({type(module) for module in modules})
        self._forwards = [kind.forward for kind in self._classes]
        self._parameters, self._learn = parameters, list(map(_requires_grad, parameters))

    def holds(self) -> bool:
        """Whether all of it is still so."""
        return (
            self._hooks == RemovableHandle.next_id
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            and all(map(is_, map(type, self._objects), self._kinds))
            and [kind.forward for kind in self._classes] == self._forwards
            and list(map(_requires_grad, self._parameters)) == self._learn
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied host was not looked at."""
