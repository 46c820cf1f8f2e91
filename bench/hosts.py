"""What other hosts cost: how long attach takes, and memorizing a mixture of experts against the host's own step.

attach    a random host of Qwen3-0.6B's shape, once as the table of families says where its FFNs are, once found by structure
          and numbers as in any unknown family; the probe included. The median of `--rounds`, each on a new model. Of the latter
          also what finding and probe take alone.
experts   a random Qwen3-MoE host of 30B-A3B's shape cut to `--layers` layers: a chunk of a full window memorized, over the
          host's own step (its context read, then forward and backward of the chunk, no memory), eagerly and in CUDA graphs.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import locas_ext as locas
from locas_ext.hosts.probe.probe import probe
from locas_ext.hosts.registry import HOSTS, inspect_host

from .baselines import HostStep, eager, graphed
from .harness import parse, percentile, ratio, report

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
DENSE = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
EXPERTS = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}


def made(arguments: argparse.Namespace, kind: type, config: object) -> torch.nn.Module:
    """A random host, made in its dtype on its device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    try:
        with torch.device(arguments.device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def dense(arguments: argparse.Namespace) -> torch.nn.Module:
    sizes = (
        {**TINY, "intermediate_size": 192, "num_hidden_layers": 2}
        if arguments.tiny
        else {**DENSE, "intermediate_size": 3072, "num_hidden_layers": 28}
    )
    return made(arguments, Qwen3ForCausalLM, Qwen3Config(**sizes, max_position_embeddings=32768, tie_word_embeddings=True))


def experts(arguments: argparse.Namespace) -> torch.nn.Module:
    sizes = (
        {**TINY, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
        if arguments.tiny
        else {**EXPERTS, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    )
    return made(arguments, Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, num_hidden_layers=arguments.layers))


def attaching(arguments: argparse.Namespace) -> list[dict]:
    """One record per way to find the FFNs, and the parts of the one without the table."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, work: Callable[[Any], Any], given: object) -> Any:
        _wait(arguments)
        started = time.perf_counter()
        made = work(given)
        _wait(arguments)
        seconds[name].append(time.perf_counter() - started)
        return made

    def attach(model: torch.nn.Module) -> locas.Memory:
        return locas.attach(model, locas.LocasConfig(rank=arguments.rank))

    for _ in range(arguments.rounds + 1):  # the first of each pays for what is made once per process
        timed("attach, from the table", attach, dense(arguments))
        with mock.patch.dict(HOSTS):
            del HOSTS["qwen3"]
            timed("attach, found", attach, dense(arguments))
            timed("of that the probe", probe, timed("of that finding", inspect_host, dense(arguments)))
    return [
        {"arm": name, "first_ms": 1e3 * values[0], "median_ms": 1e3 * statistics.median(values[1:])}
        for name, values in seconds.items()
    ]


def _wait(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def memorizing(arguments: argparse.Namespace, ids: torch.Tensor, graph: bool) -> list[dict]:
    """A chunk memorized, and the host's own step on the same window, alternating in one run."""
    window, stride = arguments.window, arguments.stride
    os.environ["LOCAS_CUDA_GRAPH"] = "1" if graph else "0"
    step = HostStep(experts(arguments), window, stride)
    own: Callable[[torch.Tensor], float] = graphed(step) if graph else eager(step)
    memory = locas.attach(experts(arguments), locas.LocasConfig(rank=arguments.rank))
    seconds: dict[str, list[float]] = {"memorizing": [], "host step": [], "host step again": []}
    resumed = time.perf_counter()

    def alternate(chunk: object) -> None:
        nonlocal resumed
        learned = time.perf_counter() - resumed
        if chunk.end >= window and chunk.end - chunk.start == stride:  # full windows only
            seconds["memorizing"].append(learned)
            part = ids[chunk.end - window : chunk.end].to(arguments.device)
            for name in ("host step", "host step again"):
                started = time.perf_counter()
                own(part)
                seconds[name].append(time.perf_counter() - started)
        resumed = time.perf_counter()

    said = memory.memorize(ids, window=window, stride=stride, progress=False, callback=alternate)
    print(f"graph: {said.graph}; kernels: {said.host_kernels}", flush=True)
    kept = {name: values[1:] for name, values in seconds.items()}
    return [
        {
            "arm": name + (", graph" if graph else ", eager"),
            "median_ms": 1e3 * statistics.median(values),
            "p10_ms": 1e3 * percentile(values, 10),
            "p90_ms": 1e3 * percentile(values, 90),
            "ratio_host_step": ratio(values, kept["host step"]),
        }
        for name, values in kept.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hosts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of attach")
    parser.add_argument("--layers", type=int, default=8, help="of the mixture of experts")
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="hosts of 64 columns, to try the benchmark itself")
    arguments = parse(parser)
    if arguments.tokens < arguments.window + 2 * arguments.stride:
        parser.error(f"--tokens is {arguments.tokens}; expected at least --window + 2 * --stride, for two full windows")
    vocabulary = (TINY if arguments.tiny else EXPERTS)["vocab_size"]
    ids = torch.randint(0, vocabulary, (arguments.tokens,), generator=torch.Generator().manual_seed(0))
    records = attaching(arguments)
    for graph in [False] if arguments.device == "cpu" else [False, True]:
        try:
            records += memorizing(arguments, ids, graph)
        except (RuntimeError, ValueError) as error:
            if not graph:
                raise
            records.append({"arm": f"host step, graph: cannot be captured ({' '.join(str(error).split())[:100]})"})
    columns = ["first_ms", "median_ms", "p10_ms", "p90_ms", "ratio_host_step"]
    rows = [[record["arm"], *(record.get(name, "") for name in columns)] for record in records]
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    title = f"attach; a chunk of {arguments.stride} tokens, window {arguments.window}, {arguments.layers} layers of experts"
    report(
        title,
        ["arm", "first", "ms", "p10", "p90", "/ host step"],
        rows,
        {"settings": settings, "records": records},
        arguments.out,
    )


if __name__ == "__main__":
    main()
