"""What ended a command, as one line and an exit status.

0 done, 1 failed, 2 bad arguments (a path that is not what it should be is one), 130 Ctrl-C (143 SIGTERM, 129 SIGHUP), 141
closed pipe.
"""

import dis
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from locas_ext.errors import Interrupted, LocasError, is_out_of_memory
from locas_ext.version import __version__

from .interrupts import status_of

_WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PACKAGE = str(Path(__file__).resolve().parents[1])
CLOSED_PIPE = 141
UsageError: Any = typer.BadParameter.__base__  # typer's or click's, whichever this typer is built on


@dataclass(frozen=True)
class Failure:
    status: int
    line: str = ""


def failure(error: BaseException, origin: Callable[[str], Path | None] = lambda name: None) -> Failure:
    """The exit status and the line for what a command raised.

    origin: the --config file that an option comes from, or None, so that a complaint about its value can name it
    """
    if isinstance(error, Interrupted):
        return Failure(status_of(error), f"interrupted: {error}")
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure(status_of(error), "interrupted: nothing was kept")
    # rich answers a closed pipe with an exit
    if isinstance(error, BrokenPipeError) or (isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)):
        return Failure(CLOSED_PIPE)
    if isinstance(error, SystemExit):
        return Failure(error.code if isinstance(error.code, int) else 1)
    if isinstance(error, UsageError):
        return Failure(2, error.format_message())  # empty where help was printed instead
    if isinstance(error, OSError):
        # What the system says comes without the file's name, what transformers says as a whole sentence.
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        return Failure(2 if isinstance(error, _WRONG_PATH) else 1, line)
    if isinstance(error, (LocasError, ImportError)):  # of the latter, what is not installed
        return Failure(1, str(error))
    if isinstance(error, (ValueError, TypeError, IndexError)) and _raised_here(error):
        return Failure(2, _with_origin(str(error), origin))
    if is_out_of_memory(error):
        return Failure(1, f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more could be had'}")
    return Failure(1, _unexpected(error))


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package made it: then its message was written for the user, else something broke."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_filename.startswith(_PACKAGE) and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _with_origin(message: str, origin: Callable[[str], Path | None]) -> str:
    """The message, after the name of the --config file that the option it begins with came from."""
    match = re.match(r"(?:--)?([a-z][\w-]*)(?: |:|=)", message)
    file = origin(match[1].replace("-", "_")) if match else None
    return f"{file}: {message}" if file else message


def _unexpected(error: BaseException) -> str:
    """Writes the traceback into a file of its own; returns what to say of it."""
    reason = f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="locas-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as log:
            log.write(f"locas_ext {__version__}, Python {sys.version}\n{sys.argv}\n\n")
            traceback.print_exception(error, file=log)
        place = f"with the log {log.name}"
    except OSError as problem:
        place = f"(no log could be written: {problem.strerror})"
    return f"this should not have happened ({reason}); please report this {place}"
