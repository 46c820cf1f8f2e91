"""How many slots a Locas-MLP memory may hold, and what gives way when more are written."""

import sys
from dataclasses import dataclass

from locas_ext.checks import integer

from .update import Write

NO_LIMIT = sys.maxsize  # a capacity that is never reached


@dataclass(frozen=True)
class Room:
    """The slots that each layer may hold.

    Attributes:
        capacity: the most of them; NO_LIMIT: as many as are written, and room is doubled as needed
        when_full: "error", "drop_oldest" or "compress"
        compress_to: how many a compression keeps; 0 unless when_full is "compress"
    """

    capacity: int
    when_full: str
    compress_to: int

    @classmethod
    def of(cls, write: Write, hidden_size: int, used: int) -> "Room":
        """What a Write asks for, with what is None filled in; ValueError where its values do not go together.

        used: the slots that the memory holds
        """
        when_full = write.when_full or ("error" if write.compress_to is None else "compress")
        if write.capacity is None and when_full != "error":
            raise ValueError(f"when_full is {when_full!r}, but capacity is None, so the memory grows and is never full")
        capacity = NO_LIMIT if write.capacity is None else write.capacity
        if capacity < used:
            raise ValueError(f"capacity is {capacity}; expected at least {used}, the slots used, or compress() first")
        if when_full == "compress":
            return cls(capacity, when_full, _compress_to(write, capacity, hidden_size))
        if write.compress_to is not None:
            raise ValueError(
                f"compress_to is {write.compress_to}, but when_full is {when_full!r}; expected when_full='compress'"
            )
        return cls(capacity, when_full, 0)

    @property
    def reserved(self) -> int:
        """The slots to make room for at a run's start: the capacity where there is one."""
        return 0 if self.capacity == NO_LIMIT else self.capacity

    def check_fits(self, count: int) -> None:
        """ValueError if `count` slots at once find no room even in a memory that was compressed or emptied for them."""
        if self.compress_to + count > self.capacity:
            beside = f" and compress_to {self.compress_to}" if self.compress_to else ""
            raise ValueError(
                f"up to {count} tokens are to be written at once, but capacity is {self.capacity}{beside}; expected a "
                f"capacity of at least {self.compress_to + count}"
            )

    def check(self, used: int, count: int) -> None:
        """ValueError if `count` more slots find no room, whatever may be done to make some."""
        if used + count <= self.capacity:
            return
        if self.when_full == "error":
            raise ValueError(
                f"the memory is full: {used} of {self.capacity} slots are used and {count} more tokens are to be "
                "written; pass a larger capacity, when_full='drop_oldest' or 'compress', or call compress() first"
            )
        self.check_fits(count)

    def after(self, used: int, count: int) -> int:
        """How many slots of `used` are used once `count` more are written."""
        if used + count <= self.capacity:
            return used + count
        return self.compress_to + count if self.when_full == "compress" else self.capacity


def _compress_to(write: Write, capacity: int, hidden_size: int) -> int:
    if capacity < 2:
        raise ValueError(f"capacity is {capacity}; expected at least 2 with when_full='compress'")
    most = min(capacity - 1, hidden_size)
    wanted = min(capacity // 2, most) if write.compress_to is None else write.compress_to
    return integer("compress_to", wanted, 1, most, "fewer than the capacity and no more than the hidden size")
