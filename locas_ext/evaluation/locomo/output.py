"""What `locas locomo` leaves behind: results.json, and every prediction in a file for each method."""

import json
from pathlib import Path

from locas_ext.evaluation import results
from locas_ext.evaluation.json_files import parse_json
from locas_ext.evaluation.schemas import PREDICTION
from locas_ext.storage.files import write_atomically

from .data import ADVERSARIAL, Dialogue
from .scoring import official_score, summarize, trap_score

ALL_REFUSE = "all-refuse"  # the control: the same refusal to every question


def predictions_file(folder: Path, method: str) -> Path:
    return folder / f"predictions-{method}.jsonl"


def _predictions(dialogue: Dialogue, answers: list[str], cut_tokens: int) -> list[dict]:
    lines = []
    for index, (question, prediction) in enumerate(zip(dialogue.questions, answers, strict=True)):
        line = {
            "dialogue": dialogue.name,
            "index": index,
            "category": question.category,
            "question": question.text,
            "gold": question.answer,
            "prediction": prediction,
            "f1": official_score(question, prediction),
            "cut_tokens": cut_tokens,
        }
        if question.published is not None:
            line |= {"published": question.published}
        if question.category == ADVERSARIAL:
            line |= {"trap": question.trap, "trap_f1": trap_score(question, prediction)}
        lines.append(line)
    return lines


class Output:
    """The output folder, brought up to date after every dialogue.

    The predictions are written first; a run that is ended before results.json is answers that dialogue again.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.records = results.open_folder(folder, settings)

    def has(self, method: str, dialogue: str) -> bool:
        return any(record["method"] == method and record["dialogue"] == dialogue for record in self.records)

    def add(self, method: str, dialogue: Dialogue, answers: list[str], cut_tokens: int, seconds: float) -> None:
        """One method's answers to all questions of a dialogue."""
        file = predictions_file(self.folder, method)
        kept = [line for line in _read_lines(file) if self.has(method, line["dialogue"])]
        lines = [*kept, *_predictions(dialogue, answers, cut_tokens)]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.records.append(
            {
                "method": method,
                "dialogue": dialogue.name,
                "questions": len(answers),
                "cut_tokens": cut_tokens,
                "seconds": seconds,
                "scores": summarize(dialogue.questions, answers),
            }
        )
        results.write(self.folder, self.settings, self.records)


def _read_lines(file: Path) -> list[dict]:
    if not file.exists():
        return []
    lines = enumerate(file.read_bytes().splitlines(), start=1)
    return [parse_json(line, f"{file}, line {number}", PREDICTION) for number, line in lines]
