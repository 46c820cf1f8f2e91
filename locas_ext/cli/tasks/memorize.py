"""`locas memorize`: streams texts through a model into a memory folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from locas_ext import memory as locas
from locas_ext.config import LocasConfig
from locas_ext.errors import Interrupted
from locas_ext.evaluation.arguments import at_least
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.results import differences
from locas_ext.evaluation.texts import read_texts
from locas_ext.memory import Chunk, MemorizeReport
from locas_ext.storage.checkpoint import read_config
from locas_ext.storage.folder import CONFIG_NAME, check_folder


@dataclass(frozen=True)
class MemorizeTask:
    """The arguments of the command; `settings` are arguments of Memory.memorize."""

    texts: list[Path]
    model: str
    out: Path
    config: LocasConfig
    settings: dict
    resume: bool
    save_every: int
    dtype: str | None
    device: str | None


def _check_settings(task: MemorizeTask) -> None:
    """ValueError if the run that --out holds has another memory than the command line asks for."""
    names = ("variant", "rank", "init", "scale", "clip", "seed")
    configs = (read_config(task.out), task.config)
    before, wanted = ({name: getattr(config, name) for name in names} for config in configs)
    if different := differences(before, wanted):
        raise ValueError(f"--resume: {task.out} was saved by a run with other settings: {different}")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder exists and can be written, which is better noticed now than after the work; empty, it goes again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def run_memorize(task: MemorizeTask, console: Console) -> MemorizeReport:
    """Memorizes, saving the memory every `save_every` chunks, at Ctrl-C and at the end, ready to be resumed.

    Raises ValueError or OSError for arguments that do not fit, Interrupted at Ctrl-C.
    """
    saved = (task.out / CONFIG_NAME).exists()
    if saved and not task.resume:
        raise ValueError(f"{task.out} already holds a memory; --resume goes on with it, or choose another --out")
    if task.resume and not saved:
        raise ValueError(f"--resume: {task.out} holds no memory to go on with")
    at_least(1, save_every=task.save_every)
    check_folder(task.out)
    if saved:
        _check_settings(task)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    ids = read_texts(task.texts, tokenizer)
    memory = locas.load(host, task.out) if task.resume else locas.attach(host, task.config)
    unsaved = 0

    def save(chunk: Chunk) -> None:
        nonlocal unsaved
        unsaved += 1
        if unsaved >= task.save_every:
            memory.save_pretrained(task.out, optimizer=True)
            unsaved = 0

    try:
        with _made(task.out):
            report = memory.memorize(ids, callback=save, resume=task.out if task.resume else None, **task.settings)
    except KeyboardInterrupt:
        if unsaved:
            memory.save_pretrained(task.out, optimizer=True)
        if not (task.out / CONFIG_NAME).exists():
            raise Interrupted("nothing had been learned yet, nothing was kept") from None
        raise Interrupted(
            f"what was learned from {memory.tokens_seen:,} of {len(ids):,} tokens is kept in {task.out}; "
            "the same command with --resume goes on"
        ) from None
    memory.save_pretrained(task.out, optimizer=True)
    console.print(
        f"{report.tokens:,} tokens scored, perplexity {report.perplexity:.2f} while reading, {report.seconds:.1f} s\n"
        f"memory: {task.out} ({memory.num_parameters:,} parameters, {memory.version:,} updates)"
    )
    return report
