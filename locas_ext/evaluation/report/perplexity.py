"""The sections of a `locas perplexity` report: tables over all books and for each, the presets' tables, the plots."""

import math
import re
from pathlib import Path

from locas_ext.evaluation.display import markdown, one_line

from . import paper_figures
from .frontier import LEARNING, SHOWN, Point, collect_points, dominators, pareto_front, shared_books
from .gain import gain_sections
from .plots.curves import Curve, plot_curves
from .plots.frontier import plot_frontier
from .runs import differing
from .tables import (
    COSTS,
    MEASURES,
    MISSING,
    PARAMETERS,
    ArmResults,
    Column,
    arm_table,
    collect_arms,
    markdown_table,
    parameters_text,
    perplexity_columns,
    perplexity_text,
    tokens_text,
)

METHOD = Column("method", lambda arm: markdown(arm.method))
LEARNING_RATE = Column(
    "learning rate", lambda arm: MISSING if (rate := arm.settings.get("learning_rate")) is None else f"{rate:g}"
)
# What all arms must share to be comparable.
SAME_FOR_ALL = ("model", "window", "stride", "bos", "max_tokens", "held_out")
INITS = ("none", "gaussian", "activation", "random", "bottomk", "topk")  # in the paper's order


def perplexity_sections(results: dict, folder: Path) -> list[str]:
    """Markdown lines; writes the plots they show into `folder`."""
    settings, records = results["settings"], results["records"]
    arms = collect_arms(records)
    lines = _missing(settings, records)
    if arms:
        books = list(dict.fromkeys(record["book"] for record in records if not record.get("error")))
        host = paper_figures.same_host(settings.get("model"))
        lines += _all_books(settings, arms, books, host)
        lines += _preset(settings.get("ablate"), arms, host)
        lines += _frontier(settings, arms, folder)
        lines += gain_sections(arms, _file_names("gain", books), folder)
        lines += _each_book(arms, books, folder)
    return lines + _harmed(records) + _failures(records)


def _missing(settings: dict, records: list[dict]) -> list[str]:
    runs = settings.get("runs", {"": settings}).values()
    expected = sum(len(run.get("arms") or []) * len(run.get("books") or []) for run in runs)
    if expected <= len(records):
        return []
    return [f"**Not finished: {len(records)} of {expected} records.**", ""]


# ---- tables ----------------------------------------------------------------------------------------------------
def _paper_columns(table: str, arms: list[ArmResults], host: str | None) -> list[Column]:
    """The paper's figures for the same host, method and settings; nothing where it has none."""

    def figure(arm: ArmResults) -> paper_figures.Figure | None:
        return paper_figures.find(table, host, arm.method, arm.settings)

    def column(title: str, text) -> Column:
        return Column(title, lambda arm: MISSING if (found := figure(arm)) is None else text(found))

    tokens = sorted({tokens for arm in arms if (found := figure(arm)) for tokens in found.perplexity})
    return [
        *(column(f"paper {tokens_text(n)}", lambda found, n=n: perplexity_text(found.perplexity.get(n))) for n in tokens),
        column("paper parameters", lambda found: parameters_text(found.extra_parameters)),
        column("paper time", lambda found: MISSING if (time := found.relative_time) is None else f"{time:g}x"),
    ]


def _paper_note(lines: list[str], host: str | None) -> list[str]:
    if "| paper" not in lines[0]:
        return [*lines, ""]
    return [*lines, "", f"Paper: {paper_figures.SOURCE}, host {host}.", ""]


def _all_books(settings: dict, arms: list[ArmResults], books: list[str], host: str | None) -> list[str]:
    lines = ["## Perplexity", ""]
    if different := [name for name in differing(settings) if name in SAME_FOR_ALL]:
        lines += [
            f"The runs differ in {', '.join(different)}: arms of one run are not comparable with another's.",
            "",
        ]
    columns = [*perplexity_columns(arms), *MEASURES, *COSTS]
    if len(books) > 1:
        lines += [f"Geometric means over {len(books)} books. Relative time: against truncation.", ""]
        if shared_books(arms) != set(books):
            columns.insert(0, Column("books", lambda arm: f"{len(arm.books)}"))
            lines += ["Not every arm has finished every book: arms over different books are not comparable.", ""]
    return lines + _paper_note(arm_table(arms, columns + _paper_columns("methods", arms, host)), host)


