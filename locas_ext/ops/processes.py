"""Processes of a group that have ended, killed or not, as far as they run on this machine: the operating system tells."""

import functools
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


def _machine() -> str | None:
    """What is the same for processes that see each other's numbers; None where nobody can watch a process."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


class Processes:
    """The other processes of a group, watched by a thread that sleeps until one of them ends.

    Attributes:
        ended: which one has, in words; None: none that is known of
    """

    def __init__(self, group: Any):
        """Called by all of the group."""
        self.ended: str | None = None
        self._is_over, self._then = threading.Event(), list[Callable[[], object]]()
        machine, own = _machine(), os.getpid()
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, (machine, own), group=group)
        watched: dict[int, str] = {}  # by file descriptor
        for rank, (where, number) in enumerate(everywhere):
            if machine is not None and where == machine and number != own:
                ended = f"rank {rank} (process {number}) has ended, so nothing can be added up with it; start all of them again"
                try:
                    watched[os.pidfd_open(number)] = ended
                except ProcessLookupError:
                    self._note(ended)
                except OSError:  # such as where this is not allowed: it is not watched
                    pass
        if watched:
            threading.Thread(target=self._watch, args=(watched,), name="locas processes", daemon=True).start()

    def _watch(self, watched: dict[int, str]) -> None:
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)
        first, _ = poll.poll()[0]
        self._note(watched[first])
        for descriptor in watched:
            os.close(descriptor)

    def _note(self, ended: str) -> None:
        self.ended = ended
        self._is_over.set()
        for each in self._then:
            each()

    def when_one_ends(self, then: Callable[[], object]) -> None:
        """Has `then` called, in another thread, when the first one ends."""
        self._then.append(then)
        if self.ended is not None:
            then()

    def ended_within(self, seconds: float) -> str | None:
        """`ended`, waited for so long."""
        self._is_over.wait(seconds)
        return self.ended


@functools.cache  # of a group once: it is watched as long as this process lives
def processes_of(group: Any) -> Processes:
    """The other processes of a group. Called by all of it."""
    return Processes(group)
