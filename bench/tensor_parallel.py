"""Memorizing with a host that transformers has split among processes (tp_plan="auto") against the whole host on one device.

    torchrun --nproc-per-node 2 -m bench.tensor_parallel --device cuda --dtype bfloat16 --shape 1.7B

The first process memorizes the text alone while the others wait, then all memorize it together, then it once more alone. On
GPUs that read each other's memory they do so twice: with sums by our own kernel, and by NCCL. Each arm's time is that of a
chunk in a full window, without those in which a CUDA graph is captured. Slots and loss are compared with those of one process:
slots as a part of their own length and of how far they have moved. Run it with --dtype float32 too: the slots of a bfloat16
host differ by its roundings. With --profile a table says where the time of each GPU goes, in chunks at the end that are not
timed.
"""

import argparse
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.ops.ranks import through_memory

from .harness import print_table, report
from .kernel_times import KINDS, KernelTimes
from .models import SHAPES, load
from .processes import Stopwatch, free, parse_run, start, timing
from .stream import text

_PROFILED = 3  # chunks at the end


class Arm(NamedTuple):
    """What a run over the text gave: seconds of each timed chunk, slots before and after, the loss per token.

    kernels: with --profile what KernelTimes.record says, by rank
    """

    seconds: list[float]
    initial: torch.Tensor
    slots: torch.Tensor
    nll: float
    said: locas.MemorizeReport
    peak_gib: float
    kernels: list[dict]


def _split(path: Path, dtype: torch.dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of another way to say it
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, tp_plan="auto").eval()


def run(model, arguments, ids: torch.Tensor) -> Arm:
    """Memorizes the text once with a new memory, which is detached again."""
    window, stride, cuda = arguments.window, arguments.stride, arguments.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    memory = locas.attach(model, locas.LocasConfig(rank=arguments.rank))
    memory.initialize(ids[:stride])
    initial = memory.gather_slots().cpu()
    memory.reset()
    stopwatch, chunks = Stopwatch(window, stride), -(-len(ids) // stride)
    kernels = KernelTimes(chunks - 1 - _PROFILED, _PROFILED) if arguments.profile else None

    def callback(chunk: locas.Chunk) -> None:
        if kernels is not None:
            kernels(chunk)
        stopwatch(chunk)

    settings = dict(window=window, stride=stride, context=arguments.context, progress=False, on_divergence="ignore")
    said = memory.memorize(ids, **settings, callback=callback)
    slots = memory.gather_slots().cpu()
    memory.detach()
    seconds = stopwatch.seconds if kernels is None else stopwatch.seconds[: -_PROFILED - 1]
    nll = sum(chunk.nll for chunk in said.chunks) / sum(chunk.tokens for chunk in said.chunks)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return Arm(seconds, initial, slots, nll, said, peak, [] if kernels is None else [kernels.record()])


def run_together(model, arguments, ids: torch.Tensor, memory_sums: bool) -> Arm:
    """The same on all processes. memory_sums: whether they may make sums through memory that they read of each other"""
    os.environ["LOCAS_PEER_SUMS"] = str(int(memory_sums))
    through_memory.cache_clear()  # it was made for another arm
    arm = run(model, arguments, ids)
    kernels: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(kernels, arm.kernels)
    return arm._replace(kernels=[of_chunks for of_rank in kernels for of_chunks in of_rank])


def measure(arguments, ids: torch.Tensor, folder: Path) -> dict[str, Arm]:
    """All arms; on processes other than the first only the one that they take part in."""
    first, arms, size = dist.get_rank() == 0, {}, dist.get_world_size()
    if first:
        model = load(arguments)
        model.save_pretrained(folder)
        arms["1 process"] = run(model, arguments, ids)
        del model
        free()
    dist.barrier()
    model = _split(folder, getattr(torch, arguments.dtype))
    arms[f"{size} processes"] = run_together(model, arguments, ids, memory_sums=True)
    if arguments.device == "cuda":
        arms[f"{size} processes, sums by NCCL"] = run_together(model, arguments, ids, memory_sums=False)
    del model
    free()
    dist.barrier()
    if first:
        arms["1 process again"] = run(load(arguments), arguments, ids)
    dist.barrier()
    return arms


def _record(name: str, arm: Arm, alone: Arm) -> dict:
    moved, apart = (alone.slots - alone.initial).norm(), (arm.slots - alone.slots).norm()
    return {
        "arm": name,
        **timing(arm.seconds, alone.seconds),
        "nll": arm.nll,
        "nll_apart": abs(arm.nll - alone.nll),
        "initial_equal": torch.equal(arm.initial, alone.initial),
        "slots_apart": (apart / alone.slots.norm()).item(),
        "slots_apart_of_moved": (apart / moved).item(),
        "peak_gib": arm.peak_gib,
        "cuda_graph": asdict(arm.said.graph),
        "host_kernels": asdict(arm.said.host_kernels),
        "kernels": arm.kernels,
    }


def _print_profile(arms: dict[str, Arm]) -> None:
    """Where the time of each GPU goes: milliseconds a chunk, and launches."""
    columns = {f"{name}, GPU {rank}": of for name, arm in arms.items() for rank, of in enumerate(arm.kernels)}
    rows = []
    for kind in (*(kind for kind, _ in KINDS), "no kernel"):
        told = [(of["ms"].get(kind, 0.0), of["launches"].get(kind, 0.0)) for of in columns.values()]
        rows.append([kind, *(f"{ms:.2f}" + (f" in {launches:.0f}" if launches else "") for ms, launches in told)])
    print_table("ms a chunk, in how many launches", ["kind", *columns], rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m bench.tensor_parallel", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--shape", choices=SHAPES, help="a random Qwen3 host of this shape and random tokens instead of --model and --text"
    )
    parser.add_argument("--text", type=Path, default=ASSETS / "nostromo.txt")
    parser.add_argument("--context", choices=["recompute", "keep"], default="recompute")
    parser.add_argument("--profile", action="store_true", help="say where the time of each GPU goes; CUDA")
    arguments = parse_run(parser, chunks=20)
    if arguments.profile and arguments.device != "cuda":
        parser.error("--profile needs --device cuda")
    arguments.chunks += (_PROFILED + 1) * arguments.profile
    arguments.tokens = arguments.chunks * arguments.stride
    return arguments


@record  # a failure's whole traceback, of whichever process
def main() -> None:
    arguments = _arguments()
    start(arguments.device, minutes=30)
    ids = text(arguments)
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        arms = measure(arguments, ids, Path(folders[0]))
    if dist.get_rank() == 0:
        records = [_record(name, arm, arms["1 process"]) for name, arm in arms.items()]
        columns = ["median_ms", "p10_ms", "ratio", "nll", "nll_apart", "slots_apart", "slots_apart_of_moved", "peak_gib"]
        rows = [[record["arm"], *(f"{record[name]:.4g}" for name in columns)] for record in records]
        for name, arm in arms.items():
            print(f"{name}: CUDA graph: {arm.said.graph}; host kernels: {arm.said.host_kernels}", flush=True)
        what = f"{arguments.shape or arguments.model.name}, {arguments.dtype}, {len(ids):,} tokens"
        title = f"{what}, W = {arguments.window}, S = {arguments.stride}"
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
        report(title, ["arm", *columns], rows, {"settings": settings, "records": records}, arguments.out)
        if arguments.profile:
            _print_profile(arms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
