"""`locas report`: report.md and its plots, from the results.json of any task that measures; several runs in one."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from locas_ext.evaluation import results as result_files
from locas_ext.evaluation.display import json_block, markdown
from locas_ext.storage.files import write_atomically
from locas_ext.storage.lock import folder_lock
from locas_ext.terminal import neutral

from .capability import capability_sections
from .locomo import locomo_sections
from .perplexity import perplexity_sections
from .recall import recall_sections
from .runs import differing, merged_records, shared_settings

NAME = "report.md"
# A command's part of the report: (results, folder) -> Markdown lines; it writes its plots into the folder.
SECTIONS: dict[str, Callable[[dict, Path], list[str]]] = {
    "capability": capability_sections,
    "locomo": locomo_sections,
    "perplexity": perplexity_sections,
    "recall": recall_sections,
}
FIRST_SETTINGS = ("model", "model_type", "window", "stride", "ablate", "dtype", "device", "seed")
FIRST_MACHINE = ("processor", "gpus", "torch", "locas_ext")


def run_report(folders: list[Path], out: Path | None, console: Console) -> None:
    """Rebuilds the report of one folder, or merges the runs of several into `out`. Errors as below."""
    if out is not None:
        report = merge_reports(folders, out)
    elif len(folders) == 1:
        report = write_report(folders[0])
    else:
        raise ValueError(f"--out is missing; expected a folder for the report of {len(folders)} runs")
    console.print(Text(f"report: {report}"))


def write_report(folder: Path) -> Path:
    """Writes folder/report.md and its plots from folder/results.json, over those of before. Returns report.md.

    Raises FileNotFoundError without results.json, LocasError if it is damaged, ValueError for a command that has no
    report.
    """
    results = _read(folder)
    settings = results["settings"]
    model = markdown(Path(settings.get("model") or "several models").name)
    lines = [f"# {settings['command'].capitalize()}: {model}", "", *_settings(settings), *_machine(results["machine"])]
    lines += SECTIONS[settings["command"]](results, folder)
    write_atomically(folder / NAME, ("\n".join(lines).strip() + "\n").encode())
    return folder / NAME


def _read(folder: Path) -> dict:
    results = result_files.read(folder)
    command = results["settings"].get("command")
    if command not in SECTIONS:
        raise ValueError(
            f"{folder / result_files.NAME}: settings.command is {command!r}; expected one of {', '.join(SECTIONS)}"
        )
    return results


def _settings(settings: dict) -> list[str]:
    first = [f"{name} {markdown(settings[name])}" for name in FIRST_SETTINGS if settings.get(name) is not None]
    different = differing(settings)
    return [
        f"Settings: {', '.join(first)}." if first else "Settings:",
        "",
        *([f"The runs differ in {', '.join(map(markdown, different))}.", ""] if different else []),
        "<details><summary>All settings</summary>",
        "",
        *json_block(settings),
        "",
        "</details>",
        "",
    ]


def _machine(machine: dict) -> list[str]:
    named = [(f"Machine of {markdown(name)}", one) for name, one in machine.get("runs", {}).items()]
    return [line for title, one in named or [("Machine", machine)] for line in _machine_line(title, one)]


def _machine_line(title: str, machine: dict) -> list[str]:
    parts = []
    for name in FIRST_MACHINE:
        value = machine.get(name)
        if isinstance(value, list):
            value = ", ".join(f"{count} x {gpu}" for gpu, count in Counter(value).items())
        if value:
            parts.append(markdown(value if name in ("processor", "gpus") else f"{name} {value}"))
    return [f"{title}: {'; '.join(parts)}.", ""] if parts else []


# ---- several runs ----------------------------------------------------------------------------------------------
def merge_reports(folders: list[Path], out: Path) -> Path:
    """Writes out/results.json with the records of several runs of one command, and its report. Returns report.md.

    Each record says in `run` where it is from. Settings that all runs share stay as they are, those of each run are
    under `runs`, likewise the machines. Arms that two runs have under one label get the run's name before it, unless
    the runs differ in their books only: then they are averaged.

    Raises as `write_report` does; ValueError for runs of different commands, and for a folder given twice or that
    holds merged runs; FileExistsError if `out` holds anything but an earlier merge.
    """
    _check_out(out)
    names = _run_names(folders)
    runs = dict(zip(names, (_read(folder) for folder in folders), strict=True))
    commands = {name: run["settings"]["command"] for name, run in runs.items()}
    if len(set(commands.values())) > 1:
        details = ", ".join(f"{name} is of {command}" for name, command in commands.items())
        raise ValueError(f"runs of different commands have no common report: {details}")
    if merged := next((name for name, run in runs.items() if "runs" in run["settings"]), None):
        raise ValueError(f"{merged} holds merged runs already; name the folders it was made from")
    content = {
        "settings": {
            **shared_settings([run["settings"] for run in runs.values()]),
            "runs": {name: run["settings"] for name, run in runs.items()},
        },
        "machine": {"runs": {name: run["machine"] for name, run in runs.items()}},
        "records": merged_records(runs),
    }
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        write_atomically(out / result_files.NAME, json.dumps(content, indent=1).encode())
        return write_report(out)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out: {out} is a file; expected a folder")
    if out.exists() and any(out.iterdir()):
        if not (out / result_files.NAME).exists() or "runs" not in result_files.read(out)["settings"]:
            raise FileExistsError(f"--out: {out} holds something else than merged runs; expected a new or empty folder")


def _run_names(folders: list[Path]) -> list[str]:
    """A folder's own name, or all of its path where two have the same."""
    places = [folder.resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"{twice} is given twice; expected each run once")
    names = [place.name for place in places]
    return [neutral(str(folder) if names.count(name) > 1 else name) for folder, name in zip(folders, names, strict=True)]
