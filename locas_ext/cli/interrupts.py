"""Ctrl-C while libraries are imported: nothing has been done yet, so the process simply ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from locas_ext.interrupts import interrupts_here

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
    if not interrupts_here():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
