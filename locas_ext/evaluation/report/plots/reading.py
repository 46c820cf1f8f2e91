"""The picture of a run: running perplexity along a book, with and without memory."""

from pathlib import Path

from matplotlib.ticker import FuncFormatter, PercentFormatter

from locas_ext.evaluation.curve import local_gain, running_perplexity
from locas_ext.evaluation.display import one_line
from locas_ext.evaluation.texts import Text
from locas_ext.memory import MemorizeReport

from .style import FAINT, INK, WITH, WITHOUT, new_figure, save, style, write_heading

SMOOTHING = 16  # chunks


def _label_end(axes, curve, text: str, color: str, above: bool) -> None:
    position, value = curve[-1]
    axes.plot([position], [value], "o", color=color, markersize=4.5, clip_on=False)
    axes.annotate(
        f"{text}\n{value:.2f}",
        (position, value),
        xytext=(9, 0),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=color,
        fontsize=10,
        annotation_clip=False,
    )


def _mark_chapters(axes, chapters: tuple[int, ...], label: bool) -> None:
    for number, position in enumerate(chapters, start=1):
        axes.axvline(position, color=FAINT, linewidth=0.7, linestyle=(0, (1, 3)))
        if label:
            axes.annotate(
                f"ch. {number}",
                (position, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -3),
                textcoords="offset points",
                va="top",
                fontsize=7.5,
                color=WITHOUT,
            )


def _draw_perplexity(axes, truncation: MemorizeReport, memorized: MemorizeReport) -> None:
    without, with_memory = running_perplexity(truncation.chunks), running_perplexity(memorized.chunks)
    positions = [position for position, _ in without]
    upper, lower = [value for _, value in without], [value for _, value in with_memory]
    axes.fill_between(positions, lower, upper, color=WITH, alpha=0.10, linewidth=0)
    axes.plot(positions, upper, color=WITHOUT, linewidth=1.6)
    axes.plot(positions, lower, color=WITH, linewidth=2.2)
    helped = lower[-1] <= upper[-1]
    _label_end(axes, without, "window only", WITHOUT, above=helped)
    _label_end(axes, with_memory, "with memory", WITH, above=not helped)
    # The title page is a list of names: its perplexity would set the scale and says nothing.
    settled = slice(len(positions) // 25, None)
    low, high = min(lower[settled] + upper[settled]), max(lower[settled] + upper[settled])
    margin = 0.12 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("perplexity so far", color=INK, fontsize=9.5)


def _draw_gain(axes, truncation: MemorizeReport, memorized: MemorizeReport) -> None:
    width = min(SMOOTHING, max(1, len(truncation.chunks) // 4))
    gain = local_gain(truncation.chunks, memorized.chunks, width)
    positions, percent = zip(*gain, strict=True)
    axes.fill_between(positions, 0, percent, color=WITH, alpha=0.30, linewidth=0)
    axes.plot(positions, percent, color=WITH, linewidth=1.1)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("lower by", color=INK, fontsize=9.5)
    axes.set_xlabel("tokens read", color=INK, fontsize=9.5)


def plot_reading(path: Path, book: Text, truncation: MemorizeReport, memorized: MemorizeReport, subtitle: str) -> None:
    """Writes a PNG. Both reports are over its ids in the same chunks."""
    figure = new_figure(5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    figure.subplots_adjust(left=0.075, right=0.865, top=0.845, bottom=0.095, hspace=0.10)
    for axes in (upper, lower):
        style(axes)
        _mark_chapters(axes, book.chapters, label=axes is upper)
    _draw_perplexity(upper, truncation, memorized)
    _draw_gain(lower, truncation, memorized)
    lower.set_xlim(0, len(book.ids))
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    write_heading(figure, 0.075, f"A small model reads {one_line(book.name)}", subtitle)
    save(figure, path)
