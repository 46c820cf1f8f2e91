"""Memorizing a text against reading it with context truncation, chunk by chunk in one run.

After each chunk in a full window, every baseline (baselines.py) runs once on the same window with a second,
unpatched copy of the host, so whatever disturbs the machine disturbs all arms. The text is memorized over windows that are
read anew and over a kept context. On CUDA the baselines run eagerly and in CUDA graphs, and each way of memorizing runs with
the step as a CUDA graph and without. The ratios are to the faster kind of truncation: in a graph where there is one. Peak GPU
memory is measured beforehand, with one host at a time.
"""

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.learning.perplexity import perplexity

from .baselines import FastTruncation, HostStep, Sliding, Truncation, eager, graphed
from .harness import parse, percentile, print_table, ratio, report


class Shape(NamedTuple):
    """A random Qwen3 host of a known model's shape, with that model's vocabulary."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512, True),  # of no model: to try a command on the CPU
    "135M": Shape(576, 1536, 30, 9, 3, 64, 49152, True),  # SmolLM2-135M
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151936, True),  # Qwen3
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128, 151936, True),
    "8B": Shape(4096, 12288, 36, 32, 8, 128, 151936, False),
}


def load(arguments):
    """A new copy of the host."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape is None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, local_files_only=True)
        return model.to(arguments.device).eval()
    shape = SHAPES[arguments.shape]
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # an 8B host in float32 first would not fit beside its copy
    try:
        with torch.device(arguments.device):
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def text(arguments) -> torch.Tensor:
    """[n]: the beginning of the text, or random tokens for a host of a shape."""
    if arguments.shape is None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        return torch.tensor(tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"][: arguments.tokens])
    vocabulary = SHAPES[arguments.shape].vocab_size
    return torch.randint(0, vocabulary, (arguments.tokens,), generator=torch.Generator().manual_seed(0))


def _baselines(arguments) -> dict[str, Callable[[torch.Tensor], float]]:
    """Arm -> a function from a full window's ids to their summed loss; the first is what ratios are to."""
    window, stride, plain = arguments.window, arguments.stride, load(arguments)
    truncation = Truncation(plain, window, stride)
    sliding = eager(Sliding(plain, window, stride))
    if arguments.device == "cpu":
        return {
            "truncation": eager(truncation),
            "truncation, host kernels": eager(FastTruncation(plain, window, stride)),
            "sliding": sliding,
            "host step": eager(HostStep(load(arguments), window, stride)),
            "host step, host kernels": eager(HostStep(load(arguments), window, stride, kernels=True)),
        }
    arms = {}
    if arguments.shape is not None:
        arms["truncation, graph, no mask"] = graphed(Truncation(plain, window, stride, causal_flag=True))
    arms["truncation, graph"] = graphed(truncation)
    arms["truncation, graph, host kernels"] = graphed(FastTruncation(plain, window, stride))
    arms["truncation, eager"] = eager(truncation)
    arms["sliding, eager"] = sliding
    step = load(arguments)
    arms["host step, graph"] = graphed(HostStep(step, window, stride))
    arms["host step, graph, host kernels"] = graphed(HostStep(step, window, stride, kernels=True))
    return arms


def _record(arm: str, seconds: list[float], truncation: list[float], stride: int) -> dict:
    return {
        "arm": arm,
        "median_ms": 1e3 * statistics.median(seconds),
        "p10_ms": 1e3 * percentile(seconds, 10),
        "p90_ms": 1e3 * percentile(seconds, 90),
        "tokens_per_second": stride / statistics.median(seconds),
        "ratio_truncation": ratio(seconds, truncation),
    }


def run(
    arguments, ids: torch.Tensor, baselines: dict[str, Callable[[torch.Tensor], float]], context: str
) -> tuple[list[dict], locas.MemorizeReport]:
    """Memorizes the text once. -> one record per arm, and what the run said of itself."""
    window, stride = arguments.window, arguments.stride
    memory = locas.attach(load(arguments), locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    first, *others = baselines
    seconds: dict[str, list[float]] = {name: [] for name in (first, "memorizing", *others, first + " again")}
    nll = dict.fromkeys(seconds, 0.0)
    scored = 0
    resumed = time.perf_counter()

    def run_baselines(chunk) -> None:
        nonlocal resumed, scored
        learned = time.perf_counter() - resumed
        if chunk.end >= window and chunk.end - chunk.start == stride:  # full windows only
            seconds["memorizing"].append(learned)
            nll["memorizing"] += chunk.nll
            scored += chunk.tokens
            part = ids[chunk.end - window : chunk.end].to(arguments.device)
            for name in (first, *others, first + " again"):
                start = time.perf_counter()
                nll[name] += baselines[name.removesuffix(" again")](part)
                seconds[name].append(time.perf_counter() - start)
        resumed = time.perf_counter()

    settings = dict(window=window, stride=stride, context=context, progress=False)
    report_ = memory.memorize(ids, **settings, callback=run_baselines)
    records = []
    for name, values in seconds.items():
        record = _record(name, values, seconds[first], stride)
        if arguments.shape is None and not name.endswith(" again"):
            record["perplexity"] = perplexity(nll[name], scored)
        records.append(record)
    return records, report_


def peak_memory(arguments, ids: torch.Tensor) -> list[dict]:
    """What the GPU holds at most for the host alone, which reads a window, and for a host that memorizes; each by itself."""

    def alone() -> None:
        baseline = Truncation(load(arguments), arguments.window, arguments.stride)
        eager(baseline)(ids[: arguments.window].to(arguments.device))

    def memorizing(context: str) -> None:
        memory = locas.attach(load(arguments), locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
        few = ids[: arguments.window + 3 * arguments.stride]
        memory.memorize(few, window=arguments.window, stride=arguments.stride, context=context, progress=False)

    records = []
    for name, work in {
        "host alone": alone,
        "memorizing": lambda: memorizing("recompute"),
        "memorizing, context kept": lambda: memorizing("keep"),
    }.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        records.append({"arm": name, "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30})
    return records


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--shape", choices=SHAPES, help="a random Qwen3 host of this shape and random tokens instead of --model and --text"
    )
    parser.add_argument("--text", type=Path, default=ASSETS / "nostromo.txt")
    parser.add_argument("--tokens", type=int, default=8000, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rehome", action="store_true", help="attach with rehome=True")
    arguments = parse(parser)
    if arguments.tokens < arguments.window + arguments.stride:
        parser.error(f"--tokens is {arguments.tokens}; expected at least --window + --stride, for a full window")
    return arguments


def main() -> None:
    arguments = _arguments()
    ids = text(arguments)
    graphs = {"": "1"} if arguments.device == "cpu" else {"": "1", ", memorizing eagerly": "0"}
    contexts = {"": "recompute", ", context kept": "keep"}
    peaks = [] if arguments.device == "cpu" else peak_memory(arguments, ids)
    baselines = _baselines(arguments)
    rows, records = [], []
    for (kept, context), (eagerly, graph) in itertools.product(contexts.items(), graphs.items()):
        suffix = kept + eagerly
        os.environ["LOCAS_CUDA_GRAPH"] = graph
        measured, said = run(arguments, ids, baselines, context)
        for record in measured:
            record = {**record, "arm": record["arm"] + suffix, "cuda_graph": asdict(said.graph)}
            record["host_kernels"] = asdict(said.host_kernels)
            records.append(record)
            rows.append(
                [
                    record["arm"],
                    record["median_ms"],
                    record["p10_ms"],
                    record["p90_ms"],
                    record["tokens_per_second"],
                    record["ratio_truncation"],
                    f"{record['perplexity']:.2f}" if "perplexity" in record else "",
                ]
            )
        if arguments.device == "cuda":
            print(f"CUDA graph: {said.graph}; host kernels: {said.host_kernels}", flush=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    if peaks:
        print_table("Peak GPU memory", ["arm", "GiB"], [[peak["arm"], f"{peak['peak_gib']:.2f}"] for peak in peaks])
    report(
        f"{len(ids):,} tokens, W = {arguments.window}, S = {arguments.stride}, rank {arguments.rank}: one chunk",
        ["arm", "ms", "p10", "p90", "tokens/s", "/ truncation", "perplexity"],
        rows,
        {"settings": settings, "records": records, "peaks": peaks},
        arguments.out,
    )


if __name__ == "__main__":
    main()
