"""The FFN with memory against the FFN without: forward, forward that saves for a backward, forward + backward.

On the CPU every arm is called once a round. On CUDA every arm is a graph of calls that rotate through enough weights and
activations to leave the L2 cache cold, replayed once a round. The arms are in bench/arms.py.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

from .arms import MODES, Arm, Operands, arms
from .ffn_report import COLUMNS, line, print_ratios, row
from .graphs import Graph, kernel_microseconds, sets_for
from .harness import interleaved, ratio, report, summary, write
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


class Checker:
    """The timed outputs of one mode on one set of operands against float64, which is computed once."""

    def __init__(self, operands: Operands, mode: str):
        self.operands, self.mode = operands, mode
        self.known: dict[bool, tuple[list, list]] = {}

    def _expected(self, memory: bool) -> tuple[list, list]:
        """Exactly, and as the eager arm computes it: y, dx, the slots' gradient."""
        if memory not in self.known:
            gradient = self.mode == "forward + backward"
            exact = self.operands.exact(memory, gradient)
            peer = arms(self.operands)["eager + sideway" if memory else "eager"]
            theirs = list(peer.make(self.operands, self.mode)())
            if gradient:
                ffn, trained = peer.build(self.operands)
                if trained:
                    theirs.append(torch.autograd.grad(ffn(self.operands.x), trained, self.operands.dy)[0])
            self.known[memory] = exact, theirs
        return self.known[memory]

    def check(self, name: str, arm: Arm, outputs: list, slots_grad: torch.Tensor | None) -> None:
        """SystemExit if an error is over twice that of the eager arm at this dtype."""
        exact, theirs = self._expected(arm.memory)
        ours = [*outputs, slots_grad] if slots_grad is not None and len(outputs) > 1 else outputs
        for what, mine, other, truth in zip(("y", "dx", "the slots' gradient"), ours, theirs, exact, strict=False):
            error, allowed = relative_error(mine, truth), 2 * relative_error(other, truth) + 1e-6
            if not error <= allowed:
                raise SystemExit(f"{name}, {self.mode}: {what} is wrong: relative error {error:.2e}, allowed {allowed:.2e}")


def checked_outputs(arm, run, operands: Operands, calls: int) -> tuple[list, torch.Tensor | None]:
    """Runs once more and -> its outputs and what it added to the arena's gradient, per call."""
    grad = operands.arena.grads[0]
    grad.zero_()
    outputs = run()
    return outputs, grad / calls if arm.in_place else None


def time_on_cpu(operands: Operands, chosen: dict, mode: str, rounds: int) -> dict[str, list[float]]:
    runs = {name: arm.make(operands, mode) for name, arm in chosen.items()}
    seconds = interleaved(runs, rounds)
    checker = Checker(operands, mode)
    for name, arm in chosen.items():
        checker.check(name, arm, *checked_outputs(arm, runs[name], operands, 1))
    return seconds


def time_on_cuda(sets: list[Operands], chosen: dict, mode: str, calls: int, arguments) -> dict[str, list[float]]:
    repeats = -(-calls // len(sets))
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: Graph([arm.make(operands, mode) for operands in sets] * repeats, pool) for name, arm in chosen.items()}
    seconds = {name: [] for name in graphs}
    for warmup in (True, True, *[False] * arguments.rounds):
        for operands in sets:
            operands.renew()
        for name, graph in graphs.items():
            taken = graph.seconds()
            if not warmup:
                seconds[name].append(taken)
    checker = Checker(sets[0], mode)
    for name, graph in graphs.items():
        if name not in ("eager again", "bare products", "LoRA"):

            def run(graph=graph):
                graph.seconds()
                return graph.first

            checker.check(name, chosen[name], *checked_outputs(chosen[name], run, sets[0], repeats))
            if arguments.kernels and name.startswith("ours"):
                for kernel, taken in kernel_microseconds(graph).items():
                    print(f"    {name}, {mode}: {taken:7.2f} us {kernel}")
    return seconds


