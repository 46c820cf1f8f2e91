"""Several processes at one list of jobs: spawned here, or started by torchrun or accelerate.

They share nothing but a folder. A job belongs to whoever holds the lock on its file; the system releases it when the
process ends, however it ends.
"""

import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from locas_ext.errors import LocasError


@contextmanager
def claimed(file: Path) -> Iterator[TextIO | None]:
    """The file, open for appending, while this process works on its job; None if another one does. Never through a link."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "a", buffering=1) as opened:  # every line is written at once
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield opened


def world_size() -> int:
    """How many processes torchrun or accelerate started; 1 without them."""
    return _from_environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of them on this machine this one is."""
    return _from_environment("LOCAL_RANK", 0)


def _from_environment(name: str, absent: int) -> int:
    """A number that a launcher sets, and which is at least what it is without one."""
    text = os.environ.get(name, "")
    if text and (not text.isdecimal() or int(text) < absent):
        raise ValueError(f"{name} is {text!r} in the environment; expected an integer >= {absent}, as launchers set it")
    return int(text or absent)


def device_for(device: str | None, index: int) -> str | None:
    """The device of the index-th process of this machine: its own GPU, round robin, unless one is named."""
    count = torch.cuda.device_count()
    return f"cuda:{index % count}" if device in (None, "cuda") and count else device


def share_threads(processes: int) -> None:
    """Divides the cores among the processes, those spawned later included, unless OMP_NUM_THREADS is set."""
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@contextmanager
def spawned(count: int, target: Callable, *arguments) -> Iterator[None]:
    """Runs target(index, *arguments) in `count` more processes, index from 1, beside the block; then waits for them.

    If the block ends by an exception, so do they. Raises LocasError if one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(index, *arguments)) for index in range(1, count + 1)]
    try:
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
        raise
    if failed := [process.exitcode for process in processes if process.exitcode != 0]:
        raise LocasError(
            f"{len(failed)} of {count} more processes ended with status {failed[0]}; finished records are kept, and "
            "the same command continues"
        )
