"""General questions that have nothing to do with any text: what a memory must leave alone."""

from locas_ext.evaluation.assets import ASSETS
from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.schemas import fields, mapping
from locas_ext.storage.schema import text

from .documents import QUESTION, Question

FILE = ASSETS / "general-questions.json"
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def general_questions() -> list[Question]:
    """Those that are shipped, in turns from their groups, so that any first part is a mixture."""
    groups = read_json(FILE, mapping(fields({"question": text, "answers": mapping(text)})))
    lists = [
        [Question(QUESTION, group["question"].format(name), _spellings(answer)) for name, answer in group["answers"].items()]
        for group in groups.values()
    ]
    most = max(map(len, lists))
    # a group of n has its k-th question at (k + 0.5) / n of the way
    placed = sorted(((k + 0.5) / len(each), at, k) for at, each in enumerate(lists) for k in range(min(most, len(each))))
    return [lists[at][k] for _, at, k in placed]


def _spellings(answer: str) -> tuple[str, ...]:
    return (answer, _NUMBERS[int(answer)]) if answer.isdigit() and int(answer) < len(_NUMBERS) else (answer,)
