"""The update of all slots in one launch: bytes moved against a plain copy on the same device.

AdamW reads gradient, slots and two states and writes slots, two states and the rounded copy: 30 bytes a parameter with a
half-precision copy. The copy arm moves as many bytes from one buffer to another. Each arm rotates through enough sets to
leave the cache cold; on CUDA it is replayed as a graph.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from locas_ext.ops.backends import slot_updates
from locas_ext.ops.types import SGD, AdamW

from .graphs import graph_seconds, sets_for
from .harness import report


def cpu_seconds(calls: list, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls))
    return statistics.median(times)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.update", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[28, 64, 2048], metavar=("L", "R", "D"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    return arguments


def main() -> None:
    arguments = _arguments()
    layers, rank, d = arguments.shape
    shape, device = (layers, 3, rank, d), torch.device(arguments.device)
    parameters = layers * 3 * rank * d
    sets = sets_for(30 * parameters)
    seconds = graph_seconds if device.type == "cuda" else cpu_seconds
    step = torch.ones((), dtype=torch.int64, device=device)
    rate = torch.tensor(4e-3, device=device)

    def fresh():
        slots = torch.randn(shape, device=device) * d**-0.5
        return slots, torch.randn_like(slots), torch.zeros_like(slots), torch.zeros_like(slots), slots.to(torch.bfloat16)

    states = [fresh() for _ in range(sets)]
    arms = {
        "adamw": (
            30,
            [lambda s=s: slot_updates.adamw_slots_(*s[:4], step, rate, AdamW(), s[4]) for s in states],
        ),
        "sgd": (14, [lambda s=s: slot_updates.sgd_slots_(s[0], s[1], None, rate, SGD(), s[4]) for s in states]),
    }
    buffers = [
        (torch.randn(15 * parameters // 4, device=device), torch.empty(15 * parameters // 4, device=device))
        for _ in range(sets)
    ]
    arms["copy of 30 bytes a parameter"] = (30, [lambda a=a, b=b: b.copy_(a) for a, b in buffers])
    rows, records = [], []
    for name, (bytes_each, calls) in arms.items():
        taken = seconds(calls * (-(-20 // sets) if device.type == "cuda" else 1), arguments.rounds)
        speed = bytes_each * parameters / taken / 1e9
        records.append({"layers": layers, "rank": rank, "d": d, "arm": name, "us": 1e6 * taken, "gigabytes_per_second": speed})
    copy = records[-1]["gigabytes_per_second"]
    for record in records:
        record["share_of_copy"] = record["gigabytes_per_second"] / copy
        rows.append(
            [record["arm"], f"{record['us']:.1f}", f"{record['gigabytes_per_second']:,.0f}", f"{record['share_of_copy']:.2f}"]
        )
    title = f"Update of {parameters:,} parameters ({layers} layers x 3 x {rank} x {d}) on {device}"
    report(title, ["arm", "us", "GB/s", "/ copy"], rows, {"records": records}, arguments.out)


if __name__ == "__main__":
    main()
