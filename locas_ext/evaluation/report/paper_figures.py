"""The paper's own figures, to stand beside ours where the host is the same.

Lu et al., "Locas", arXiv 2602.05085: PG-19, a window of 2K tokens. Its fourth host, an own pre-training with a
ReLU FFN, was not published, so nobody can run it.
"""

import re
from dataclasses import dataclass

SOURCE = "Lu et al., arXiv 2602.05085: PG-19, window 2K"
BASE = "Qwen3-1.7B-Base"


@dataclass(frozen=True)
class Figure:
    """One row of one of the paper's tables.

    table: "methods", "initialization" or "width"
    rank, init, learning_rate: None where the method has none, or the paper names none for this row
    perplexity: tokens read -> perplexity
    relative_time: against truncation
    """

    table: str
    host: str
    method: str
    perplexity: dict[int, float]
    rank: int | None = None
    init: str | None = None
    learning_rate: float | None = None
    extra_parameters: float | None = None
    relative_time: float | None = None


FIGURES = (
    Figure("methods", "Qwen3-0.6B-Base", "temp-lora", {200_000: 25.22}, 64, None, None, 36.7e6, 4.3),
    Figure("methods", "Qwen3-0.6B-Base", "locas", {200_000: 25.00}, 64, "topk", None, 5.5e6, 1.4),
    Figure("methods", "Qwen3-0.6B-Base", "long-context", {200_000: 24.57}, relative_time=13.9),
    Figure("methods", BASE, "truncation", {200_000: 20.50}),
    Figure("methods", BASE, "temp-lora", {200_000: 19.13}, 64, None, None, 73.4e6, 4.7),
    Figure("methods", BASE, "locas", {200_000: 19.04}, 64, "topk", None, 11.0e6, 1.8),
    Figure("methods", "Qwen3-1.7B", "temp-lora", {200_000: 21.65}, 64, None, None, 73.4e6, 4.7),
    Figure("methods", "Qwen3-1.7B", "locas", {200_000: 21.65}, 64, "topk", None, 11.0e6, 1.8),
    # The paper heads the next two tables Qwen3-1.7B; that "none" and "top-k" end at 20.50 and 19.04 says Base.
    Figure("initialization", BASE, "truncation", {50_000: 20.60, 100_000: 20.38, 200_000: 20.50}),
    Figure("initialization", BASE, "locas", {50_000: 20.44, 100_000: 20.09, 200_000: 19.90}, 64, "gaussian"),
    Figure("initialization", BASE, "locas", {50_000: 20.58, 100_000: 20.17, 200_000: 19.93}, 64, "activation", 1e-6),
    Figure("initialization", BASE, "locas", {50_000: 20.02, 100_000: 19.51, 200_000: 19.06}, 64, "random"),
    Figure("initialization", BASE, "locas", {50_000: 20.04, 100_000: 19.53, 200_000: 19.08}, 64, "bottomk"),
    Figure("initialization", BASE, "locas", {50_000: 20.00, 100_000: 19.49, 200_000: 19.04}, 64, "topk"),
    Figure("width", BASE, "locas", {200_000: 19.14}, 16, "topk", None, 2.8e6),
    Figure("width", BASE, "locas", {200_000: 19.10}, 32, "topk", None, 5.5e6),
    Figure("width", BASE, "locas", {200_000: 19.04}, 64, "topk", None, 11.0e6),
    Figure("width", BASE, "locas", {200_000: 19.02}, 128, "topk", None, 22.0e6),
    Figure("width", BASE, "temp-lora", {200_000: 19.39}, 16, None, None, 18.4e6),
    Figure("width", BASE, "temp-lora", {200_000: 19.13}, 64, None, None, 73.4e6),
    Figure("width", BASE, "temp-lora", {200_000: 19.10}, 128, None, None, 146.9e6),
)


def same_host(model: str | None) -> str | None:
    """The paper's name of a host, from a model's hub name, folder or place in the hub's cache; None if it is not there.

    A whole part of the path must be the name: Qwen3-1.7B-Base is not Qwen3-1.7B.
    """
    parts = {part.lower() for part in re.split(r"[/\\]|--", model or "")}
    return next((figure.host for figure in FIGURES if figure.host.lower() in parts), None)


def find(table: str, host: str | None, method: str, settings: dict) -> Figure | None:
    """The row of one table for an arm of this method and settings, or None. What a row leaves open may be anything."""
    for figure in FIGURES:
        if (figure.table, figure.host, figure.method) == (table, host, method):
            named = {name: getattr(figure, name) for name in ("rank", "init", "learning_rate")}
            if all(value is None or value == settings.get(name) for name, value in named.items()):
                return figure
    return None
