"""`locas demo`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    READING,
    DeviceOrCpu,
    Dtype,
    Epochs,
    LearningOptions,
    LearningRate,
    MemoryOptions,
    Paper,
    Rank,
    Scale,
    option,
)
from locas_ext.cli.values import integer, path
from locas_ext.terminal import Terminal

EXAMPLES = ("locas demo --out demo", "locas demo --max-tokens 5000 --rank 16")


def demo(
    out: Annotated[Path, option(path("DIR"), "Where the plot and the memory go.")] = Path("."),
    max_tokens: Annotated[int, option(integer(256), "Read at most this many tokens of the book.", panel=READING)] = 50_000,
    rank: Rank = 64,
    learning_rate: LearningRate = None,
    scale: Scale = None,
    epochs: Epochs = None,
    paper: Paper = False,
    dtype: Dtype = None,
    device: DeviceOrCpu = None,
    config: ConfigFile = None,
) -> None:
    """Let the shipped small model memorize the shipped novel; print a table, write a plot and the memory."""
    with importing():
        from locas_ext.cli.tasks.demo import DemoSettings, run_demo
        from locas_ext.learning.initialization import backprop_for

    memory = MemoryOptions(rank=rank, scale=scale).config(paper)
    settings = DemoSettings(
        out=out,
        max_tokens=max_tokens,
        config=memory,
        update=backprop_for(memory, LearningOptions(learning_rate=learning_rate, epochs=epochs).given(), paper),
        dtype=dtype,
        device=device or "cpu",
    )
    run_demo(settings, Terminal())
