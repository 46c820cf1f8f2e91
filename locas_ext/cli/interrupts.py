"""Ctrl-C while libraries are imported: nothing has been done yet, so the process simply ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MESSAGE = b"locas: interrupted: nothing was kept\n"


def _end(*_: Any) -> None:
    os.write(2, _MESSAGE)
    os._exit(130)


@contextmanager
def importing() -> Iterator[None]:
    """Inside the block Ctrl-C ends the process at once, with one line.

    An exception would not do: import machinery and C modules swallow a KeyboardInterrupt, or turn it into another error.
    Where something else than Python's own handler is in place, it stays.
    """
    ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
