"""`locas info MEMORY_DIR`: what a saved memory holds, read from its folder alone."""

from contextlib import suppress
from pathlib import Path

from rich.console import Console

from locas_ext.evaluation.display import one_line
from locas_ext.storage import checkpoint
from locas_ext.storage.checkpoint import Saved
from locas_ext.storage.folder import CONFIG_NAME, MEMORY_NAME


def bytes_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def size_on_disk(folder: Path) -> int:
    """Of the memory in a folder, into which another process may be saving."""
    total = 0
    for name in (CONFIG_NAME, MEMORY_NAME):
        with suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total


def _host(saved: Saved) -> str:
    host = saved.fields["host"]
    return (
        f"{host['model_type']}, {host['num_hidden_layers']} layers, hidden size {host['hidden_size']}, "
        f"FFN width {host['intermediate_size']}"
    )


def _config(saved: Saved) -> str:
    config = saved.config
    layers = saved.fields["layers"]
    everywhere = len(layers) == saved.fields["host"]["num_hidden_layers"]
    parts = {
        "variant": config.variant,
        "rank": config.rank,
        "layers": "all" if everywhere else ",".join(map(str, layers)),
        "init": config.init,
        "scale": config.scale,
        "clip": str(config.clip).lower(),
        "backend": config.backend,
        "seed": config.seed,
        "row length": config.row_length,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def _resume(saved: Saved) -> str:
    if saved.stream is None:
        return "no: it was saved without the optimizer"
    settings = saved.stream.settings
    kept = ", context kept" if "context" in settings else ""
    return f"yes, after token {saved.stream.position:,} (window {settings['window']}, stride {settings['stride']}{kept})"


def _texts(saved: Saved) -> list[str]:
    lines = []
    for text in saved.fields.get("texts") or []:
        title = text["title"] or "untitled"
        lines.append(f"{title}: {text['tokens']:,} tokens, learned {text['learned_at']}, digest {text['digest'][:12]}")
    return lines or ["not recorded"]


def describe(folder: Path, console: Console) -> None:
    """Prints it. Raises FileNotFoundError, OSError or LocasError if the folder holds no whole memory."""
    saved = checkpoint.read(folder)
    fields = saved.fields
    lines = [
        ("memory", str(folder)),
        ("host", _host(saved)),
        ("config", _config(saved)),
        *(("text", line) for line in _texts(saved)),
        ("learned", f"{fields['tokens_seen']:,} tokens, {fields['memory_version']:,} updates"),
        ("slots", f"{fields['slots_used']:,} per layer used, {saved.tensors['slots'].numel():,} parameters"),
        ("size", bytes_text(size_on_disk(folder))),
        ("resumable", _resume(saved)),
        ("written by", f"locas_ext {fields['locas_ext_version']}, format {fields['format_version']}"),
    ]
    if "created_at" in fields:
        lines.append(("saved", fields["created_at"]))
    for name, value in lines:
        console.print(f"{name:<11} {one_line(value)}")
