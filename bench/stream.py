"""Memorizing a text against reading it with context truncation, chunk by chunk in one run.

After each chunk that the memory has learned, the truncation baseline scores the same chunk with a second, unpatched
copy of the host: the same window, dtype and attention, torch.inference_mode, logits for the scored tokens only. So
whatever disturbs the machine disturbs both. On CUDA the text is memorized twice, with the step as a CUDA graph and
without.
"""

import argparse
import math
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS, MODEL

from .harness import parse, percentile, ratio, report


def load(arguments):
    """A new copy of the host."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.random is None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, local_files_only=True)
        return model.to(arguments.device).eval()
    d, layers = arguments.random
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=d,
        intermediate_size=3 * d,
        num_hidden_layers=layers,
        num_attention_heads=d // 128,
        num_key_value_heads=max(1, d // 256),
        head_dim=128,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return Qwen3ForCausalLM(config).to(dtype).eval()


def _record(arm: str, seconds: list[float], truncation: list[float], stride: int) -> dict:
    return {
        "arm": arm,
        "median_ms": 1e3 * statistics.median(seconds),
        "p10_ms": 1e3 * percentile(seconds, 10),
        "p90_ms": 1e3 * percentile(seconds, 90),
        "tokens_per_second": stride / statistics.median(seconds),
        "ratio_truncation": ratio(seconds, truncation),
    }


def run(arguments, ids: torch.Tensor) -> tuple[list[dict], locas.GraphReport]:
    """Memorizes the text once. -> one record per arm, and how far a CUDA graph was used."""
    window, stride = arguments.window, arguments.stride
    plain, host = load(arguments), load(arguments)
    memory = locas.attach(host, locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    seconds = {"truncation": [], "memorizing": [], "truncation again": []}
    nll = {"truncation": 0.0, "memorizing": 0.0}
    scored = 0
    resumed = time.perf_counter()

    def read_with_truncation(chunk) -> None:
        nonlocal resumed, scored
        learned = time.perf_counter() - resumed
        # The last chunk of a text that ends with this chunk, in its whole window: one forward.
        begin = max(0, chunk.end - window)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            one = _score_last(plain, ids[begin : chunk.end].to(arguments.device), chunk)
            times.append(time.perf_counter() - start)
        nll["truncation"] += one
        nll["memorizing"] += chunk.nll
        scored += chunk.tokens
        if chunk.end >= window and chunk.end - chunk.start == stride:  # full windows only
            seconds["memorizing"].append(learned)
            seconds["truncation"].append(times[0])
            seconds["truncation again"].append(times[1])
        resumed = time.perf_counter()

    report_ = memory.memorize(ids, window=window, stride=stride, progress=False, callback=read_with_truncation)
    records = []
    for name, values in seconds.items():
        record = _record(name, values, seconds["truncation"], stride)
        if name in nll and arguments.random is None:
            record["perplexity"] = math.exp(nll[name] / scored)
        records.append(record)
    return records, report_.graph


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--random",
        type=int,
        nargs=2,
        metavar=("D", "LAYERS"),
        help="a random Qwen3 host of this size and random tokens instead of --model and --text",
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
    if arguments.random is None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        ids = tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"][: arguments.tokens]
        ids = torch.tensor(ids)
    else:
        ids = torch.randint(0, 32768, (arguments.tokens,), generator=torch.Generator().manual_seed(0))
    runs = {"": "1"} if arguments.device == "cpu" else {"": "1", ", no graph": "0"}
    rows, records = [], []
    for suffix, graph in runs.items():
        os.environ["LOCAS_CUDA_GRAPH"] = graph
        measured, graph_report = run(arguments, ids)
        for record in measured:
            record = {**record, "arm": record["arm"] + suffix, "cuda_graph": asdict(graph_report)}
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
            print(f"CUDA graph: {graph_report}", flush=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    report(
        f"{len(ids):,} tokens, W = {arguments.window}, S = {arguments.stride}, rank {arguments.rank}: a chunk in a full window",
        ["arm", "ms", "p10", "p90", "tokens/s", "/ truncation", "perplexity"],
        rows,
        {"settings": settings, "records": records},
        arguments.out,
    )


@torch.inference_mode()
def _score_last(model, ids: torch.Tensor, chunk) -> float:
    """Summed NLL of the last chunk.tokens tokens of ids [n], in one forward of the whole window."""
    inputs, targets = ids[None, :-1], ids[len(ids) - chunk.tokens :]
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=chunk.tokens).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


if __name__ == "__main__":
    main()
