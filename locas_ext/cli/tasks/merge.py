"""`locas merge`: a memory and its host become one plain checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from locas_ext import memory as locas
from locas_ext.cli.folders import check_new, whole_or_not_at_all
from locas_ext.evaluation.inputs import load_host
from locas_ext.hosts.registry import inspect_host


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """The arguments of the command."""

    model: str
    memory: Path
    out: Path
    pad_to_multiple_of: int
    dtype: str | None
    device: str


def run_merge(task: MergeTask, console: Console) -> None:
    """Writes the merged model and its tokenizer to `out`, a new or empty folder: whole or not at all.

    Raises ValueError, FileNotFoundError, LocasError or OSError for arguments that do not fit.
    """
    check_new(task.out)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    before = inspect_host(host).intermediate_size
    merged = locas.load(host, task.memory).merge_and_unload(task.pad_to_multiple_of)
    width = inspect_host(merged).intermediate_size
    with whole_or_not_at_all(task.out) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    console.print(f"merged: {task.out} (FFN width {before} -> {width}); it loads with plain transformers")
