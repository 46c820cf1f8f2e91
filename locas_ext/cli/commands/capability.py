"""`locas capability`: its arguments and their help."""

from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    READING,
    BatchSize,
    HeldOut,
    HeldOutTokens,
    HostOptions,
    MemoryFolder,
    Model,
    Seed,
    flag,
    option,
)
from locas_ext.cli.values import integer, names, path
from locas_ext.terminal import Terminal

TASKS = "lm-eval's tasks"
EXAMPLES = (
    "locas capability --model Qwen/Qwen3-0.6B --memory book-memory --held-out other.txt --out capability",
    "locas capability --model Qwen/Qwen3-0.6B --memory book-memory --tasks mmlu --limit 20 --out mmlu",
)


def capability(
    model: Model,
    memory: MemoryFolder,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    window: Annotated[
        int, option(integer(2), "Tokens seen at once; a memory is judged window by window.", panel=READING)
    ] = 128,
    merged: Annotated[
        bool | None,
        flag(
            "Whether the merged model is measured, which needs a second copy of the FFNs; default: on texts, not on --tasks.",
            "--merged/--no-merged",
        ),
    ] = None,
    tasks: Annotated[
        Any,  # list[str] | None: a list's type would make typer take the option several times
        option(names(), "lm-eval's tasks too, such as mmlu,arc_easy; needs the extra eval.", panel=TASKS),
    ] = None,
    few_shot: Annotated[
        int | None, option(integer(0), "Examples before each question; default: what the task says.", panel=TASKS)
    ] = None,
    limit: Annotated[int | None, option(integer(1), "Questions per task; default: all.", panel=TASKS)] = None,
    batch_size: BatchSize = 8,
    include_path: Annotated[
        Path | None, option(path("DIR"), "Further task files of lm-eval's kind; their data may be local.", panel=TASKS)
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, option(path("DIR"), "Where results.json and report.md go; default: print the tables only.")
    ] = None,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """What a memory does to the host's general ability: before, attached, merged, detached.

    Without --held-out, on the text that is shipped.
    """
    with importing():
        from locas_ext.evaluation.capability.command import DEFAULT_TEXT, CapabilityTask, HarnessTasks, run_capability

    if not tasks and (tasks, few_shot, limit, include_path) != (None, None, None, None):
        raise ValueError(
            "--tasks is empty; expected names of lm-eval's tasks, which --few-shot, --limit and --include-path are for"
        )
    asked = None
    if tasks:
        asked = HarnessTasks(
            names=tuple(tasks), few_shot=few_shot, limit=limit, batch_size=batch_size, include_path=include_path
        )
    task = CapabilityTask(
        model=model,
        memory=memory,
        held_out=held_out or [DEFAULT_TEXT],
        held_out_tokens=held_out_tokens,
        window=window,
        merged=merged,
        tasks=asked,
        seed=seed,
        out=out,
        dtype=host.dtype,
        device=host.device,
    )
    run_capability(task, Terminal())
