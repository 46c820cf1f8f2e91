"""Records for the tests of the reports, and the means they should show."""

import json
import math
import random

from locas_ext.evaluation.report.build import write_report

MACHINE = {"processor": "a processor", "gpus": ["a GPU", "a GPU"], "threads": 2, "torch": "2.6.0"}
SETTINGS = {
    "command": "perplexity",
    "model": "models/some-host",
    "window": 2048,
    "stride": 512,
    "ablate": None,
    "seed": 3,
}
METHODS = ("truncation", "locas", "temp-lora", "long-context")


def record(method="locas", arm=None, book="Nostromo", settings=None, perplexity=None, **fields):
    """One of a run's records, with figures of its own for every (method, arm, book)."""
    numbers = random.Random(f"{method} {arm} {book}")
    perplexity = perplexity or numbers.uniform(15, 60)
    curve = [[n * 2000, perplexity * (1 + 3 / n)] for n in range(1, 31)]
    return {
        "method": method,
        "arm": arm or method,
        "arm_settings": settings or {},
        "book": book,
        "tokens": 59_999,
        "nll": 59_999 * math.log(perplexity),
        "perplexity": perplexity,
        "perplexity_per_word": perplexity**1.3,
        "perplexity_per_byte": perplexity**0.25,
        "seconds": numbers.uniform(10, 90),
        "relative_time": numbers.uniform(1, 5),
        "extra_parameters": numbers.randrange(10**6, 10**8),
        "curve": curve,
        "milestones": {"50000": perplexity * 1.1, "54321": perplexity * 1.05},
        "held_out_perplexity": numbers.uniform(40, 50),
        "held_out_perplexity_before": 39.0,
        "error": None,
        "peak_memory_bytes": 2**31,
        **fields,
    }


def save(folder, records, **settings):
    folder.mkdir(exist_ok=True)
    content = {"settings": {**SETTINGS, **settings}, "machine": MACHINE, "records": records}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def report(folder, records, **settings):
    return write_report(save(folder, records, **settings)).read_text()


def tables(markdown):
    """{the heading above: [row as {title: cell}, ...]} of the first table under each heading."""
    found, heading, titles = {}, None, None
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading, titles = line.strip("# "), None
        elif not line.startswith("|"):
            titles = None
        else:
            cells = [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
            if titles is None:
                titles = cells
                assert heading not in found, f"two tables under {heading}"
                found[heading] = []
            elif set(line) - set("|:- "):
                assert len(cells) == len(titles)
                found[heading].append(dict(zip(titles, cells, strict=False)))
    return found


def mean(records, *path):
    """exp of the mean log, written once more."""
    values = []
    for value in records:
        for name in path:
            value = value[name]
        values.append(value)
    return math.prod(values) ** (1 / len(values))
