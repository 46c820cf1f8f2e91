"""Ctrl-C, and the signals that a command makes do the same: what takes note of them, and what they wait for."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def interrupt(signum: int, frame: Any) -> None:
    """What SIGTERM and SIGHUP may be handled by: a KeyboardInterrupt that knows its signal, where Ctrl-C's knows none."""
    raise KeyboardInterrupt(signum)


_INTERRUPTS = (signal.default_int_handler, interrupt)  # what raises KeyboardInterrupt


@contextmanager
def handled(handler: Callable[[int, Any], None], meaning: tuple = _INTERRUPTS) -> Iterator[None]:
    """Inside the block the signals that one of `meaning` handles, KeyboardInterrupt by default, call `handler` instead.

    None does in another thread, nor one that the caller handles otherwise or ignores.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in ENDING if signal.getsignal(each) in meaning}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, own in reversed(before.items()):  # Ctrl-C last: once it may raise, the others must be in place
            signal.signal(each, own)


@contextmanager
def noting(said: bytes = b"") -> Iterator[Callable[[], None]]:
    """Inside, these signals only take note. Yields what raises the KeyboardInterrupt, if one came.

    said: is written to standard error by the first
    """
    noted = 0  # the latest signal

    def handler(signum: int, frame: Any) -> None:
        nonlocal noted
        first, noted = not noted, signum
        if first and said:
            with suppress(OSError):  # a terminal that has hung up takes nothing
                os.write(2, said)  # print() may not be called from a signal handler

    def check() -> None:
        if noted == signal.SIGINT:
            raise KeyboardInterrupt  # as Python's own
        if noted:
            interrupt(noted, None)

    with handled(handler):
        yield check


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """What this block changes, it changes whole: Ctrl-C is raised at its end. Yields what raises it sooner."""
    with noting() as check:
        yield check
    check()
