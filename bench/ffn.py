"""The FFN with memory against the FFN without: forward, forward that saves for a backward, forward + backward.

On the CPU every arm is called once a round. On CUDA every arm is a graph of calls that rotate through enough weights and
activations to leave the L2 cache cold, replayed once a round. The arms are in bench/arms.py.
"""

import argparse
import statistics
from pathlib import Path

import torch

from .arms import MODES, Arm, Operands, arms
from .graphs import Graph, sets_for
from .harness import interleaved, print_table, ratio, report, summary
from .overhead import overhead

PEERS = ("eager", "eager + sideway", "compiled", "compiled + sideway", "Liger", "LoRA", "bare products")


# ---- floors -----------------------------------------------------------------------------------------------------
def floors(tokens: int, d: int, m: int, rank: int, mode: str) -> list[tuple[float, float]]:
    """(FLOP, bytes) of each of the two or four kernels that a half-precision FFN needs at least; rank 0: no memory.

    gate and up -> hidden; hidden -> y; dy -> hidden gradients; hidden gradients -> dx and the slots' gradient (float32).
    """
    n = m + rank
    kernels_ = [
        (4 * tokens * d * n, 2 * (tokens * d + 2 * n * d + tokens * n)),
        (2 * tokens * d * n, 2 * (tokens * n + n * d + tokens * d)),
    ]
    if mode != "forward":
        kernels_[0] = (kernels_[0][0], kernels_[0][1] + 4 * tokens * n)  # the pre-activations are saved
    if mode == "forward + backward":
        kernels_ += [
            (2 * tokens * d * n, 2 * (tokens * d + n * d + 4 * tokens * n)),
            (4 * tokens * d * n + 6 * tokens * d * rank, 2 * (2 * tokens * n + 2 * n * d + 2 * tokens * d) + 12 * rank * d),
        ]
    return kernels_


