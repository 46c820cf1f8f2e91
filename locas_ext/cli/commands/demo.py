"""`locas demo`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import READING, DeviceOrCpu, Dtype, Epochs, LearningRate, Rank, Scale, option
from locas_ext.cli.values import integer, path
from locas_ext.terminal import Terminal

EXAMPLES = ("locas demo --out demo", "locas demo --max-tokens 5000 --rank 16")


def demo(
    out: Annotated[Path, option(path("DIR"), "Where the plot and the memory go.")] = Path("."),
    max_tokens: Annotated[int, option(integer(256), "Read at most this many tokens of the book.", panel=READING)] = 50_000,
    rank: Rank = 64,
    learning_rate: LearningRate = 5e-3,
    scale: Scale = 0.3,
    epochs: Epochs = 1,
    dtype: Dtype = None,
    device: DeviceOrCpu = None,
    config: ConfigFile = None,
) -> None:
    """Let the shipped small model memorize the shipped novel; print a table, write a plot and the memory."""
    with importing():
        from locas_ext.cli.tasks.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=out,
        max_tokens=max_tokens,
        rank=rank,
        learning_rate=learning_rate,
        scale=scale,
        epochs=epochs,
        dtype=dtype,
        device=device or "cpu",
    )
    run_demo(settings, Terminal())
