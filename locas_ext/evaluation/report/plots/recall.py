"""The picture of a ladder: what each method answers, and what it left alone."""

from dataclasses import dataclass
from pathlib import Path

from locas_ext.evaluation.display import one_line

from .style import FAINT, INK, WITH, WITHOUT, new_figure, save, style, write_heading

LEFT, RIGHT, TOP, BOTTOM = 0.20, 0.97, 0.95, 0.65  # shares of the width; inches
ROW = 0.52  # inches a method
Figure = tuple[float, list[float] | None]


@dataclass(frozen=True)
class Bar:
    """One method: shares from 0 to 1 with their intervals."""

    method: str
    generated: Figure
    calibrated: Figure | None
    kept: Figure | None


def _draw(axes, y: float, found: Figure, color: str, height: float) -> None:
    value, bounds = found
    axes.barh([y], [100 * value], height=height, color=color, alpha=0.85, zorder=2)
    if bounds:
        axes.plot([100 * bound for bound in bounds], [y, y], color=INK, linewidth=1.0, zorder=3)
    axes.annotate(
        f"{100 * value:.0f}",
        (100 * max([value, *(bounds or [])]), y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        annotation_clip=False,
    )


def plot_recall(path: Path, title: str, bars: list[Bar]) -> None:
    """Writes a PNG: per method what it wrote right, what it chose right of ten, and how many general questions it kept."""
    height = TOP + BOTTOM + ROW * len(bars)
    figure = new_figure(height)
    axes = figure.add_axes((LEFT, BOTTOM / height, RIGHT - LEFT, ROW * len(bars) / height))
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.5)
    for row, bar in enumerate(bars):
        _draw(axes, row - 0.17, bar.generated, WITH, 0.30)
        if bar.calibrated is not None:
            _draw(axes, row + 0.17, bar.calibrated, "#7fb5ad", 0.30)
        if bar.kept is not None:
            axes.plot([100 * bar.kept[0]], [row], "D", color=WITHOUT, markersize=6, zorder=4, clip_on=False)
    axes.axvline(10, color=WITHOUT, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks(range(len(bars)), [one_line(bar.method) for bar in bars], parse_math=False)
    axes.set_xlabel("percent of questions; dotted: chance of one in ten", color=INK, fontsize=9.5)
    write_heading(figure, 0.05, title, "dark: written right, light: chosen right of ten, diamond: general questions kept")
    save(figure, path)