# ---- one shape --------------------------------------------------------------------------------------------------
def relative_error(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    return ((tensor.double() - exact).norm() / exact.norm()).item()


def check(name: str, arm: Arm, outputs: list, operands: Operands, slots_grad: torch.Tensor | None) -> None:
    """The timed outputs against float64: SystemExit if the error is over twice that of the eager arm at this dtype."""
    gradient = len(outputs) > 1
    exact = operands.exact(arm.memory, gradient)
    peer = arms(operands, False)["eager + sideway" if arm.memory else "eager"]
    mode = "forward + backward" if gradient else "forward"
    theirs, ours = peer.make(operands, mode)(), list(outputs)
    if slots_grad is not None and gradient:
        ours.append(slots_grad)
        ffn, trained = peer.build(operands)
        theirs.append(torch.autograd.grad(ffn(operands.x), trained, operands.dy)[0])
    for what, mine, other, truth in zip(("y", "dx", "the slots' gradient"), ours, theirs, exact, strict=False):
        error, allowed = relative_error(mine, truth), 2 * relative_error(other, truth) + 1e-6
        if not error <= allowed:
            raise SystemExit(f"{name}, {mode}: {what} is wrong: relative error {error:.2e}, allowed {allowed:.2e}")


def checked_outputs(arm, run, operands: Operands, calls: int) -> tuple[list, torch.Tensor | None]:
    """Runs once more and -> its outputs and what it added to the arena's gradient, per call."""
    grad = operands.arena.grads[0]
    grad.zero_()
    outputs = run()
    return outputs, grad / calls if arm.in_place else None


def time_on_cpu(operands: Operands, chosen: dict, mode: str, rounds: int) -> dict[str, list[float]]:
    runs = {name: arm.make(operands, mode) for name, arm in chosen.items()}
    seconds = interleaved(runs, rounds)
    for name, arm in chosen.items():
        outputs, slots_grad = checked_outputs(arm, runs[name], operands, 1)
        check(name, arm, outputs, operands, slots_grad)
    return seconds


def time_on_cuda(sets: list[Operands], chosen: dict, mode: str, rounds: int, calls: int) -> dict[str, list[float]]:
    repeats = -(-calls // len(sets))
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: Graph([arm.make(operands, mode) for operands in sets] * repeats, pool) for name, arm in chosen.items()}
    seconds = {name: [] for name in graphs}
    for warmup in (True, True, *[False] * rounds):
        for operands in sets:
            operands.renew()
        for name, graph in graphs.items():
            taken = graph.seconds()
            if not warmup:
                seconds[name].append(taken)
    for name, graph in graphs.items():
        if name not in ("eager again", "bare products", "LoRA"):

            def run(graph=graph):
                graph.seconds()
                return graph.first

            outputs, slots_grad = checked_outputs(chosen[name], run, sets[0], repeats)
            check(name, chosen[name], outputs, sets[0], slots_grad)
    return seconds


def run_shape(d: int, m: int, tokens: int, dtype: torch.dtype, arguments) -> list[dict]:
    """One record an arm and mode."""
    device = torch.device(arguments.device)

    def fresh():
        return Operands(d, m, tokens, arguments.rank, dtype, device)

    sets = [fresh()]
    if device.type == "cuda":
        sets += [fresh() for _ in range(sets_for(sets[0].bytes()) - 1)]
    torch._dynamo.reset()  # otherwise the compiled arms stop compiling at the ninth shape
    chosen = arms(sets[0], arguments.compile)
    if arguments.arms:
        chosen = {name: arm for name, arm in chosen.items() if name in arguments.arms or name.startswith("eager")}
    records = []
    for mode in arguments.modes:
        if device.type == "cuda":
            seconds = time_on_cuda(sets, chosen, mode, arguments.rounds, arguments.calls)
        else:
            seconds = time_on_cpu(sets[0], chosen, mode, arguments.rounds)
        for name, values in seconds.items():
            parts = floors(tokens, d, m, arguments.rank if chosen[name].memory else 0, mode)
            flop, size = (sum(part) for part in zip(*parts, strict=False))
            floor = sum(max(f / arguments.tflops / 1e12, b / arguments.terabytes / 1e12) for f, b in parts)
            median = statistics.median(values)
            records.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "d": d,
                    "m": m,
                    "tokens": tokens,
                    "rank": arguments.rank,
                    "mode": mode,
                    "arm": name,
                    **summary(values),
                    "tflops": flop / median / 1e12,
                    "gigabytes_per_second": size / median / 1e9,
                    "percent_of_floor": 100 * floor / median,
                    **{f"ratio to {peer}": ratio(values, seconds[peer]) for peer in PEERS if peer in seconds},
                }
            )
    return records


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ffn", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--d", type=int, nargs="+", help="hidden sizes (CPU: 256 1024 2048; CUDA: 1024 2048 4096)")
    parser.add_argument("--m", type=int, help="intermediate size; default 3 d")
    parser.add_argument("--tokens", type=int, nargs="+", help="(CPU: 128 512 2048; CUDA: 1 64 512 2048)")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="(CPU: float32 bfloat16; CUDA: bfloat16)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="(CPU: without the training forward; CUDA: all)")
    parser.add_argument("--arms", nargs="+", help="only these besides the eager ones, by name; default: all")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, help="(CPU: 15; CUDA: 50 replays)")
    parser.add_argument("--calls", type=int, default=20, help="calls in a CUDA graph, at least")
    parser.add_argument("--tflops", type=float, default=790.0, help="half-precision peak of the floor, CUDA")
    parser.add_argument("--terabytes", type=float, default=4.3, help="TB/s of the floor; 3.0 for an H100")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of both peers (minutes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device")
    arguments.d = arguments.d or ([1024, 2048, 4096] if cuda else [256, 1024, 2048])
    arguments.tokens = arguments.tokens or ([1, 64, 512, 2048] if cuda else [128, 512, 2048])
    arguments.dtype = arguments.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    arguments.modes = arguments.modes or [mode for mode in MODES if cuda or mode != "training forward"]
    arguments.rounds = arguments.rounds or (50 if cuda else 15)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return arguments


def main() -> None:
    arguments = _arguments()
    cuda = arguments.device == "cuda"
    records = []
    for dtype in arguments.dtype:
        for d in arguments.d:
            for tokens in arguments.tokens:
                measured = run_shape(d, arguments.m or 3 * d, tokens, getattr(torch, dtype), arguments)
                records += measured
                for record in measured:
                    print(_line(record), flush=True)
    calls = {} if cuda else overhead(max(50, arguments.rounds))
    report(
        "FFN, every arm",
        _COLUMNS,
        [_row(record, cuda) for record in records],
        {"records": records, "call_us": calls},
        arguments.out,
    )
    peers = [name for name in PEERS if any(record["arm"] == name for record in records)]
    ours = [record for record in records if record["arm"].startswith("ours")]
    print_table(
        "FFN with memory: time over each peer's",
        [*_COLUMNS[:3], "us", "% floor", *peers, "noise"],
        [_compact_row(record, records, peers, cuda) for record in ours],
    )
    if calls:
        print("a call at T = 1, d = 16, in us:", ", ".join(f"{name} {value:.1f}" for name, value in calls.items()))


_COLUMNS = ["dtype d T", "", "arm", "us", "p10", "p90", "TFLOP/s", "GB/s", "% floor", "/ eager", "/ eager + sideway"]


def _line(record: dict) -> str:
    """For the log of a run that may be cut short."""
    return (
        f"{record['dtype']} {record['d']} {record['tokens']} {record['mode']}, {record['arm']}: "
        f"{record['median_us']:.1f} us, {record['ratio to eager']:.3f} of eager"
    )


def _row(record: dict, cuda: bool) -> list:
    return [
        f"{record['dtype']} {record['d']} {record['tokens']}",
        record["mode"],
        record["arm"],
        record["median_us"],
        record["p10_us"],
        record["p90_us"],
        record["tflops"],
        record["gigabytes_per_second"],
        record["percent_of_floor"] if cuda else "",
        record["ratio to eager"],
        record["ratio to eager + sideway"],
    ]


def _compact_row(record: dict, records: list[dict], peers: list[str], cuda: bool) -> list:
    same = {r["arm"]: r for r in records if all(r[key] == record[key] for key in ("dtype", "d", "tokens", "mode"))}
    return [
        f"{record['dtype']} {record['d']} {record['tokens']}",
        record["mode"],
        record["arm"],
        record["median_us"],
        record["percent_of_floor"] if cuda else "",
        *[record.get(f"ratio to {peer}", "") for peer in peers],
        same["eager again"]["ratio to eager"],
    ]


if __name__ == "__main__":
    main()
