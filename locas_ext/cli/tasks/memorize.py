"""`locas memorize`: streams texts through a model into a memory folder."""

import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from locas_ext import memory as locas
from locas_ext.cli.folders import made
from locas_ext.config import LocasConfig
from locas_ext.errors import Interrupted, LocasError
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.results import differences
from locas_ext.evaluation.texts import read_texts
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.learning.initialization import backprop_for
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.selectors import LossAbove, TopLoss
from locas_ext.learning.update import Backprop, Write
from locas_ext.memory import Chunk, MemorizeReport, Memory
from locas_ext.storage import checkpoint
from locas_ext.storage.folder import CONFIG_NAME, check_folder
from locas_ext.storage.lock import folder_lock

from .describe import bytes_text, size_on_disk
from .host_alone import compare


@dataclass(frozen=True, kw_only=True)
class MemorizeTask:
    """The arguments of the command.

    settings: arguments of Memory.memorize; bos among them
    update: "backprop" or "write"
    learning, writing: the fields of Backprop and of Write; None where the command line says nothing
    paper: whether fields of Backprop that are None are the paper's
    max_tokens: of each text; None: all
    """

    texts: list[Path]
    model: str
    out: Path
    config: LocasConfig
    settings: dict[str, Any]
    update: str
    learning: dict[str, Any]
    paper: bool
    writing: dict[str, Any]
    max_tokens: int | None
    rehome: bool
    resume: bool
    save_every: int
    dtype: str | None
    device: str | None


def _update(task: MemorizeTask) -> Backprop | Write:
    """What `update` of Memory.memorize gets. ValueError for an option of the other kind of update."""
    kinds = {"backprop": task.learning, "write": task.writing}
    given = {name: value for name, value in kinds.pop(task.update).items() if value is not None}
    ((other, fields),) = kinds.items()
    for name, value in fields.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is given, but --update is {task.update}; expected --update {other}")
    if task.update == "backprop":
        return backprop_for(task.config, given, task.paper)
    return Write(**{**given, "tokens": _selector(given.get("tokens", "all"))})


def _selector(text: str) -> str | TopLoss | LossAbove:
    kind, _, amount = text.partition(":")
    return TopLoss(int(amount)) if kind == "top-loss" else LossAbove(float(amount)) if kind == "loss-above" else text


def _check_settings(task: MemorizeTask) -> None:
    """LocasError, as for its other settings, if the run that --out holds has another memory than the command line asks for."""
    saved = checkpoint.read(task.out)
    names = ("variant", "rank", "init", "scale", "clip", "row_length", "seed")
    before, wanted = ({name: getattr(config, name) for name in names} for config in (saved.config, task.config))
    before["layers"] = saved.fields["layers"]
    wanted["layers"] = list(task.config.resolve_layers(saved.fields["host"]["num_hidden_layers"]))
    if different := differences(before, wanted):
        raise LocasError(f"--resume: {task.out} was saved by a run with other settings: {different}")


def _check_out(task: MemorizeTask) -> None:
    saved = (task.out / CONFIG_NAME).exists()
    if saved and not task.resume:
        raise ValueError(f"{task.out} already holds a memory; --resume continues its run, or choose another --out")
    if task.resume and not saved:
        raise ValueError(f"--resume: {task.out} holds no memory to resume")
    check_folder(task.out)
    if saved:
        _check_settings(task)


def _learn(task: MemorizeTask, memory: Memory, ids: Tensor, update: Backprop | Write) -> MemorizeReport:
    """Memorizes, saving every `save_every` chunks, at Ctrl-C and at the end."""
    unsaved = 0

    def save(chunk: Chunk) -> None:
        nonlocal unsaved
        unsaved += 1
        if unsaved >= task.save_every:
            memory.save_pretrained(task.out, optimizer=True)
            unsaved = 0

    try:
        with made(task.out), folder_lock(task.out, wait=0):  # two runs into one folder would undo each other's work
            resume = task.out if task.resume else None
            report = memory.memorize(ids, callback=save, resume=resume, update=update, **task.settings)
            memory.save_pretrained(task.out, optimizer=True)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):  # pressed again: what was saved before is still there
            if unsaved:
                memory.save_pretrained(task.out, optimizer=True)
        if not (task.out / CONFIG_NAME).exists():
            raise Interrupted("nothing had been learned yet, nothing was kept") from None
        raise Interrupted(
            f"what was learned from {checkpoint.read(task.out).fields['tokens_seen']:,} of {len(ids):,} tokens is kept in "
            f"{task.out}; the same command {'' if task.resume else 'with --resume '}continues"
        ) from None
    return report


def run_memorize(task: MemorizeTask, console: Console) -> MemorizeReport:
    """Memorizes into a folder that can be resumed, and says what came of it and what can be done with it.

    Raises ValueError or OSError for arguments that do not fit, Interrupted at Ctrl-C.
    """
    update = _update(task)
    _check_out(task)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    ids = read_texts(task.texts, tokenizer, task.max_tokens)
    if task.resume:
        memory = locas.load(host, task.out, rehome=task.rehome)
    else:
        memory = locas.attach(host, task.config, rehome=task.rehome)
    report = _learn(task, memory, ids, update)
    try:
        _say_what_came_of_it(task, memory, ids, report, console)
    except KeyboardInterrupt:
        raise Interrupted(f"the memory is complete and kept in {task.out}") from None
    return report


def _say_what_came_of_it(task: MemorizeTask, memory: Memory, ids: Tensor, report: MemorizeReport, console: Console) -> None:
    console.print(f"{report.tokens:,} tokens scored, perplexity {report.perplexity:.2f} while reading, {report.seconds:.1f} s")
    if report.diverged is not None:
        console.print(f"{report.diverged}; tokens learned in what is kept: {memory.tokens_seen:,}")
    protocol = Protocol.of(memory.model, task.settings["window"], task.settings["stride"], task.settings["bos"])
    bos = bos_token_id(memory.model) if protocol.bos else None
    if sides := compare(memory, ids, report, protocol.window, bos):
        console.print(
            f"on {sides.chunks} of its {len(report.chunks):,} chunks: {sides.memory:.2f} while reading, "
            f"{sides.host:.2f} by the host alone"
        )
    size = bytes_text(size_on_disk(task.out))
    console.print(f"memory: {task.out} ({memory.num_parameters:,} parameters, {memory.version:,} updates, {size})")
    out, model = shlex.quote(str(task.out)), shlex.quote(task.model)
    console.print(f'next: locas generate --model {model} --memory {out} --prompt "..."\n      locas info {out}')
