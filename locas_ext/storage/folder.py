"""A memory's folder: locas_config.json and locas_memory.safetensors, at every moment one whole memory.

The config holds the SHA-256 of the tensor file, so the two can be neither damaged nor mixed up unnoticed. A save replaces
them one after the other; between the two renames the previous tensor file is kept as locas_memory.safetensors.previous,
so that whatever moment a save is cut off at, the folder holds one complete memory, and `read` finds it. Savers take turns
(lock.py); readers need no lock, as they read again when a saver came between.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from locas_ext.errors import LocasError

from . import config_file, tensor_file
from .files import open_regular, remove_temporaries, write_atomically
from .lock import FolderLock

CONFIG_NAME = "locas_config.json"
MEMORY_NAME = "locas_memory.safetensors"
PREVIOUS_NAME = MEMORY_NAME + ".previous"
_OURS = (CONFIG_NAME, MEMORY_NAME, PREVIOUS_NAME)
_MOST_READS = 100


# ---- writing ---------------------------------------------------------------------------------------------------
def check_folder(folder: Path) -> None:
    """FileExistsError if `folder` holds something else than a memory; it need not exist."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder to save the memory in")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(name for name in names if not name.lstrip(".").startswith(_OURS))
    if foreign and not names & {CONFIG_NAME, MEMORY_NAME}:
        raise FileExistsError(f"{folder} holds something else ({foreign[0]}) and no memory; expected an empty or new folder")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """An error of the file system says what was tried, and where."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours, and says it all
            raise
        place = str(error.filename or folder)  # a write to a full disk names no file
        raise type(error)(error.errno, f"cannot save the memory: {error.strerror}", place) from error


def _keep_previous(folder: Path) -> None:
    """Keeps the tensor file that the config in the folder describes, until a new config is in place."""
    memory_file, previous = folder / MEMORY_NAME, folder / PREVIOUS_NAME
    if os.path.lexists(previous):  # an earlier save was cut off; what it kept may be the only whole memory
        try:
            with open_regular(previous) as kept, open_regular(folder / CONFIG_NAME) as config:
                tensor_file.read(previous, *kept, _read_config(folder / CONFIG_NAME, config))
            return
        except (OSError, LocasError):
            previous.unlink(missing_ok=True)
    if memory_file.exists():
        try:
            os.link(memory_file, previous)
        except OSError:  # a file system without hard links
            write_atomically(previous, memory_file.read_bytes())


def write(folder: Path, config: bytes, memory: bytes) -> None:
    """Replaces the memory in a folder, which is made if need be. OSError or LocasError; then the old one is still there."""
    with _named(folder):
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder):
            for name in _OURS:
                remove_temporaries(folder / name)
            _keep_previous(folder)
            write_atomically(folder / MEMORY_NAME, memory)
            write_atomically(folder / CONFIG_NAME, config)
            (folder / PREVIOUS_NAME).unlink(missing_ok=True)


# ---- reading ---------------------------------------------------------------------------------------------------
_Opened = tuple[BinaryIO, os.stat_result]


def _open_all(folder: Path, stack: ExitStack) -> list[_Opened | OSError | LocasError]:
    """The files of a memory, opened one right after the other; what is open stays whole when a saver replaces it."""
    files: list[_Opened | OSError | LocasError] = []
    for name in _OURS:
        try:
            files.append(stack.enter_context(open_regular(folder / name)))
        except FileNotFoundError:
            files.append(FileNotFoundError(f"{folder} holds no memory: {name} is missing"))
        except (OSError, LocasError) as error:
            files.append(error)
    return files


def _read_config(file: Path, opened: _Opened | OSError | LocasError) -> dict:
    if isinstance(opened, Exception):
        raise opened
    content, status = opened
    if status.st_size > config_file.MOST_BYTES:
        raise LocasError(f"{file} is damaged: it has {status.st_size} bytes, the most is {config_file.MOST_BYTES}")
    return config_file.parse(content.read(status.st_size), file)


def _read_tensors(folder: Path, files: list[_Opened | OSError | LocasError], fields: dict) -> dict[str, Tensor]:
    """From the tensor file or the one kept of it, whichever the record is of; the error is about the first."""
    problems: list[Exception] = []
    for name, opened in zip((MEMORY_NAME, PREVIOUS_NAME), files, strict=True):
        if isinstance(opened, Exception):
            problems.append(opened)
            continue
        try:
            return tensor_file.read(folder / name, *opened, fields)
        except LocasError as error:
            problems.append(error)
    raise problems[0]


def _is_still(file: Path, opened: _Opened | OSError | LocasError) -> bool:
    """Whether this very file is still in its place, unchanged."""
    try:
        now = os.stat(file)
    except OSError:
        return isinstance(opened, OSError)
    if isinstance(opened, Exception):
        return isinstance(opened, LocasError)
    return all(getattr(now, name) == getattr(opened[1], name) for name in ("st_dev", "st_ino", "st_mtime_ns", "st_ctime_ns"))


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """One whole memory: its record and its tensors on the CPU, all checked.

    FileNotFoundError, OSError or LocasError for a folder that holds none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with {CONFIG_NAME} and {MEMORY_NAME}")
    for _ in range(_MOST_READS):
        with ExitStack() as stack:
            config, *tensors = _open_all(folder, stack)
            try:
                fields = _read_config(folder / CONFIG_NAME, config)
                return fields, _read_tensors(folder, tensors, fields)
            except (OSError, LocasError):
                if _is_still(folder / CONFIG_NAME, config):  # nobody saved meanwhile
                    raise
    raise LocasError(f"{folder} is being saved into all the time: read {_MOST_READS} times, and replaced meanwhile each time")
