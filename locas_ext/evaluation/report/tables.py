"""From records to tables: an arm is summed up over its books, a column knows how to print it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from locas_ext.evaluation.display import markdown
from locas_ext.learning.perplexity import perplexity
from locas_ext.terminal import Figures

MISSING = "–"


@dataclass(frozen=True)
class ArmResults:
    """What was measured under one label: one record per book, those that failed left out."""

    label: str
    method: str
    settings: dict
    records: list[dict]

    @property
    def books(self) -> set[str]:
        return {record["book"] for record in self.records}

    def on(self, books: Iterable[str]) -> "ArmResults":
        """The same arm on these books only."""
        records = [record for record in self.records if record["book"] in books]
        return ArmResults(self.label, self.method, self.settings, records)

    def mean(self, name: str) -> float | None:
        """The geometric mean of a field over the books, exp of the mean log. None if a book lacks it."""
        return geometric_mean([record.get(name) for record in self.records])

    def at(self, tokens: int) -> float | None:
        """The perplexity of the first `tokens` tokens, averaged likewise. None if a book does not reach so far."""
        return geometric_mean([(record.get("milestones") or {}).get(str(tokens)) for record in self.records])

    def largest(self, name: str) -> int | None:
        return max((record[name] for record in self.records if record.get(name) is not None), default=None)


def geometric_mean(values: list[float | None]) -> float | None:
    """None for no values, or if one is None; inf or nan if one of them is."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return perplexity(sum(math.log(value) for value in known), len(known))


def collect_arms(records: list[dict]) -> list[ArmResults]:
    """The arms in the order of their first record, without those that only failed."""
    arms: dict[str, ArmResults] = {}
    for record in records:
        if not record.get("error"):
            arm = ArmResults(record["arm"], record["method"], record.get("arm_settings") or {}, [])
            arms.setdefault(record["arm"], arm).records.append(record)
    return list(arms.values())


def milestones(arms: list[ArmResults]) -> list[int]:
    """All milestones that some book of some arm reached, ascending."""
    return sorted({int(tokens) for arm in arms for record in arm.records for tokens in record.get("milestones") or {}})


# ---- text ------------------------------------------------------------------------------------------------------
def perplexity_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def tokens_text(tokens: int) -> str:
    return f"{tokens // 1000}K" if tokens % 1000 == 0 else f"{tokens:,}"


def parameters_text(count: float | None) -> str:
    if count is None:
        return MISSING
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K" if count >= 1e3 else f"{count:.0f}"


def times_text(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}x"


def bytes_text(count: int | None) -> str:
    return MISSING if count is None else f"{count / 2**30:.2f} GiB"


# ---- tables ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    title: str
    text: Callable[[ArmResults], str]


def perplexity_columns(arms: list[ArmResults]) -> list[Column]:
    """One column a milestone, then the end of the book."""

    def at(tokens: int) -> Column:
        return Column(tokens_text(tokens), lambda arm: perplexity_text(arm.at(tokens)))

    return [*map(at, milestones(arms)), Column("end", lambda arm: perplexity_text(arm.mean("perplexity")))]


PARAMETERS = Column("extra parameters", lambda arm: parameters_text(arm.largest("extra_parameters")))
COSTS = [
    PARAMETERS,
    Column("relative time", lambda arm: times_text(arm.mean("relative_time"))),
    Column("peak memory", lambda arm: bytes_text(arm.largest("peak_memory_bytes"))),
]
MEASURES = [
    Column("per word", lambda arm: perplexity_text(arm.mean("perplexity_per_word"))),
    Column("per byte", lambda arm: MISSING if (value := arm.mean("perplexity_per_byte")) is None else f"{value:.4f}"),
    Column("held out, before", lambda arm: perplexity_text(arm.mean("held_out_perplexity_before"))),
    Column("held out, after", lambda arm: perplexity_text(arm.mean("held_out_perplexity"))),
]


LABEL = Column("arm", lambda arm: markdown(arm.label))


def arm_table(arms: list[ArmResults], columns: list[Column], first: Column = LABEL) -> list[str]:
    """A row per arm, headed by `first`. A column in which nothing is known is left out."""
    cells = [[column.text(arm) for arm in arms] for column in columns]
    known = [index for index, texts in enumerate(cells) if any(text != MISSING for text in texts)]
    rows = [[first.text(arm), *(cells[index][row] for index in known)] for row, arm in enumerate(arms)]
    return markdown_table([first.title, *(columns[index].title for index in known)], rows)


def markdown_table(titles: list[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column left-aligned, the others right-aligned. Cells are taken as they are."""
    lines: list[Sequence[str]] = [titles, [":--", *["--:"] * (len(titles) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def console_table(titles: list[str], rows: Sequence[Sequence[str]], title: str | None = None, left: int = 1) -> Figures:
    """The same for a Terminal, with the first `left` columns left-aligned."""
    table = Figures(titles, title, left)
    for row in rows:
        table.add_row(*row)
    return table
