"""What benchmarks with several processes share: how they start, their options, and what is timed of a run over a text."""

import argparse
import gc
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from .harness import parse, percentile

_UNTIMED = 2  # full windows at the beginning: a graph is captured in the first


def parse_run(parser: argparse.ArgumentParser, chunks: int) -> argparse.Namespace:
    """The command line, with --chunks, --window, --stride and --rank; an error where no full window would be timed."""
    parser.add_argument("--chunks", type=int, default=chunks)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    arguments = parse(parser)
    full = arguments.chunks - (arguments.window - 1) // arguments.stride
    if full <= _UNTIMED:
        parser.error(
            f"--chunks is {arguments.chunks}, of which {full} lie in full windows; expected more than {_UNTIMED} there"
        )
    return arguments


def start(device: str, minutes: int) -> None:
    """Starts the process group, on CUDA with a device per process. minutes: how long one waits for the others"""
    own = {}
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        own["device_id"] = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=minutes), **own)


def free() -> None:
    """Gives the memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Stopwatch:
    """A callback of memorize that times the chunks in full windows."""

    def __init__(self, window: int, stride: int):
        self.window, self.stride = window, stride
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, chunk) -> None:
        if chunk.end >= self.window and chunk.end - chunk.start == self.stride:
            self._seconds.append(time.perf_counter() - self._began)
        self._began = time.perf_counter()

    @property
    def seconds(self) -> list[float]:
        """The time of each chunk, without the first ones."""
        return self._seconds[_UNTIMED:]


def timing(seconds: list[float], alone: list[float]) -> dict[str, float]:
    """The part of an arm's record that says how long a chunk takes, and over the arm of one process."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p10_ms": 1e3 * percentile(seconds, 10),
        "p90_ms": 1e3 * percentile(seconds, 90),
        "ratio": statistics.median(seconds) / statistics.median(alone),
    }
