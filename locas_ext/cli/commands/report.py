"""`locas report`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import argument, option
from locas_ext.cli.values import path
from locas_ext.terminal import Terminal

EXAMPLES = ("locas report results", "locas report part-1 part-2 --out whole")


def report(
    folders: Annotated[list[Path], argument(path("DIR"), "Output folders of runs of one command.")],
    out: Annotated[
        Path | None, option(path("DIR"), "Where the runs' common report goes; default: DIR's own report is made anew.")
    ] = None,
) -> None:
    """Tables and plots of a run, or of several runs in one report."""
    with importing():
        from locas_ext.evaluation.report.build import run_report
        from locas_ext.storage.folder import CONFIG_NAME

    for folder in folders:
        if (folder / CONFIG_NAME).exists():
            raise ValueError(
                f"{folder} is a memory, which `locas info {folder}` describes; expected an output folder of "
                "`locas perplexity`, `locas locomo`, `locas recall` or `locas capability`"
            )
    run_report(folders, out, Terminal())
