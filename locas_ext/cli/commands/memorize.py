"""`locas memorize`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import (
    Clip,
    Device,
    Dtype,
    Epochs,
    Init,
    LearningRate,
    Model,
    Rank,
    Scale,
    Seed,
    Stride,
    Variant,
    Window,
)
from locas_ext.config import LocasConfig


def memorize(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files, read one after another.")],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the memory goes: a new folder, or see --resume.")],
    window: Window = None,
    stride: Stride = None,
    rank: Rank = 64,
    learning_rate: LearningRate = 4e-3,
    scale: Scale = "paper",
    epochs: Epochs = 1,
    init: Init = "topk",
    variant: Variant = "glu",
    clip: Clip = True,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    seed: Seed = 0,
    update: Annotated[str, typer.Option(help="backprop; with --variant mlp also write: slots in closed form.")] = "backprop",
    epsilon: Annotated[float, typer.Option(help="Of --update write: the length of the step a slot makes.")] = 1e-2,
    capacity: Annotated[
        int | None,
        typer.Option(help="Of --update write: slots a layer at most; left out: twice the stride or the rank."),
    ] = None,
    compress_to: Annotated[
        int | None,
        typer.Option(help="Of --update write: slots kept when the capacity is reached; left out: half of it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    save_every: Annotated[int, typer.Option(help="Save after so many chunks.")] = 50,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Stream texts through a model into a memory."""
    from locas_ext.checks import one_of
    from locas_ext.cli.tasks.memorize import MemorizeTask, run_memorize
    from locas_ext.learning.update import UPDATES, Backprop, Write

    if update == "write":
        by: Backprop | Write = Write(epsilon=epsilon, capacity=capacity, compress_to=compress_to)
    else:
        one_of("update", update, UPDATES)
        by = Backprop(learning_rate=learning_rate, epochs=epochs, optimizer=optimizer)
    settings = dict(window=window, stride=stride, update=by)
    config = LocasConfig(variant=variant, rank=rank, init=init, scale=scale, clip=clip, seed=seed)
    run_memorize(MemorizeTask(texts, model, out, config, settings, resume, save_every, dtype, device), console())
