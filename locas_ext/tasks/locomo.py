"""`locas locomo`: questions about long dialogues that are in the window, in a memory, in both or in neither."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .. import memory as locas
from ..config import LocasConfig
from . import Interrupted, results
from .arms import choose
from .loading import load_host
from .locomo_answers import Prompts, answer, make_prompts, starts_with_bos, token_ids
from .locomo_data import Dialogue, read_dialogues
from .locomo_output import ALL_REFUSE, Output, predictions_file
from .locomo_prompts import PROMPTS, dialogue_text
from .locomo_report import table
from .locomo_scoring import REFUSAL, check_installed
from .report import write_report
from .temp_lora import lora, temp_lora

CONTEXTS = ("full-context", "no-context")


@dataclass(frozen=True)
class LocomoTask:
    """The arguments of the command; those that are not here are in LocasConfig and Memory.memorize.

    methods: of METHODS
    temp_lora: rank, learning_rate and epochs of that memory
    batch_size: how many questions are answered at once
    """

    data: list[Path]
    model: str
    methods: list[str]
    out: Path
    config: LocasConfig
    window: int | None
    stride: int | None
    learning_rate: float
    epochs: int
    temp_lora: dict
    max_new_tokens: int
    batch_size: int
    dtype: str | None
    device: str | None


# ---- memories --------------------------------------------------------------------------------------------------
@contextmanager
def _locas(host, ids: Tensor, task: LocomoTask, bos: bool, progress: bool) -> Iterator[None]:
    """The host with a fresh memory that has read a text, and without it after the block."""
    memory = locas.attach(host, task.config)
    try:
        memory.memorize(
            ids, window=task.window, stride=task.stride, learning_rate=task.learning_rate, epochs=task.epochs,
            progress=progress, bos=bos,
        )
        yield
    finally:
        memory.detach()


@contextmanager
def _temp_lora(host, ids: Tensor, task: LocomoTask, bos: bool, progress: bool) -> Iterator[None]:
    """The same with a LoRA adapter for a memory."""
    settings = task.temp_lora
    with lora(host, settings["rank"], seed=task.config.seed) as parameters:
        temp_lora(
            host, parameters, ids, task.window, task.stride, settings["learning_rate"], settings["epochs"], progress,
            bos=bos,
        )
        yield


@contextmanager
def _none(host, ids: Tensor, task: LocomoTask, bos: bool, progress: bool) -> Iterator[None]:
    """The host alone."""
    yield


MEMORIES = {"": _none, "locas": _locas, "temp-lora": _temp_lora}  # by what stands behind the + in a method's name
METHODS = tuple(f"{context}+{memory}".rstrip("+") for memory in MEMORIES for context in CONTEXTS)


def _split(method: str) -> tuple[str, str]:
    """-> context, memory"""
    context, _, memory = method.partition("+")
    return context, memory


# ---- one dialogue ----------------------------------------------------------------------------------------------
@contextmanager
def _progress(title: str, questions: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of questions with tokens/s, on standard error. Yields the callback of `answer`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=max(4, min(40, console.width - 76))),
        TextColumn("{task.completed}/{task.total} questions"), TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(), TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        bar, written = progress.add_task(title, total=questions, rate=0.0), 0

        def advance(count: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            progress.update(bar, advance=count, rate=written / (progress.tasks[0].elapsed or 1.0))

        yield advance


def _answer_dialogue(host, tokenizer, dialogue: Dialogue, task: LocomoTask, output: Output) -> None:
    """Every method that is not in `output` yet; methods with the same memory share one reading."""
    if not output.has(ALL_REFUSE, dialogue.name):
        output.add(ALL_REFUSE, dialogue, [REFUSAL] * len(dialogue.questions), cut_tokens=0, seconds=0.0)
    ids, bos = token_ids(tokenizer, dialogue_text(dialogue)), starts_with_bos(tokenizer)
    for memory in MEMORIES:
        missing = [name for name in task.methods if _split(name)[1] == memory and not output.has(name, dialogue.name)]
        if not missing:
            continue
        started = time.perf_counter()
        with MEMORIES[memory](host, ids, task, bos, progress=True):
            reading = time.perf_counter() - started
            for method in missing:
                started = time.perf_counter()
                prompts = _prompts(host, tokenizer, dialogue, method, task)
                with _progress(f"{method}, dialogue {dialogue.name}", len(dialogue.questions)) as advance:
                    answers = answer(host, tokenizer, prompts, task.max_new_tokens, task.batch_size, advance)
                seconds = reading + time.perf_counter() - started
                output.add(method, dialogue, answers, prompts.cut_tokens, seconds)


def _positions(host) -> int:
    return host.config.get_text_config(decoder=True).max_position_embeddings


def _prompts(host, tokenizer, dialogue: Dialogue, method: str, task: LocomoTask) -> Prompts:
    with_context = _split(method)[0] == "full-context"
    return make_prompts(tokenizer, dialogue, with_context, _positions(host), task.max_new_tokens)


# ---- the command -----------------------------------------------------------------------------------------------
def _check(task: LocomoTask) -> None:
    """ValueError or LocasError for what can be seen before anything is loaded."""
    choose("--methods", task.methods, METHODS)
    if not task.methods:
        raise ValueError(f"--methods is empty; expected some of {', '.join(METHODS)}")
    temp_lora = task.temp_lora
    counts = {
        "--max-new-tokens": task.max_new_tokens, "--batch-size": task.batch_size, "--temp-lora-rank": temp_lora["rank"],
        "--temp-lora-epochs": temp_lora["epochs"],
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected an integer >= 1")
    if not 0 <= temp_lora["learning_rate"] < math.inf:
        raise ValueError(f"--temp-lora-lr is {temp_lora['learning_rate']}; expected a finite number >= 0")
    check_installed()


def _resolved(task: LocomoTask, host) -> LocomoTask:
    """The task with Memory.memorize's defaults spelled out, as the settings should be."""
    window = min(2048, _positions(host)) if task.window is None else task.window
    return replace(task, window=window, stride=max(1, window // 4) if task.stride is None else task.stride)


def _rehearse(host, tokenizer, dialogues: list[Dialogue], task: LocomoTask) -> None:
    """Raises what would not fit later, before anything is written: prompts that are too long, settings of a memory."""
    for dialogue in dialogues:
        _prompts(host, tokenizer, dialogue, "no-context", task)
    first_chunk = token_ids(tokenizer, dialogue_text(dialogues[0]))[: max(2, task.stride)]
    for memory in dict.fromkeys(_split(method)[1] for method in task.methods):
        with MEMORIES[memory](host, first_chunk, task, starts_with_bos(tokenizer), progress=False):
            pass


def _settings(task: LocomoTask, dialogues: list[Dialogue], host) -> dict:
    config = task.config
    return {
        "command": "locomo", "model": task.model, "dtype": str(host.dtype).removeprefix("torch."),
        "methods": task.methods,
        "dialogues": {dialogue.name: dialogue.digest() for dialogue in dialogues},
        "positions": _positions(host), "window": task.window, "stride": task.stride, "rank": config.rank,
        "init": config.init, "scale": config.scale, "seed": config.seed, "learning_rate": task.learning_rate,
        "epochs": task.epochs, **{f"temp_lora_{name}": value for name, value in task.temp_lora.items()},
        "max_new_tokens": task.max_new_tokens, "batch_size": task.batch_size, "prompts": PROMPTS,
    }


def run_locomo(task: LocomoTask, console: Console) -> dict:
    """Answers every question by every method; prints a table, writes a report and returns the content of results.json.

    A folder that an ended run of the same settings left is taken up after its last finished dialogue.

    Raises ValueError or OSError for arguments or data that do not fit, LocasError if a library is missing, Interrupted
    at Ctrl-C.
    """
    _check(task)
    dialogues = read_dialogues(task.data)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    task = _resolved(task, host)
    _rehearse(host, tokenizer, dialogues, task)
    output = Output(task.out, _settings(task, dialogues, host))
    try:
        for dialogue in dialogues:
            _answer_dialogue(host, tokenizer, dialogue, task, output)
    except KeyboardInterrupt:
        total = len(dialogues) * (len(task.methods) + 1)
        raise Interrupted(
            f"{len(output.records)} of {total} pairs of method and dialogue are finished and kept in {task.out}; "
            "the same command goes on"
        ) from None
    content = results.read(task.out)
    console.print(table(content))
    console.print(f"report: {write_report(task.out)}\npredictions: {predictions_file(task.out, 'METHOD')}")
    return content
