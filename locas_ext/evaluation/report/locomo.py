"""The results of `locas locomo` as a table on the console and as a section of a report."""

import json
from pathlib import Path

from locas_ext.evaluation.display import code, markdown
from locas_ext.evaluation.locomo.data import CATEGORIES
from locas_ext.evaluation.locomo.output import ALL_REFUSE, predictions_file
from locas_ext.evaluation.locomo.scoring import ANSWERABLE, OVERALL, REFUSAL, TRAP, UNDISPUTED, pool
from locas_ext.terminal import Figures

from .tables import MISSING, console_table, markdown_table

_LABELS = {
    **{name: f"{number} {name}" for number, name in CATEGORIES.items()},
    TRAP: "5, minus trap F1",
    OVERALL: "1 to 5",
    ANSWERABLE: "1 to 4",
    UNDISPUTED: "1 to 4, none corrected",
}


def _columns(content: dict) -> dict[str, list[str]]:
    """{title: cells}: n questions of each category, then each method's F1 in percent; the last row is its seconds."""
    by_method: dict[str, list[dict]] = {}
    for record in content["records"]:
        by_method.setdefault(record["method"], []).append(record)
    pooled = {method: pool([record["scores"] for record in records]) for method, records in by_method.items()}
    # In an unfinished run not every method has answered all: the control is always the first of a dialogue.
    control = pooled.get(ALL_REFUSE, {})
    labels = {name: label for name, label in _LABELS.items() if name != UNDISPUTED or name in control}
    columns = {
        "category": [*labels.values(), "seconds"],
        "n": [*(str(control[name]["count"]) if name in control else "0" for name in labels), ""],
    }
    for method in (*content["settings"]["methods"], ALL_REFUSE):
        if scores := pooled.get(method):
            cells = [f"{100 * scores[name]['f1']:.1f}" if name in scores else MISSING for name in labels]
            columns[method] = [*cells, f"{sum(record['seconds'] for record in by_method[method]):.0f}"]
    return columns


def _title(content: dict) -> str:
    count = len(content["settings"]["dialogues"])
    wrong = _wrong(content["settings"])
    corrected = f", {wrong:,} answer{'s' * (wrong != 1)} corrected" if content["settings"].get("corrections") else ""
    return f"LoCoMo, {count} dialogue{'s' if count > 1 else ''}{corrected}: F1 in percent"


def _wrong(settings: dict) -> int:
    return sum(counts["wrong"] for counts in (settings.get("corrections") or {}).get("dialogues", {}).values())


def _corrections(settings: dict) -> list[str]:
    """What was corrected, dialogue by dialogue; nothing where the published answers were taken."""
    corrections = settings.get("corrections")
    if not corrections:
        return []
    each = [f"{markdown(name)}: {counts['wrong']} of {counts['audited']}" for name, counts in corrections["dialogues"].items()]
    return [
        f"Corrected answers: {markdown(corrections['file'])} replaced {_wrong(settings)} published answers that an audit "
        f'found wrong, of those that it names ({", ".join(each)}). "1 to 4, none corrected" leaves these questions out.',
        "",
    ]


def table(content: dict) -> Figures:
    columns = _columns(content)
    titles = [name.replace("-", "-\n").replace("+", "\n+") for name in columns]  # six methods fit into 80 columns
    return console_table(titles, list(zip(*columns.values(), strict=True)), _title(content))


def locomo_sections(content: dict, folder: Path) -> list[str]:
    """The Markdown lines of a report on this command's results.json in `folder`, of one run or of several merged."""
    runs = content["settings"].get("runs") or {None: content["settings"]}
    lines = [
        "Scored by LoCoMo's official rules; the numbers of the categories are its own. Adversarial questions have two "
        "scores: the share of refusals, which counts in 1 to 5, and minus the F1 against their trap. "
        f'`{ALL_REFUSE}` is the control that answers "{REFUSAL}" to everything. '
        "With `+` a memory read the whole dialogue first; its time counts.",
        "",
    ]
    for run, settings in runs.items():
        records = [record for record in content["records"] if record.get("run") == run]
        lines += _run_section(run, {"settings": settings, "records": records})
    return lines


def _run_section(run: str | None, content: dict) -> list[str]:
    settings, columns = content["settings"], _columns(content)
    where = "the run's folder" if run else "this folder"
    return [
        f"## {_title(content)}" + (f" ({markdown(run)})" if run else ""),
        "",
        *markdown_table([markdown(name) for name in columns], list(zip(*columns.values(), strict=True))),
        "",
        *_corrections(settings),
        *_cuts(content["records"]),
        "",
        f"Dialogues: {', '.join(map(markdown, settings['dialogues']))}. "
        f"Every answer is in {where}, in `{predictions_file(Path(), 'METHOD')}`.",
        "",
        "Prompts:",
        "",
        *(f"- {markdown(name)}: {code(json.dumps(prompt))}" for name, prompt in settings["prompts"].items()),
        "",
    ]


def _cuts(records: list[dict]) -> list[str]:
    cuts = [record for record in records if record["cut_tokens"]]
    if not cuts:
        return ["Every dialogue fitted into the window as a whole."]
    return [
        "Turns at the beginning that did not fit into the window were cut:",
        "",
        *(
            f"- {markdown(record['method'])}, dialogue {markdown(record['dialogue'])}: {record['cut_tokens']:,} tokens"
            for record in cuts
        ),
    ]
