"""A memory's folder: locas_config.json and locas_memory.safetensors, at every moment one whole memory.

The config holds the SHA-256 of the tensor file, so the two can be neither damaged nor mixed up unnoticed. A save replaces
them one after the other; between the two renames the previous tensor file is kept as locas_memory.safetensors.previous,
so that whatever moment a save is cut off at, the folder holds one complete memory, and `read` finds it. Savers take turns
(lock.py); readers need no lock, as they read again when a saver came between.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from locas_ext.errors import LocasError

from . import config_file, tensor_file
from .files import open_regular, remove_temporaries, write_atomically
from .lock import folder_lock

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
            tensor_file.read(previous, _read_config(folder)[0])
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
        with folder_lock(folder):
            for name in _OURS:
                remove_temporaries(folder / name)
            _keep_previous(folder)
            write_atomically(folder / MEMORY_NAME, memory)
            write_atomically(folder / CONFIG_NAME, config)
            (folder / PREVIOUS_NAME).unlink(missing_ok=True)


# ---- reading ---------------------------------------------------------------------------------------------------
def _read_config(folder: Path) -> tuple[dict, tuple]:
    """The record, and what tells this config file from one that took its place."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with {CONFIG_NAME} and {MEMORY_NAME}")
    file = folder / CONFIG_NAME
    try:
        with open_regular(file) as (opened, status):
            if status.st_size > config_file.MOST_BYTES:
                raise LocasError(f"{file} is damaged: it has {status.st_size} bytes, the most is {config_file.MOST_BYTES}")
            content = opened.read(config_file.MOST_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no memory: {CONFIG_NAME} is missing") from None
    return config_file.parse(content, file), (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, content)


def _read_once(folder: Path, fields: dict) -> dict[str, Tensor]:
    problem: FileNotFoundError | LocasError | None = None
    for name in (MEMORY_NAME, PREVIOUS_NAME):
        try:
            return tensor_file.read(folder / name, fields)
        except FileNotFoundError:
            problem = problem or FileNotFoundError(f"{folder} holds no memory: {name} is missing")
        except LocasError as error:
            problem = problem or error
    assert problem is not None, "both names were tried"
    raise problem


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """One whole memory: its record and its tensors on the CPU, all checked.

    FileNotFoundError, OSError or LocasError for a folder that holds none.
    """
    for _ in range(_MOST_READS):
        fields, seen = _read_config(folder)
        try:
            return fields, _read_once(folder, fields)
        except (FileNotFoundError, LocasError):
            if _read_config(folder)[1] == seen:  # nobody saved meanwhile
                raise
    raise LocasError(f"{folder} is being saved into all the time: read {_MOST_READS} times, and replaced meanwhile each time")
