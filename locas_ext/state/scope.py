"""What holds for a memory in one context only, a thread's or an asyncio task's, such as `disabled()`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scope:
    """One memory in one context. What is default everywhere is not kept at all.

    disabled: how many `disabled()` blocks are open
    observer: called with each patched FFN and its input [..., d], whether or not the memory is in use
    tap: while writing: takes a patched FFN, its input and its output, and returns the output to continue with
    accumulates: whether backwards add the slots' gradient into the arenas instead of handing it to autograd
    looked: whether changes from outside have been looked for already
    """

    disabled: int = 0
    observer: Callable[[Any, Tensor], None] | None = None
    tap: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    accumulates: bool = False
    looked: bool = False


_PLAIN = Scope()
_NOTHING: Mapping[Any, Scope] = {}
# By memory state. A mapping is never changed, only replaced: contexts are copied by reference.
scopes: ContextVar[Mapping[Any, Scope]] = ContextVar("locas_scopes", default=_NOTHING)


def _put(state: Any, scope: Scope) -> None:
    others = {key: value for key, value in scopes.get().items() if key is not state}
    scopes.set(others if scope == _PLAIN else {**others, state: scope})


def scope_of(state: Any) -> Scope:
    """The scope of a memory state in this context."""
    return scopes.get().get(state, _PLAIN)


@contextmanager
def scoped(state: Any, **changes: Any) -> Iterator[None]:
    """Changes fields of a memory's scope inside this block; `disabled` is added to, the others are replaced.

    Only these fields are put back at the end, so blocks of several memories may end in any order.
    """
    before = scope_of(state)
    if "disabled" in changes:
        changes = {**changes, "disabled": before.disabled + changes["disabled"]}
    _put(state, replace(before, **changes))
    try:
        yield
    finally:
        now = scope_of(state)
        restored = {name: getattr(before, name) for name in changes if name != "disabled"}
        if "disabled" in changes:
            restored["disabled"] = now.disabled - (changes["disabled"] - before.disabled)
        _put(state, replace(now, **restored))
