"""`locas demo`: the shipped small model memorizes the shipped novel."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from locas_ext import memory as locas
from locas_ext.cli.folders import made
from locas_ext.config import LocasConfig
from locas_ext.errors import Interrupted
from locas_ext.evaluation.assets import MODEL, read_book
from locas_ext.evaluation.curve import running_perplexity
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.evaluation.report.plots.reading import plot_reading
from locas_ext.evaluation.texts import Text
from locas_ext.memory import Backprop, Chunk, MemorizeReport, Memory
from locas_ext.storage.folder import check_folder
from locas_ext.terminal import Figures

WINDOW, STRIDE = 512, 128  # the model was trained on 512 tokens
REREAD = 3 * STRIDE
UNRELATED = 4096


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The options of `locas demo`."""

    out: Path
    max_tokens: int
    config: LocasConfig
    update: Backprop
    dtype: str | None
    device: str

    @property
    def memory_folder(self) -> Path:
        return self.out / "locas-demo-memory"

    @property
    def plot_file(self) -> Path:
        return self.out / "locas-demo.png"


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One measurement, perplexity unless said otherwise: by the host alone and with the memory."""

    host: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything the table shows.

    unrelated: another book's opening, before anything was attached and with the memory
    unrelated_after: the same by the host alone after detach()
    reread: the book's first chunks once more, host and memory loaded back from its folder
    """

    truncation: MemorizeReport
    memorized: MemorizeReport
    extra_parameters: int
    host_parameters: int
    unrelated: Sides
    unrelated_after: float
    host_unchanged: bool
    reread: Sides


def _digest(model) -> str:
    """SHA-256 over all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _learn(memory: Memory, book: Text, settings: DemoSettings) -> MemorizeReport:
    """Memorizes the book and saves the memory, also that of a run ended by Ctrl-C."""
    finished: list[Chunk] = []
    try:
        report = memory.memorize(
            book.ids,
            window=WINDOW,
            stride=STRIDE,
            update=settings.update,
            callback=finished.append,
        )
    except KeyboardInterrupt:
        if not finished:
            raise Interrupted("nothing had been learned yet, nothing was kept") from None
        memory.save_pretrained(settings.memory_folder, optimizer=True)
        raise Interrupted(
            f"what was learned from the first {finished[-1].end:,} tokens is kept in {settings.memory_folder}"
        ) from None
    memory.save_pretrained(settings.memory_folder)
    return report


def _measure(model, book: Text, other: Text, settings: DemoSettings) -> DemoResult:
    def perplexity(ids) -> float:
        return truncation(model, ids, WINDOW, WINDOW, progress=False).perplexity

    # The memory comes first: settings that do not fit show at once, and an interrupted run has something to keep.
    memory = locas.attach(model, settings.config)
    weights = _digest(model)
    with memory.disabled():
        unrelated_before = perplexity(other.ids)
    memorized = _learn(memory, book, settings)
    try:
        unrelated_with = perplexity(other.ids)
        extra_parameters = memory.num_parameters
        memory.detach()
        alone = truncation(model, book.ids, WINDOW, STRIDE)
        unrelated_after = perplexity(other.ids)
        host_unchanged = _digest(model) == weights
        first = book.ids[:REREAD]
        host_first = perplexity(first)
        reloaded = locas.load(model, settings.memory_folder)
        reread = Sides(host=host_first, memory=perplexity(first))
        reloaded.detach()
    except KeyboardInterrupt:
        raise Interrupted(f"the memory of {len(book.ids):,} tokens is kept in {settings.memory_folder}") from None
    host_parameters = sum(parameter.numel() for parameter in model.parameters())
    return DemoResult(
        truncation=alone,
        memorized=memorized,
        extra_parameters=extra_parameters,
        host_parameters=host_parameters,
        unrelated=Sides(host=unrelated_before, memory=unrelated_with),
        unrelated_after=unrelated_after,
        host_unchanged=host_unchanged,
        reread=reread,
    )


def _table(result: DemoResult, book: Text, other: Text) -> Figures:
    table = Figures(["", "window only", "with memory", "change"], f"{book.name}, {len(book.ids):,} tokens")

    def perplexity_row(name: str, host: float, memory: float) -> None:
        table.add_row(name, f"{host:.2f}", f"{memory:.2f}", f"{100 * (memory / host - 1):+.1f}%")

    alone, memorized = running_perplexity(result.truncation.chunks), running_perplexity(result.memorized.chunks)
    for fifth in range(1, 6):
        index = max(0, round(len(alone) * fifth / 5) - 1)
        position, host = alone[index]
        perplexity_row(f"perplexity, first {position:,} tokens", host, memorized[index][1])
    table.add_section()
    host_rate = len(book.ids) / result.truncation.seconds
    memory_rate = len(book.ids) / result.memorized.seconds
    table.add_row("tokens/s", f"{host_rate:,.0f}", f"{memory_rate:,.0f}", "")
    table.add_row(
        "time", f"{result.truncation.seconds:.1f} s", f"{result.memorized.seconds:.1f} s", f"{host_rate / memory_rate:.2f}x"
    )
    share = 100 * result.extra_parameters / result.host_parameters
    table.add_row("extra parameters", "0", f"{result.extra_parameters:,}", f"+{share:.1f}%")
    table.add_section()
    perplexity_row(f"reloaded, first {REREAD} tokens again", result.reread.host, result.reread.memory)
    perplexity_row(f"unrelated: {other.name}", result.unrelated.host, result.unrelated.memory)
    after = result.unrelated_after
    same = "same bits" if after == result.unrelated.host else f"was {result.unrelated.host:.2f}"
    table.add_row("  after detach()", f"{after:.2f}", "", same)
    table.add_row("host weights, SHA-256", "unchanged" if result.host_unchanged else "CHANGED", "", "")
    return table


def run_demo(settings: DemoSettings, console: Console) -> DemoResult:
    """Reads the book with and without memory; prints a table and writes the plot and the memory under settings.out.

    Raises ValueError for settings that do not fit, OSError if `out` cannot be written, Interrupted at Ctrl-C.
    """
    check_folder(settings.memory_folder)
    with made(settings.out):
        return _run(settings, console)


def _run(settings: DemoSettings, console: Console) -> DemoResult:
    model, _ = load_host(str(MODEL), settings.dtype, settings.device)
    book = read_book("Nostromo", "nostromo.txt", settings.max_tokens)
    other = read_book("Tono-Bungay", "tono-bungay.txt", UNRELATED)
    result = _measure(model, book, other, settings)
    console.print(_table(result, book, other))
    subtitle = (
        f"{result.host_parameters / 1e6:.1f} M parameters, a window of {WINDOW} tokens, and a memory of "
        f"{result.extra_parameters / 1e6:.2f} M that learns each passage after predicting it"
    )
    plot_reading(settings.plot_file, book, result.truncation, result.memorized, subtitle)
    console.print(f"plot: {settings.plot_file}\nmemory: {settings.memory_folder}")
    return result
