"""`locas study`: its arguments and their help."""

import os
from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import HOST, LEARNING, HostOptions, MemoryOptions, Model, argument, option
from locas_ext.cli.study_options import STUDY, StudyOptions, check_new_only
from locas_ext.cli.values import integer, number, path
from locas_ext.terminal import Terminal

EXAMPLES = (
    "locas study notes.txt --model HuggingFaceTB/SmolLM2-135M-Instruct --out notes",
    "locas study manual.txt --model Qwen/Qwen3-0.6B --pairs questions.jsonl --loss ce --out manual",
    "locas study book.txt --model Qwen/Qwen3-0.6B --memory book-memory --out book-studied",
)


def study(
    texts: Annotated[list[Path], argument(path("TEXT"), "UTF-8 text files, read one after another.")],
    model: Model,
    out: Annotated[Path, option(path("DIR"), "Where the memory goes: a new folder.")],
    memory: Annotated[Path | None, option(path("DIR"), "A memory to study on with; default: a new one.", panel=HOST)] = None,
    pairs: Annotated[
        Path | None,
        option(
            path("FILE"), 'Your own questions, lines of {"question", "answer"}; default: the host writes them.', panel=STUDY
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        option(path("DIR"), "Keeps questions and progress; the same command continues there. Default: OUT with .study behind."),
    ] = None,
    studying: StudyOptions = StudyOptions(),
    epochs: Annotated[int, option(integer(1), "Passes over all questions.", panel=LEARNING)] = 5,
    learning_rate: Annotated[float, option(number(low=0), "Learning rate of AdamW.", panel=LEARNING)] = 5e-3,
    options: MemoryOptions = MemoryOptions(),
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Learn texts so that questions about them can be answered without them in the window.

    The host writes questions about each passage and answers them; the memory learns the answers without the passage. Ctrl-C
    keeps what was written and learned; the same command continues.
    """
    check_new_only(options, memory)
    with importing():
        from locas_ext.cli.tasks.study import StudyTask, run_study
        from locas_ext.memory import StudySettings

    task = StudyTask(
        texts=texts,
        model=model,
        out=out,
        memory=memory,
        pairs=pairs,
        cache=cache or Path(f"{os.path.abspath(out)}.study"),
        loss=studying.loss,
        settings=StudySettings(**studying.fields(epochs, learning_rate)),
        config=options.config(),
        dtype=host.dtype,
        device=host.device,
    )
    run_study(task, Terminal())
