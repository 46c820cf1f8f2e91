"""`locas capability`: what a memory does to everything else the host can do.

Host, attached, merged and detached model read held-out texts (held_out.py) and, where asked for, answer tasks
(task_states.py): those that are built in (ability/) or lm-eval's (lm_eval_tasks.py). Each difference from the host comes with a
paired bootstrap interval (docs/method.md, "Forgetting").
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from locas_ext import memory as locas
from locas_ext.errors import Interrupted, LocasError
from locas_ext.evaluation import results
from locas_ext.evaluation.arguments import at_least, once
from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.inputs import load_host, weights_digest
from locas_ext.evaluation.methods.adapter_files import lora_digest, saved_lora
from locas_ext.evaluation.report.build import write_report
from locas_ext.evaluation.report.capability import console_tables, detached_verdict
from locas_ext.evaluation.texts import Text, read_text
from locas_ext.storage.snapshot import copy_sharing_weights
from locas_ext.terminal import neutral

from .ability.suite import Ability, AbilityTasks
from .bootstrap import interval, resampled_sums
from .distributions import digest
from .held_out import AGREEING, EXCESS_NLL, KL, NLL, TOKENS, StateScores, check, measure
from .lm_eval_tasks import Harness, HarnessTasks
from .task_states import Evaluator, answer_tasks, states

DEFAULT_TEXT = ASSETS / "tono-bungay.txt"
ALL = "all texts"


@dataclass(frozen=True, kw_only=True)
class CapabilityTask:
    """The arguments of the command.

    held_out: texts the memory has not read
    held_out_tokens: at most so many of each; None: all
    window: the most tokens the model sees at once
    merged: whether the merged model is measured, which needs room for a second, wider copy of the FFNs; None: on the
        texts but not on the tasks
    tasks: those asked, and by what; None: the texts only
    temp_lora: a folder with an adapter that Temp-LoRA learned, which answers the tasks too; None: there is none
    seed: of the bootstrap
    out: where results.json and report.md go; None: the tables are printed only
    """

    model: str
    memory: Path
    held_out: list[Path]
    held_out_tokens: int | None
    window: int
    merged: bool | None
    tasks: AbilityTasks | HarnessTasks | None
    temp_lora: Path | None
    seed: int
    out: Path | None
    dtype: str | None
    device: str | None


# ---- records ---------------------------------------------------------------------------------------------------
def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """From column sums [..., 5] over windows."""
    tokens = sums[..., TOKENS]
    return {
        "perplexity": np.exp(sums[..., NLL] / tokens),
        "perplexity_ratio": np.exp(sums[..., EXCESS_NLL] / tokens),
        "top1_agreement": sums[..., AGREEING] / tokens,
        "kl": sums[..., KL] / tokens,
    }


def _summary(state: str, text: str, windows: list[list[float]], seed: int) -> dict:
    """Figures and their intervals; null where a KL is unknown, where no float holds it, and intervals of one window."""
    values = np.array(windows, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        figures = {name: float(value) for name, value in _figures(values.sum(0)).items()}
        intervals = dict.fromkeys(figures)
        if len(values) > 1:
            intervals = {name: interval(each) for name, each in _figures(resampled_sums(values, seed=seed)).items()}
    result = {"state": state, "text": text, "tokens": int(values[:, TOKENS].sum()), "windows": len(values)}
    for name, figure in figures.items():
        known = math.isfinite(figure)  # JSON knows no NaN and no infinity
        certain = known and np.isfinite(bounds := intervals[name] or ()).all()
        result |= {name: figure if known else None, f"{name}_interval": (bounds or None) if certain else None}
    return result


def _text_record(text: str, scores: StateScores, seed: int) -> dict:
    return _summary(scores.state, text, scores.windows, seed) | {
        "same_bits_as_host": scores.difference is None,
        "first_difference": scores.difference,
        "seconds": scores.seconds,
        "per_window": [[None if math.isnan(number) else number for number in row] for row in scores.windows],
    }


def _pooled(records: list[dict], seed: int) -> list[dict]:
    """One record a state over the windows of all texts."""
    result = []
    for state in dict.fromkeys(record["state"] for record in records):
        those = [record for record in records if record["state"] == state]
        windows = [row for record in those for row in record["per_window"]]
        result.append(
            _summary(state, ALL, windows, seed)
            | {
                "same_bits_as_host": all(record["same_bits_as_host"] for record in those),
                "seconds": sum(record["seconds"] for record in those),
                "pooled": True,
            }
        )
    return result


# ---- the command -----------------------------------------------------------------------------------------------
def _names(paths: list[Path]) -> list[str]:
    """What the texts are called in the results: their files' names, or their paths where two names are the same."""
    names = [neutral(path.name) for path in paths]
    return names if len(set(names)) == len(names) else [neutral(str(path)) for path in paths]