def run_shape(d: int, m: int, tokens: int, dtype: torch.dtype, arguments) -> list[dict]:
    """One record an arm and mode."""
    device = torch.device(arguments.device)

    def fresh():
        return Operands(d, m, tokens, arguments.rank, dtype, device)

    sets = [fresh()]
    if device.type == "cuda":
        sets += [fresh() for _ in range(sets_for(sets[0].bytes()) - 1)]
    if arguments.compile:
        torch._dynamo.reset()  # otherwise its arms stop compiling at the ninth shape
    chosen = arms(sets[0], arguments.compile)
    if arguments.arms:
        chosen = {name: arm for name, arm in chosen.items() if name in arguments.arms or name.startswith("eager")}
    records = []
    for mode in arguments.modes:
        if device.type == "cuda":
            calls = arguments.calls or min(20, max(4, 4096 // tokens))
            seconds = time_on_cuda(sets, chosen, mode, calls, arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ffn", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="CUDA: d of 1024 and 2048, two modes, 15 rounds")
    parser.add_argument("--d", type=int, nargs="+", help="hidden sizes (CPU: 256 1024 2048; CUDA: 1024 2048 4096)")
    parser.add_argument("--m", type=int, help="intermediate size; default 3 d")
    parser.add_argument("--tokens", type=int, nargs="+", help="(CPU: 128 512 2048; CUDA: 1 8 32 64 128 512 2048 8192)")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="(CPU: float32 bfloat16; CUDA: bfloat16)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="(CPU: without the training forward; CUDA: all)")
    parser.add_argument("--arms", nargs="+", help="only these besides the eager ones, by name; default: all")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, help="(CPU: 15; CUDA: 50 replays)")
    parser.add_argument("--calls", type=int, help="calls in a CUDA graph, at least (20, fewer from 512 tokens on)")
    parser.add_argument("--tflops", type=float, default=790.0, help="half-precision peak of the floor, CUDA")
    parser.add_argument("--terabytes", type=float, help="TB/s of the floor (4.3, as an H200 copies; 3.0 on an H100)")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "max-autotune"],
        help="also time torch.compile of both peers (seconds per shape; minutes with max-autotune)",
    )
    parser.add_argument("--kernels", action="store_true", help="CUDA: also print the time of each kernel of our arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    return parser


def _arguments() -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args()
    cuda, quick = arguments.device == "cuda", arguments.quick
    if cuda and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device")
    if quick and not cuda:
        parser.error("--quick is for --device cuda")
    arguments.d = arguments.d or ([1024, 2048, 4096][: 2 if quick else 3] if cuda else [256, 1024, 2048])
    arguments.tokens = arguments.tokens or ([1, 8, 32, 64, 128, 512, 2048, 8192] if cuda else [128, 512, 2048])
    arguments.dtype = arguments.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    every_mode = cuda and not quick
    arguments.modes = arguments.modes or [mode for mode in MODES if every_mode or mode != "training forward"]
    arguments.rounds = arguments.rounds or (50 if every_mode else 15)
    if arguments.terabytes is None:
        arguments.terabytes = 3.0 if cuda and "H100" in torch.cuda.get_device_name() else 4.3
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return arguments


def main() -> None:
    arguments, started = _arguments(), time.perf_counter()
    cuda = arguments.device == "cuda"
    records: list[dict] = []
    results = {"settings": {name: str(value) for name, value in vars(arguments).items() if name != "out"}, "records": records}
    for dtype, d, tokens in itertools.product(arguments.dtype, arguments.d, arguments.tokens):
        measured = run_shape(d, arguments.m or 3 * d, tokens, getattr(torch, dtype), arguments)
        records += measured
        for record in measured:
            print(line(record), flush=True)
        print(f"after {time.perf_counter() - started:.0f} s", flush=True)
        if arguments.out is not None:  # a run that is cut short leaves what it has measured
            write(results, arguments.out)
    calls = results["call_us"] = {} if cuda else overhead(max(50, arguments.rounds))
    report("FFN, every arm", COLUMNS, [row(record, cuda) for record in records], results, arguments.out)
    print_ratios(records, [name for name in PEERS if any(record["arm"] == name for record in records)], cuda)
    if calls:
        print("a call at T = 1, d = 16, in us:", ", ".join(f"{name} {value:.1f}" for name, value in calls.items()))


if __name__ == "__main__":
    main()
