"""Which epsilon, capacity and scale to write with: the perplexity of a text over a small grid of them.

Each row memorizes the whole text with update="write" and NL-SVD; beside them are context truncation and backpropagation
with the defaults. The scale is set through the rank it is computed from ("paper" divides by it) or taken as a host
neuron's ("host"). Each process has one torch thread.
"""

import argparse
import itertools
import multiprocessing
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.methods.truncation import truncation

from .harness import report

COLUMNS = ("arm", "scale", "rank", "capacity", "compress_to", "epsilon")
Setting = dict  # of one row: "arm", and for writing the other columns


def settings(arguments) -> list[Setting]:
    writing = itertools.product(arguments.scale, arguments.rank, arguments.capacity, arguments.epsilon)
    grid = [
        {"arm": "write", "scale": scale, "rank": rank, "capacity": capacity, "compress_to": capacity // 2, "epsilon": epsilon}
        for scale, rank, capacity, epsilon in writing
    ]
    return [{"arm": "truncation"}, {"arm": "backprop"}, *grid]


def measure(job: tuple[Setting, list[int], argparse.Namespace]) -> dict:
    """-> the setting with its perplexity and seconds."""
    setting, ids, arguments = job
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True).eval()
    protocol = {"window": arguments.window, "stride": arguments.stride, "progress": False}
    started = time.perf_counter()
    if setting["arm"] == "truncation":
        measured = truncation(model, ids, **protocol)
    elif setting["arm"] == "backprop":
        measured = locas.attach(model, locas.LocasConfig(variant="mlp")).memorize(ids, **protocol)
    else:
        config = locas.LocasConfig(variant="mlp", rank=setting["rank"], scale=setting["scale"])
        measured = locas.attach(model, config).memorize(
            ids,
            update=locas.Write(epsilon=setting["epsilon"], capacity=setting["capacity"], compress_to=setting["compress_to"]),
            **protocol,
        )
    result = {**setting, "perplexity": measured.perplexity, "seconds": time.perf_counter() - started}
    print(result, flush=True)  # for the log of a run that may be cut short
    return result


def row(record: dict, best: dict) -> list[str]:
    mark = " *" if record is best else ""
    measured = [f"{record['perplexity']:.3f}{mark}", f"{record['seconds']:.0f}"]
    return [*(str(record.get(column, "")) for column in COLUMNS), *measured]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.write_sweep", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a two-layer host")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=50_000, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--capacity", type=int, nargs="+", default=[256, 512], help="compressed to its half when full")
    parser.add_argument("--rank", type=int, nargs="+", default=[64], help="which the paper's scale is divided by")
    parser.add_argument("--scale", nargs="+", default=["paper"], choices=["paper", "host"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}; expected at least 1")
    smallest = min(arguments.capacity)
    if smallest // 2 + arguments.stride > smallest:
        parser.error(f"--capacity is {smallest}; expected {2 * arguments.stride} or more, twice --stride")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    ids = tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"][: arguments.tokens]
    jobs = [(setting, ids, arguments) for setting in settings(arguments)]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        records = pool.map(measure, jobs, chunksize=1)
        pool.close()
        pool.join()  # leaving the block would end the processes where they stand
    best = min((record for record in records if record["arm"] == "write"), key=lambda record: record["perplexity"])
    shown = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    report(
        f"{len(ids):,} tokens, W = {arguments.window}, S = {arguments.stride}; * the best of writing",
        [*COLUMNS, "perplexity", "seconds"],
        [row(record, best) for record in records],
        {"settings": shown, "records": records},
        arguments.out,
    )


if __name__ == "__main__":
    main()
