"""Where a GPU's time goes while a text is memorized: the kernels of a few chunks by kind, and when none runs."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

# By what a kernel's name holds; the first that fits.
KINDS = (
    ("sums, NCCL", ("nccl",)),
    ("sums, ours", ("PeerSum",)),
    ("our kernels", ("locas",)),
    ("attention", ("flash", "fmha", "cudnn")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "splitK")),
    ("copies", ("Memcpy", "Memset")),
    ("torch's kernels", ("",)),
)


def _kind(name: str) -> str:
    return next(kind for kind, words in KINDS if any(word in name for word in words))


class KernelTimes:
    """A callback of memorize that records the kernels between its calls `first` and `first` + `chunks`, on CUDA."""

    def __init__(self, first: int, chunks: int):
        self.first, self.chunks, self.calls = first, chunks, 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __call__(self, chunk: Any) -> None:
        if self.calls in (self.first, self.first + self.chunks):
            torch.cuda.synchronize()
            (self._profiler.start if self.calls == self.first else self._profiler.stop)()
        self.calls += 1

    def _kernels(self) -> Iterator[tuple[str, float, float]]:
        """(name, begin, end) in microseconds."""
        for event in self._profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                yield event.name, event.time_range.start, event.time_range.end

    def record(self) -> dict:
        """Of a chunk: milliseconds and launches by kind, milliseconds in which no kernel runs, the longest kernels."""
        kernels = sorted(self._kernels(), key=lambda kernel: kernel[1])
        took, launches, of_name = defaultdict(float), Counter(), defaultdict(lambda: [0.0, 0])
        reached, idle = kernels[0][1], 0.0
        for name, begin, end in kernels:
            idle, reached = idle + max(0.0, begin - reached), max(reached, end)
            took[_kind(name)] += end - begin
            launches[_kind(name)] += 1
            of_name[name][0] += end - begin
            of_name[name][1] += 1
        per = 1e-3 / self.chunks
        longest = sorted(of_name.items(), key=lambda item: -item[1][0])[:30]
        return {
            "ms": {kind: took[kind] * per for kind, _ in KINDS if launches[kind]} | {"no kernel": idle * per},
            "launches": {kind: launches[kind] / self.chunks for kind, _ in KINDS if launches[kind]},
            "longest": [
                {"name": name[:160], "ms": time * per, "launches": count / self.chunks} for name, (time, count) in longest
            ],
        }
