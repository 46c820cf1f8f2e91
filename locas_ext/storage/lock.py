"""One saver at a time into a folder: a lock on the folder itself, which leaves no file behind, also if its holder dies."""

import errno
import os
import random
import socket
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType

from locas_ext.caller import caller_stacklevel
from locas_ext.errors import LocasError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

WAIT_SECONDS = 30.0  # a few times what writing a large memory takes
_POLL_SECONDS = 0.001  # how often a lock that another holds is tried again, on average
_NO_LOCKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}
_held = threading.local()


class folder_lock:
    """Keeps the other savers, threads and processes of this machine, out of an existing folder: `with folder_lock(folder):`.

    A thread that holds the lock may take it again. Where there are no such locks (a file system or a platform without
    flock, a folder that may not be read) a warning says so and the block runs all the same.

    wait: for how many seconds at most another saver is waited for; None: WAIT_SECONDS

    Entering raises LocasError that names the holder if it takes longer.
    """

    def __init__(self, folder: Path, wait: float | None = None):
        self.folder, self.wait = folder, WAIT_SECONDS if wait is None else wait
        self.descriptor: int | None = None  # open while the lock is held by this very object

    def __enter__(self) -> None:
        if fcntl is None:
            return _warn(self.folder, "this platform has no flock")
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
        except PermissionError:
            return _warn(self.folder, "it may not be read")
        try:
            if (identity := _identity(descriptor)) in _own_folders():
                return os.close(descriptor)
            _acquire(descriptor, self.folder, self.wait)
        except BaseException:
            os.close(descriptor)
            raise
        _own_folders().add(identity)
        self.descriptor = descriptor

    def __exit__(self, *error: object) -> None:
        if self.descriptor is None:
            return
        _own_folders().discard(_identity(self.descriptor))
        try:
            _release(self.descriptor)
        finally:
            os.close(self.descriptor)
            self.descriptor = None
        time.sleep(2 * _POLL_SECONDS)  # who saves in a loop would take the lock again before any other looks


def _own_folders() -> set[tuple[int, int]]:
    """Those that this thread has locked."""
    return _held.__dict__.setdefault("folders", set())


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


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
            time.sleep(random.uniform(0.5, 1.5) * _POLL_SECONDS)  # at no beat that another saver's could be in step with
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
        f"{folder} is saved into without a lock: {why}; two savers at the same time would mix up their files",
        stacklevel=caller_stacklevel(),
    )
