"""`locas study`: texts learned from questions about them, into a memory folder."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from locas_ext import memory as locas
from locas_ext.cli.folders import check_new, made
from locas_ext.config import LocasConfig
from locas_ext.errors import Interrupted, LocasError
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.json_files import parse_json
from locas_ext.evaluation.schemas import fields
from locas_ext.evaluation.texts import read_whole
from locas_ext.memory import StudyReport, StudySettings
from locas_ext.storage.lock import folder_lock
from locas_ext.storage.schema import text

from .describe import bytes_text, size_on_disk

_PAIR = fields({"question": text, "answer": text})


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """The arguments of the command.

    memory: where a memory to go on with lies; None: a new one of `config`
    pairs: a file of questions and answers; None: the host's own
    cache: where questions and progress are kept
    """

    texts: list[Path]
    model: str
    out: Path
    memory: Path | None
    pairs: Path | None
    cache: Path
    loss: str
    settings: StudySettings
    config: LocasConfig
    dtype: str | None
    device: str | None


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The questions and answers of a file of JSON lines; blank lines are left out.

    Raises OSError for a file that cannot be read, LocasError, naming line and key, for a line that is not one.
    """
    lines = enumerate(file.read_bytes().split(b"\n"), start=1)
    found = [parse_json(line, f"{file}, line {number}", _PAIR) for number, line in lines if line.strip()]
    if not found:
        raise LocasError(f'{file} holds no questions; expected lines of {{"question": ..., "answer": ...}}')
    for number, pair in enumerate(found, start=1):
        for name in ("question", "answer"):
            if not pair[name].strip():
                raise LocasError(f"{file}: the {name} of pair {number} is empty; expected some text")
    return [(pair["question"], pair["answer"]) for pair in found]


def run_study(task: StudyTask, console: Console) -> StudyReport:
    """Studies into a new folder, and says what came of it.

    Raises ValueError or OSError for arguments that do not fit, LocasError for files of another shape and where no question can
    be used, Interrupted at Ctrl-C.
    """
    check_new(task.out)
    texts = [read_whole(path) for path in task.texts]
    pairs = None if task.pairs is None else read_pairs(task.pairs)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    memory = locas.attach(host, task.config) if task.memory is None else locas.load(host, task.memory)
    try:
        with made(task.out), made(task.cache), folder_lock(task.cache, wait=0):
            report = memory.study(
                texts, tokenizer, task.loss, pairs, task.config.seed, settings=task.settings, cache=task.cache
            )
            memory.save_pretrained(task.out)
    except KeyboardInterrupt:
        raise Interrupted(
            f"what was written and learned ({memory.version:,} updates) is kept in {task.cache}; the same command continues"
        ) from None
    for line in str(report).splitlines():
        console.print(line)
    size = bytes_text(size_on_disk(task.out))
    console.print(f"memory: {task.out} ({memory.num_parameters:,} parameters, {memory.version:,} updates, {size})")
    out, model = shlex.quote(str(task.out)), shlex.quote(task.model)
    console.print(f'next: locas generate --model {model} --memory {out} --prompt "..."\n      locas info {out}')
    return report
