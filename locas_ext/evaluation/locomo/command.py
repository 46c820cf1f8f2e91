"""`locas locomo`: questions about long dialogues that are in the window, in a memory, in both or in neither."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from locas_ext.errors import Interrupted
from locas_ext.evaluation import results
from locas_ext.evaluation.arguments import at_least, check_temp_lora, choose
from locas_ext.evaluation.display import one_line
from locas_ext.evaluation.inputs import load_host, weights_digest
from locas_ext.evaluation.methods.arm import Arm, make_arm
from locas_ext.evaluation.methods.registry import check_arm, reader
from locas_ext.evaluation.report.build import write_report
from locas_ext.evaluation.report.locomo import table
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.progress import progress_bar
from locas_ext.learning.protocol import Protocol
from locas_ext.terminal import neutral

from .answers import Prompts, answer, make_prompts, starts_with_bos, token_ids
from .corrections import correct, counts, read_corrections
from .data import Dialogue, read_dialogues
from .output import ALL_REFUSE, Output, predictions_file
from .prompts import PROMPTS, dialogue_text
from .scoring import REFUSAL, check_installed

CONTEXTS = ("full-context", "no-context")


@dataclass(frozen=True, kw_only=True)
class LocomoTask:
    """The arguments of the command.

    methods: of METHODS
    locas, temp_lora: the settings of the two memories; methods/registry.py, `locas_settings`
    batch_size: how many questions are answered at once
    corrections: a file of corrected answers; None: the published ones
    """

    data: list[Path]
    model: str
    methods: list[str]
    out: Path
    locas: dict
    temp_lora: dict
    window: int | None
    stride: int | None
    max_new_tokens: int
    batch_size: int
    corrections: Path | None
    dtype: str | None
    device: str | None


# ---- methods ---------------------------------------------------------------------------------------------------
MEMORIES = ("", "locas", "temp-lora")  # what stands behind the + in a method's name
METHODS = tuple(f"{context}+{memory}".rstrip("+") for memory in MEMORIES for context in CONTEXTS)


def _split(method: str) -> tuple[str, str]:
    """-> context, memory"""
    context, _, memory = method.partition("+")
    return context, memory


def _arms(task: LocomoTask) -> dict[str, Arm]:
    """The memories that the task's methods need, by name."""
    base = {"locas": task.locas, "temp-lora": task.temp_lora}
    return {name: make_arm(base, name) for name in dict.fromkeys(_split(method)[1] for method in task.methods) if name}


@contextmanager
def _having_read(host, arm: Arm | None, ids: Tensor, protocol: Protocol) -> Iterator[None]:
    """Inside the block the host has a fresh memory that has read a text; without an arm it is alone."""
    if arm is None:
        yield
        return
    with reader(host, arm) as reading:
        reading.read(ids, protocol.window, protocol.stride, bos=protocol.bos)
        yield


