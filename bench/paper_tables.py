"""The paper's tables on a real host, and ours: one command each. `python -m bench.paper_tables TABLE --model MODEL ...`

    methods   perplexity of books up to 50K, 100K, 150K and 200K tokens: truncation, long context, Temp-LoRA, Locas
    init      the same for each initialization
    rank      the same for each width, of Locas and of Temp-LoRA
    controls  how much of the gain is memory of this text; --control-text
    ability   MMLU and seven other tasks after a book that `methods` read; --study, --book
    locomo    questions about six dialogues; --data, --corrections

Each prints the `locas` command that it runs; what stands after -- is added to it. The results go to --out and, without what is
large and no table needs, to bench/results/TABLE-NAME.json. `python -m bench.paper_tables report OUT` makes every table and plot
again from these files.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from locas_ext.cli import main as locas
from locas_ext.evaluation.capability.ability.tasks import TASKS
from locas_ext.evaluation.locomo.command import METHODS
from locas_ext.evaluation.report.build import write_report
from locas_ext.storage.files import write_atomically

RESULTS = Path(__file__).parent / "results"
TABLES = ("methods", "init", "rank", "controls", "ability", "locomo")
_NEEDS = {
    "methods": ("books",),
    "init": ("books",),
    "rank": ("books",),
    "controls": ("books", "control_text"),
    "ability": ("study", "book"),
    "locomo": ("data",),
}
_METHODS = {
    "methods": ["--methods", "truncation,long-context,temp-lora,locas"],
    "init": ["--ablate", "init"],
    "rank": ["--ablate", "rank"],
    "controls": ["--methods", "truncation,locas,temp-lora,locas-other-text,locas-shuffled"],
}


def command(table: str, options: argparse.Namespace) -> list[str]:
    """The arguments of `locas` that measure a table. SystemExit that names an option which the table needs and lacks."""
    if lacking := [name for name in _NEEDS[table] if not getattr(options, name)]:
        raise SystemExit(f"{table} needs --{lacking[0].replace('_', '-')}")
    if table == "ability":
        read = ["--memory", options.study / "memories" / f"{options.book}-locas"]
        read += ["--temp-lora", options.study / "adapters" / f"{options.book}-temp-lora"]
        words = ["capability", *read, "--tasks", ",".join(TASKS)]
    elif table == "locomo":
        words = ["locomo", options.data, "--methods", ",".join(METHODS)]
        words += ["--corrections", options.corrections] if options.corrections else []
    else:
        words = ["perplexity", *options.books, *_METHODS[table], "--max-tokens", options.tokens]
        words += ["--control-text", options.control_text] if table == "controls" else []
        for text in options.held_out or []:
            words += ["--held-out", text]
    return [str(word) for word in (*words, "--model", options.model, "--out", options.out, *options.more)]


def slim(content: dict) -> dict:
    """Results without what only a continued run needs, and without the folders of the machine that made them."""
    settings = dict(content["settings"])
    for name in ("model", "memory", "temp_lora"):
        if settings.get(name):
            settings[name] = Path(settings[name]).name
    records = []
    for record in content["records"]:
        large = {"per_question": None, "per_window": []}
        records.append(record | {name: empty for name, empty in large.items() if name in record})
    return content | {"settings": settings, "records": records}


def keep(table: str, options: argparse.Namespace) -> Path:
    """Puts a run's results beside those that are published."""
    content = slim(json.loads((options.out / "results.json").read_text()))
    file = RESULTS / f"{table}-{options.name or Path(options.model).stem}.json"
    write_atomically(file, (json.dumps(content, separators=(",", ":")) + "\n").encode())
    return file


def report(out: Path) -> list[Path]:
    """The report of every published run of a table, each in a folder of its own."""
    reports = []
    for file in sorted(RESULTS.glob("*.json")):
        if file.name.split("-")[0] in TABLES:
            folder = out / file.stem
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "results.json", file.read_bytes())
            reports.append(write_report(folder))
    return reports


def main() -> None:
    words = sys.argv[1:]
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    if words[:1] == ["report"] and len(words) == 2:
        print(*report(Path(words[1])), sep="\n")
        return
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.paper_tables", description=__doc__, formatter_class=form)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--model", required=True, help="a folder, a hub name or a GGUF file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the host in the file's name; default: the model's")
    parser.add_argument("--books", type=Path, nargs="+", help="books of PG-19")
    parser.add_argument("--tokens", type=int, default=200_000, help="read at most this many of each; default: 200,000")
    parser.add_argument("--held-out", type=Path, action="append", help="a text that forgetting is measured on")
    parser.add_argument("--control-text", type=Path, help="a book by the same author")
    parser.add_argument("--study", type=Path, help="the output folder of methods")
    parser.add_argument("--book", help="the book's name in it")
    parser.add_argument("--data", type=Path, help="LoCoMo's file or folder")
    parser.add_argument("--corrections", type=Path)
    options = parser.parse_args(words)
    options.more = more
    asked = command(options.table, options)
    print("locas", shlex.join(asked), flush=True)
    if status := locas(asked):
        raise SystemExit(status)
    print(keep(options.table, options))


if __name__ == "__main__":
    main()
