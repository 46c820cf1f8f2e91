"""The Hopper kernels by themselves: every tile tested for the right numbers, then timed against cuBLAS.

Needs an H100 or H200 and torch, not the built module: the kernels are compiled into a library of their own. K1 is the
gate and up product with the activation, K2 the down product, K3 the gradient of the hidden neurons with the activation's,
K4 the gradients of the input and of the slots; the peer is torch.mm on the host's weights alone, without memory and without
activation. A time is the median over interleaved rounds of CUDA graphs that rotate through operands.

A tile is tested by a process of its own, so that one that never ends or breaks the context takes none with it; those that
are right are timed. Tiles: tokens x columns, pp: ping-pong, /4: in four slices of K, s4: the slots' gradients in four
slices of the tokens.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .graphs import Graph, sets_for
from .sm90_checks import SLICES, cases_of, cases_of_plans, check_all, make
from .sm90_library import Library

SHAPES = {1024: 3072, 2048: 6144, 4096: 12288}
PLANS = -1  # as a tile: whole passes as planned
CHECK_SECONDS, CHECKS_AT_ONCE = 60, 8
SLICED_TOKENS = 512  # slices of K are timed up to here, those of the slots' gradients above
SLOT_SLICES = (1, 4, 8, 16)


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


def peers() -> dict[str, Callable[[dict], object]]:
    """cuBLAS's products of the host alone."""
    return {
        "K1": lambda ffn: torch.mm(ffn["x"], ffn["gate_up"].T, out=ffn["products"]),
        "K2": lambda ffn: torch.mm(ffn["host_hidden"], ffn["down"].T, out=ffn["y"]),
        "K3": lambda ffn: torch.mm(ffn["dy"], ffn["down"], out=ffn["host_hidden"]),
        "K4": lambda ffn: torch.mm(ffn["products"], ffn["gate_up"], out=ffn["dx"]),
    }


def inference(ffn: dict) -> dict:
    """Without what the forward saves for a backward."""
    return {name: tensor for name, tensor in ffn.items() if name not in ("gate_out", "up_out")}


def slices(product: str, tokens: int) -> list[tuple[int, ...]]:
    """What is cut into how many: K, and in K4 the tokens for the slots' gradients too."""
    if product == "K2":
        return [(splits,) for splits in SLICES if splits == 1 or tokens <= SLICED_TOKENS]
    if product == "K4":
        return [(splits, 1) for splits in SLICES] if tokens <= SLICED_TOKENS else [(1, splits) for splits in SLOT_SLICES]
    return [()]


def products(library: Library, tokens: int, right: Collection[int]) -> dict[str, dict]:
    """Each product's arms by name, the peer first; then both of a pass. right: the tiles to time."""
    mm = peers()
    ours = {
        "K1": lambda ffn, tile: library.hidden(inference(ffn), tile),
        "K2": library.down,
        "K3": library.hidden_grad,
        "K4": library.input_grad,
    }
    all_arms: dict[str, dict] = {}
    for product, call in ours.items():
        arms: dict[str, Callable] = {"cuBLAS": mm[product]}
        for tile in [tile for tile in library.instances[product] if tile in right]:
            for splits in slices(product, tokens):
                arms[library.arm(tile, *splits)] = lambda ffn, call=call, numbers=(tile, *splits): call(ffn, *numbers)
        all_arms[product] = arms
    for tile in [tile for tile in library.instances["K1"] if tile in right]:
        all_arms["K1"][f"{library.arm(tile)} saving"] = lambda ffn, tile=tile: library.hidden(ffn, tile)
    passes = [("K1", "K2", lambda ffn: library.forward(inference(ffn))), ("K3", "K4", library.backward)]
    for first, second, whole in passes if PLANS in right else []:
        both = {"cuBLAS": lambda ffn, first=first, second=second: (mm[first](ffn), mm[second](ffn)), "planned": whole}
        all_arms[f"{first}+{second}"] = both
    return all_arms


def flops(product: str, tokens: int, d: int, m: int, r: int) -> tuple[int, int]:
    """-> of the peer, of ours, which have the memory and in K4 its gradient too."""
    weights = sum({"K1": 2, "K2": 1, "K3": 1, "K4": 2}[part] for part in product.split("+"))
    slots = 3 * r if "K4" in product else 0
    return 2 * tokens * d * m * weights, 2 * tokens * d * ((m + r) * weights + slots)


