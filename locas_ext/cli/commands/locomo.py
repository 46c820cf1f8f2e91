"""`locas locomo`: its arguments and their help."""

from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    BatchSize,
    ContextGradient,
    ContextOptions,
    HostOptions,
    LearningOptions,
    MaxNewTokens,
    MemoryOptions,
    Model,
    Paper,
    ReadingOptions,
    Rehome,
    ResultsFolder,
    TempLoraOptions,
    argument,
    option,
)
from locas_ext.cli.values import names, path
from locas_ext.terminal import Terminal

EXAMPLES = (
    "locas locomo locomo10.json --model Qwen/Qwen3-0.6B --out locomo",
    "locas locomo data/ --model Qwen/Qwen3-0.6B --methods no-context,no-context+locas --rank 128 --out locomo",
)


def locomo(
    data: Annotated[list[Path], argument(path("DATA"), "LoCoMo's JSON files, or folders of them.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        Any,  # list[str], which would make typer take the option several times
        option(
            names(),
            "full-context, no-context, and both with +locas or +temp-lora: a memory that has read the dialogue.",
        ),
    ] = ["full-context", "no-context", "full-context+locas", "no-context+locas"],  # noqa: B006 (typer copies it)
    reading: ReadingOptions = ReadingOptions(),
    context: ContextOptions = ContextOptions(),
    memory: MemoryOptions = MemoryOptions(),
    rehome: Rehome = False,
    learning: LearningOptions = LearningOptions(),
    paper: Paper = False,
    context_gradient: ContextGradient = False,
    temp_lora: TempLoraOptions = TempLoraOptions(),
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 8,
    corrections: Annotated[
        Path | None, option(path("FILE"), "Corrected answers (JSON) in the place of wrong published ones; default: none.")
    ] = None,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Answer LoCoMo's questions about long dialogues, with the dialogue in the window, in a memory, both or neither."""
    with importing():
        from locas_ext.evaluation.locomo.command import LocomoTask, run_locomo
        from locas_ext.evaluation.methods.registry import locas_settings

    task = LocomoTask(
        data=data,
        model=model,
        methods=methods,
        out=out,
        locas=locas_settings(memory.config(paper), learning.given(), rehome, context_gradient, context.settings(), paper),
        temp_lora=temp_lora.settings(memory.seed),
        window=reading.window,
        stride=reading.stride,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        corrections=corrections,
        dtype=host.dtype,
        device=host.device,
    )
    run_locomo(task, Terminal())
