"""What ends a command from outside: Ctrl-C, and the signals of schedulers and closed terminals, which then do the same."""

import os
import signal
from contextlib import AbstractContextManager, suppress
from typing import Any

from locas_ext.signals import handled, interrupt

_MESSAGE = b"locas: interrupted: nothing was kept\n"


def _end(signum: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, _MESSAGE)
    os._exit(128 + signum)


def importing() -> AbstractContextManager[None]:
    """Inside the block Ctrl-C ends the process at once, with one line: nothing has been done yet.

    An exception would not do: import machinery and C modules swallow a KeyboardInterrupt, or turn it into another error.
    """
    return handled(_end)


def ended_alike() -> AbstractContextManager[None]:
    """Inside the block SIGTERM and SIGHUP do what Ctrl-C does, so that what was learned is kept.

    One that is ignored, as under nohup, or handled otherwise stays as it is.
    """
    return handled(interrupt, meaning=(signal.SIG_DFL,))


def status_of(error: BaseException | None) -> int:
    """The exit status of a command that this error ended: 128 and the number of the signal."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and error.args and isinstance(error.args[0], int):
            return 128 + error.args[0]
        error = error.__context__
    return 128 + signal.SIGINT
