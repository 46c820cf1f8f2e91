"""What a host calls its KV cache: `cache` in transformers 5.24 and later, `past_key_values` before and in code of its own."""

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

_NAMES = ("cache", "past_key_values", "layer_past")  # the last one in GPT-NeoX's attention


@cache
def _name_in(kind: Any) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a forward of the module reads behind a cache; nothing where that is None."""
    kind: Any = type(module)
    return {} if cache is None else {_name_in(kind): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's named arguments, or None."""
    for name in _NAMES:
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def returned_cache(output: Any) -> Any:
    """The cache that a forward has returned, or None."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