# ---- one dialogue ----------------------------------------------------------------------------------------------
@contextmanager
def _question_progress(title: str, questions: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of questions with tokens/s, on standard error. Yields the callback of `answer`."""
    with progress_bar("questions", "{task.fields[rate]:,.0f} tokens/s") as progress:
        bar, written = progress.add_task(title, total=questions, rate=0.0), 0

        def advance(count: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            progress.update(bar, advance=count, rate=written / (progress.tasks[0].elapsed or 1.0))

        yield advance


def _answer_dialogue(host, tokenizer, dialogue: Dialogue, task: LocomoTask, protocol: Protocol, output: Output) -> None:
    """Every method that is not in `output` yet; methods with the same memory share one reading."""
    if not output.has(ALL_REFUSE, dialogue.name):
        output.add(ALL_REFUSE, dialogue, [REFUSAL] * len(dialogue.questions), cut_tokens=0, seconds=0.0)
    ids, arms = token_ids(tokenizer, dialogue_text(dialogue)), _arms(task)
    for memory in MEMORIES:
        missing = [name for name in task.methods if _split(name)[1] == memory and not output.has(name, dialogue.name)]
        if not missing:
            continue
        started = time.perf_counter()
        with _having_read(host, arms.get(memory), ids, protocol):
            reading = time.perf_counter() - started
            for method in missing:
                started = time.perf_counter()
                prompts = _prompts(host, tokenizer, dialogue, method, task)
                with _question_progress(one_line(f"{method}, dialogue {dialogue.name}"), len(dialogue.questions)) as advance:
                    answers = answer(host, tokenizer, prompts, task.max_new_tokens, task.batch_size, advance)
                seconds = reading + time.perf_counter() - started
                output.add(method, dialogue, answers, prompts.cut_tokens, seconds)


def _prompts(host, tokenizer, dialogue: Dialogue, method: str, task: LocomoTask) -> Prompts:
    with_context = _split(method)[0] == "full-context"
    return make_prompts(tokenizer, dialogue, with_context, max_positions(host), task.max_new_tokens)


# ---- the command -----------------------------------------------------------------------------------------------
def _check(task: LocomoTask) -> None:
    """ValueError or LocasError for what can be seen before anything is loaded."""
    choose("--methods", task.methods, METHODS)
    check_temp_lora(task.temp_lora)
    at_least(1, max_new_tokens=task.max_new_tokens, batch_size=task.batch_size)
    check_installed()


def _read(task: LocomoTask) -> tuple[list[Dialogue], dict | None]:
    """-> the dialogues, corrected where asked for, and what was corrected, for the settings."""
    dialogues = read_dialogues(task.data, but=task.corrections)
    if task.corrections is None:
        return dialogues, None
    entries = read_corrections(task.corrections)
    return correct(dialogues, entries), {"file": neutral(task.corrections.name), "dialogues": counts(dialogues, entries)}


def _settings(task: LocomoTask, dialogues: list[Dialogue], corrections: dict | None, host, protocol: Protocol) -> dict:
    return {
        "command": "locomo",
        "model": task.model,
        "weights_sha256": weights_digest(host),
        "dtype": str(host.dtype).removeprefix("torch."),
        "methods": task.methods,
        "dialogues": {dialogue.name: dialogue.digest() for dialogue in dialogues},
        "positions": max_positions(host),
        "window": protocol.window,
        "stride": protocol.stride,
        "seed": task.locas["seed"],
        "memories": {name: arm.settings for name, arm in _arms(task).items()},
        "max_new_tokens": task.max_new_tokens,
        "batch_size": task.batch_size,
        "prompts": PROMPTS,
        "corrections": corrections,
    }


def run_locomo(task: LocomoTask, console: Console) -> dict:
    """Answers every question by every method; prints a table, writes a report and returns the content of results.json.

    A folder that an ended run with the same settings left is continued after its last finished dialogue.

    Raises ValueError or OSError for arguments or data that do not fit, LocasError if a library is missing, Interrupted
    at Ctrl-C.
    """
    _check(task)
    dialogues, corrections = _read(task)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    protocol = Protocol.of(host, task.window, task.stride, starts_with_bos(tokenizer), prefix="--")
    for dialogue in dialogues:
        _prompts(host, tokenizer, dialogue, "no-context", task)  # raises if a question does not fit
    longest = max(len(token_ids(tokenizer, dialogue_text(dialogue))) for dialogue in dialogues)
    for arm in _arms(task).values():
        check_arm(host, arm, protocol, longest)
    settings = _settings(task, dialogues, corrections, host, protocol)
    with results.only_run(task.out):
        return _run(task, dialogues, host, tokenizer, protocol, settings, console)


def _run(
    task: LocomoTask, dialogues: list[Dialogue], host, tokenizer, protocol: Protocol, settings: dict, console: Console
) -> dict:
    output = Output(task.out, settings)
    try:
        for dialogue in dialogues:
            _answer_dialogue(host, tokenizer, dialogue, task, protocol, output)
    except KeyboardInterrupt:
        total = len(dialogues) * (len(task.methods) + 1)
        raise Interrupted(
            f"{len(output.records)} of {total} pairs of method and dialogue are finished and kept in {task.out}; "
            "the same command continues"
        ) from None
    content = results.read(task.out)
    console.print(table(content))
    report = write_report(task.out)
    console.print(f"report: {report}\npredictions: {predictions_file(task.out, 'METHOD')}", markup=False)
    return content
