"""`locas report`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of runs of one command.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the runs' common report goes; left out: DIR's own is made anew."),
    ] = None,
) -> None:
    """Tables and plots of a run, or of several runs in one report."""
    from locas_ext.evaluation.report.build import run_report

    run_report(folders, out, console())
