"""`locas memorize`: its arguments and their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    LEARNING,
    WRITING,
    Bos,
    ContextGradient,
    ContextOptions,
    HostOptions,
    LearningOptions,
    MaxTokens,
    MemoryOptions,
    Model,
    Paper,
    ReadingOptions,
    Rehome,
    argument,
    flag,
    option,
)
from locas_ext.cli.values import TOKENS, integer, number, one_of, path, text
from locas_ext.learning.keep import context_of
from locas_ext.terminal import Terminal, neutral

EXAMPLES = (
    "locas memorize book.txt --model Qwen/Qwen3-0.6B --out book-memory",
    "locas memorize book.txt --model Qwen/Qwen3-0.6B --out book-memory --resume",
    "locas memorize notes.txt --model facebook/opt-125m --variant mlp --update write --tokens top-loss:8 --out notes",
)
UPDATES, WHEN_FULL = ("backprop", "write"), ("error", "drop_oldest", "compress")
ON_DIVERGENCE = ("warn", "stop", "ignore")


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """The fields of Write. None: its default."""

    epsilon: Annotated[
        float | None, option(number(above=0), "The length of the step that a slot makes; default: 0.01.", panel=WRITING)
    ] = None
    tokens: Annotated[
        str | None,
        option(
            TOKENS,
            "Which tokens of a chunk get a slot; default: all.",
            panel=WRITING,
        ),
    ] = None
    capacity: Annotated[
        int | None,
        option(integer(1), "Slots per layer at most; default: those used and twice the stride or the rank.", panel=WRITING),
    ] = None
    when_full: Annotated[
        str | None, option(one_of(WHEN_FULL), "What is done at the capacity; default: compress.", panel=WRITING)
    ] = None
    compress_to: Annotated[
        int | None, option(integer(1), "Slots kept when the capacity is reached; default: half of it.", panel=WRITING)
    ] = None


def memorize(
    texts: Annotated[list[Path], argument(path("TEXT"), "UTF-8 text files, read one after another.")],
    model: Model,
    out: Annotated[Path, option(path("DIR"), "Where the memory goes: a new folder, or see --resume.")],
    title: Annotated[str | None, option(text("TITLE"), "What the memory calls the text; default: the files' names.")] = None,
    reading: ReadingOptions = ReadingOptions(),
    context: ContextOptions = ContextOptions(),
    bos: Bos = False,
    max_tokens: MaxTokens = None,
    memory: MemoryOptions = MemoryOptions(),
    rehome: Rehome = False,
    update: Annotated[
        str, option(one_of(UPDATES), "How slots change; write, for --variant mlp, makes them in closed form.", panel=LEARNING)
    ] = "backprop",
    learning: LearningOptions = LearningOptions(),
    paper: Paper = False,
    context_gradient: ContextGradient = False,
    writing: WritingOptions = WritingOptions(),
    on_divergence: Annotated[
        str,
        option(one_of(ON_DIVERGENCE), "What to do where the memory makes the text harder than the host alone.", panel=LEARNING),
    ] = "warn",
    resume: Annotated[bool, flag("Resume the run that --out holds, with the same settings and --dtype.", "--resume")] = False,
    save_every: Annotated[int, option(integer(1), "Save after this many chunks.")] = 50,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Stream texts through a model into a memory.

    Each chunk is scored first and learned from afterwards. Ctrl-C keeps what was learned; --resume continues exactly.
    """
    with importing():
        from locas_ext.cli.tasks.memorize import MemorizeTask, run_memorize
    settings: dict[str, Any] = {
        "window": reading.window,
        "stride": reading.stride,
        "bos": bos,
        "context_gradient": context_gradient,
        "on_divergence": on_divergence,
        "context": context_of(context.settings()) or "recompute",
        "title": title or ", ".join(neutral(file.stem) for file in texts),
    }
    task = MemorizeTask(
        texts=texts,
        model=model,
        out=out,
        config=memory.config(paper),
        settings=settings,
        update=update,
        learning=vars(learning),
        paper=paper,
        writing=vars(writing),
        max_tokens=max_tokens,
        rehome=rehome,
        resume=resume,
        save_every=save_every,
        dtype=host.dtype,
        device=host.device,
    )
    run_memorize(task, Terminal())
