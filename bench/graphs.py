"""Timing on CUDA: calls that rotate through enough operands to leave the L2 cache cold, captured in a graph and replayed."""

import re
import statistics
from collections.abc import Callable

import torch

COLD_BYTES = 180 * 2**20  # three times an H200's L2


def sets_for(bytes_each: int) -> int:
    """How many sets of operands of this size to rotate through."""
    return max(2, -(-COLD_BYTES // bytes_each))


class Graph:
    """Several calls, one after another, in a CUDA graph. `first`: what the first returned, new after each replay.

    Graphs that are never replayed at the same time may share a memory pool.
    """

    def __init__(self, calls: list[Callable[[], object]], pool=None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:  # libraries set themselves up, compilers compile
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        # The calls are kept: a replay reads and writes what they hold.
        self.graph, self.calls = torch.cuda.CUDAGraph(), calls
        with torch.cuda.graph(self.graph, pool=pool):
            self.first = calls[0]()
            for call in calls[1:]:
                call()

    def seconds(self) -> float:
        """The time of one call, in one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.calls)


def kernel_microseconds(graph: Graph) -> dict[str, float]:
    """The time of each kernel in one call, by the profiler; what a kernel waits for another one counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graph.graph.replay()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_time_total > 0]
    return {_short(event.key): event.device_time_total / len(graph.calls) for event in events}


def _short(kernel: str) -> str:
    """A kernel of ours by its struct and what it is an instance of, another one by the beginning of its name."""
    ours = re.search(r"locas::cuda::kernel<(.*)>\(", kernel)
    if ours is None:
        return kernel[:60]
    return re.sub(r"locas::(cuda::)?|\(anonymous namespace\)::|<unnamed>::|\((int|bool)\)", "", ours[1]).strip()


def graph_seconds(calls: list, replays: int) -> float:
    """Median seconds of one call; `calls` run one after another in a graph."""
    graph = Graph(calls)
    return statistics.median(graph.seconds() for _ in range(replays))
