"""Which language models of transformers take a memory: `python -m bench.census [--only NAME ...] [--jobs N] [--out FILE.json]`.

Every class of the installed transformers' causal and image-text mappings is built small with random weights, each in a process
of its own, and is asked through the public API only. The verdict on a class is the first of these that holds:

    not built       no small model, or it computes nothing from tokens alone
    refused         attach raises ValueError or TypeError, and the host is as it was
    error           anything else raises, or the process dies or gives no answer in time
    not bitwise     attach, disabled() or detach changes an output, a weight, a module or the config
    not causal      a token's logits depend on later tokens
    wrong context   memorize does not score a chunk as one plain forward over its window does
    no learning     the loss of a text that repeats itself falls by less than 0.05
    works

Of those that work it says where the memory stands, and whether the merged model, saved and read by plain transformers, gives
the same logits. Classes that FILE.json holds already are not run again.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.harness import machine
from bench.host_checks import examine, told
from bench.small_hosts import language_models
from locas_ext.storage.files import write_atomically

MEMORY_BYTES = 14 << 30  # of a process
KINDS = ("causal", "image-text")
WRONG = ("wrong context", "not causal", "not bitwise", "error")
VERDICTS = ("works", "no learning", *WRONG, "refused", "not built")
PLACES = ("whole", "whole in some layers", "between", "between in some layers", "beside")
# What attach and the checks say of several classes, and in words for all of them.
REASONS = {
    "no FFN was found": "no FFN was found in the layers",
    "found by one forward": "the forward that finds the FFNs raises",
    "is not causal": "a token's logits depend on later tokens",
    "an encoder and a decoder": "an encoder and a decoder",
    "has no language-model head": "no language-model head",
    "no gradient comes back": "no gradient comes back",
    "the loss fell": "the loss falls by less",
    "a package is not installed": "a package is not installed",
    "its forward takes more": "the forward takes more than token ids",
    "no small model": "no small model could be made",
}

Result = dict[str, Any]
Results = dict[str, Result]


# ---- processes ---------------------------------------------------------------------------------------------------
def _child(name: str, answer: connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        result = examine(name)
    except BaseException as error:
        result = {"verdict": "error", "why": told(error)}
    answer.send(result)


def examined(names: list[str], jobs: int, seconds: float) -> Iterator[tuple[str, Result]]:
    """(class, result) as they come, of `jobs` processes at a time, each of which has so many seconds."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            answer, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, send), daemon=True)
            process.start()
            send.close()
            running[name] = process, answer, time.monotonic()
        connection.wait([answer for _, answer, _ in running.values()], timeout=1)
        for name, (process, answer, start) in list(running.items()):
            took = time.monotonic() - start
            if answer.poll():
                try:
                    result = answer.recv()
                except EOFError:
                    process.join()
                    result = {"verdict": "error", "why": f"the process died with exit code {process.exitcode}"}
            elif took > seconds:
                process.kill()
                result = {"verdict": "error", "why": f"no answer in {seconds:.0f} s"}
            else:
                continue
            process.join()
            del running[name]
            yield name, result | {"seconds": round(took, 1)}


# ---- the table ---------------------------------------------------------------------------------------------------
def standing(result: Result) -> str:
    """Where the memory of a host that works stands, of all layers."""
    places = set(result["places"])
    for place in ("whole", "between"):
        if place in places:
            return place if len(places) == 1 else f"{place} in some layers"
    return "beside"


def counts(results: Results) -> list[tuple[str, list[int]]]:
    """The table's rows: what is counted, and how many classes of each mapping and of both."""

    def row(what: str, holds: Any) -> tuple[str, list[int]]:
        each = [sum(holds(result) for result in results.values() if result["kind"] == kind) for kind in KINDS]
        return what, [*each, sum(each)]

    def works(result: Result) -> bool:
        return result["verdict"] == "works"

    rows = [row("classes", lambda result: True), row("built small", lambda result: result["verdict"] != "not built")]
    rows.append(row("attach, learn on the right context, detach bitwise", works))
    rows += [row(f"- {place}", lambda result, place=place: works(result) and standing(result) == place) for place in PLACES]
    rows.append(row("- merged, saved, read by plain transformers: same logits", lambda result: result.get("merge") == "works"))
    rows.append(row("- merged, but not the same", lambda result: result.get("merge") == "wrong"))
    rows += [row(verdict, lambda result, verdict=verdict: result["verdict"] == verdict) for verdict in VERDICTS[1:-1]]
    return [(what, each) for what, each in rows if each[-1]]


def reason(result: Result) -> str:
    """What the messages of several classes have in common, or the message."""
    return next((words for phrase, words in REASONS.items() if phrase in result["why"]), result["why"][:160])


def print_table(results: Results) -> None:
    """The counts as a table for the README, then who is not among those that work, by reason."""
    print(f"\n| transformers {transformers.__version__} | {' | '.join(KINDS)} | both |\n| --- | --- | --- | --- |")
    for what, each in counts(results):
        print(f"| {what} | {' | '.join(map(str, each))} |")
    groups = defaultdict(list)
    for name, result in results.items():
        if result["verdict"] != "works":
            groups[VERDICTS.index(result["verdict"]), reason(result)].append(name)
    for (verdict, why), names in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
        print(f"\n{len(names)} {VERDICTS[verdict]}: {why}\n    {', '.join(sorted(names))}")


# ---- the command -------------------------------------------------------------------------------------------------
def line(name: str, result: Result) -> str:
    """One class's line of progress."""
    parts = [f"{name:45} {result['verdict']:13} {result['seconds']:5.1f} s"]
    if "loss" in result:
        before, after = result["loss"]
        parts.append(f"{result['variant']} {before:.2f} -> {after:.2f}, context {result['context_error']:.0e}")
    if result["verdict"] == "works":
        parts.append(f"{standing(result)}, merge {result['merge']}")
    return ", ".join([*parts, result["why"][:200]] if result["why"] else parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.census", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="classes; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=150, help="the most that one class may take")
    parser.add_argument("--out", type=Path, help="JSON file; the classes it holds are not run again")
    parser.add_argument("--expect", type=int, default=0, help="exit status 1 if fewer work, or one is wrong")
    arguments = parser.parse_args()
    kinds = language_models()
    if unknown := set(arguments.only) - set(kinds):
        parser.error(f"--only names {', '.join(sorted(unknown))}; expected classes of the two mappings")
    results: Results = {}
    if arguments.out is not None and arguments.out.exists():
        results = json.loads(arguments.out.read_text())["classes"]
    torch.set_num_threads(1)
    host = machine()
    transformers.logging.set_verbosity_error()
    names = [name for name in sorted(kinds) if name not in results and (not arguments.only or name in arguments.only)]
    for done, (name, result) in enumerate(examined(names, arguments.jobs, arguments.seconds), start=1):
        results[name] = {"kind": kinds[name], **result}
        if arguments.out is not None:
            write_atomically(arguments.out, json.dumps({"machine": host, "classes": results}, indent=1).encode())
        print(f"{done:3} of {len(names)} {line(name, result)}", flush=True)
    print_table(results)
    verdicts = [result["verdict"] for result in results.values()]
    wrong = {*verdicts} & {*WRONG} or any(result.get("merge") == "wrong" for result in results.values())
    if arguments.expect and (wrong or verdicts.count("works") < arguments.expect):
        sys.exit(1)


if __name__ == "__main__":
    main()
