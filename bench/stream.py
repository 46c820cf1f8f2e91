"""Memorizing a text against reading it with context truncation, chunk by chunk.

The text is memorized over windows that are read anew and over a kept context, with --contexts gradient also with the gradient
through the context. Temp-LoRA learns for its published two epochs per chunk, and on CUDA also for one. The baselines
(baselines.py) read the same full windows. On the CPU every one of them runs once after each chunk, with unpatched copies of
the host, so that whatever disturbs the machine disturbs all arms. On CUDA one host serves all arms, one after another, so
that a large one fits, and each arm's peak of GPU memory is its own; they run in CUDA graphs and eagerly, and so does
memorizing. The ratios are to the faster kind of truncation, in a graph where there is one, and to truncation by the same
host kernels. With --stride 1 a decode step of the plain host is an arm too.
"""

import argparse
import gc
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.methods.temp_lora import lora
from locas_ext.learning.perplexity import perplexity

from .baselines import FastTruncation, HostStep, Sliding, TempLora, Truncation, eager, graphed
from .decode import ROOM, DecodeStep
from .harness import parse, percentile, ratio, report
from .models import SHAPES, add_options, check, load

Score = Callable[[Tensor], float]  # from the ids of a full window to their summed loss
Build = Callable[[torch.nn.Module], AbstractContextManager[Score]]
BY_KERNELS = "truncation, host kernels", "truncation, graph, host kernels"
TEMP_LORA = "Temp-LoRA"  # arms of this name change their host
CONTEXTS = {
    "recompute": "memorizing",
    "keep": "memorizing, context kept",
    "gradient": "memorizing, gradient through the context",
}


@dataclass
class Measured:
    """An arm's seconds and summed loss over the full windows; more: what else its record holds."""

    seconds: list[float] = field(default_factory=list)
    nll: float = 0.0
    more: dict = field(default_factory=dict)

    def add(self, seconds: float, nll: float) -> None:
        self.seconds.append(seconds)
        self.nll += nll

    def time(self, score: Score, part: Tensor) -> None:
        start = time.perf_counter()
        nll = score(part)
        self.add(time.perf_counter() - start, nll)


# ---- the arms ---------------------------------------------------------------------------------------------------
@contextmanager
def _adapted(host, arguments, runner: Callable, epochs: int = 2) -> Iterator[Score]:
    with lora(host, arguments.rank) as parameters:
        yield runner(TempLora(host, parameters, arguments.window, arguments.stride, runner is graphed, epochs))


def _decoding(host, arguments) -> AbstractContextManager[Score]:
    """One token behind as many as a window holds; what it gives is no loss of a text."""
    step = DecodeStep(host, max(1, arguments.window - ROOM))
    run = step.runner()

    def score(ids: Tensor) -> float:
        run()
        step.token.item()
        return float("nan")

    return nullcontext(score)


def builders(arguments) -> dict[str, Build]:
    """Arm -> what makes it of a host; the first is what ratios are to."""
    window, stride = arguments.window, arguments.stride

    def of(work: Callable, runner: Callable, **settings) -> Build:
        return lambda host: nullcontext(runner(work(host, window, stride, **settings)))

    on_gpu = arguments.device == "cuda"
    first, suffix = (graphed, ", graph") if on_gpu else (eager, "")
    arms: dict[str, Build] = {}
    if on_gpu and arguments.shape is not None:
        arms["truncation, graph, no mask"] = of(Truncation, graphed, causal_flag=True)
    arms["truncation" + suffix] = of(Truncation, first)
    arms[f"truncation{suffix}, host kernels"] = of(FastTruncation, first)
    if on_gpu and not arguments.graphs_only:
        arms["truncation, eager"] = of(Truncation, eager)
    if not (on_gpu and arguments.graphs_only):
        arms["sliding" + (", eager" if on_gpu else "")] = of(Sliding, eager)
    arms["host step" + suffix] = of(HostStep, first)
    arms[f"host step{suffix}, host kernels"] = of(HostStep, first, kernels=True)
    if stride == 1:
        arms["decoding" + suffix] = partial(_decoding, arguments=arguments)
    if importlib.util.find_spec("peft") is not None:
        arms[TEMP_LORA + suffix] = partial(_adapted, arguments=arguments, runner=first)
        if on_gpu:
            arms[f"{TEMP_LORA}, 1 epoch{suffix}"] = partial(_adapted, arguments=arguments, runner=first, epochs=1)
        if on_gpu and not arguments.graphs_only:
            arms[TEMP_LORA + ", eager"] = partial(_adapted, arguments=arguments, runner=eager)
    return arms


