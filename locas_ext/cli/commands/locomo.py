"""`locas locomo`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import (
    BatchSize,
    Clip,
    Device,
    Dtype,
    Epochs,
    Init,
    LearningRate,
    MaxNewTokens,
    Model,
    Rank,
    ResultsFolder,
    Scale,
    Seed,
    Stride,
    TempLoraAlpha,
    TempLoraEpochs,
    TempLoraRank,
    TempLoraRate,
    Variant,
    Window,
    names,
)


def locomo(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="LoCoMo's JSON files, or folders of them.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="full-context, no-context, and both with +locas or +temp-lora: a memory that has read the dialogue.",
        ),
    ] = "full-context,no-context,full-context+locas,no-context+locas",
    window: Window = None,
    stride: Stride = None,
    rank: Rank = 64,
    learning_rate: LearningRate = 4e-3,
    scale: Scale = "paper",
    epochs: Epochs = 1,
    init: Init = "topk",
    variant: Variant = "glu",
    clip: Clip = True,
    temp_lora_rank: TempLoraRank = 64,
    temp_lora_alpha: TempLoraAlpha = None,
    temp_lora_lr: TempLoraRate = 5e-5,
    temp_lora_epochs: TempLoraEpochs = 2,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer LoCoMo's questions about long dialogues, with the dialogue in the window, in a memory, both or neither."""
    from locas_ext.evaluation.locomo.command import LocomoTask, run_locomo

    locas = dict(
        variant=variant,
        rank=rank,
        init=init,
        scale=scale,
        clip=clip,
        learning_rate=learning_rate,
        epochs=epochs,
        seed=seed,
    )
    temp_lora = dict(rank=temp_lora_rank, alpha=temp_lora_alpha, learning_rate=temp_lora_lr, epochs=temp_lora_epochs, seed=seed)
    task = LocomoTask(
        data, model, names(methods), out, locas, temp_lora, window, stride, max_new_tokens, batch_size, dtype, device
    )
    run_locomo(task, console())
