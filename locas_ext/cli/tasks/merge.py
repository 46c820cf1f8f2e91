"""`locas merge`: a memory and its host become one plain checkpoint."""

import shutil
from pathlib import Path

from rich.console import Console

from locas_ext import memory as locas
from locas_ext.evaluation.inputs import load_host
from locas_ext.hosts.registry import inspect_host


def run_merge(model: str, memory: Path, out: Path, pad_to_multiple_of: int, dtype: str | None, console: Console) -> None:
    """Writes the merged model and its tokenizer to `out`, a new or empty folder: whole or not at all.

    Raises ValueError, FileNotFoundError or OSError for arguments that do not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something already; expected a new or empty folder")
    host, tokenizer = load_host(model, dtype, "cpu")
    before = inspect_host(host).intermediate_size
    merged = locas.load(host, memory).merge_and_unload(pad_to_multiple_of)
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    width = inspect_host(merged).intermediate_size
    console.print(f"merged: {out} (FFN width {before} -> {width}); it loads with plain transformers")
