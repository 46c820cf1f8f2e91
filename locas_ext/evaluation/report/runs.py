"""Several runs of one command as one: what they share, where they differ, whose record is whose.

The merged settings hold what all runs share, and the whole of each run's under `runs`.
"""


def shared_settings(settings: list[dict]) -> dict:
    """What is the same in all."""
    first, *others = settings
    return {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}


def differing(settings: dict) -> list[str]:
    """The names of the settings in which merged runs differ; none for a single run."""
    runs = settings.get("runs", {}).values()
    return [name for name in dict.fromkeys(name for run in runs for name in run) if name not in settings]


def merged_records(runs: dict[str, dict]) -> list[dict]:
    """runs: a run's name -> its results. Each record gets its run's name, an ambiguous arm has it before its label."""
    ambiguous = _ambiguous(runs)
    records = []
    for name, run in runs.items():
        for record in run["records"]:
            record = {**record, "run": name}
            if record.get("arm") in ambiguous:
                record["arm"] = f"{name}: {record['arm']}"
            records.append(record)
    return records


def _ambiguous(runs: dict[str, dict]) -> set[str]:
    """The arms that are not the same in all runs that have them: other settings, or one book twice.

    Runs with the same settings on different books are one run in parts.
    """
    seen: dict[str, tuple[dict, set]] = {}
    ambiguous = set()
    for run in runs.values():
        settings = {name: value for name, value in run["settings"].items() if name != "books"}
        arms = [record["arm"] for record in run["records"] if "arm" in record]
        for arm in dict.fromkeys(arms):
            books = {record.get("book") for record in run["records"] if record.get("arm") == arm}
            others, read = seen.setdefault(arm, (settings, set()))
            if others != settings or read & books:
                ambiguous.add(arm)
            read |= books
    return ambiguous
