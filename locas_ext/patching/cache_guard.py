"""Keeps `generate` from continuing on a KV cache that the memory, as it was then, no longer stands for.

Every forward stamps its cache with the state of the memory that filled it; `generate` compares.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from locas_ext.hosts.cache_names import given_cache
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scope_of, scoped

_STAMP = "_locas_memory_state"
_SEVERAL = -1  # filled by more than one state of the memory


def is_empty(cache: Any) -> bool:
    """Whether a KV cache holds nothing yet."""
    length = cache.get_seq_length()
    return not (length.any() if isinstance(length, Tensor) else length)


def is_first_filling(cache: Any, state: MemoryState) -> bool:
    """What `stamp` asks of the cache that a forward is about to fill; it does not ask where the stamp stays as it is."""
    return cache is None or (getattr(cache, _STAMP, None) != state.output_state and is_empty(cache))


def stamp(cache: Any, now: int, fresh: bool) -> None:
    """Notes down which state of the memory filled a cache; fresh: whether this was its first filling.

    now: the state's `output_state` as the forward has seen it, which has looked for changes from outside
    """
    # A cache without a stamp comes from before attach: the host alone filled it.
    setattr(cache, _STAMP, now if fresh or getattr(cache, _STAMP, 0) == now else _SEVERAL)


class StaleCacheGuard:
    """Binds a `generate` to a model; unbind() takes it away."""

    def __init__(self, model: PreTrainedModel, state: MemoryState):
        self.model, self.state = model, state

    def bind(self) -> None:
        self.replaced = self.model.__dict__.get("generate")
        self.original: Callable[..., Any] | None = getattr(self.model, "generate", None)
        if self.original is not None:
            self.model.generate = self._generate

    def unbind(self) -> None:
        if self.original is None:
            return
        if self.replaced is None:
            self.model.__dict__.pop("generate", None)
        else:
            self.model.generate = self.replaced
        self.original = None

    def _generate(self, *args, allow_stale_cache: bool = False, **kwargs):
        """The model's own generate.

        A `past_key_values` (or `cache`) that was filled under another state of the memory is refused with ValueError unless
        allow_stale_cache is True. The slots are compared with what was last seen once, and not again for each token.
        """
        assert self.original is not None, "bind() puts this in the place of an original only"
        cache = given_cache(kwargs)
        self.state.sync()
        now = self.state.output_state
        if cache is not None and not allow_stale_cache and not is_empty(cache) and getattr(cache, _STAMP, 0) != now:
            raise ValueError(
                "past_key_values was filled before the memory changed, so the text in it was read with another "
                "memory; start from a fresh cache, or pass allow_stale_cache=True to use it all the same"
            )
        if not self.state.watched or scope_of(self.state).looked:
            return self.original(*args, **kwargs)
        with scoped(self.state, looked=True):
            return self.original(*args, **kwargs)
