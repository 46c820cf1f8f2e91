"""Ctrl-C that waits until a change is whole."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def interrupts_here() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt in this thread: not in another one, nor where the caller has a handler."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextmanager
def noting_interrupts(said: bytes = b"") -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only takes note. Yields what says whether it was pressed.

    said: is written to standard error when it is pressed. Where Ctrl-C does not raise KeyboardInterrupt, nothing changes
    """
    mine, pressed = interrupts_here(), False

    def handler(*_: Any) -> None:
        nonlocal pressed
        first, pressed = not pressed, True
        if first and said:
            with suppress(OSError):  # nobody need listen
                os.write(2, said)  # print() may not be called from a signal handler

    if mine:
        signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What this block changes, it changes whole: Ctrl-C is raised at its end."""
    with noting_interrupts() as pressed:
        yield
    if pressed():
        raise KeyboardInterrupt
