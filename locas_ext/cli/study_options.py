"""The options of a study, of `locas study` and of the methods of `locas recall` that study."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from .options import MemoryOptions, flag, option
from .values import integer, names, number, one_of

STUDY = "Studying"
LOSSES = ("kl", "ce")
KINDS = ("asked", "asked-for", "turned", "linked", "begun", "blank", "about", "continued")
KEYS = ("addressed", "learned")


def check_new_only(options: MemoryOptions, memory: Path | None) -> None:
    """ValueError for an option of a new memory beside --memory; the seed is one of the command too."""
    if memory is None:
        return
    for field in fields(MemoryOptions):
        value = getattr(options, field.name)
        if field.name != "seed" and value != field.default:
            option = field.name.replace("_", "-")
            raise ValueError(f"--{option} is {value}, but --memory says what the memory is made of; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The fields of StudySettings that have one meaning everywhere, and the loss."""

    loss: Annotated[
        str,
        option(
            one_of(LOSSES),
            "kl: answers as the host gives them with the passage in view; ce: answers themselves.",
            panel=STUDY,
        ),
    ] = "kl"
    kinds: Annotated[
        Any,  # list[str], which would make typer take the option several times
        option(names(KINDS), "Kinds of questions, the first by hosts with a chat template only; default: all.", panel=STUDY),
    ] = None
    questions: Annotated[
        int, option(integer(1), "Questions of each kind that the host writes per passage, at most.", panel=STUDY)
    ] = 4
    chunk: Annotated[int, option(integer(16), "Tokens of a passage.", panel=STUDY)] = 128
    check: Annotated[
        bool, flag("Keep only questions that the host answers with the passage in view.", "--check/--no-check", panel=STUDY)
    ] = True
    batch: Annotated[int, option(integer(1), "Questions per update.", panel=STUDY)] = 64
    top_k: Annotated[int, option(integer(1), "Likeliest tokens of the host that are kept at each place.", panel=STUDY)] = 32
    gold: Annotated[float, option(number(low=0, high=1), "With --loss kl, the share of the answer itself.", panel=STUDY)] = 0.5
    updates: Annotated[int, option(integer(1), "Updates at least, however few the questions.", panel=STUDY)] = 200
    recalled: Annotated[
        float, option(number(above=0, below=1), "From which probability on a token counts as learned.", panel=STUDY)
    ] = 0.7
    raw: Annotated[float, option(number(low=0), "Weight of the text itself.", panel=STUDY)] = 0.5
    raw_first: Annotated[
        float, option(number(low=0, below=1), "Share of the updates that learn mostly the text itself, first.", panel=STUDY)
    ] = 0.3
    guard: Annotated[
        float, option(number(low=0), "Weight of the distance to the host on general prompts and free text.", panel=STUDY)
    ] = 2.0
    most_kl: Annotated[float, option(number(above=0), "How far that distance may grow, nats per token.", panel=STUDY)] = 0.1
    keys: Annotated[
        str,
        option(
            one_of(KEYS),
            "addressed: slots answer to words of the text, values alone are learned; learned: keys are learned too, measured "
            "at a learning rate of 2e-3, with --guard 4 --most-kl 0.02.",
            panel=STUDY,
        ),
    ] = "addressed"

    def fields(self, epochs: int, learning_rate: float) -> dict[str, Any]:
        """The arguments of StudySettings."""
        given = {name: value for name, value in vars(self).items() if name != "loss"}
        return {**given, "kinds": tuple(self.kinds or KINDS), "epochs": epochs, "learning_rate": learning_rate}
