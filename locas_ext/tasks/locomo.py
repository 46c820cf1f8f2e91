"""`locas locomo`: questions about long dialogues, answered with and without the dialogue in the window and in a memory."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from .. import memory as locas
from ..checkpoint import write_atomically
from ..config import LocasConfig
from . import Interrupted, results
from .loading import load_host
from .locomo_answers import Prompts, answer, make_prompts, starts_with_bos, token_ids
from .locomo_data import ADVERSARIAL, CATEGORIES, Dialogue, read_dialogues
from .locomo_prompts import PROMPTS, dialogue_text
from .locomo_scoring import (
    ANSWERABLE, OVERALL, REFUSAL, SCORES, TRAP, check_installed, official_score, pool, summarize, trap_score,
)

CONTEXTS = ("full-context", "no-context")
ALL_REFUSE = "all-refuse"  # the control: the same refusal to every question


@dataclass(frozen=True)
class LocomoTask:
    """The arguments of the command; those that are not here are in LocasConfig and Memory.memorize.

    methods: of METHODS, comma-separated
    batch_size: how many questions are answered at once
    """

    data: list[Path]
    model: str
    methods: str
    out: Path
    config: LocasConfig
    window: int | None
    stride: int | None
    learning_rate: float
    epochs: int
    max_new_tokens: int
    batch_size: int
    dtype: str | None
    device: str | None


# ---- memories --------------------------------------------------------------------------------------------------
class Learner(Protocol):
    """A memory on a host: it learns a text, and goes without a trace."""

    def learn(self, ids: Tensor) -> None: ...

    def detach(self) -> None: ...


class LocasLearner:
    def __init__(self, host, task: LocomoTask, bos: bool):
        self.memory, self.task, self.bos = locas.attach(host, task.config), task, bos

    def learn(self, ids: Tensor) -> None:
        task = self.task
        self.memory.memorize(
            ids, window=task.window, stride=task.stride, learning_rate=task.learning_rate, epochs=task.epochs, bos=self.bos
        )

    def detach(self) -> None:
        self.memory.detach()


LEARNERS: dict[str, Callable[..., Learner]] = {"locas": LocasLearner}
METHODS = (*CONTEXTS, *(f"{context}+{memory}" for memory in LEARNERS for context in CONTEXTS))


@contextmanager
def _learned(memory: str, host, tokenizer, dialogue: Dialogue, task: LocomoTask) -> Iterator[float]:
    """The host with a fresh memory that has read the dialogue, or alone for memory "". Yields the seconds it took."""
    if not memory:
        yield 0.0
        return
    started = time.perf_counter()
    learner = LEARNERS[memory](host, task, starts_with_bos(tokenizer))
    try:
        learner.learn(token_ids(tokenizer, dialogue_text(dialogue)))
        yield time.perf_counter() - started
    finally:
        learner.detach()


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


def _predictions(dialogue: Dialogue, answers: list[str], cut_tokens: int) -> list[dict]:
    lines = []
    for index, (question, prediction) in enumerate(zip(dialogue.questions, answers, strict=True)):
        line = {
            "dialogue": dialogue.name, "index": index, "category": question.category, "question": question.text,
            "gold": question.answer, "prediction": prediction, "f1": official_score(question, prediction),
            "cut_tokens": cut_tokens,
        }
        if question.category == ADVERSARIAL:
            line |= {"trap": question.trap, "trap_f1": trap_score(question, prediction)}
        lines.append(line)
    return lines


class Output:
    """The output folder: results.json and a file of predictions a method, both written after every dialogue.

    The predictions come first. A run that is ended between the two answers that dialogue again.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.records = results.open_folder(folder, settings)

    def has(self, method: str, dialogue: str) -> bool:
        return any(record["method"] == method and record["dialogue"] == dialogue for record in self.records)

    def add(self, method: str, dialogue: Dialogue, answers: list[str], cut_tokens: int, seconds: dict[str, float]) -> None:
        file = predictions_file(self.folder, method)
        kept = [line for line in _read_lines(file) if self.has(method, line["dialogue"])]
        lines = [*kept, *_predictions(dialogue, answers, cut_tokens)]
        write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self.records.append({
            "method": method, "dialogue": dialogue.name, "questions": len(answers), "cut_tokens": cut_tokens, **seconds,
            "scores": summarize(dialogue.questions, answers),
        })
        results.write(self.folder, self.settings, self.records)


