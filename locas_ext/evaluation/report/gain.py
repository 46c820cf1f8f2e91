"""The gain over truncation by how much of a text was read: what tells memory from getting used to a kind of text.

What an arm gains on a book is by how many percent its perplexity is below truncation's on the same tokens. A memory of the text
gains more the more it has read; a frozen memory of another text gains what it gains from the first page on.
"""

import math
from pathlib import Path

from locas_ext.evaluation.display import markdown, one_line
from locas_ext.evaluation.methods.arm import OTHER_TEXT, SHUFFLED

from .frontier import SHOWN
from .plots.curves import GAIN, Curve, plot_curves
from .tables import MISSING, ArmResults, Column, arm_table, geometric_mean, tokens_text

POINTS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 150_000, 200_000)
MOST_POINTS = 6
_NOTES = {
    OTHER_TEXT: "has learned another text, and learns nothing here: what it gains is due to the kind of text alone",
    SHUFFLED: "learns this text's chunks in random order, each after it was scored: what it gains does not need the order",
}


def running_ratio(record: dict, truncation: dict) -> list[tuple[int, float]]:
    """(tokens read, perplexity so far / truncation's on the same tokens) after every chunk, in the order of reading.

    Nothing where the two records are not of the same chunks, or a figure is not known.
    """
    mine, theirs = _losses(record), _losses(truncation)
    if mine is None or theirs is None or [end for end, _ in mine] != [end for end, _ in theirs]:
        return []
    order = record.get("reading_order") or range(len(mine))
    if sorted(order) != list(range(len(mine))):
        return []
    ratio, read, scored, nats = [], 0, 0, 0.0
    for place in order:
        begin = mine[place - 1][0] if place else 0
        read += mine[place][0] - begin
        scored += mine[place][0] - max(begin, 1)
        nats += mine[place][1] - theirs[place][1]
        ratio.append((read, math.exp(min(nats / scored, 700))))
    return ratio


def _losses(record: dict) -> list[tuple[int, float]] | None:
    """(end, nats) of every chunk, from the perplexities so far. A text's first token is never scored."""
    losses: list[tuple[int, float]] = []
    curve, before = record.get("curve") or [], 0.0
    for end, value in curve:
        if value is None or not 0 < value < SHOWN or end < 2 or (losses and end <= losses[-1][0]):
            return None
        total = (end - 1) * math.log(value)
        losses.append((end, total - before))
        before = total
    return losses or None


def _baselines(arms: list[ArmResults]) -> dict[str, dict]:
    """Truncation's record of each book."""
    return {record["book"]: record for arm in arms if arm.method == "truncation" for record in arm.records}


def gain_sections(arms: list[ArmResults], names: dict[str, str], folder: Path) -> list[str]:
    """Markdown lines with a table over all books and a plot a book; nothing without truncation and an arm to compare.

    names: what the file of each book's plot is called
    """
    baselines = _baselines(arms)
    ratios: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for arm in (arm for arm in arms if arm.method != "truncation"):
        for record in arm.records:
            if (base := baselines.get(record["book"])) and (ratio := running_ratio(record, base)):
                ratios[arm.label, record["book"]] = ratio
    compared = [arm for arm in arms if all((arm.label, book) in ratios for book in arm.books) and arm.method != "truncation"]
    if not compared:
        return []
    books = [book for book in names if any(book in arm.books for arm in compared)]
    lines = [
        "## Gain over truncation",
        "",
        "By how many percent the perplexity so far is below truncation's on the same tokens, by tokens read.",
        "",
        *arm_table(compared, _columns(compared, ratios)),
        "",
        *(f"`{method}` {note}." for method, note in _NOTES.items() if any(arm.method == method for arm in compared)),
        "",
    ]
    for book in books:
        curves = [
            Curve(one_line(arm.label), arm.method, [(read, _percent(ratio)) for read, ratio in ratios[arm.label, book]])
            for arm in compared
            if book in arm.books
        ]
        subtitle = "by how many percent the perplexity of what was read is below truncation's"
        plot_curves(folder / names[book], one_line(book), subtitle, curves, GAIN)
        lines += [f"![Gain over truncation, {markdown(book)}]({names[book]})", ""]
    return lines


def _percent(ratio: float) -> float:
    return 100 * (1 - ratio)


def _columns(arms: list[ArmResults], ratios: dict[tuple[str, str], list[tuple[int, float]]]) -> list[Column]:
    """Points that every book reaches, the last ones, and the end."""
    shortest = min(ratio[-1][0] for ratio in ratios.values())
    first = max(ratio[0][0] for ratio in ratios.values())
    points = [tokens for tokens in POINTS if first <= tokens < shortest][-MOST_POINTS:]

    def text(arm: ArmResults, tokens: int | None) -> str:
        values: list[float | None] = []
        for book in arm.books:
            reached = [ratio for read, ratio in ratios[arm.label, book] if tokens is None or read <= tokens]
            values.append(reached[-1])
        mean = geometric_mean(values)
        return MISSING if mean is None else f"{_percent(mean):.2f}%"

    def column(title: str, tokens: int | None) -> Column:
        return Column(title, lambda arm: text(arm, tokens))

    return [*(column(tokens_text(tokens), tokens) for tokens in points), column("end", None)]
