"""A process that fails or is killed while others wait for it in a sum: they learn of it, and end too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import distributed_c10d

from locas_ext.errors import LocasError
from locas_ext.ops.processes import processes_of
from locas_ext.ops.ranks import Ranks

_LOOK = 0.5  # seconds between two looks into the store
_GRACE = 3.0  # seconds in which the others may fail by the same error, which needs no alarm


class _Store:
    """What the processes of one run say of their failures."""

    def __init__(self, ranks: Ranks, tells: bool):
        """tells: False: they say nothing here"""
        self.rank, self.keys = ranks.rank, list[str]()
        if not tells:
            return
        self.store = distributed_c10d._get_process_group_store(ranks.group)
        run = self.store.add(f"locas_runs_{ranks.rank}", 1)  # the same on all: they make the same runs
        self.keys = [f"locas_failed_{run}_{rank}" for rank in range(ranks.size)]

    def tell(self, error: str) -> None:
        if not self.keys:
            return
        with suppress(Exception):  # who holds the store may be gone
            self.store.set(self.keys[self.rank], error)

    def others_error(self, own: str = "") -> str | None:
        """What another one failed by, if not by the same error as this one; None: nothing known."""
        with suppress(Exception):
            for rank, key in enumerate(self.keys):
                if rank != self.rank and self.store.check([key]) and (error := self.store.get(key).decode()) != own:
                    return f"rank {rank} failed in the middle of the run: {error}"
        return None


@contextmanager
def alarm(ranks: Ranks | None, tells: bool) -> Iterator[None]:
    """Inside, an error on one rank, or its end, is a LocasError on the others a few seconds later, if they do not end by
    themselves.

    With gloo they have to wait until the process that failed ends. A group that was ended so is of no use any more. Of
    processes on other machines nobody knows whether they have ended.

    ranks: None: this process is alone
    tells: whether errors are told here; else the sums of the steps do it, and what is noticed here is a process that has ended
    """
    if ranks is None:
        yield
        return
    processes, store = processes_of(ranks.group), _Store(ranks, tells)
    over, heard = threading.Event(), list[str]()

    def look() -> None:
        while not over.wait(_LOOK):
            if (error := store.others_error() or processes.ended) is not None and not over.wait(_GRACE):
                heard.append(error)
                ranks.give_up()
                return

    looking = threading.Thread(target=look, name="locas alarm", daemon=True)
    looking.start()
    try:
        yield
    except BaseException as error:
        own = f"{type(error).__name__}: {error}"
        why = heard[0] if heard else None
        if why is None and isinstance(error, RuntimeError):  # a sum breaks off with one as soon as the other process is gone
            why = store.others_error(own) or processes.ended_within(_LOOK)
        elif why is None and isinstance(error, LocasError) and ranks.memory is not None and processes.ended is not None:
            why = store.others_error(own) or processes.ended  # a sum through memory is NaN then
        if why is not None:
            raise LocasError(why) from error
        store.tell(own)
        raise
    finally:
        over.set()
        looking.join()
