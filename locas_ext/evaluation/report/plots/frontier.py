"""The picture of learning against forgetting: a point an arm, the Pareto front, the host alone for comparison."""

from pathlib import Path
from textwrap import wrap

from locas_ext.evaluation.display import one_line
from locas_ext.evaluation.report.frontier import Point, pareto_front

from .style import FAINT, INK, METHOD_COLORS, METHOD_MARKERS, PAPER, WITHOUT, new_figure, save, style, text_color, write_heading

NUMBERED = 14  # points that all get a number; of more, the front
LEFT, RIGHT, TOP, BOTTOM = 0.075, 0.70, 0.95, 0.55  # shares of the width; inches
LINE_HEIGHT, GAP = 0.150, 0.06  # of the list beside the axes, inches
ASTRAY = 1.15  # a perplexity of more than so many times the median is shown at the edge


def _range(values: list[float], host: float) -> tuple[float, float]:
    """The part of an axis to show, with the host's value in it."""
    limit = max(host, ASTRAY * sorted(values)[len(values) // 2])
    near = [value for value in values if value <= limit]
    margin = 0.10 * (max(near) - min(near)) or 0.05 * max(near)
    return min(near) - margin, max(near) + margin


def _draw_front(axes, front: list[Point], right: float, top: float) -> None:
    """The edge of what is dominated: steps through the front's points."""
    x, y = [front[0].learned], [top]
    for point, following in zip(front, [*front[1:], None], strict=True):
        x += [point.learned, following.learned if following else right]
        y += [point.held_out, point.held_out]
    axes.fill_between(x, y, top, color=FAINT, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(x, y, color=INK, linewidth=1.0, alpha=0.55, zorder=2)


def _draw_point(axes, point: Point, number: int | None, right: float, top: float) -> None:
    """At the edge and hollow if it lies beyond."""
    x, y = min(point.learned, right), min(point.held_out, top)
    outside = (x, y) != (point.learned, point.held_out)
    color = METHOD_COLORS[point.method]
    axes.plot(
        [x],
        [y],
        METHOD_MARKERS[point.method],
        color=color,
        markerfacecolor=PAPER if outside else color,
        markeredgecolor=color if outside else PAPER,
        markeredgewidth=1.2 if outside else 0.7,
        markersize=11.5 if number else 7,
        alpha=1 if number else 0.75,
        zorder=5 if number else 3,
        clip_on=False,
    )
    if number:
        axes.annotate(
            f"{number}",
            (x, y),
            ha="center",
            va="center_baseline",
            fontsize=7,
            weight="bold",
            color=color if outside else PAPER,
            zorder=6,
            annotation_clip=False,
        )


def _draw_host(axes, host: Point) -> None:
    axes.plot([host.learned], [host.held_out], METHOD_MARKERS["truncation"], color=WITHOUT, markersize=7, zorder=4)
    axes.axhline(host.held_out, color=WITHOUT, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    axes.axvline(host.learned, color=WITHOUT, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)


def _key(points: list[Point], host: Point | None) -> list[tuple[str, str, str]]:
    """(marker, colour, text) of what stands in the list before the numbers."""
    methods = dict.fromkeys(point.method for point in points)
    names = {"locas": "Locas", "temp-lora": "Temp-LoRA"}
    key = [(METHOD_MARKERS[method], METHOD_COLORS[method], names[method]) for method in methods]
    return [*key, (METHOD_MARKERS["truncation"], WITHOUT, "host alone")] if host else key


def _list_beside(figure, axes, height: float, key, numbered: list[tuple[int, Point]]) -> None:
    """Key and numbered arms, top down; the left margin holds markers and numbers."""
    bottom, axes_height = axes.get_position().y0, axes.get_position().height
    y = bottom + axes_height - 0.08 / height
    canvas = figure.add_axes((0, 0, 1, 1), facecolor="none")
    canvas.set_axis_off()
    canvas.set_xlim(0, 1)
    canvas.set_ylim(0, 1)
    for marker, color, text in key:
        canvas.plot([RIGHT + 0.032], [y], marker, color=color, markersize=7)
        canvas.text(RIGHT + 0.05, y, text, va="center", fontsize=9.5, color=text_color(color))
        y -= 0.21 / height
    y -= 0.12 / height
    for number, point in numbered:
        text, color = _entry(point), text_color(METHOD_COLORS[point.method])
        canvas.text(
            RIGHT + 0.040, y, f"{number}", va="top", ha="right", fontsize=8.5, color=color, weight="bold", linespacing=1.2
        )
        canvas.text(RIGHT + 0.05, y, text, va="top", fontsize=8.5, color=color, linespacing=1.2, parse_math=False)
        y -= ((text.count("\n") + 1) * LINE_HEIGHT + GAP) / height


def _entry(point: Point) -> str:
    return "\n".join(wrap(f"{one_line(point.label)}: {point.learned:.2f}, {point.held_out:.2f}", 34))


def plot_frontier(path: Path, title: str, subtitle: str, points: list[Point], host: Point | None) -> None:
    """Writes a PNG. `points` are numbered from 1 as they come; `host`: its perplexities without a memory, if known.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("points is empty; expected one per arm")
    front = pareto_front(points)
    numbered = [(n, p) for n, p in enumerate(points, start=1) if len(points) <= NUMBERED or p in front]
    key = _key(points, host)
    list_height = (
        0.08 + 0.21 * len(key) + 0.12 + sum((_entry(point).count("\n") + 1) * LINE_HEIGHT + GAP for _, point in numbered)
    )
    axes_height = max(4.4, list_height)
    height = axes_height + TOP + BOTTOM
    figure = new_figure(height)
    axes = figure.add_axes((LEFT, BOTTOM / height, RIGHT - LEFT, axes_height / height))
    style(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.5)
    everything = [*points, host] if host else points
    (left, right), (low, top) = (
        _range([getattr(p, name) for p in everything], getattr(host, name) if host else 0.0) for name in ("learned", "held_out")
    )
    axes.set_xlim(left, right)
    axes.set_ylim(low, top)
    if any(point.learned > right or point.held_out > top for point in points):
        subtitle += "; hollow: beyond the edge"
    _draw_front(axes, front, right, top)
    if host:
        _draw_host(axes, host)
    shown = dict(zip((point.label for _, point in numbered), (number for number, _ in numbered), strict=True))
    for point in points:
        _draw_point(axes, point, shown.get(point.label), right, top)
    axes.set_xlabel("perplexity on the book  (lower: learned more)", color=INK, fontsize=9.5)
    axes.set_ylabel("held-out perplexity after it  (lower: forgot less)", color=INK, fontsize=9.5)
    _list_beside(figure, axes, height, key, numbered)
    write_heading(figure, LEFT, title, subtitle)
    save(figure, path)
