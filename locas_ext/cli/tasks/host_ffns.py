"""`locas info --model`: the FFNs of a model, layer by layer, and what a memory can do there."""

from rich.console import Console

from locas_ext.evaluation.inputs import load_host
from locas_ext.hosts.ffn import HostFFN, Place
from locas_ext.hosts.probe.probe import probe
from locas_ext.hosts.registry import HOSTS, Host, inspect_host
from locas_ext.transforms.merge import merge_notes


def _standing(ffn: HostFFN) -> str:
    """How a memory would stand there."""
    if not ffn.is_gated:
        return "between its projections" if ffn.place is Place.PROJECTIONS else "beside it"
    if ffn.place is Place.PROJECTIONS:
        return "between its projections, as the module does more"
    obstacle = ffn.obstacle()
    return "whole" if obstacle is None else f"beside it: {obstacle}"


def _line(host: Host, layer: int, note: str) -> str:
    if (ffn := host.ffns.get(layer)) is None:
        return "no FFN of its own"
    names = f" ({', '.join(ffn.names)})" if ffn.names else ""
    variant = "glu" if ffn.is_gated else "mlp"
    path = ".".join(host.paths[layer])
    return f"{path}: {ffn.layout}{names}, {ffn.width:,} neurons, {ffn.activation}; {variant}, {_standing(ffn)}; {note}"


def describe_host(model: str, dtype: str | None, device: str, console: Console) -> None:
    """Prints it. Raises what loading a model raises, and ValueError for one that no memory fits."""
    loaded, _ = load_host(model, dtype, device)
    host = inspect_host(loaded.requires_grad_(False))
    probe(host)
    notes = merge_notes(host)
    family = host.config.model_type
    lines = [
        ("model", f"{type(loaded).__name__}, model type {family}, hidden size {host.hidden_size}, {host.depth} layers"),
        ("found", "in the table of families" if family in HOSTS else "by one forward over a few tokens"),
        ("windows", host.reading.describe()),
        *((f"layer {layer}", _line(host, layer, notes.get(layer, ""))) for layer in range(host.depth)),
    ]
    for name, value in lines:
        console.print(f"{name:<11} {value}")
