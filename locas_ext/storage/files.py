"""Files that are whole at every moment, whoever else writes into their folder, and are read only where they are files."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from locas_ext.errors import LocasError

# How some network and FUSE file systems say that they have no fsync. A full or broken disk says something else.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
# A folder may also be closed to reading, or never be open as a file at all.
_NO_FOLDER_FSYNC = _NO_FSYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old one or the whole new one.

    It also survives a power cut where the file system has fsync; where it has none there is nothing better to be had, and
    an error would mean that nothing can be kept there at all. The new file's permissions follow the umask. A link in
    the file's place is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_new(temporary, content)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:  # a full disk names no file, the others the temporary one
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    _sync_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    # O_EXCL: never into something that is there already, be it a planted link
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno(), _NO_FSYNC)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def remove_temporaries(path: Path) -> None:
    """Removes what killed writers of `path` left behind; only for who keeps others from writing it meanwhile."""
    for entry in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 16}.tmp"):
        entry.unlink(missing_ok=True)


def _sync(descriptor: int, unsupported: set[int]) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in unsupported:
            raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; the file itself is whole without it too."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FOLDER_FSYNC:
            return
        raise
    try:
        _sync(descriptor, _NO_FOLDER_FSYNC)
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A file opened for reading, and its stat. LocasError for a pipe, a device or a folder, which is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise LocasError(f"{path} is damaged: it is not a regular file")
    with open(descriptor, "rb") as file:
        yield file, status


def follow_umask(folder: Path) -> None:
    """Gives the regular files in a folder the permissions that new files get there.

    For what other libraries write through private temporary files, which nobody else can read.
    """
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            os.chmod(entry.path, mode)
