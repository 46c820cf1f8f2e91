"""The look that all pictures share: colours, axes, the PNG file."""

import warnings
from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from locas_ext.storage.files import write_atomically

PAPER, INK, FAINT = "#fbf8f1", "#2f3437", "#b9b2a3"
WITHOUT, WITH = "#8c8577", "#0f766e"
WIDTH, DPI = 9.6, 160  # inches, dots an inch
# Besides the hue, Locas and Temp-LoRA differ in lightness, line and marker, for eyes that do not tell the hues apart.
METHOD_COLORS = {
    "truncation": WITHOUT,
    "sliding": "#8a5a83",
    "locas": WITH,
    "temp-lora": "#dd7a1f",
    "long-context": "#4a5aa8",
    "locas-other-text": "#b0457b",
    "locas-shuffled": "#7fb3d5",
}
METHOD_LINES = {
    "sliding": (0, (5, 1, 1, 1)),
    "temp-lora": (0, (4, 1.2)),
    "long-context": (0, (1, 1)),
    "locas-other-text": (0, (6, 2)),
    "locas-shuffled": (0, (2, 1.5)),
}
METHOD_MARKERS = {"truncation": "D", "sliding": "v", "locas": "o", "temp-lora": "s", "long-context": "^"}


def new_figure(height: float) -> Figure:
    """An empty figure, WIDTH x height inches, that needs no display."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style(axes) -> None:
    axes.set_facecolor(PAPER)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.5)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def write_heading(figure: Figure, left: float, title: str, subtitle: str) -> None:
    """Title and subtitle at a fixed distance from the top, whatever the figure's height. Never read as formulas."""
    height = figure.get_figheight()
    title = title if len(title) <= 56 else f"{title[:53]}..."
    figure.text(left, 1 - 0.364 / height, title, family="serif", fontsize=17, color=INK, parse_math=False)
    figure.text(left, 1 - 0.627 / height, subtitle, fontsize=9.5, color=WITHOUT, parse_math=False)


def shades(color: str, count: int) -> list[str]:
    """`count` colours of one hue, from light to dark; one alone is the colour itself."""
    if count == 1:
        return [color]
    steps = [-0.4 + 0.85 * index / (count - 1) for index in range(count)]
    return [_towards(color, "#000000" if step > 0 else PAPER, abs(step)) for step in steps]


def text_color(color: str) -> str:
    """The colour of words about something that has this colour: dark enough to read."""
    return _towards(color, INK, 0.3)


def _towards(color: str, other: str, share: float) -> str:
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True))
    return to_hex((red, green, blue))


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG, atomically."""
    png = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in a script that the font lacks: boxes say so
        figure.savefig(png, format="png", facecolor=PAPER)
    write_atomically(path, png.getvalue())
