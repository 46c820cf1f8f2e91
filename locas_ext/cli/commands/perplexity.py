"""`locas perplexity`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import (
    Clip,
    Device,
    Dtype,
    Epochs,
    HeldOut,
    HeldOutTokens,
    Init,
    LearningRate,
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


def perplexity(
    books: Annotated[list[Path], typer.Argument(metavar="BOOK...", help="UTF-8 text files, each read on its own.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Of truncation, long-context, temp-lora, locas; left out: truncation,locas, or all of the ablation.",
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Many settings side by side: init, rank, learning-rate or scale."),
    ] = None,
    window: Window = None,
    stride: Stride = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read at most so many tokens of each book.")] = None,
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
    long_context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens that long-context sees at once; left out: the host's positions."),
    ] = None,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    seed: Seed = 0,
    bos: Annotated[bool, typer.Option("--bos", help="Put the host's BOS token before every window.")] = False,
    processes: Annotated[int, typer.Option(help="Share the arms and books among so many; for times, use 1.")] = 1,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Read books with several methods side by side, each scored before it learns; perplexity, time, forgetting."""
    from locas_ext.evaluation.perplexity.command import run_perplexity
    from locas_ext.evaluation.perplexity.study import PerplexityTask

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
    task = PerplexityTask(
        books,
        model,
        out,
        None if methods is None else names(methods),
        ablate,
        locas,
        temp_lora,
        long_context,
        window,
        stride,
        max_tokens,
        held_out or [],
        held_out_tokens,
        bos,
        processes,
        dtype,
        device,
    )
    run_perplexity(task, console())
