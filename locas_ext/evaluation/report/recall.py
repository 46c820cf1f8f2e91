"""The results of `locas recall` as a table on the console, and as a section with a plot in a report."""

from pathlib import Path

import numpy as np

from locas_ext.evaluation.capability.bootstrap import interval, resampled_sums
from locas_ext.evaluation.display import markdown
from locas_ext.evaluation.recall.documents import KINDS
from locas_ext.terminal import Figures

from .plots.recall import Bar, plot_recall
from .tables import MISSING, console_table, markdown_table, parameters_text

_OVER_TEXTS = 5  # from so many texts on, intervals are over texts
PLOT = "recall.png"
Found = tuple[float, list[float] | None] | None


# ---- figures of a method over all texts ------------------------------------------------------------------------
def _by_method(content: dict) -> dict[str, list[dict]]:
    """The records without an error, in the order of the settings' methods, those of merged runs apart."""
    result: dict[str, list[dict]] = {}
    for record in content["records"]:
        name = record["method"] if record.get("run") is None else f"{record['run']}: {record['method']}"
        if not record.get("error"):
            result.setdefault(name, []).append(record)
    return result


def _pooled(texts: list[list[float]], seed: int = 0) -> Found:
    """The mean over questions of several texts, and its interval: over texts where there are enough, else over questions."""
    texts = [values for values in texts if values]
    if not texts:
        return None
    flat = [value for values in texts for value in values]
    if len(texts) >= _OVER_TEXTS:
        units = np.array([[sum(values), len(values)] for values in texts], dtype=np.float64)
    elif len(flat) > 1:
        units = np.array([[value, 1.0] for value in flat])
    else:
        return flat[0], None
    sums = resampled_sums(units, seed=seed)
    return float(np.mean(flat)), interval(sums[:, 0] / sums[:, 1])


def figure(records: list[dict], kind: str, measure: str) -> Found:
    """A measure of a kind of question over the texts of some records; None where nothing is known."""
    return _pooled(
        [
            [float(a[measure]) for a in record["answers"] if a["kind"] == kind and a.get(measure) is not None]
            for record in records
        ]
    )