def _preset(name: str | None, arms: list[ArmResults], host: str | None) -> list[str]:
    """The table of an ablation in the paper's layout; "scale" has none there."""
    if name == "init":
        return _init_table(arms, host)
    if name == "rank":
        return _rank_table(arms, host)
    if name == "learning-rate":
        return _learning_rate_table(arms)
    return []


def _init_table(arms: list[ArmResults], host: str | None) -> list[str]:
    def init(arm: ArmResults) -> str:
        return "none" if arm.method == "truncation" else arm.settings.get("init", "") if arm.method == "locas" else ""

    rows = sorted((arm for arm in arms if init(arm) in INITS), key=lambda arm: INITS.index(init(arm)))
    columns = [LEARNING_RATE, *perplexity_columns(rows), *_paper_columns("initialization", rows, host)]
    return ["## Initialization", "", *_paper_note(arm_table(rows, columns, Column("init", init)), host)]


def _by_method(arms: list[ArmResults], setting: str) -> list[ArmResults]:
    """The arms that learn and have this setting: Locas first, then Temp-LoRA, ascending."""
    rows = [arm for arm in arms if arm.method in LEARNING and arm.settings.get(setting) is not None]
    return sorted(rows, key=lambda arm: (LEARNING.index(arm.method), arm.settings[setting]))


def _rank_table(arms: list[ArmResults], host: str | None) -> list[str]:
    rows = _by_method(arms, "rank")
    columns = [
        Column("rank", lambda arm: f"{arm.settings['rank']}"),
        PARAMETERS,
        *perplexity_columns(rows),
        *_paper_columns("width", rows, host),
    ]
    return ["## Rank", "", *_paper_note(arm_table(rows, columns, METHOD), host)]


def _learning_rate_table(arms: list[ArmResults]) -> list[str]:
    rows = _by_method(arms, "learning_rate")
    return ["## Learning rate", "", *arm_table(rows, [LEARNING_RATE, *perplexity_columns(rows)], METHOD), ""]


# ---- learning against forgetting -------------------------------------------------------------------------------
def _host_point(arms: list[ArmResults], points: list[Point], books: set[str]) -> Point | None:
    """The host alone on the same books: truncation's perplexity, and the held-out one before anything was learned."""
    alone = next((arm.on(books) for arm in arms if arm.method == "truncation" and arm.books >= books), None)
    if alone is None:
        return None
    learned = next(arm for arm in arms if arm.label == points[0].label).on(books)
    held_out = learned.mean("held_out_perplexity_before") or alone.mean("held_out_perplexity")
    perplexity = alone.mean("perplexity")
    return None if held_out is None or perplexity is None else Point(alone.label, alone.method, perplexity, held_out)


def _frontier(settings: dict, arms: list[ArmResults], folder: Path) -> list[str]:
    points, books = collect_points(arms)
    if len(points) < 2:
        return []
    heading = ["## Learning against forgetting", ""]
    if different := [name for name in differing(settings) if name in SAME_FOR_ALL]:
        return [*heading, f"The runs differ in {', '.join(different)}: their arms are not comparable.", ""]
    over = f"{len(books)} books" if len(books) > 1 else "one book"
    subtitle = f"{len(points)} arms over {over}; towards the lower left is better"
    plot_frontier(folder / "frontier.png", "Learning against forgetting", subtitle, points, _host_point(arms, points, books))
    numbers = {point.label: str(number) for number, point in enumerate(points, start=1)}
    front = pareto_front(points)
    rows = [
        [
            markdown(point.label),
            numbers[point.label],
            perplexity_text(point.learned),
            perplexity_text(point.held_out),
            ", ".join(numbers[other.label] for other in dominators(point, points)) or "on the front",
        ]
        for point in points
    ]
    return [
        *heading,
        f"Perplexity on the book against held-out perplexity after it, over {over} that all these arms read.",
        "",
        "![Learning against forgetting](frontier.png)",
        "",
        f"On the Pareto front: {', '.join(_name(point) for point in front)}.",
        "",
        *_verdict(points, "temp-lora", "locas"),
        *_verdict(points, "locas", "temp-lora"),
        "",
        *markdown_table(["arm", "no.", "on the book", "held out, after", "dominated by"], rows),
        "",
    ]


