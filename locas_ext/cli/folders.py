"""Folders that a command makes: writable before the work begins, gone again where nothing came of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locas_ext.errors import LocasError
from locas_ext.signals import uninterrupted
from locas_ext.storage.files import follow_umask

_LAST = "config.json"  # without which nobody takes a folder for a model's


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Inside the block the folder exists and can be written; of the folders made for that, those still empty go again."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder")
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise type(error)(error.errno, f"cannot write into it: {error.strerror}", str(folder)) from error
        yield
    finally:
        for each in missing:  # the innermost first
            try:
                each.rmdir()
            except OSError:  # it holds something, or was never made
                break


def check_new(folder: Path, but: Path | None = None) -> None:
    """FileExistsError for anything but an empty folder in this place; a link is something. but: what may be in it"""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}; expected a new or empty folder")
    if folder.exists() and any(entry != but for entry in folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already; expected a new or empty folder")


@contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, whose content is moved into `folder` when the block ends, or removed if it fails.

    It is a temporary folder of its own in `folder`, so nothing else is ever moved or removed, and `folder` may be what no other
    folder can take the place of: where a disk is mounted, or where the command was started. What the libraries that write
    raise at a full disk has many types; all become one LocasError.
    """
    check_new(folder)
    with made(folder):
        private = Path(tempfile.mkdtemp(prefix=".locas-", dir=folder))
        try:
            unfinished = private / "unfinished"
            unfinished.mkdir()
            yield unfinished
            for place, _, _ in os.walk(unfinished):
                follow_umask(Path(place))
            check_new(folder, but=private)
            with uninterrupted():
                for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.name == _LAST):
                    entry.rename(folder / entry.name)
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise LocasError(f"{folder} could not be written: {reason}; nothing was kept") from error
        finally:
            shutil.rmtree(private, ignore_errors=True)
