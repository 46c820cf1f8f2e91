"""`locas merge`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.console import console
from locas_ext.cli.options import MemoryFolder, Model


def merge(
    model: Model,
    memory: MemoryFolder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged checkpoint goes: a new folder.")],
    pad_to_multiple_of: Annotated[int, typer.Option(help="The new FFN width is rounded up to this.")] = 256,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32.")] = None,
) -> None:
    """Make a memory a permanent part of its host: a plain, wider checkpoint."""
    from locas_ext.cli.tasks.merge import run_merge

    run_merge(model, memory, out, pad_to_multiple_of, dtype, console())