def predictions_file(folder: Path, method: str) -> Path:
    return folder / f"predictions-{method}.jsonl"


def _read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _answer_dialogue(host, tokenizer, dialogue: Dialogue, methods: tuple[str, ...], task: LocomoTask, output: Output) -> None:
    """Every method that is not in `output` yet; methods with the same memory share one reading."""
    if not output.has(ALL_REFUSE, dialogue.name):
        output.add(ALL_REFUSE, dialogue, [REFUSAL] * len(dialogue.questions), 0, {"seconds": 0.0, "memorize_seconds": 0.0})
    for memory in ("", *LEARNERS):
        missing = [method for method in methods if _memory_of(method) == memory and not output.has(method, dialogue.name)]
        if not missing:
            continue
        with _learned(memory, host, tokenizer, dialogue, task) as memorize_seconds:
            for method in missing:
                started = time.perf_counter()
                prompts = _prompts(host, tokenizer, dialogue, method, task)
                with _progress(f"{method}, dialogue {dialogue.name}", len(dialogue.questions)) as advance:
                    answers = answer(host, tokenizer, prompts, task.max_new_tokens, task.batch_size, advance)
                seconds = time.perf_counter() - started + memorize_seconds
                times = {"seconds": seconds, "memorize_seconds": memorize_seconds}
                output.add(method, dialogue, answers, prompts.cut_tokens, times)


def _memory_of(method: str) -> str:
    return method.partition("+")[2]


def _prompts(host, tokenizer, dialogue: Dialogue, method: str, task: LocomoTask) -> Prompts:
    positions = host.config.get_text_config(decoder=True).max_position_embeddings
    with_context = method.partition("+")[0] == "full-context"
    return make_prompts(tokenizer, dialogue, with_context, positions, task.max_new_tokens)


# ---- the command -----------------------------------------------------------------------------------------------
def _check_methods(text: str) -> tuple[str, ...]:
    methods = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: {method!r}; expected some of {', '.join(METHODS)}")
    return methods


def _settings(task: LocomoTask, methods: tuple[str, ...], dialogues: list[Dialogue], host) -> dict:
    config = task.config
    return {
        "command": "locomo", "model": task.model, "dtype": str(host.dtype).removeprefix("torch."), "methods": methods,
        "dialogues": {dialogue.name: dialogue.digest() for dialogue in dialogues},
        "window": task.window, "stride": task.stride, "rank": config.rank, "init": config.init, "scale": config.scale,
        "seed": config.seed, "learning_rate": task.learning_rate, "epochs": task.epochs,
        "max_new_tokens": task.max_new_tokens, "batch_size": task.batch_size, "prompts": PROMPTS,
    }


def run_locomo(task: LocomoTask, console: Console) -> dict:
    """Answers every question by every method; prints a table and returns the content of results.json.

    A folder that an ended run of the same settings left is taken up after its last finished dialogue.

    Raises ValueError or OSError for arguments or data that do not fit, LocasError if a library is missing, Interrupted
    at Ctrl-C.
    """
    methods = _check_methods(task.methods)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(task, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(task, name)}; expected an integer >= 1")
    check_installed()
    dialogues = read_dialogues(task.data)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    for dialogue in dialogues:  # what does not fit shows now, not after the dialogues before it
        _prompts(host, tokenizer, dialogue, "no-context", task)
    output = Output(task.out, _settings(task, methods, dialogues, host))
    try:
        for dialogue in dialogues:
            _answer_dialogue(host, tokenizer, dialogue, methods, task, output)
    except KeyboardInterrupt:
        total = len(dialogues) * (len(methods) + 1)
        raise Interrupted(
            f"{len(output.records)} of {total} pairs of method and dialogue are finished and kept in {task.out}; "
            "the same command goes on"
        ) from None
    content = results.read(task.out)
    console.print(_table(content))
    console.print(f"results: {task.out / results.NAME}\npredictions: {predictions_file(task.out, 'METHOD')}")
    return content


