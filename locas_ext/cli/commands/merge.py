"""`locas merge`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import DeviceOrCpu, Dtype, MemoryFolder, Model, option
from locas_ext.cli.values import integer, path
from locas_ext.terminal import Terminal

EXAMPLES = ("locas merge --model Qwen/Qwen3-0.6B --memory book-memory --out merged",)


def merge(
    model: Model,
    memory: MemoryFolder,
    out: Annotated[Path, option(path("DIR"), "Where the merged checkpoint goes: a new or empty folder.")],
    pad_to_multiple_of: Annotated[int, option(integer(1), "Round the new FFN width up to a multiple of this.")] = 256,
    dtype: Dtype = None,
    device: DeviceOrCpu = None,
    config: ConfigFile = None,
) -> None:
    """Make a memory a permanent part of its host: a plain, wider checkpoint."""
    with importing():
        from locas_ext.cli.tasks.merge import MergeTask, run_merge

    task = MergeTask(
        model=model, memory=memory, out=out, pad_to_multiple_of=pad_to_multiple_of, dtype=dtype, device=device or "cpu"
    )
    run_merge(task, Terminal())
