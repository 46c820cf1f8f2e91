"""What `locas capability` found, as tables for the console and as the sections of its report."""

from pathlib import Path

from locas_ext.evaluation.display import markdown
from locas_ext.terminal import Figures

from .tables import MISSING, console_table, markdown_table

_TEXT_TITLES = ["state", "perplexity", "ratio to host", "top-1 agreement", "KL, nats"]
_TASK_TITLES = ["state", "value", "difference"]


# ---- rows ------------------------------------------------------------------------------------------------------
def _with_interval(record: dict, name: str, form: str) -> str:
    """The figure and, where it is not certain, its interval."""
    if record[name] is None:
        return MISSING
    low, high = record[f"{name}_interval"] or (None, None)
    return format(record[name], form) + (f" [{low:{form}}, {high:{form}}]" if low != high else "")


def _text_row(record: dict) -> list[str]:
    compared = (("perplexity_ratio", ".4f"), ("top1_agreement", ".4f"), ("kl", "#.3g"))
    is_host = record["state"] == "host"
    cells = [MISSING if is_host else _with_interval(record, name, form) for name, form in compared]
    perplexity = MISSING if record["perplexity"] is None else f"{record['perplexity']:.3f}"
    return [record["state"], perplexity, *cells]


def _form(record: dict) -> str:
    """Shares have four digits behind the point, perplexities two."""
    return ".2f" if record["metric"].startswith("perplexity") else ".4f"


def _task_row(record: dict) -> list[str]:
    value = f"{record['value']:{_form(record)}}" + (f" ± {record['stderr']:.4f}" if record["stderr"] is not None else "")
    difference = MISSING if record["state"] == "host" else _with_interval(record, "difference", f"+{_form(record)}")
    return [record["state"], value, difference]


def _groups(records: list[dict]) -> dict[tuple, list[dict]]:
    """The records that stand in one table, by (run, text) or (run, task, metric); a run alone is called None."""
    result: dict[tuple, list[dict]] = {}
    for record in records:
        key = (record["text"],) if "text" in record else (record["task"], record["metric"])
        result.setdefault((record.get("run"), *key), []).append(record)
    return result


def _title(key: tuple, records: list[dict]) -> str:
    first = records[0]
    run, name = key[0], ", ".join(key[1:])
    if "text" in first:
        size = f"{first['tokens']:,} tokens, {first['windows']:,} windows"
    else:
        size = f"{first['questions']:,} questions"
    return f"{name}: {size}" + (f" ({run})" if run else "")


def _table(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows."""
    titles, row = (_TEXT_TITLES, _text_row) if "text" in records[0] else (_TASK_TITLES, _task_row)
    return titles, [row(record) for record in records]


def _all_tasks(records: list[dict], run: str | None) -> list[str]:
    """A row a task and metric, a column a state: the host's value, of the others the difference from it."""
    groups = [group for group in _groups(records).values() if "task" in group[0]]
    if len(groups) < 2:
        return []
    states = [state for state in dict.fromkeys(record["state"] for group in groups for record in group) if state != "host"]
    rows = []
    for group in groups:
        of_state, first = {record["state"]: record for record in group}, group[0]
        cells = {state: _with_interval(record, "difference", f"+{_form(first)}") for state, record in of_state.items()}
        value = MISSING if "host" not in of_state else f"{of_state['host']['value']:{_form(first)}}"
        differences = [cells.get(state, MISSING) for state in states]
        rows.append([f"{first['task']}, {first['metric']}", f"{first['questions']:,}", value, *differences])
    return [
        "## All tasks" + (f" ({markdown(run)})" if run else ""),
        "",
        "The host's value; of every other state its difference from the host.",
        "",
        *markdown_table(["task", "questions", "host", *map(markdown, states)], [list(map(markdown, row)) for row in rows]),
        "",
    ]


# ---- what detach() left ----------------------------------------------------------------------------------------
def detached_verdict(records: list[dict]) -> tuple[bool, str]:
    """Whether the detached host is the host, bit for bit, in all that was measured; and the sentence that says so."""
    detached = [record for record in records if record["state"] == "detached" and not record.get("pooled")]
    different = next((record for record in detached if not record["same_bits_as_host"]), None)
    if different is not None:
        if "task" in different:
            return False, f"after detach() the answers to {different['task']} differ from the host's"
        start, end = different["first_difference"]
        return False, (
            f"after detach() the logits differ from the host's, first at tokens {start} to {end} of {different['text']}"
        )
    tokens = sum(record["tokens"] for record in detached if "text" in record)
    questions = sum({record["task"]: record["questions"] for record in detached if "task" in record}.values())
    on_tasks = f", and so are the answers to {questions:,} questions" if questions else ""
    return True, f"after detach() every bit of the logits is the host's, at all {tokens:,} positions{on_tasks}"


# ---- console and Markdown --------------------------------------------------------------------------------------
def console_tables(records: list[dict]) -> list[Figures]:
    """A table a text or metric; they fit into 80 columns."""
    tables = []
    for key, group in _groups(records).items():
        titles, rows = _table(group)
        rows = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
        tables.append(console_table(titles, rows, _title(key, group)))
    return tables


def capability_sections(results: dict, folder: Path) -> list[str]:
    """Markdown lines from the content of results.json. `folder` is where pictures would go; there are none."""
    records = results["records"]
    if not records:
        return ["Nothing has been measured yet.", ""]
    lines = [
        "Each state reads the same windows. Ratio: perplexity against the host's. Top-1 agreement: the share of "
        "positions whose likeliest token is the host's. "
        "KL: the mean of KL(host, state) over the positions. In brackets: 95% "
        "intervals, by a paired bootstrap over the windows (tasks: over the questions).",
        "",
    ]
    for run in dict.fromkeys(record.get("run") for record in records):
        lines += _all_tasks([record for record in records if record.get("run") == run], run)
    for key, group in _groups(records).items():
        titles, rows = _table(group)
        rows = [[markdown(cell) for cell in row] for row in rows]
        lines += [f"## {markdown(_title(key, group))}", "", *markdown_table(titles, rows), ""]
    for run in dict.fromkeys(record.get("run") for record in records):
        _, sentence = detached_verdict([record for record in records if record.get("run") == run])
        lines += [f"Detached{f' ({markdown(run)})' if run else ''}: {markdown(sentence)}.", ""]
    return lines
