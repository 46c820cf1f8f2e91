"""`locas info`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.interrupts import importing
from locas_ext.cli.values import path
from locas_ext.errors import LocasError
from locas_ext.terminal import Terminal

EXAMPLES = ("locas info", "locas info book-memory")


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
) -> None:
    """Versions, build, devices and a self-test of the kernels, to paste into a bug report; or what a memory holds."""
    if memory is not None:
        with importing():
            from locas_ext.cli.tasks.describe import describe

        describe(memory, Terminal())
        return
    with importing():
        from locas_ext.cli.tasks.info import info as print_info

    if not print_info(Terminal()):
        raise LocasError("the self-test failed: the lines above say where")
