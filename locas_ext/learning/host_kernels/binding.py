"""The pieces stand in for the host's own forwards only while a window is read."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from locas_ext.hosts.formula import has_hooks
from locas_ext.hosts.split import only_sums_gradients


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
    """Inside, each module of the pieces runs what stands in for its forward, in this thread."""
    before, thread = list[tuple[nn.Module, Any]](), threading.get_ident()
    try:
        for piece in pieces:
            forward = _in_thread(piece, thread)
            before.append((piece.module, piece.module.__dict__.get("forward")))
            piece.module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                module.__dict__.pop("forward", None)
            else:  # what splits the module among processes
                module.__dict__["forward"] = own


def why_not_bound(module: nn.Module) -> str | None:
    """Why nothing may stand in for this module's forward, or None."""
    if "forward" in module.__dict__ and not only_sums_gradients(module):
        return "its forward is somebody else's"
    if has_hooks(module):
        return "it has hooks"
    return None