def operands(library: Library, tokens: int, d: int, arguments: argparse.Namespace) -> list[dict]:
    m, r = SHAPES[d], arguments.r
    count = min(6, sets_for(2 * (3 * m * d + tokens * (2 * d + 3 * m))))
    sets = [make(tokens, d, m, r, torch.bfloat16, splits=16, gradients=True) for _ in range(count)]
    for ffn in sets:  # what only the peer needs
        ffn["gate_up"] = torch.cat([ffn["gate"], ffn["up"]])
        ffn["products"] = torch.randn(tokens, 2 * m, device="cuda").bfloat16()
        ffn["host_hidden"] = torch.randn(tokens, m, device="cuda").bfloat16()
    return sets


def measure(library: Library, right: Collection[int], d: int, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    m, r = SHAPES[d], arguments.r
    sets = operands(library, tokens, d, arguments)
    picked = {product: library.arm(*plan) for product, plan in library.plan(tokens, d, m, r).items()}
    records = []
    for product, arms in products(library, tokens, right).items():
        theirs, ours = flops(product, tokens, d, m, r)
        taken = times(arms, sets, theirs, arguments.rounds)
        for name, us in taken.items():
            tflops = (theirs if name == "cuBLAS" else ours) / us / 1e6
            record = dict(d=d, m=m, r=r, tokens=tokens, product=product, arm=name, us=us, tflops=tflops)
            records.append(record | dict(time_ratio=us / taken["cuBLAS"], picked=picked.get(product) == name))
    return records


def show(records: list[dict]) -> None:
    """A line for each product of each shape: the peer, then ours from the fastest on."""
    print("\nmicroseconds, and TFLOP/s over cuBLAS's; [] is the plan, + saves for a backward")
    for (d, tokens, product), group in itertools.groupby(records, lambda x: (x["d"], x["tokens"], x["product"])):
        peer, *ours = group
        ours.sort(key=lambda x: x["us"])
        shown = [x for place, x in enumerate(ours) if place < 7 or x["picked"]]
        arms = [f"{x['arm'].replace(' saving', '+')} {x['us']:.1f} {x['tflops'] / peer['tflops']:.2f}" for x in shown]
        marked = [f"[{arm}]" if x["picked"] else arm for arm, x in zip(arms, shown, strict=True)]
        print(f"{d} {tokens} {product}: cuBLAS {peer['us']:.1f}; {'; '.join(marked)}", flush=True)


def right_tiles(library: Library) -> list[int]:
    """Tests each tile, and the plans, in a process of its own; -> those that are right."""

    def is_right(tile: int) -> bool:
        command = [sys.executable, "-m", "bench.sm90", "--check-tile", str(tile)]
        what = "plans" if tile == PLANS else library.names[tile]
        try:
            ended = subprocess.run(command, timeout=CHECK_SECONDS, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            print(f"{what}: WRONG, has not ended after {CHECK_SECONDS} s", flush=True)
            return False
        print(ended.stdout + (ended.stderr[-1500:] if ended.returncode else ""), end="", flush=True)
        return ended.returncode == 0

    tiles = [*range(len(library.names)), PLANS]
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return [tile for tile, right in zip(tiles, pool.map(is_right, tiles), strict=True) if right]


def check(library: Library, tile: int) -> None:
    """As a process of right_tiles."""
    torch.manual_seed(tile + 1)
    cases = cases_of_plans() if tile == PLANS else cases_of(library, tile)
    if not check_all(library, "plans" if tile == PLANS else library.names[tile], cases):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sm90", description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2048], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--check-tile", type=int, help="tests this one and ends")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = Library()
    if arguments.check_tile is not None:
        return check(library, arguments.check_tile)
    tiles = [*range(len(library.names)), PLANS]
    right = tiles if arguments.no_check else right_tiles(library)
    print(torch.cuda.get_device_name(), flush=True)
    records: list[dict] = []
    for d, tokens in [] if arguments.no_time else itertools.product(arguments.d, arguments.tokens):
        records += measure(library, right, d, tokens, arguments)
        if arguments.out:
            found = {"gpu": torch.cuda.get_device_name(), "right": [tile in right for tile in tiles]}
            arguments.out.write_text(json.dumps(found | {"records": records}, indent=1))
    show(records)
    if len(right) < len(tiles):
        raise SystemExit("some numbers are wrong")


if __name__ == "__main__":
    main()
