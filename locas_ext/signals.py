"""The signals that end a run as Ctrl-C does; a command makes those of schedulers and closed terminals some of them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def interrupt(signum: int, frame: Any) -> None:
    """What SIGTERM and SIGHUP may be handled by: a KeyboardInterrupt that knows its signal, where Ctrl-C's knows none."""
    raise KeyboardInterrupt(signum)


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside the block the signals that mean KeyboardInterrupt call `handler` instead.

    None does in another thread, nor one that the caller handles otherwise or ignores.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        meaning = (signal.default_int_handler, interrupt)
        before = {each: signal.getsignal(each) for each in ENDING if signal.getsignal(each) in meaning}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, own in before.items():
            signal.signal(each, own)
