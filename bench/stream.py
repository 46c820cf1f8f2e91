"""Memorizing a text against reading it with context truncation, chunk by chunk in one run.

After each chunk that the memory has learned, the truncation baseline scores the same chunk with a second, unpatched
copy of the host: the same window, dtype and attention, torch.inference_mode, logits for the scored tokens only. So
whatever disturbs the machine disturbs both.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.tasks.assets import ASSETS, MODEL

from .harness import percentile, ratio, report


def load(path: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=ASSETS / "nostromo.txt")
    parser.add_argument("--tokens", type=int, default=8000, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    dtype = getattr(torch, arguments.dtype)
    plain, host = load(arguments.model, dtype), load(arguments.model, dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    ids = torch.tensor(tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"][: arguments.tokens])
    memory = locas.attach(host, locas.LocasConfig(rank=arguments.rank))
    window, stride = arguments.window, arguments.stride
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
            one = _score_last(plain, ids[begin : chunk.end], chunk, window)
            times.append(time.perf_counter() - start)
        nll["truncation"] += one
        nll["memorizing"] += chunk.nll
        scored += chunk.tokens
        if chunk.end >= window and chunk.end - chunk.start == stride:  # full windows only
            seconds["memorizing"].append(learned)
            seconds["truncation"].append(times[0])
            seconds["truncation again"].append(times[1])
        resumed = time.perf_counter()

    memory.memorize(ids, window=window, stride=stride, progress=False, callback=read_with_truncation)
    if not seconds["truncation"]:
        raise SystemExit(f"--tokens is {len(ids)}; expected more than --window {window} for a full window")
    rows, records = [], []
    for name, values in seconds.items():
        record = {
            "arm": name,
            "median_ms": 1e3 * statistics.median(values),
            "p10_ms": 1e3 * percentile(values, 10),
            "p90_ms": 1e3 * percentile(values, 90),
            "tokens_per_second": stride / statistics.median(values),
            "ratio_truncation": ratio(values, seconds["truncation"]),
        }
        if name in nll:
            record["perplexity"] = math.exp(nll[name] / scored)
        records.append(record)
        rows.append([name, record["median_ms"], record["p10_ms"], record["p90_ms"], record["tokens_per_second"],
                     record["ratio_truncation"], f"{record['perplexity']:.2f}" if name in nll else ""])
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    report(
        f"{len(ids):,} tokens, W = {window}, S = {stride}, rank {arguments.rank}: one chunk in a full window",
        ["arm", "ms", "p10", "p90", "tokens/s", "/ truncation", "perplexity"], rows,
        {"settings": settings, "records": records}, arguments.out,
    )


@torch.inference_mode()
def _score_last(model, ids: torch.Tensor, chunk, window: int) -> float:
    """Summed NLL of the last chunk.tokens tokens of ids [n], in one forward of the whole window."""
    inputs, targets = ids[None, :-1], ids[len(ids) - chunk.tokens :]
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=chunk.tokens).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


if __name__ == "__main__":
    main()
