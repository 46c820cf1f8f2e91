"""`locas info`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import HOST, DeviceOrCpu, Dtype, option
from locas_ext.cli.values import MODEL, path
from locas_ext.errors import LocasError
from locas_ext.terminal import Terminal

EXAMPLES = ("locas info", "locas info book-memory", "locas info --model Qwen/Qwen3-30B-A3B")


def info(
    memory: Annotated[
        Path | None,
        typer.Argument(
            parser=path("MEMORY_DIR"),
            metavar="[MEMORY_DIR]",
            help="A folder that `locas memorize` wrote: show what it holds instead.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, option(MODEL, "A folder, a hub name or a GGUF file.", panel=HOST)] = None,
    dtype: Dtype = None,
    device: DeviceOrCpu = None,
) -> None:
    """Versions, build, devices and a self-test of the kernels, for a bug report; or what a memory or a model's FFNs are."""
    if memory is not None and model is not None:
        raise ValueError("--model is given beside a memory folder; expected one of the two")
    if model is not None:
        with importing():
            from locas_ext.cli.tasks.host_ffns import describe_host

        describe_host(model, dtype, device or "cpu", Terminal())
        return
    for name, value in ("--dtype", dtype), ("--device", device):
        if value is not None:
            raise ValueError(f"{name} is {value} without --model, whose host it is about")
    if memory is not None:
        with importing():
            from locas_ext.cli.tasks.describe import describe

        describe(memory, Terminal())
        return
    with importing():
        from locas_ext.cli.tasks.info import info as print_info

    if not print_info(Terminal()):
        raise LocasError("the self-test failed: the lines above say where")
