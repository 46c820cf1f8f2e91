"""lm-eval's tasks (MMLU and others) on a model object. lm-eval is the extra `eval`, imported where it is needed."""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from locas_ext.evaluation.arguments import at_least, needs_extra


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """What lm-eval is to run.

    names: its tasks, groups or tags, such as "mmlu"
    few_shot: examples before each question; None: what the task says
    limit: questions a task at most; None: all
    include_path: a folder with further task files (YAML), which may read their questions from local files
    """

    names: tuple[str, ...]
    few_shot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    include_path: Path | None = None


class Harness:
    """lm-eval with its index of tasks, which takes seconds to read.

    Raises ValueError for arguments that do not fit, LocasError with what to install where lm-eval is not.
    """

    def __init__(self, tasks: HarnessTasks):
        at_least(1, limit=tasks.limit, batch_size=tasks.batch_size)
        at_least(0, few_shot=tasks.few_shot)
        if tasks.include_path is not None and not tasks.include_path.is_dir():
            raise FileNotFoundError(f"--include-path: {tasks.include_path} is not a folder")
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise needs_extra("--tasks", "lm-eval", error) from None
        self._lm_eval, self._wrapper, self.tasks = lm_eval, HFLM, tasks
        self._manager = TaskManager(include_path=tasks.include_path and str(tasks.include_path))
        if unknown := [name for name in tasks.names if not self._manager.match_tasks([name])]:
            raise ValueError(f"--tasks: lm-eval has no {', '.join(unknown)}; `lm-eval ls tasks` lists what it has")

    @property
    def parts(self) -> tuple[None]:
        """lm-eval runs all tasks at once."""
        return (None,)

    @property
    def settings(self) -> dict:
        """What decides the answers, apart from the model."""
        tasks = self.tasks
        return {
            "harness": "lm-eval",
            "tasks": tasks.names,
            "few_shot": tasks.few_shot,
            "limit": tasks.limit,
            "include_path": tasks.include_path,
        }

    def evaluate(self, model, tokenizer, state: str, part: None = None) -> list[dict]:
        """A record for each metric of each task or group asked for, without its parts.

        value: the metric; stderr: its standard error by lm-eval
        per_question: the metric for each question, where the value is their mean; else None
        responses_sha256: over all that the model answered, log-likelihoods to the last bit
        """
        tasks, started = self.tasks, time.perf_counter()
        found = self._lm_eval.simple_evaluate(
            model=self._wrapper(pretrained=model, tokenizer=tokenizer, batch_size=tasks.batch_size),
            tasks=list(tasks.names),
            num_fewshot=tasks.few_shot,
            limit=tasks.limit,
            task_manager=self._manager,
            bootstrap_iters=1000,
        )
        seconds = time.perf_counter() - started
        parts = found["group_subtasks"]
        inner = {name for names in parts.values() for name in names}
        records = []
        for name, figures in found["results"].items():
            if name in inner:
                continue
            samples = [sample for leaf in _leaves(name, parts) for sample in found["samples"][leaf]]
            for key, value in figures.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr"):
                    continue
                asked = [sample for sample in samples if sample["filter"] == filter_name]
                records.append(
                    {
                        "state": state,
                        "task": name,
                        "metric": key,
                        "value": float(value),
                        "stderr": _number(figures.get(f"{metric}_stderr,{filter_name}")),
                        "questions": len(asked),
                        "per_question": _mean_of(metric, asked, value),
                        "responses_sha256": _digest(asked),
                        "seconds": seconds,
                        "lm_eval": found["lm_eval_version"],
                    }
                )
        return records


def _leaves(name: str, parts: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it; of a task: itself."""
    return [leaf for part in parts[name] for leaf in _leaves(part, parts)] if parts.get(name) else [name]


def _number(value) -> float | None:
    """lm-eval writes "N/A" where there is no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean_of(metric: str, samples: list[dict], value: float) -> list[float] | None:
    values = [sample.get(metric) for sample in samples]
    numbers = [float(each) for each in values if isinstance(each, int | float)]
    if not values or len(numbers) < len(values):
        return None
    # A group weighted otherwise, or a metric like perplexity, is not a mean over its questions.
    return numbers if math.isclose(sum(numbers) / len(numbers), value, rel_tol=1e-9) else None


def _digest(samples: list[dict]) -> str:
    return hashlib.sha256(json.dumps([sample["filtered_resps"] for sample in samples]).encode()).hexdigest()
