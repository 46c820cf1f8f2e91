"""The bare matrix products of an FFN through cuBLAS: what any fused kernel has to be compared with.

Forward: gate, up and down; backward with frozen weights: the same three transposed. Each shape is timed in a CUDA graph of
several calls that rotate through enough weight and activation sets to leave the L2 cache cold, on N(0, 1) activations.
The floor is the larger of arithmetic at --tflops and bytes at --terabytes a second, product by product.
"""

import argparse
from pathlib import Path

import torch

from .graphs import graph_seconds, sets_for
from .harness import report

SHAPES = {1024: 3072, 2048: 6144, 2560: 9728, 4096: 12288}


def products(tokens: int, d: int, m: int) -> dict[str, tuple[int, int, bool]]:
    """name -> (input width, output width, whether the weight is used transposed)."""
    return {
        "gate": (d, m, True),
        "up": (d, m, True),
        "down": (m, d, True),
        "d_hidden": (d, m, False),
        "dx gate": (m, d, False),
        "dx up": (m, d, False),
    }


def measure(tokens: int, width_in: int, width_out: int, transposed: bool, arguments: argparse.Namespace) -> tuple[float, float]:
    """-> microseconds of one product, and of its floor."""
    size = 2 * (tokens * (width_in + width_out) + width_in * width_out)
    sets = sets_for(size)
    shape = (width_out, width_in) if transposed else (width_in, width_out)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * width_in**-0.5 for _ in range(sets)]
    inputs = [torch.randn(tokens, width_in, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    outputs = [x.new_empty(tokens, width_out) for x in inputs]
    calls = [
        lambda x=x, w=w, y=y: torch.mm(x, w.T if transposed else w, out=y)
        for x, w, y in zip(inputs, weights, outputs, strict=True)
    ]
    calls *= -(-20 // sets)
    taken = 1e6 * graph_seconds(calls, arguments.replays)
    flop = 2 * tokens * width_in * width_out
    return taken, 1e6 * max(flop / arguments.tflops / 1e12, size / arguments.terabytes / 1e12)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gemms", description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 2048, 8192])
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--tflops", type=float, default=790.0)
    parser.add_argument("--terabytes", type=float, default=4.3)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return arguments


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(0)
    rows, records = [], []
    for d in arguments.d:
        m = SHAPES[d]
        for tokens in arguments.tokens:
            record = {"d": d, "m": m, "tokens": tokens, "gpu": torch.cuda.get_device_name()}
            for name, (width_in, width_out, transposed) in products(tokens, d, m).items():
                record[name], record[f"{name} floor"] = measure(tokens, width_in, width_out, transposed, arguments)
            names = list(products(tokens, d, m))
            forward, backward = (sum(record[name] for name in part) for part in (names[:3], names[3:]))
            floors = [sum(record[f"{name} floor"] for name in part) for part in (names[:3], names[3:])]
            records.append({**record, "forward": forward, "backward": backward})
            tflops = 6 * tokens * d * m / forward / 1e6
            rows.append(
                [
                    f"{d}, {m}",
                    str(tokens),
                    *[f"{record[name]:.1f}" for name in names],
                    f"{forward:.1f}",
                    f"{forward / floors[0]:.2f}",
                    f"{backward:.1f}",
                    f"{backward / floors[1]:.2f}",
                    f"{tflops:.0f}",
                ]
            )
    columns = ["d, m", "T", *products(1, 1, 1), "forward", "/ floor", "backward", "/ floor", "TFLOP/s fwd"]
    report("Bare bf16 products through cuBLAS, us", columns, rows, {"records": records}, arguments.out)


if __name__ == "__main__":
    main()
