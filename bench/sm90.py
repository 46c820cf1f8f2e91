"""The Hopper kernels by themselves: every tile tested for the right numbers, then timed against cuBLAS.

Needs an H100 or H200 and torch, not the built module: the kernels are compiled into a library of their own. K1 is the
gate and up product with the activation, K2 the down product; the peer is torch.mm on the host's weights alone, without
memory and without activation. A time is the median over interleaved rounds of CUDA graphs that rotate through operands.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

from .graphs import Graph, sets_for
from .sm90_checks import check_all, make
from .sm90_library import Library

SHAPES = {1024: 3072, 2048: 6144, 4096: 12288}


def calls_of(arm, sets: list[dict], seconds: float) -> list:
    """Calls of an arm, over the sets in turn, that take about six milliseconds."""
    count = max(2, min(20, int(6e-3 / seconds)))
    return [lambda ffn=ffn: arm(ffn) for ffn in itertools.islice(itertools.cycle(sets), count)]


def times(arms: dict, sets: list[dict], flop: float, rounds: int) -> dict[str, float]:
    """Median microseconds of each arm, in interleaved rounds."""
    graphs = {name: Graph(calls_of(arm, sets, flop / 500e12)) for name, arm in arms.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            taken[name].append(graph.seconds())
    return {name: 1e6 * statistics.median(seconds) for name, seconds in taken.items()}


def products(library: Library, tokens: int) -> dict[str, dict]:
    """K1 and K2: arms by name, the peer first."""
    tiles = list(enumerate(library.names))
    hidden = {"cuBLAS": lambda ffn: torch.mm(ffn["x"], ffn["gate_up"].T, out=ffn["products"])}
    hidden |= {name: lambda ffn, tile=tile: library.hidden(ffn, tile) for tile, name in tiles}
    down = {"cuBLAS": lambda ffn: torch.mm(ffn["host_hidden"], ffn["down"].T, out=ffn["y"])}
    for splits in (1, 2, 4, 8) if tokens <= 512 else (1, 2) if tokens <= 2048 else (1,):
        down |= {
            f"{name}/{splits}" if splits > 1 else name: lambda ffn, tile=tile, splits=splits: library.down(ffn, tile, splits)
            for tile, name in tiles
        }
    both = {
        "cuBLAS": lambda ffn: (hidden["cuBLAS"](ffn), down["cuBLAS"](ffn)),
        "planned": lambda ffn: library.forward(ffn),
    }
    return {"K1": hidden, "K2": down, "K1+K2": both}


def measure(library: Library, d: int, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    m, r = SHAPES[d], arguments.r
    size = 2 * (3 * m * d + tokens * (2 * d + 3 * m))
    sets = [make(tokens, d, m, r, torch.bfloat16, splits=8 if tokens <= 512 else 2) for _ in range(min(8, sets_for(size)))]
    for ffn in sets:  # what only the peer needs
        ffn["gate_up"] = torch.cat([ffn["gate"], ffn["up"]])
        ffn["products"], ffn["host_hidden"] = ffn["x"].new_empty(tokens, 2 * m), torch.randn_like(ffn["hidden"][:, :m])
        ffn["host_hidden"] = ffn["host_hidden"].contiguous()
    plan = library.plan(tokens, d, m, r)
    picked = {"K1": library.names[plan[0]], "K2": library.names[plan[1]] + (f"/{plan[2]}" if plan[2] > 1 else "")}
    records = []
    for product, arms in products(library, tokens).items():
        weights = {"K1": 2, "K2": 1, "K1+K2": 3}[product]
        flop = {True: 2 * tokens * d * m * weights, False: 2 * tokens * d * (m + r) * weights}
        taken = times(arms, sets, flop[True], arguments.rounds)
        for name, us in taken.items():
            tflops = flop[name == "cuBLAS"] / us / 1e6
            record = dict(d=d, m=m, r=r, tokens=tokens, product=product, arm=name, us=us, tflops=tflops)
            records.append(record | dict(time_ratio=us / taken["cuBLAS"], picked=picked.get(product) == name))
    return records


def show(records: list[dict]) -> None:
    for (d, tokens, product), group in itertools.groupby(records, lambda x: (x["d"], x["tokens"], x["product"])):
        rows = list(group)
        peer = rows[0]["tflops"]
        print(f"\nd {d}, T {tokens}, {product}: cuBLAS {rows[0]['us']:.1f} us, {peer:.0f} TFLOP/s", flush=True)
        for x in sorted(rows[1:], key=lambda x: x["us"])[:8] + [x for x in rows[1:] if x["picked"]]:
            mark = " <- plan" if x["picked"] else ""
            ratio = f"{x['tflops'] / peer:.3f} of cuBLAS, time x {x['time_ratio']:.3f}"
            print(f"   {x['arm']:12} {x['us']:8.1f} us  {x['tflops']:6.0f} TFLOP/s  {ratio}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sm90", description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = Library()
    right = arguments.no_check or check_all(library)
    records = []
    for d, tokens in [] if arguments.no_time else itertools.product(arguments.d, arguments.tokens):
        measured = measure(library, d, tokens, arguments)
        show(measured)
        records += measured
        if arguments.out:
            arguments.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "records": records}, indent=1))
    if not right:
        raise SystemExit("some numbers are wrong")


if __name__ == "__main__":
    main()