def memorizing(
    arguments, host, ids: Tensor, context: str, behind: Callable[[Tensor], None] | None = None
) -> tuple[Measured, int]:
    """Memorizes the text once; behind: takes each full window's ids once it is learned. -> and how many tokens were scored"""
    window, stride, measured, scored = arguments.window, arguments.stride, Measured(), 0
    memory = locas.attach(host, locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    resumed = time.perf_counter()

    def note(chunk: locas.Chunk) -> None:
        nonlocal resumed, scored
        learned = time.perf_counter() - resumed
        if chunk.end >= window and chunk.end - chunk.start == stride:  # full windows only
            measured.add(learned, chunk.nll)
            scored += chunk.tokens
            if behind is not None:
                behind(ids[chunk.end - window : chunk.end].to(arguments.device))
        resumed = time.perf_counter()

    reading = {"context": "keep"} if context == "keep" else {"context_gradient": context == "gradient"}
    said = memory.memorize(ids, window=window, stride=stride, **reading, progress=False, callback=note)
    memory.detach()
    measured.more = {"cuda_graph": asdict(said.graph), "host_kernels": asdict(said.host_kernels)}
    print(f"{CONTEXTS[context]}: CUDA graph: {said.graph}; host kernels: {said.host_kernels}", flush=True)
    return measured, scored


# ---- on the CPU: all after each chunk ---------------------------------------------------------------------------
def interleaved(arguments, ids: Tensor) -> list[dict]:
    """One record per arm and way of memorizing."""
    plain, records = load(arguments), []
    built = {
        name: build(load(arguments) if name.startswith(TEMP_LORA) else plain) for name, build in builders(arguments).items()
    }
    scores = {name: arm.__enter__() for name, arm in built.items()}  # for as long as this process lives
    first = next(iter(scores))
    for context in arguments.contexts:
        measured = {name: Measured() for name in (*scores, first + " again")}

        def behind(part: Tensor, measured=measured) -> None:
            for name, of_arm in measured.items():
                of_arm.time(scores[name.removesuffix(" again")], part)

        learned, scored = memorizing(arguments, load(arguments), ids, context, behind)
        records += _records(arguments, {CONTEXTS[context]: learned, **measured}, first, scored)
    return records


# ---- on a GPU: one after another --------------------------------------------------------------------------------
@contextmanager
def _peak_memory(more: dict) -> Iterator[None]:
    """Notes down what the GPU holds at most inside, the host included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    more["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    more["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30


def _by_itself(host, name: str, build: Build, parts: list[Tensor]) -> Measured | None:
    """None, with the reason printed, for an arm that this host does not allow."""
    measured = Measured()
    try:
        with _peak_memory(measured.more), build(host) as score:
            for part in parts:
                measured.time(score, part)
    except (RuntimeError, ValueError) as error:
        print(f"{name}: left out: {type(error).__name__}: {error}", flush=True)
        return None
    print(f"{name}: {1e3 * statistics.median(measured.seconds):.2f} ms, {measured.more['peak_gib']:.2f} GiB", flush=True)
    return measured


def one_by_one(arguments, ids: Tensor) -> list[dict]:
    """One record per arm, with one host alive."""
    host, arms = load(arguments), builders(arguments)
    window, stride = arguments.window, arguments.stride
    ends = range(-(-window // stride) * stride, len(ids) + 1, stride)
    parts = [ids[end - window : end].to(arguments.device) for end in ends]
    measured = {name: _by_itself(host, name, build, parts) for name, build in arms.items()}
    ways = [("", "1")] if arguments.graphs_only else [("", "1"), (", eager", "0")]
    for context, (eagerly, graph) in itertools.product(arguments.contexts, ways):
        os.environ["LOCAS_CUDA_GRAPH"] = graph
        more: dict = {}
        with _peak_memory(more):
            learned, scored = memorizing(arguments, host, ids, context)
        learned.more |= more
        measured[CONTEXTS[context] + eagerly] = learned
    there = {name: of_arm for name, of_arm in measured.items() if of_arm is not None}
    first = next(iter(there))
    again = _by_itself(host, first + " again", arms[first], parts)
    return _records(arguments, there if again is None else {**there, first + " again": again}, first, scored)


# ---- what is reported -------------------------------------------------------------------------------------------
def _records(arguments, measured: dict[str, Measured], first: str, scored: int) -> list[dict]:
    """scored: the tokens of the full windows"""
    kernels = next((measured[name].seconds for name in BY_KERNELS if name in measured), None)
    records = []
    for name, of_arm in measured.items():
        seconds = of_arm.seconds
        record = {
            "arm": name,
            "median_ms": 1e3 * statistics.median(seconds),
            "p10_ms": 1e3 * percentile(seconds, 10),
            "p90_ms": 1e3 * percentile(seconds, 90),
            "tokens_per_second": arguments.stride / statistics.median(seconds),
            "ratio_truncation": ratio(seconds, measured[first].seconds),
        }
        if kernels is not None:
            record["ratio_truncation_host_kernels"] = ratio(seconds, kernels)
        if arguments.shape is None and not name.endswith(" again") and of_arm.nll == of_arm.nll:
            record["perplexity"] = perplexity(of_arm.nll, scored)
        records.append({**record, **of_arm.more})
    return records


def _row(record: dict) -> list:
    columns = ("arm", "median_ms", "p10_ms", "p90_ms", "tokens_per_second", "ratio_truncation")
    text = {name: f"{record[name]:.2f}" if name in record else "" for name in ("peak_gib", "perplexity")}
    return [*(record[name] for name in columns), record.get("ratio_truncation_host_kernels", ""), *text.values()]


_COLUMNS = ["arm", "ms", "p10", "p90", "tokens/s", "/ truncation", "/ with kernels", "peak GiB", "perplexity"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    add_options(parser)
    parser.add_argument("--text", type=Path, default=ASSETS / "nostromo.txt", help="with --shape tokens are random")
    parser.add_argument("--tokens", type=int, default=8000, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64, help="of the memory, and of Temp-LoRA's adapter")
    parser.add_argument("--rehome", action="store_true", help="attach with rehome=True")
    parser.add_argument(
        "--contexts", nargs="+", choices=CONTEXTS, default=["recompute", "keep"], help="how the text is memorized"
    )
    parser.add_argument("--graphs-only", action="store_true", help="on CUDA nothing eagerly")
    arguments = parse(parser)
    check(parser, arguments)
    if arguments.tokens < arguments.window + arguments.stride:
        parser.error(f"--tokens is {arguments.tokens}; expected at least --window + --stride, for a full window")
    return arguments


def text(arguments) -> Tensor:
    """[n]: the beginning of the text, or random tokens for a host of a shape."""
    if arguments.shape is not None:
        vocabulary = SHAPES[arguments.shape].vocab_size
        return torch.randint(0, vocabulary, (arguments.tokens,), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    return torch.tensor(tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"][: arguments.tokens])


def main() -> None:
    arguments = _arguments()
    ids = text(arguments)
    records = (interleaved if arguments.device == "cpu" else one_by_one)(arguments, ids)
    report(
        f"{len(ids):,} tokens, W = {arguments.window}, S = {arguments.stride}, rank {arguments.rank}: one chunk",
        _COLUMNS,
        [_row(record) for record in records],
        {"settings": {name: str(value) for name, value in vars(arguments).items() if name != "out"}, "records": records},
        arguments.out,
    )


if __name__ == "__main__":
    main()