def _name(point: Point) -> str:
    return f"{markdown(point.label)} ({point.learned:.2f}, {point.held_out:.2f})"


def _some(points: list[Point], method: str) -> str:
    count = f"{len(points)} {method} arm{'s' * (len(points) > 1)}"
    return (
        f"{count}, among them {', '.join(map(_name, points[:3]))}"
        if len(points) > 3
        else (f"{count}: {', '.join(map(_name, points))}")
    )


def _verdict(points: list[Point], method: str, other: str) -> list[str]:
    """In words: the arm of `method` that learned most, all its arms, and what of the other method dominates them."""
    mine, theirs = ([point for point in points if point.method == wanted] for wanted in (method, other))
    if not mine or not theirs:
        return []
    best = mine[0]  # points come with the lowest perplexity first
    better = dominators(best, theirs)
    dominated = [point for point in mine if dominators(point, theirs)]
    lines = [
        f"- The {method} arm that learned most, {_name(best)}, is "
        + (f"dominated by {_some(better, other)}." if better else f"dominated by no {other} arm."),
    ]
    if len(mine) > 1:
        lines.append(f"- Of {len(mine)} {method} arms, {len(dominated)} are dominated by some {other} arm.")
    return lines


# ---- book by book ----------------------------------------------------------------------------------------------
def _each_book(arms: list[ArmResults], books: list[str], folder: Path) -> list[str]:
    lines, names = [], _file_names("perplexity", books)
    for book in books:
        on_book = [arm.on({book}) for arm in arms if book in arm.books]
        curves = [Curve(one_line(arm.label), arm.method, points) for arm in on_book if (points := _points(arm.records[0]))]
        lines += [f"## {markdown(book)}", ""]
        if curves:
            plot_curves(folder / names[book], one_line(book), _subtitle(on_book), curves)
            lines += [f"![Running perplexity, {markdown(book)}]({names[book]})", ""]
        if len(books) > 1:
            reading = [
                Column("tokens", lambda arm: f"{arm.largest('tokens') or 0:,}"),
                Column("seconds", lambda arm: f"{arm.records[0].get('seconds') or math.nan:,.1f}"),
            ]
            lines += [*arm_table(on_book, [*perplexity_columns(on_book), *MEASURES, *COSTS, *reading]), ""]
    return lines


def _points(record: dict) -> list[tuple[int, float]]:
    """What is not known, or too high for any scale, is infinite here: the plot leaves it out."""
    points = record.get("curve") or []
    return [(tokens, value if value is not None and value < SHOWN else math.inf) for tokens, value in points]


def _subtitle(arms: list[ArmResults]) -> str:
    tokens = max(arm.largest("tokens") or 0 for arm in arms)
    return f"perplexity of everything read so far; {tokens:,} tokens"


def _file_names(kind: str, books: list[str]) -> dict[str, str]:
    """A file name a book: its letters and digits, numbered where two would be the same."""
    names: dict[str, str] = {}
    for book in books:
        stem = f"{kind}-" + (re.sub(r"[^a-z0-9]+", "-", book.lower()).strip("-")[:60] or "book")
        taken, number, name = set(names.values()), 1, f"{stem}.png"
        while name in taken:
            number += 1
            name = f"{stem}-{number}.png"
        names[book] = name
    return names


def _harmed(records: list[dict]) -> list[str]:
    """The arms that made a book harder to predict than truncation finds it."""
    known = [record for record in records if not record.get("error") and record.get("perplexity") is not None]
    alone = {
        (record["book"], record.get("tokens")): record["perplexity"] for record in known if record["method"] == "truncation"
    }
    lines = []
    for record in known:
        host = alone.get((record["book"], record.get("tokens")), math.inf)
        if record["method"] in LEARNING and record["perplexity"] > host:
            figures = f"{perplexity_text(record['perplexity'])}, without learning {perplexity_text(host)}"
            lines.append(f"- {markdown(record['arm'])}, {markdown(record['book'])}: {figures}")
    return ["## Harder than without learning", "", "Try a lower learning rate or scale.", "", *lines, ""] if lines else []


def _failures(records: list[dict]) -> list[str]:
    failed = [record for record in records if record.get("error")]
    if not failed:
        return []
    lines = [f"- {markdown(record['arm'])}, {markdown(record['book'])}: {markdown(record['error'])}" for record in failed]
    return ["## Failed", "", *lines, ""]
