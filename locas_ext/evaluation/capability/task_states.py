"""Tasks answered in each state of the host: alone, with the memory, merged, detached, with Temp-LoRA's adapter in its place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from locas_ext import memory as locas
from locas_ext.errors import LocasError
from locas_ext.evaluation.methods.adapter_files import saved_lora

from .ability.suite import PERPLEXITY
from .bootstrap import interval, resampled_sums


class Evaluator(Protocol):
    """What answers tasks: `Ability` or `Harness`.

    Attributes:
        parts: what is answered and kept one after another: tasks by name, or None for all of them at once
        settings: what decides the answers, apart from the model
    """

    @property
    def parts(self) -> tuple[str | None, ...]: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def evaluate(self, model: Any, tokenizer: Any, state: str, part: Any) -> list[dict]:
        """A record for each metric of a part: state, task, metric, value, stderr, questions, per_question, responses_sha256."""


def states(model: Any, memory_folder: Path, merged: bool, adapter: Path | None) -> Iterator[tuple[str, Any]]:
    """The states' names and models, one after another; the model is plain before and after."""
    yield "host", model
    memory = locas.load(model, memory_folder)
    try:
        yield "attached", model
        if merged:
            yield "merged", memory.fork().merge_and_unload()
    finally:
        memory.detach()
    yield "detached", model
    if adapter is not None:
        with saved_lora(model, adapter):
            yield "temp-lora", model


def answer_tasks(
    evaluator: Evaluator,
    model: Any,
    tokenizer: Any,
    of_states: Iterator[tuple[str, Any]],
    seed: int,
    records: list[dict],
    keep: Callable[[], None],
) -> None:
    """Adds to `records` what each state answers and is not there yet, and has it kept after every part."""
    for state, in_state in of_states:
        for part in evaluator.parts:
            earlier = [record["task"] for record in records if "task" in record and record["state"] == state]
            if part in earlier or (part is None and earlier):
                continue
            found = evaluator.evaluate(in_state, tokenizer, state, part)
            hosts = {(r["task"], r["metric"]): r for r in [*records, *found] if "task" in r and r["state"] == "host"}
            records += [compared(record, _host_record(record, hosts), seed) for record in found]
            keep()


def _host_record(record: dict, hosts: dict[tuple[str, str], dict]) -> dict:
    """The host's record of the same task and metric, as long as this one. LocasError if an earlier run left another."""
    host = hosts.get((record["task"], record["metric"]))
    lengths = {None if host is None else len(host["per_question"] or []), len(record["per_question"] or [])}
    if host is None or len(lengths) > 1:
        raise LocasError(f"the earlier run's record of the host at {record['task']} is of other questions; choose a new --out")
    return host


def compared(record: dict, host: dict, seed: int) -> dict:
    """A task's record with its difference from the host's, and the interval over the questions, paired.

    The value is the mean over the questions, of a perplexity exp of the mean of their nats.
    """
    bounds = None
    if record["per_question"] and host["per_question"] and record["questions"] > 1:
        pairs = np.stack([record["per_question"], host["per_question"]], axis=1).astype(np.float64)
        means = resampled_sums(pairs, seed=seed) / len(pairs)
        values = np.exp(np.minimum(means, 700)) if record["metric"] == PERPLEXITY else means
        bounds = interval(values[:, 0] - values[:, 1])
    return record | {
        "difference": record["value"] - host["value"],
        "difference_interval": bounds,
        "same_bits_as_host": record["responses_sha256"] == host["responses_sha256"],
    }
