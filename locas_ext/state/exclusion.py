"""Who may change a memory: one thread at a time, and nobody else reads it meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Exclusion:
    """The right to change a memory, held by one thread for the time of a verb; the same thread may take it again.

    Nobody waits: whoever comes second gets a RuntimeError, for two threads that wait for each other never end.

    Attributes:
        holder: (thread identity, verb), or None
        epoch: how often the right was taken: a forward that sees two values was overtaken by a change
        off_somewhere: in how many places, of any context, the memory is off; compiled graphs, which cannot ask their
            context, guard on whether it is 0
        lock: for short pieces of work that two readers must not do at once
    """

    def __init__(self) -> None:
        self.holder: tuple[int, str] | None = None
        self.epoch = self.off_somewhere = 0
        self.lock = threading.RLock()

    @contextmanager
    def held(self, verb: str) -> Iterator[bool]:
        """Takes the right for this block. Yields whether this thread did not have it before."""
        me = threading.get_ident()
        with self.lock:
            if self.holder is not None and self.holder[0] != me:
                raise RuntimeError(f"{verb}: {self._who()}; wait until it is done")
            outermost = self.holder is None
            if outermost:
                self.holder = (me, verb)
                self.epoch += 1
        try:
            yield outermost
        finally:
            if outermost:
                self.holder = None

    @contextmanager
    def counted_off(self) -> Iterator[None]:
        """Counts this block in off_somewhere."""
        with self.lock:
            self.off_somewhere += 1
        try:
            yield
        finally:
            with self.lock:
                self.off_somewhere -= 1

    @property
    def elsewhere(self) -> bool:
        """Whether another thread is changing the memory."""
        holder = self.holder
        return holder is not None and holder[0] != threading.get_ident()

    def check_reader(self) -> None:
        """RuntimeError if another thread is changing the memory."""
        if self.elsewhere:
            raise RuntimeError(
                f"the memory cannot be read here: {self._who()}; wait until it is done, or read the host alone inside "
                "memory.disabled()"
            )

    @contextmanager
    def read(self, verb: str) -> Iterator[None]:
        """What this block reads of the memory is of one moment; RuntimeError if another thread changes it."""
        if self.elsewhere:
            raise RuntimeError(f"{verb}: {self._who()}; wait until it is done")
        epoch = self.epoch
        yield
        if self.epoch != epoch:
            raise RuntimeError(f"{verb}: another thread changed this memory meanwhile; try again")

    def _who(self) -> str:
        holder = self.holder
        return f"{holder[1] if holder else 'a verb'}() is changing this memory in another thread"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exclusion":
        """A copied memory belongs to nobody yet."""
        return Exclusion()
