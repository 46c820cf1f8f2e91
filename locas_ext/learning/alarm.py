"""A process that fails while others wait for it in a sum: they learn of it through the group's store, and end too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import distributed_c10d

from locas_ext.errors import LocasError
from locas_ext.ops.ranks import Ranks

_LOOK = 0.5  # seconds between two looks into the store
_GRACE = 3.0  # seconds in which the others may fail by the same error, which needs no alarm


class _Store:
    """What the processes of one run say of their failures."""

    def __init__(self, ranks: Ranks):
        self.rank, self.store = ranks.rank, distributed_c10d._get_process_group_store(ranks.group)
        run = self.store.add(f"locas_runs_{ranks.rank}", 1)  # the same on all: they make the same runs
        self.keys = [f"locas_failed_{run}_{rank}" for rank in range(ranks.size)]

    def tell(self, error: str) -> None:
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
def alarm(ranks: Ranks | None) -> Iterator[None]:
    """Inside, an error on one rank is a LocasError on the others a few seconds later, if they do not end by themselves.

    With gloo they have to wait until the process that failed ends. A group that was ended so is of no use any more.

    ranks: None: this process is alone
    """
    if ranks is None:
        yield
        return
    store, ended, heard = _Store(ranks), threading.Event(), list[str]()

    def look() -> None:
        while not ended.wait(_LOOK):
            if (error := store.others_error()) is not None and not ended.wait(_GRACE):
                heard.append(error)
                ranks.give_up()
                return

    looking = threading.Thread(target=look, name="locas alarm", daemon=True)
    looking.start()
    try:
        yield
    except BaseException as error:
        own = f"{type(error).__name__}: {error}"
        # A sum breaks off with a RuntimeError as soon as the other process is gone.
        why = heard[0] if heard else store.others_error(own) if isinstance(error, RuntimeError) else None
        if why is not None:
            raise LocasError(why) from error
        store.tell(own)
        raise
    finally:
        ended.set()
        looking.join()
