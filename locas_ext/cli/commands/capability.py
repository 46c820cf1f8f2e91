"""`locas capability`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import BatchSize, Device, Dtype, HeldOut, HeldOutTokens, MemoryFolder, Model, Seed, names


def capability(
    model: Model,
    memory: MemoryFolder,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    window: Annotated[int, typer.Option(help="Tokens seen at once; a memory is judged window by window.")] = 128,
    merged: Annotated[
        bool | None,
        typer.Option(
            help="Whether the merged model is measured, which needs a second copy of the FFNs; "
            "left out: on texts, not on --tasks."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="lm-eval's tasks too, such as mmlu,arc_easy; needs the extra eval."),
    ] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question; left out: what the task says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task; left out: all.")] = None,
    batch_size: BatchSize = 8,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Further task files of lm-eval's kind; their data may be local.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results.json and report.md go; left out: the tables only.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What a memory does to the host's general ability: before, attached, merged, detached.

    Without --held-out, on the text that is shipped.
    """
    from locas_ext.evaluation.capability.command import DEFAULT_TEXT, CapabilityTask, HarnessTasks, run_capability

    wanted = None if tasks is None else names(tasks)
    if not wanted and (wanted, few_shot, limit, include_path) != (None, None, None, None):
        raise ValueError(
            "--tasks is empty; expected names of lm-eval's tasks, which --few-shot, --limit and --include-path are for"
        )
    asked = HarnessTasks(tuple(wanted), few_shot, limit, batch_size, include_path) if wanted else None
    task = CapabilityTask(
        model, memory, held_out or [DEFAULT_TEXT], held_out_tokens, window, merged, asked, seed, out, dtype, device
    )
    run_capability(task, console())