def _mean(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None


def _kept(records: list[dict], name: str = "kept") -> Found:
    """Over texts; of one text, with its interval over questions."""
    known = [record for record in records if record.get(name) is not None]
    if len(known) == 1:
        return known[0][name], known[0].get(f"{name}_interval")
    return _pooled([[record[name]] for record in known])


# ---- text ------------------------------------------------------------------------------------------------------
def _percent(found: Found, with_interval: bool) -> str:
    if found is None:
        return MISSING
    value, bounds = found
    text = f"{100 * value:.0f}"
    return text + (f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]" if with_interval and bounds else "")


def _nats(found: Found, with_interval: bool) -> str:
    if found is None:
        return MISSING
    value, bounds = found
    return f"{value:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if with_interval and bounds else "")


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _rows(content: dict, with_intervals: bool) -> tuple[list[str], list[list[str]]]:
    """Titles and rows; columns in which nothing is known are left out."""
    methods = _by_method(content)
    columns: dict[str, list[str]] = {"method": list(methods)}
    for kind in KINDS:
        measures = {"contained": "made up"} if kind == "absent" else {"contained": "gen", "calibrated": "cal"}
        measures |= {"f1": "F1"} if kind == "question" else {}
        for measure, name in measures.items():
            found = [figure(records, kind, measure) for records in methods.values()]
            columns[f"{kind} {name}"] = [_percent(each, with_intervals) for each in found]
    found = [figure(records, "question", "gold_nats") for records in methods.values()]
    columns["gold, nats a token"] = [_nats(each, with_intervals) for each in found]
    columns |= _after(content, methods, with_intervals)
    asked = max((record.get("kept_questions", 0) for records in methods.values() for record in records), default=0)
    for title, name in {f"kept of {asked}": "kept", "kept in float32": "kept_in_float32"}.items():
        columns[title] = [_percent(_kept(records, name), with_intervals) for records in methods.values()]
    for title, name, form in (
        ("other KL", "other_kl", ".3f"),
        ("perplexity", "perplexity", ".2f"),
        ("seconds", "seconds", ".1f"),
    ):
        columns[title] = [_number(_mean(records, name), form) for records in methods.values()]
    columns["parameters"] = [parameters_text(_mean(records, "extra_parameters")) for records in methods.values()]
    known = {title: cells for title, cells in columns.items() if any(cell != MISSING for cell in cells)}
    return list(known), [list(row) for row in zip(*known.values(), strict=True)]


def _after(content: dict, methods: dict[str, list[dict]], with_intervals: bool) -> dict[str, list[str]]:
    """The columns of what is left after further texts."""
    columns = {}
    for measure, name in {"contained": "gen", "calibrated": "cal"}.items():
        title = f"question {name}, {content['settings'].get('further') or 'some'} texts later"
        found = [figure([r["after"] for r in records if r.get("after")], "question", measure) for records in methods.values()]
        columns[title] = [_percent(each, with_intervals) for each in found]
    return columns


def _title(content: dict) -> str:
    titles = dict.fromkeys(record["document"] for record in content["records"])
    return f"Recall, {len(titles)} text{'s' if len(titles) != 1 else ''}: percent"


def table(content: dict) -> Figures:
    titles, rows = _rows(content, with_intervals=False)
    return console_table(titles, rows, _title(content))


# ---- the report ------------------------------------------------------------------------------------------------
_LEGEND = (
    "gen: a right answer is in what was written (greedy). cal: the right one of ten answers has the highest log-probability "
    "after taking off what is usual for each over the text's questions (chance: 10). F1: of words. gold: log-probability of "
    "the right answer. made up: questions about what the text never mentions that were answered with something it says of "
    "others. kept: general questions that the bare host answers right and that are still right, with the method's context "
    "in the window; in float32: the same with host and memory computed in it, if there is room, where rounding decides "
    "between no two tokens. "
    "other KL: nats a token to the bare host on an unrelated text. perplexity: of the text, read again at the end. seconds: "
    "of learning."
)


def recall_sections(content: dict, folder: Path) -> list[str]:
    """The Markdown lines of a report on this command's results.json in `folder`; the plot is written beside it."""
    titles, rows = _rows(content, with_intervals=True)
    texts = len(dict.fromkeys(record["document"] for record in content["records"]))
    units = "texts" if texts >= _OVER_TEXTS else "questions"
    lines = [f"## {_title(content)}", ""]
    if rows:
        lines += [*markdown_table([markdown(title) for title in titles], [[markdown(c) for c in row] for row in rows]), ""]
    lines += [f"{_LEGEND} In brackets: 95% bootstrap intervals over {units}.", ""]
    lines += [*_rounding(content), *_errors(content), *_notes(content)]
    if bars := _bars(content):
        plot_recall(folder / PLOT, _title(content).partition(":")[0], bars)
        lines += [f"![recall]({PLOT})", ""]
    return lines


def _rounding(content: dict) -> list[str]:
    shares = [share for record in content["records"] if (share := record.get("kept_by_rounding")) is not None]
    if not shares:
        return []
    return [f"The bare host itself, computed in float32, keeps {100 * shares[0]:.0f}: so much rounding alone decides.", ""]


def _errors(content: dict) -> list[str]:
    failed = [record for record in content["records"] if record.get("error")]
    lines = [f"- {markdown(r['method'])}, {markdown(r['document'])}: {markdown(r['error'])}" for r in failed]
    return ["Not measured:", "", *lines, ""] if lines else []


def _notes(content: dict) -> list[str]:
    records = content["records"]
    lines = [
        f"- {markdown(record['method'])}, {markdown(record['document'])}: {markdown(note)}"
        for record in records
        for note in record.get("notes") or []
    ]
    return ["What learning says:", "", *lines, ""] if lines else []


def _bars(content: dict) -> list[Bar]:
    bars = []
    for method, records in _by_method(content).items():
        found = [figure(records, "question", measure) for measure in ("contained", "calibrated")]
        if found[0] is not None:
            bars.append(Bar(method, found[0], found[1], _kept(records)))
    return bars