# ---- tables ----------------------------------------------------------------------------------------------------
_TITLES = {
    **{name: f"{name} ({number})" for number, name in CATEGORIES.items()}, TRAP: "minus trap (5)", OVERALL: "all (1-5)",
    ANSWERABLE: "all (1-4)",
}


def _rows(content: dict) -> dict[str, list[str]]:
    """For each method the cells of its row: F1 in percent by category, then seconds."""
    by_method: dict[str, list[dict]] = {}
    for record in content["records"]:
        by_method.setdefault(record["method"], []).append(record)
    rows = {}
    for method in sorted(by_method, key=lambda name: (name == ALL_REFUSE, (*METHODS, ALL_REFUSE).index(name))):
        scores = pool([record["scores"] for record in by_method[method]])
        cells = [f"{100 * scores[name]['f1']:.1f}" if name in scores else "" for name in SCORES]
        rows[method] = [*cells, f"{sum(record['seconds'] for record in by_method[method]):.0f}"]
    return rows


def _question_counts(content: dict) -> list[str]:
    """Of one method: all have answered the same dialogues but in an unfinished run, where the control is the first."""
    scores = pool([record["scores"] for record in content["records"] if record["method"] == ALL_REFUSE])
    return [str(scores[name]["count"]) if name in scores else "0" for name in SCORES]


def _table(content: dict) -> Table:
    dialogues = content["settings"]["dialogues"]
    title = f"LoCoMo, {len(dialogues)} dialogue{'s' if len(dialogues) > 1 else ''}: F1 in percent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for name in SCORES:
        # one word a line keeps the table within 110 columns
        table.add_column("\n".join(_TITLES[name].replace("-", "-\n", 1).split(" ")), justify="right", min_width=6)
    table.add_column("s", justify="right", min_width=6)
    for method, cells in _rows(content).items():
        table.add_row(method, *cells)
    table.add_section()
    table.add_row("questions", *_question_counts(content))
    return table


def section(content: dict, folder: Path) -> list[str]:
    """The Markdown lines of a report on a results.json of this command in `folder`."""
    settings, records = content["settings"], content["records"]
    header = ["method", *(_TITLES[name] for name in SCORES), "seconds"]
    rows = [[method, *cells] for method, cells in _rows(content).items()]
    rows.append(["questions", *_question_counts(content), ""])
    lines = [
        f"## LoCoMo: {settings['model']}", "",
        f"F1 in percent over {len(settings['dialogues'])} dialogues, by LoCoMo's official rules; category numbers are its own. "
        f"Adversarial: the share of refusals, and minus the F1 against the trap. `{ALL_REFUSE}` answers \"{REFUSAL}\" "
        "to everything. `+locas`: a memory read the whole dialogue first.", "",
        "| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows), "",
    ]
    for record in records:
        if record["cut_tokens"]:
            lines.append(
                f"- {record['method']}, dialogue {record['dialogue']}: the earliest {record['cut_tokens']:,} tokens did not fit "
                "into the window and were cut"
            )
    lines += ["", "Settings: " + ", ".join(
        f"{name} {value}" for name, value in settings.items() if name not in ("command", "model", "prompts", "dialogues")
    ) + ".", "", "Prompts:", ""]
    for name, prompt in settings["prompts"].items():
        lines.append(f"- {name}: `{json.dumps(prompt)}`")
    return [*lines, "", f"Every answer: {', '.join(f'`{predictions_file(folder, method).name}`' for method in _rows(content))}."]
