"""One memory learned from a text per process, and hosts that FSDP2 shards, against one process that learns alone.

    torchrun --nproc-per-node 2 -m bench.data_parallel --device cuda --dtype bfloat16 --shape 1.7B

Every process has the whole host on a device of its own, except where the arm says FSDP2. Each arm's time is that of a chunk in
a full window, without the first of them, in which a CUDA graph is captured. Where all processes read one text, slots and loss
have to be those of the first process alone: slots as a part of their own length and of how far they have moved. Run it with
--dtype float32 too: the slots of a bfloat16 host differ by its roundings.
"""

import argparse
import hashlib
import os
import statistics
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard

import locas_ext as locas

from .harness import report
from .models import SHAPES, load
from .processes import Stopwatch, free, parse_run, start, timing


@dataclass(frozen=True)
class Arm:
    """How the text is learned.

    together: whether the processes learn one memory; sharded: whether FSDP2 shards the host; one_text: whether all read the
    first one's text; graph: whether CUDA graphs are allowed
    """

    together: bool = False
    sharded: bool = False
    one_text: bool = False
    graph: bool = True


ARMS = {
    "alone": Arm(),
    "data parallel": Arm(together=True),
    "data parallel, no graph": Arm(together=True, graph=False),
    "data parallel, one text": Arm(together=True, one_text=True),
    "FSDP2, one text": Arm(sharded=True, one_text=True),
    "FSDP2 and data parallel": Arm(together=True, sharded=True),
    "alone, no graph": Arm(graph=False),
    "alone again": Arm(),
}


def _host(arguments, arm: Arm):
    model = load(arguments)
    if arm.sharded:
        mesh = init_device_mesh(arguments.device, (dist.get_world_size(),))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        free()
    return model


def run(arguments, arm: Arm) -> dict:
    """Memorizes a text with a new host and a new memory. -> what was measured on this process"""
    window, stride, cuda = arguments.window, arguments.stride, arguments.device == "cuda"
    seed = 0 if arm.one_text else dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SHAPES[arguments.shape].vocab_size, (arguments.chunks * stride,), generator=generator)
    model = _host(arguments, arm)
    memory = locas.attach(model, locas.LocasConfig(rank=arguments.rank))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    stopwatch = Stopwatch(window, stride)
    update = locas.Backprop(process_group=dist.group.WORLD if arm.together else None)
    os.environ["LOCAS_CUDA_GRAPH"] = str(int(arm.graph))
    settings = dict(window=window, stride=stride, update=update, progress=False, on_divergence="ignore")
    said = memory.memorize(ids, **settings, callback=stopwatch)
    slots = memory.gather_slots().cpu()
    hashes = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hashlib.sha256(slots.numpy().tobytes()).hexdigest())
    return {
        "seconds": stopwatch.seconds,
        "slots": slots,
        "nll": said.nll / said.tokens,
        "same_bits": len(set(hashes)) == 1,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "graph": said.graph,
        "host_kernels": said.host_kernels,
    }


def _record(name: str, found: dict, alone: dict, stride: int) -> dict:
    arm, processes = ARMS[name], dist.get_world_size()
    compared = not arm.together or arm.one_text  # with the first process alone, on its text
    apart, moved = found["slots"] - alone["slots"], alone["slots"][:, -1]  # values begin at 0
    return {
        "arm": name,
        **timing(found["seconds"], alone["seconds"]),
        "tokens_per_second": (1 if arm.one_text else processes) * stride / statistics.median(found["seconds"]),
        "nll": found["nll"],
        "nll_apart": abs(found["nll"] - alone["nll"]) if compared else None,
        "slots_apart": (apart.norm() / alone["slots"].norm()).item() if compared else None,
        "values_apart": (apart[:, -1].norm() / moved.norm()).item() if compared else None,
        "same_bits_on_all": found["same_bits"] if arm.together or arm.sharded else None,
        "peak_gib": found["peak_gib"],
        "cuda_graph": asdict(found["graph"]),
        "host_kernels": asdict(found["host_kernels"]),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m bench.data_parallel", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M", help="a random Qwen3 host of this shape, random tokens")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    return parse_run(parser, chunks=24)


@record  # a failure's whole traceback, of whichever process
def main() -> None:
    arguments = _arguments()
    start(arguments.device, minutes=5)
    records, alone = [], None
    for name in dict.fromkeys(["alone", *arguments.arms]):
        found = run(arguments, ARMS[name])
        alone = found if alone is None else alone
        records.append(_record(name, found, alone, arguments.stride))
        free()
        if dist.get_rank() == 0:
            print(f"{name}: CUDA graph: {found['graph']}; host kernels: {found['host_kernels']}", flush=True)
    if dist.get_rank() == 0:
        columns = ["median_ms", "p10_ms", "ratio", "tokens_per_second", "nll", "nll_apart", "slots_apart", "values_apart"]
        columns += ["same_bits_on_all", "peak_gib"]
        shown = [
            [record["arm"], *("" if record[name] is None else f"{record[name]:.4g}" for name in columns)] for record in records
        ]
        title = f"{arguments.shape}, {arguments.dtype}, {dist.get_world_size()} processes, {arguments.chunks} chunks, "
        title += f"W = {arguments.window}, S = {arguments.stride}"
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
        report(title, ["arm", *columns], shown, {"settings": settings, "records": records}, arguments.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
