"""Folders that a command makes: writable before the work begins, gone again where nothing came of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locas_ext.errors import LocasError
from locas_ext.storage.files import follow_umask


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Inside the block the folder exists and can be written; of the folders made for that, those still empty go again."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    finally:
        for each in missing:  # the innermost first
            try:
                each.rmdir()
            except OSError:  # it holds something, or was never made
                break


def check_new(folder: Path) -> None:
    """FileExistsError for anything but an empty folder in this place; a link is something."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}; expected a new or empty folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already; expected a new or empty folder")


@contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which takes the place of `folder` when the block ends, or is removed if it fails.

    It lies in a temporary folder of its own beside `folder`, so nothing else is ever moved or removed. What the libraries
    that write raise at a full disk has many types; all become one LocasError.
    """
    check_new(folder)
    with made(folder.parent):
        private = Path(tempfile.mkdtemp(prefix=".locas-", dir=folder.parent))
        try:
            unfinished = private / "unfinished"
            unfinished.mkdir()
            yield unfinished
            for place, _, _ in os.walk(unfinished):
                follow_umask(Path(place))
            check_new(folder)
            unfinished.rename(folder)  # onto an empty folder at most
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise LocasError(f"{folder} could not be written: {reason}; nothing was kept") from error
        finally:
            shutil.rmtree(private, ignore_errors=True)
