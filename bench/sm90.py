"""The Hopper kernels by themselves: every tile tested for the right numbers, then timed against cuBLAS.

Needs an H100 or H200 and torch, not the built module: the kernels are compiled into a library of their own. K1 is the
gate and up product with the activation, K2 the down product, K3 the gradient of the hidden neurons with the activation's,
K4 the gradients of the input and of the slots; the peer is torch.mm on the host's weights alone, without memory and without
activation. A time is the median over interleaved rounds of CUDA graphs that rotate through operands.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
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


def products(library: Library, tokens: int) -> dict[str, dict]:
    """Each product's arms by name, the peer first; then both of a pass."""
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
        sums = product in ("K2", "K4")
        for splits, tile in itertools.product(slices_of(tokens) if sums else (1,), library.instances[product]):
            numbers = (tile, splits) if sums else (tile,)
            arms[library.arm(tile, splits)] = lambda ffn, call=call, numbers=numbers: call(ffn, *numbers)
        all_arms[product] = arms
    for tile in library.instances["K1"]:
        all_arms["K1"][f"{library.arm(tile, 1)} saving"] = lambda ffn, tile=tile: library.hidden(ffn, tile)
    for first, second, whole in [("K1", "K2", lambda ffn: library.forward(inference(ffn))), ("K3", "K4", library.backward)]:
        both = {"cuBLAS": lambda ffn, first=first, second=second: (mm[first](ffn), mm[second](ffn)), "planned": whole}
        all_arms[f"{first}+{second}"] = both
    return all_arms


def flops(product: str, tokens: int, d: int, m: int, r: int) -> tuple[int, int]:
    """-> of the peer, of ours, which have the memory and in K4 its gradient too."""
    weights = sum({"K1": 2, "K2": 1, "K3": 1, "K4": 2}[part] for part in product.split("+"))
    slots = 3 * r if "K4" in product else 0
    return 2 * tokens * d * m * weights, 2 * tokens * d * ((m + r) * weights + slots)


def slices_of(tokens: int) -> tuple[int, ...]:
    """The numbers of slices that are timed."""
    return (1, 2, 4) if tokens <= 512 else (1,)


def operands(library: Library, tokens: int, d: int, arguments: argparse.Namespace) -> list[dict]:
    m, r = SHAPES[d], arguments.r
    count = min(6, sets_for(2 * (3 * m * d + tokens * (2 * d + 3 * m))))
    splits = max(*slices_of(tokens), *(planned for _, planned in library.plan(tokens, d, m, r).values()))
    sets = [make(tokens, d, m, r, torch.bfloat16, splits=splits, gradients=True) for _ in range(count)]
    for ffn in sets:  # what only the peer needs
        ffn["gate_up"] = torch.cat([ffn["gate"], ffn["up"]])
        ffn["products"] = torch.randn(tokens, 2 * m, device="cuda").bfloat16()
        ffn["host_hidden"] = torch.randn(tokens, m, device="cuda").bfloat16()
    return sets


def measure(library: Library, d: int, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    m, r = SHAPES[d], arguments.r
    sets = operands(library, tokens, d, arguments)
    picked = {product: library.arm(*plan) for product, plan in library.plan(tokens, d, m, r).items()}
    records = []
    for product, arms in products(library, tokens).items():
        theirs, ours = flops(product, tokens, d, m, r)
        taken = times(arms, sets, theirs, arguments.rounds)
        for name, us in taken.items():
            tflops = (theirs if name == "cuBLAS" else ours) / us / 1e6
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
            print(f"   {x['arm']:18} {x['us']:8.1f} us  {x['tflops']:6.0f} TFLOP/s  {ratio}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sm90", description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2048], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
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
