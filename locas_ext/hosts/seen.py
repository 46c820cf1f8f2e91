"""Whether what was looked at is still as it was: dicts compared entry by entry, by identity, in loops that stay in C."""

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch.utils.hooks import RemovableHandle

Entry = tuple[dict[str, Any], str]  # a dict, and a key that it may or may not have
_requires_grad = attrgetter("requires_grad")


class SeenPlaces:
    """What some places hold now."""

    def __init__(self, places: Sequence[Entry]):
        self._dicts, self._keys = [place[0] for place in places], [place[1] for place in places]
        self._values = list(map(dict.get, self._dicts, self._keys))

    def hold(self) -> bool:
        """Whether they still hold the same objects."""
        return all(map(is_, map(dict.get, self._dicts, self._keys), self._values))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied host was not looked at."""


class SeenFFN:
    """What decides whether a host's FFN, without hooks, computes its family's formula on its own weights.

    Modules with their classes and forwards, parameters and whether they require a gradient, and how many hooks anybody has
    registered anywhere.
    """

    def __init__(self, places: Sequence[Entry], modules: list[Any], parameters: list[Any]):
        """modules: the FFN's own first"""
        self._hooks, self._places = RemovableHandle.next_id, SeenPlaces(places)
        self._objects, self._parameters = [*modules, *parameters], parameters
        self._kinds: list[Any] = list(map(type, self._objects))
        self._learn, self._forward = list(map(_requires_grad, parameters)), self._kinds[0].forward

    def holds(self) -> bool:
        """Whether all of it is still so."""
        return (
            self._hooks == RemovableHandle.next_id
            and self._places.hold()
            and all(map(is_, map(type, self._objects), self._kinds))
            and self._kinds[0].forward is self._forward
            and list(map(_requires_grad, self._parameters)) == self._learn
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied host was not looked at."""