def _probe(model, memory_folder: Path) -> dict:
    """What the memory is. On a copy of the model that shares its weights, so that the host itself stays untouched.

    Raises what `locas.load` raises, before any work is done.
    """
    memory = locas.load(copy_sharing_weights(model), memory_folder)
    return {
        "memory_config": memory.config.to_dict(),
        "memory_version": memory.version,
        "tokens_seen": memory.tokens_seen,
        "memory_sha256": digest(memory.gather_slots()).hex(),
    }


def _evaluator(tasks: AbilityTasks | HarnessTasks | None) -> Evaluator | None:
    """Raises what `Ability` and `Harness` raise."""
    if tasks is None:
        return None
    return Ability(tasks) if isinstance(tasks, AbilityTasks) else Harness(tasks)


def _settings(task: CapabilityTask, model, texts: list[Text], evaluator: Evaluator | None) -> dict:
    """Everything that decides the numbers."""
    return {
        "command": "capability",
        "model": task.model,
        "weights_sha256": weights_digest(model),
        "memory": task.memory,
        "held_out": [text.fingerprint for text in texts],
        "window": task.window,
        "merged": task.merged,
        "temp_lora": task.temp_lora,
        "temp_lora_sha256": task.temp_lora and lora_digest(task.temp_lora),
        "tasks": None,
        **(evaluator.settings if evaluator else {}),
        "seed": task.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **_probe(model, task.memory),
    }


def _run_texts(task: CapabilityTask, model, texts: dict[str, Text], records: list[dict], keep: Callable[[], None]) -> None:
    done = {record.get("text") for record in records}
    for name, text in texts.items():
        if name not in done:
            scores = measure(model, task.memory, text.ids, task.window, merged=task.merged is not False)
            records += [_text_record(name, each, task.seed) for each in scores]
            keep()
    if len(texts) > 1 and ALL not in done:
        records += _pooled([record for record in records if "text" in record], task.seed)
        keep()


def run_capability(task: CapabilityTask, console: Console) -> list[dict]:
    """Measures and prints the tables; with an output folder, writes results.json as it goes and report.md at the end.

    Returns the records. Raises ValueError or OSError for arguments that do not fit, LocasError where tasks are asked
    for and what answers them is not installed, for a memory of another host and, after everything is printed and written, if
    detach() did not restore the host; Interrupted at Ctrl-C.
    """
    at_least(2, held_out_tokens=task.held_out_tokens)
    once("--held-out", task.held_out)
    evaluator = _evaluator(task.tasks)
    if task.temp_lora is not None and evaluator is None:
        raise ValueError("--temp-lora is given, but --tasks, which the adapter is to answer, is not")
    model, tokenizer = load_host(task.model, task.dtype, task.device)
    read = [read_text(path, tokenizer, task.held_out_tokens) for path in task.held_out]
    texts = dict(zip(_names(task.held_out), read, strict=True))
    for text in read:
        check(model, text.ids, task.window)
    if task.temp_lora is not None:
        with saved_lora(model, task.temp_lora):
            pass  # raises what it would raise hours later
    settings = _settings(task, model, read, evaluator)
    with results.only_run(task.out) if task.out else nullcontext():
        return _run(task, model, tokenizer, texts, settings, evaluator, console)


def _run(
    task: CapabilityTask,
    model,
    tokenizer,
    texts: dict[str, Text],
    settings: dict,
    evaluator: Evaluator | None,
    console: Console,
) -> list[dict]:
    records = results.open_folder(task.out, settings) if task.out else []

    def keep() -> None:
        if task.out:
            results.write(task.out, settings, records)

    try:
        _run_texts(task, model, texts, records, keep)
        if evaluator:
            of_states = states(model, task.memory, task.merged is True, task.temp_lora)
            answer_tasks(evaluator, model, tokenizer, of_states, task.seed, records, keep)
    except KeyboardInterrupt:
        if not task.out or not records:
            raise Interrupted("nothing was kept") from None
        raise Interrupted(f"{len(records)} records are kept in {task.out}; the same command continues") from None
    for table in console_tables(records):
        console.print(table)
    is_host, sentence = detached_verdict(records)
    console.print(sentence, markup=False)
    if task.out:
        console.print(f"report: {write_report(task.out)}", markup=False)
    if not is_host:
        raise LocasError(sentence)
    return records
