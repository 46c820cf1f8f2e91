"""Sums over the GPUs of one host, of the sizes that a split host's step makes: our kernel, NCCL, and torch's own kernels.

    torchrun --nproc-per-node 2 -m bench.sums --device cuda --dtype bfloat16

A CUDA graph of many sums one behind the other, replayed; the time of one sum is the slowest process's. Checked first: our
kernel against NCCL on fresh numbers, through several graph replays.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric
from torch.distributed.elastic.multiprocessing.errors import record

from locas_ext.ops.ranks import Ranks, through_memory

from .harness import parse, percentile, report
from .processes import start

_SUMS, _REPLAYS = 40, 30
SIZES = {"6 KiB": 6 << 10, "256 KiB": 256 << 10, "2 MiB": 2 << 20, "6 MiB": 6 << 20, "16 MiB": 16 << 20}


def _shared(x: Tensor) -> Tensor:
    """A copy in symmetric memory, which torch's kernels need."""
    copy = symmetric.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    symmetric.rendezvous(copy, dist.group.WORLD.group_name)
    return copy


def arms(ranks: Ranks, x: Tensor) -> dict[str, Callable[[], object]]:
    """Each makes one sum, in the place of x or of a copy."""
    name, found = dist.group.WORLD.group_name, {"NCCL": lambda: dist.all_reduce(x)}
    if ranks.memory is not None and ranks.memory.takes(x):
        found["ours"] = lambda: ranks.memory.add_up(x)
    try:
        shared = _shared(x)
        found["torch, one shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)
        found["torch, two shots"] = lambda: torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)
    except (RuntimeError, AttributeError) as why:
        print(f"torch's kernels are left out: {why}", flush=True)
    return found


def _graph(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_SUMS):
            run()
    return graph


def microseconds(run: Callable[[], object]) -> list[float]:
    """The time of one sum, in each replay; on the slowest process."""
    graph, took = _graph(run), []
    for _ in range(_REPLAYS):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(1e3 * begin.elapsed_time(end) / _SUMS)
    slowest = torch.tensor(took, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()[3:]


def check(ranks: Ranks, numbers: int, dtype: torch.dtype) -> float:
    """How far our sums are from NCCL's, as a part of their length: the largest of several replays."""
    assert ranks.memory is not None
    x = torch.empty(numbers, dtype=dtype, device=ranks.device)
    graph, worst = torch.cuda.CUDAGraph(), 0.0
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        ranks.memory.add_up(x)
    for _ in range(20):
        fresh = torch.randn(numbers, device=ranks.device).to(dtype)
        x.copy_(fresh)
        graph.replay()
        exact = fresh.double()
        dist.all_reduce(exact)
        worst = max(worst, ((x.double() - exact).norm() / exact.norm()).item())
        mine = x.clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine.view(torch.uint8), x.view(torch.uint8)), "other bits on another process"
    return worst


def _records(ranks: Ranks, dtype: torch.dtype) -> list[dict]:
    records = []
    for size, count in SIZES.items():
        numbers = count // dtype.itemsize
        x = torch.randn(numbers, device=ranks.device).to(dtype)
        wrong = check(ranks, numbers, dtype) if ranks.memory is not None and ranks.memory.takes(x) else None
        for arm, run in arms(ranks, x).items():
            took = microseconds(run)
            gbs = count / statistics.median(took) * 1e-3
            told = {"us": statistics.median(took), "p10": percentile(took, 10), "p90": percentile(took, 90), "GB/s": gbs}
            records.append({"size": size, "arm": arm, **told, "apart": wrong if arm == "ours" else None})
    return records


@record
def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m bench.sums", description=__doc__)
    arguments = parse(parser)
    if arguments.device != "cuda":
        parser.error(f"--device is {arguments.device}; expected cuda")
    start(arguments.device, minutes=3)
    device = torch.device("cuda", torch.cuda.current_device())
    ranks = through_memory(Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), device))
    if ranks.why_not is not None:
        print(f"rank {ranks.rank}: our kernel is left out: {ranks.why_not}", flush=True)
    records = _records(ranks, getattr(torch, arguments.dtype))
    if ranks.rank == 0:
        columns = ["size", "arm", "us", "p10", "p90", "GB/s"]
        rows = [[record["size"], record["arm"], *(f"{record[name]:.4g}" for name in columns[2:])] for record in records]
        title = f"one sum over {ranks.size} GPUs, {arguments.dtype}"
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
        report(title, columns, rows, {"settings": settings, "records": records}, arguments.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
