"""One saver at a time into a folder: a lock on the folder itself, which leaves no file behind, also if its holder dies."""

import errno
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from locas_ext.errors import LocasError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

WAIT_SECONDS = 30.0  # a few times what writing a large memory takes
_POLL_SECONDS = 0.02
_NO_LOCKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}
_held = threading.local()  # .folders: the (device, inode) of those that this thread has locked


@contextmanager
def folder_lock(folder: Path, wait: float | None = None) -> Iterator[None]:
    """Keeps the other savers, threads and processes of this machine, out of an existing folder.

    A thread that holds the lock may take it again. Where there are no such locks (a file system or a platform without
    flock) a warning says so and the block runs all the same.

    wait: for how many seconds at most another saver is waited for; None: WAIT_SECONDS

    Raises LocasError that names the holder if it takes longer.
    """
    if fcntl is None:
        _warn(folder, "this platform has no flock")
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        _warn(folder, "it may not be read")
        yield
        return
    try:
        identity = (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)
        held = _held.__dict__.setdefault("folders", set())
        if identity in held:
            yield
            return
        _acquire(descriptor, folder, WAIT_SECONDS if wait is None else wait)
        held.add(identity)
        try:
            yield
        finally:
            held.discard(identity)
            _release(descriptor)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, wait: float) -> None:
    assert fcntl is not None, "folder_lock asks"
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LocasError(
                    f"{folder} is being saved into by {_holder(descriptor)}; waited {wait:g} s for it to finish: "
                    "end one of the two, or save into another folder"
                ) from None
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn(folder, f"its file system has no locks ({error.strerror})")
            return


def _release(descriptor: int) -> None:
    """Not by closing alone: a process forked meanwhile has the folder open too."""
    assert fcntl is not None, "folder_lock asks"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:  # what could not be locked cannot be unlocked
        if error.errno not in _NO_LOCKS:
            raise


def _holder(descriptor: int) -> str:
    """Who has the lock, as Linux lists it; it does not list processes outside this container."""
    inode = os.fstat(descriptor).st_ino
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and fields[4] != "0":
            own = " (this one, another thread)" if int(fields[4]) == os.getpid() else ""
            return f"process {fields[4]}{own} on {socket.gethostname()}"
    return f"another process on {socket.gethostname()}"


def _warn(folder: Path, why: str) -> None:
    warnings.warn(
        f"{folder} is saved into without a lock: {why}; two savers at the same time would mix up their files", stacklevel=2
    )
