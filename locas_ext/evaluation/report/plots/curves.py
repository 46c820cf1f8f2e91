"""The pictures of `locas perplexity` along a book, a line an arm: running perplexity, and the gain over truncation."""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from matplotlib.ticker import FuncFormatter

from .style import FAINT, INK, METHOD_COLORS, METHOD_LINES, WIDTH, new_figure, save, shades, style, text_color, write_heading

LABELLED, BEST = 12, 3  # so many arms all get a label at their end; of more, so many of each method
LEFT, TOP, BOTTOM = 0.075, 0.87, 0.52  # a share of the width; inches
LABEL_WIDTH = 27  # characters
LINE_HEIGHT, CHARACTER, GAP = 0.148, 0.077, 0.07  # of a label's text, inches
# For several arms of one method alone: hues that are told apart also without red or green.
HUES = ("#0f766e", "#dd7a1f", "#4a5aa8", "#b0457b", "#7fb3d5", "#7a5c2e")


@dataclass(frozen=True)
class Curve:
    """points: (tokens read, perplexity so far, or a gain), ascending; at least one."""

    label: str
    method: str
    points: list[tuple[int, float]]

    @property
    def end(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Measure:
    """What a picture's lines show. label: of the axis; unit: behind a line's last value; best: +1 if high is good, -1 if low"""

    label: str
    unit: str
    best: int


PERPLEXITY, GAIN = Measure("perplexity so far", "", -1), Measure("lower than truncation's, percent", "%", 1)


def _colors(curves: list[Curve]) -> dict[str, str]:
    """A hue a method and a shade an arm; hues for the arms where only one method has several."""
    methods: dict[str, list[str]] = {}
    for curve in curves:
        methods.setdefault(curve.method, []).append(curve.label)
    several = [labels for labels in methods.values() if len(labels) > 1]
    colors = {
        label: color
        for method, labels in methods.items()
        for label, color in zip(labels, shades(METHOD_COLORS.get(method, INK), len(labels)), strict=False)
    }
    if len(several) == 1 and len(several[0]) <= len(HUES):
        colors.update(zip(several[0], HUES, strict=False))
    return colors


def _labelled(curves: list[Curve], measure: Measure) -> list[Curve]:
    """Those to name: all, or of too many each method's best."""
    if len(curves) <= LABELLED:
        return curves
    ranked = sorted(curves, key=lambda curve: -measure.best * curve.end if math.isfinite(curve.end) else math.inf)
    methods = dict.fromkeys(curve.method for curve in curves)
    return [c for method in methods for c in [curve for curve in ranked if curve.method == method][:BEST]]


def _limits(curves: list[Curve], measure: Measure) -> tuple[float, float]:
    """The values to show: without the first tokens, which say nothing, and without arms that went astray."""
    first, last = min(c.points[0][0] for c in curves), max(c.points[-1][0] for c in curves)
    settled = first + (last - first) / 25
    values = [
        value
        for curve in curves
        for position, value in curve.points
        if math.isfinite(value) and (position >= settled or position == curve.points[-1][0])
    ] or [1.0]
    ends = sorted(curve.end for curve in curves if math.isfinite(curve.end)) or values
    low, high = min(values), max(values)
    if measure == PERPLEXITY:
        high = max(low, min(high, 1.6 * ends[len(ends) // 2]))
    else:
        high = max(high, 0.0)  # truncation itself
        low = min(max(low, -max(high, 1.0)), 0.0)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Centres for labels of these heights between low and high, near to the wanted ones, without overlap.

    Labels that touch form a block, which stands where its labels are nearest to their places on average.
    """
    blocks: list[tuple[list[int], float, float]] = []  # labels, lowest first; the block's lower end; its height
    for index in sorted(range(len(wanted)), key=lambda index: wanted[index]):
        blocks.append(_block([index], wanted, heights, low, high))
        while len(blocks) > 1 and blocks[-2][1] + blocks[-2][2] > blocks[-1][1]:
            upper, lower = blocks.pop(), blocks.pop()
            blocks.append(_block(lower[0] + upper[0], wanted, heights, low, high))
    centres = [0.0] * len(wanted)
    for indices, begin, _ in blocks:
        for index in indices:
            centres[index] = begin + heights[index] / 2
            begin += heights[index]
    return centres


def _block(indices: list[int], wanted, heights, low: float, high: float) -> tuple[list[int], float, float]:
    begins, offset = [], 0.0
    for index in indices:
        begins.append(wanted[index] - heights[index] / 2 - offset)
        offset += heights[index]
    return indices, max(low, min(sum(begins) / len(begins), high - offset)), offset


def _words(curve: Curve) -> list[str]:
    return wrap(curve.label, LABEL_WIDTH)


def _label_ends(
    axes, curves: list[Curve], colors: dict[str, str], limits: tuple[float, float], height: float, measure: Measure
) -> None:
    """The labels stand beside the axes, each joined to its line's end; `height` of the axes in inches."""
    low, high = limits
    inches = axes.get_position().width * WIDTH
    texts = ["\n".join([*_words(curve), f"{curve.end:.2f}{measure.unit}"]) for curve in curves]
    heights = [(text.count("\n") + 1) * LINE_HEIGHT + GAP for text in texts]
    astray = 1.0 if measure.best < 0 else 0.0
    ends = [min(max((c.end - low) / (high - low), 0), 1) if math.isfinite(c.end) else astray for c in curves]
    centres = spread([end * height for end in ends], heights, 0, height)
    for curve, text, end, centre in zip(curves, texts, ends, centres, strict=False):
        color, position = colors[curve.label], curve.points[-1][0]
        if math.isfinite(curve.end) and low <= curve.end <= high:
            axes.plot([position], [curve.end], "o", color=color, markersize=4.5, clip_on=False, zorder=4)
        axes.annotate(
            "",
            (position, low + end * (high - low)),
            xytext=(1 + 0.26 / inches, centre / height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
        )
        axes.text(
            1 + 0.31 / inches,
            centre / height,
            text,
            transform=axes.transAxes,
            va="center",
            fontsize=9,
            color=text_color(color),
            linespacing=1.15,
            parse_math=False,
        )


def plot_curves(path: Path, title: str, subtitle: str, curves: list[Curve], measure: Measure = PERPLEXITY) -> None:
    """Writes a PNG, WIDTH inches wide and as high as its labels need. Raises ValueError without curves."""
    if not curves:
        raise ValueError("curves is empty; expected one per arm")
    labelled = _labelled(curves, measure)
    if len(labelled) < len(curves):
        subtitle += f"; of {len(curves)} arms, each method's best {BEST} have a label"
    lines = sum(len(_words(curve)) + 1 for curve in labelled)
    axes_height = max(3.9, lines * LINE_HEIGHT + len(labelled) * GAP)
    longest = max(len(line) for curve in labelled for line in [*_words(curve), "1234.56"])
    right = 1 - (0.42 + CHARACTER * longest) / WIDTH
    height = axes_height + TOP + BOTTOM
    figure = new_figure(height)
    axes = figure.add_axes((LEFT, BOTTOM / height, right - LEFT, axes_height / height))
    style(axes)
    colors, limits = _colors(labelled), _limits(curves, measure)
    for curve in curves:
        named = curve in labelled
        axes.plot(
            *zip(*curve.points, strict=True),
            color=colors[curve.label] if named else FAINT,
            zorder=3 if named else 2,
            linestyle=METHOD_LINES.get(curve.method, "-"),
            linewidth=(2.2 if curve.method == "locas" else 1.7) if named else 0.7,
        )
    _label_ends(axes, labelled, colors, limits, axes_height, measure)
    axes.set_ylim(*limits)
    axes.set_xlim(0, 1.002 * max(1, *(curve.points[-1][0] for curve in curves)))  # so that a round end gets its tick
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel(measure.label, color=INK, fontsize=9.5)
    axes.set_xlabel("tokens read", color=INK, fontsize=9.5)
    write_heading(figure, LEFT, title, subtitle)
    save(figure, path)
