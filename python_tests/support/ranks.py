"""N processes that talk over gloo on the CPU, as torchrun starts them."""

import faulthandler
import importlib.util
import inspect
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from support.forked import forked

GRACE = 10.0  # seconds that the others have once a rank has failed: they may raise the same error


class RanksFailed(AssertionError):
    """A rank raised, died or did not end in time; the message holds what each rank said."""


def run_ranks(function, *arguments, world=2, timeout=300.0):
    """function(*arguments) in `world` processes of one gloo group: what each returned, in the order of ranks.

    `function` stands at the top of its file, which each rank loads by its path. Arguments and results are pickled.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        target = (inspect.getfile(function), function.__qualname__, pickle.dumps(arguments))
        settings = (folder, world, timeout)
        ranks = [forked(_rank, rank, *settings, *target) for rank in range(world)]
        for process in ranks:
            process.start()
        _wait(ranks, time.monotonic() + timeout)
        results = [_result(Path(folder), rank, process.exitcode) for rank, process in enumerate(ranks)]
    if all(done for done, _ in results):
        return [result for _, result in results]
    raise RanksFailed("\n".join(f"---- rank {rank} ----\n{said}" for rank, (_, said) in enumerate(results)))


def _wait(ranks, deadline):
    """Returns when all have ended; what still runs at the deadline writes where it stands and is killed."""
    running = list(ranks)
    while running and time.monotonic() < deadline:
        multiprocessing.connection.wait([process.sentinel for process in running], max(deadline - time.monotonic(), 0.0))
        ended, running = [p for p in running if p.exitcode is not None], [p for p in running if p.exitcode is None]
        if any(process.exitcode for process in ended):
            deadline = min(deadline, time.monotonic() + GRACE)
    for process in running:
        os.kill(process.pid, signal.SIGUSR1)
    for process in running:
        process.join(30.0)
        process.kill()
    for process in ranks:
        process.join()


def _result(folder, rank, exitcode):
    """Whether the rank is done, and what it returned, or all that it said."""
    if exitcode == 0 and (folder / f"result{rank}").exists():
        return True, pickle.loads((folder / f"result{rank}").read_bytes())
    said = [path.read_text(errors="replace") for name in ("error", "output") if (path := folder / f"{name}{rank}").exists()]
    return False, "\n".join(["done" if exitcode == 0 else f"exit status {exitcode}", *said])


def _rank(rank, folder, world, timeout, file, name, arguments):
    folder = Path(folder)
    output = open(folder / f"output{rank}", "w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR1, output, chain=True)  # writes where the rank stands, and ends it
    try:
        with _group(rank, folder, world, timeout):
            result = getattr(_loaded(file), name)(*pickle.loads(arguments))
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        output.flush()
        os._exit(1)  # without waiting for the group, which the others may still be in


@contextmanager
def _group(rank, folder, world, timeout):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    store = f"file://{folder / 'store'}"  # no port that somebody else could take
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=timeout), world_size=world, rank=rank)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _loaded(file):
    """The test file as a module, under whatever name pytest gave it."""
    spec = importlib.util.spec_from_file_location(f"{Path(file).stem}_on_a_rank", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
