"""The pieces stand in for the host's own forwards only while a window is read."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


class Piece(NamedTuple):
    """A module, and what stands in for its forward."""

    module: nn.Module
    forward: Callable[..., Any]


def _in_thread(piece: Piece, thread: int) -> Callable[..., Any]:
    """What stands in for a forward in one thread; in others, which may read the host meanwhile, it is the module's own."""
    own = piece.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (piece.forward if threading.get_ident() == thread else own)(*args, **kwargs)

    return forward


@contextmanager
def bound(pieces: Sequence[Piece]) -> Iterator[None]:
    """Inside, each module of the pieces runs what stands in for its forward, in this thread. None may have one of its own."""
    done, thread = 0, threading.get_ident()
    try:
        for piece in pieces:
            piece.module.__dict__["forward"] = _in_thread(piece, thread)
            done += 1
        yield
    finally:
        for piece in pieces[:done]:
            del piece.module.__dict__["forward"]


def why_not_bound(module: nn.Module) -> str | None:
    """Why nothing may stand in for this module's forward, or None."""
    if "forward" in module.__dict__:
        return "its forward is somebody else's"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return None
