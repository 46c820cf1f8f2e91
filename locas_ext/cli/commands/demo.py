"""`locas demo`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import Epochs, LearningRate, Rank, Scale


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the plot and the memory go.")] = Path("."),
    max_tokens: Annotated[int, typer.Option(min=256, help="Read at most so many tokens of the book.")] = 50_000,
    rank: Rank = 64,
    learning_rate: LearningRate = 5e-3,
    scale: Scale = "0.3",
    epochs: Epochs = 1,
) -> None:
    """Let the shipped small model memorize the shipped novel; print a table, write a plot and the memory."""
    from locas_ext.cli.tasks.demo import DemoSettings, run_demo

    run_demo(DemoSettings(out, max_tokens, rank, learning_rate, scale, epochs), console())
