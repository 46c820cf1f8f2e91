"""`locas recall`: its arguments and their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    READING,
    BatchSize,
    HostOptions,
    LearningOptions,
    MaxNewTokens,
    MemoryOptions,
    Model,
    Paper,
    ReadingOptions,
    ResultsFolder,
    TempLoraOptions,
    argument,
    option,
)
from locas_ext.cli.study_options import STUDY, StudyOptions
from locas_ext.cli.values import integer, names, number, path
from locas_ext.terminal import Terminal

RETRIEVAL, CARTRIDGE = "Retrieval", "Cartridge"
TEMP_LORA = TempLoraOptions(temp_lora_lr=5e-4)  # its best of three in earlier comparisons; its public code's learns little here
EXAMPLES = (
    "locas recall nonce --model HuggingFaceTB/SmolLM2-135M-Instruct --out recall",
    "locas recall fairytaleqa --documents 5 --model Qwen/Qwen3-0.6B --methods none,window,retrieval,locas --out tales",
    "locas recall squad.json --documents 20 --model Qwen/Qwen3-0.6B --out passages",
)
MOST_TEXTS = 10_000  # invented ones are made before anything is loaded


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """What BM25 looks up for a question."""

    retrieval_chunks: Annotated[int, option(integer(1), "Chunks put into the window.", panel=RETRIEVAL)] = 3
    retrieval_tokens: Annotated[int, option(integer(2), "Tokens per chunk.", panel=RETRIEVAL)] = 128


@dataclass(frozen=True, kw_only=True)
class CartridgeOptions:
    """Cartridges as a method among others; everything else is as the study has it."""

    cartridge_tokens: Annotated[int, option(integer(2), "Tokens whose keys and values are trained.", panel=CARTRIDGE)] = 128
    cartridge_lr: Annotated[float, option(number(low=0), "Learning rate of AdamW.", panel=CARTRIDGE)] = 2e-2

    def settings(self) -> dict[str, Any]:
        return {"tokens": self.cartridge_tokens, "learning_rate": self.cartridge_lr}


def recall(
    source: Annotated[
        Path, argument(path("DATA"), "nonce: invented facts; fairytaleqa: shipped; or JSON files of texts with questions.")
    ],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        Any,  # list[str], which would make typer take the option several times
        option(
            names(),
            "none: the host alone; window: the whole text in the window; retrieval: BM25; locas, temp-lora: a memory that has "
            "read the text; study: one that has studied it; study-given: with nonce's own questions; cartridge: peft's, "
            "trained keys and values, with the questions of study; each of these five also with +retrieval.",
        ),
    ] = ["none", "window", "retrieval", "locas", "study"],  # noqa: B006 (typer copies it)
    documents: Annotated[
        int | None,
        option(integer(1, MOST_TEXTS), "How many texts; default: all, of nonce one. Each text of nonce has another seed."),
    ] = None,
    facts: Annotated[int, option(integer(5), "Invented facts in each text of nonce.")] = 50,
    reading: ReadingOptions = ReadingOptions(),
    passes: Annotated[int, option(integer(1), "How often locas and temp-lora read each text.", panel=READING)] = 1,
    further: Annotated[
        int,
        option(
            integer(0, MOST_TEXTS), "More texts that a memory learns before it is asked again: what it retains.", panel=READING
        ),
    ] = 0,
    memory: MemoryOptions = MemoryOptions(),
    learning: LearningOptions = LearningOptions(),
    paper: Paper = False,
    temp_lora: TempLoraOptions = TEMP_LORA,
    studying: StudyOptions = StudyOptions(),
    study_epochs: Annotated[int, option(integer(1), "Passes over all questions.", panel=STUDY)] = 5,
    study_learning_rate: Annotated[float, option(number(low=0), "Learning rate of AdamW.", panel=STUDY)] = 5e-3,
    study_passes: Annotated[int, option(integer(0), "How often a text is streamed before it is studied.", panel=STUDY)] = 0,
    cartridge: CartridgeOptions = CartridgeOptions(),
    retrieval: RetrievalOptions = RetrievalOptions(),
    general: Annotated[
        int, option(integer(0), "General questions that the host answers right, asked again of each method; 0: none.")
    ] = 200,
    max_new_tokens: MaxNewTokens = 20,
    batch_size: BatchSize = 32,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Ask about texts that a memory has learned and that are no longer in the window.

    Sentences to complete, questions in other words than the text's, and questions turned round, each by what is written and
    by a choice of ten; beside the host alone, the text in the window and retrieval.
    """
    with importing():
        from locas_ext.evaluation.methods.registry import locas_settings
        from locas_ext.evaluation.recall.command import RecallTask, run_recall
        from locas_ext.evaluation.recall.measuring import Asking
        from locas_ext.evaluation.recall.methods import Retrieval

    task = RecallTask(
        data=str(source),
        model=model,
        methods=methods,
        out=out,
        documents=documents,
        facts=facts,
        locas=locas_settings(memory.config(paper), learning.given(), False, False, {}, paper),
        temp_lora=temp_lora.settings(memory.seed),
        passes=passes,
        further=further,
        study={
            "loss": studying.loss,
            "passes": study_passes,
            "study": studying.fields(study_epochs, study_learning_rate),
        },
        cartridge=cartridge.settings(),
        window=reading.window,
        stride=reading.stride,
        retrieval=Retrieval(retrieval.retrieval_chunks, retrieval.retrieval_tokens),
        asking=Asking(max_new_tokens=max_new_tokens, batch_size=batch_size, general=general),
        dtype=host.dtype,
        device=host.device,
    )
    run_recall(task, Terminal())
