"""`locas recall`: questions about texts that a memory has learned, beside a ladder of what else could answer them."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from locas_ext.checks import number
from locas_ext.errors import Interrupted, LocasError
from locas_ext.evaluation import results
from locas_ext.evaluation.arguments import at_least, check_temp_lora, choose
from locas_ext.evaluation.display import one_line
from locas_ext.evaluation.inputs import load_host, weights_digest
from locas_ext.evaluation.methods.arm import Arm, make_arm
from locas_ext.evaluation.methods.cartridge import check_cartridge
from locas_ext.evaluation.methods.registry import check_arm
from locas_ext.evaluation.report.build import write_report
from locas_ext.evaluation.report.recall import table
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter
from locas_ext.memory import StudySettings
from locas_ext.terminal import neutral

from .asking import View, prompt_lengths, question_bar
from .distractors import with_distractors
from .documents import SHIPPED, Document, read_documents
from .measuring import Asking, HostAlone, ask_all, everything_else, host_alone, perplexity, summarize
from .methods import CARTRIDGE, METHODS, STUDYING, Learned, Reading, Retrieval, having_learned, split, view_of
from .nonce import nonce_document

NONCE = "nonce"
_FURTHER_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """The arguments of the command.

    data: NONCE, a shipped set or a path
    documents: how many of the texts; None: all, of NONCE one
    facts: of each invented text
    passes: how often a memory that streams reads each text
    locas, temp_lora: the settings of the two memories that stream; methods/registry.py, `locas_settings`
    further: how many more texts a memory learns before it is asked again
    study: {"loss", "passes", "study": the fields of StudySettings}; passes: how often a text is streamed before it is studied
    cartridge: {"tokens", "learning_rate"}; the rest is as `study` has it
    """

    data: str
    model: str
    methods: list[str]
    out: Path
    documents: int | None
    facts: int
    locas: dict
    temp_lora: dict
    passes: int
    further: int
    study: dict
    cartridge: dict
    window: int | None
    stride: int | None
    retrieval: Retrieval
    asking: Asking
    dtype: str | None
    device: str | None

    @property
    def seed(self) -> int:
        return self.locas["seed"]


# ---- arguments -------------------------------------------------------------------------------------------------
def _check(task: RecallTask) -> None:
    choose("--methods", task.methods, METHODS)
    check_temp_lora(task.temp_lora)
    at_least(
        1,
        documents=task.documents,
        passes=task.passes,
        study_passes=task.study["passes"] or None,
        max_new_tokens=task.asking.max_new_tokens,
    )
    at_least(1, batch_size=task.asking.batch_size, retrieval_chunks=task.retrieval.chunks)
    at_least(2, retrieval_tokens=task.retrieval.tokens, cartridge_tokens=task.cartridge["tokens"])
    number("--cartridge-lr", task.cartridge["learning_rate"], 0)
    at_least(0, general=task.asking.general, study_passes=task.study["passes"], further=task.further)
    StudySettings(**task.study["study"])


def _documents(task: RecallTask) -> list[Document]:
    if task.data == NONCE:
        count = 1 if task.documents is None else task.documents
        return [nonce_document(task.facts, task.seed + number) for number in range(count)]
    if task.data not in SHIPPED and not Path(task.data).exists():
        raise FileNotFoundError(f"DATA: {task.data} is not there; expected {NONCE}, {', '.join(SHIPPED)}, a file or a folder")
    documents = with_distractors(read_documents(task.data, task.documents), task.seed)
    if len(documents) <= task.further:
        raise ValueError(f"--further is {task.further}, but there are {len(documents)} texts; expected fewer further ones")
    return documents


def _arms(task: RecallTask) -> dict[str, Arm]:
    """The memories that the task's methods need, by name."""
    study = {**task.study, "memory": task.locas}
    cartridge = {**task.cartridge, "seed": task.seed, "loss": task.study["loss"], "study": task.study["study"]}
    base = {"locas": task.locas, "temp-lora": task.temp_lora, "study": study, "study-given": study, CARTRIDGE: cartridge}
    return {name: make_arm(base, name) for name in dict.fromkeys(split(method)[0] for method in task.methods) if name}


def _settings(task: RecallTask, documents: list[Document], host: Any, protocol: Protocol, prompter: Prompter) -> dict:
    return {
        "command": "recall",
        "model": task.model,
        "weights_sha256": weights_digest(host),
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": str(host.device),
        "data": neutral(task.data),
        "methods": task.methods,
        "documents": {document.title: document.digest() for document in documents},
        "chat_template": prompter.has_chat,
        "positions": max_positions(host),
        "window": protocol.window,
        "stride": protocol.stride,
        "passes": task.passes,
        "further": task.further,
        "seed": task.seed,
        "memories": {name: arm.settings for name, arm in _arms(task).items()},
        "retrieval": asdict(task.retrieval),
        **asdict(task.asking),
    }


# ---- one method on one text ------------------------------------------------------------------------------------
class Recall:
    """A run: the host, the texts, what is kept of the host alone, and the records so far."""

    def __init__(self, task: RecallTask, documents: list[Document], host: Any, tokenizer: Any):
        self.task, self.documents, self.host = task, documents, host
        self.prompter = Prompter(tokenizer)
        bos = bool(self.prompter.passage("")[:1])
        self.protocol = Protocol.of(host, task.window, task.stride, bos, prefix="--")
        self.arms = _arms(task)
        for arm in self.arms.values():
            if arm.method == CARTRIDGE:
                check_cartridge(host, arm.settings["tokens"], self.protocol)
                continue
            check_arm(host, Arm("locas", "", task.locas) if arm.method in STUDYING else arm, self.protocol)
        self.reading = Reading(self.protocol, task.passes, task.out / "studies")
        self.settings = _settings(task, documents, host, self.protocol, self.prompter)

    def record(self, method: str, document: Document, alone: HostAlone) -> dict:
        """Everything that is measured of one method on one text."""
        memory, context = split(method)
        view = view_of(context, document, self.prompter, self.task.retrieval)
        record: dict[str, Any] = {"method": method, "document": document.title}
        before = self.task.cartridge["tokens"] if memory == CARTRIDGE else 0
        if error := self._too_long(document, view, alone, before):
            return {**record, "error": error, "seconds": 0.0}
        arm, started = self.arms.get(memory) if memory else None, time.perf_counter()
        try:
            with having_learned(self.host, self.prompter, arm, self.reading) as learned:
                learned.learn(document)
                seconds = time.perf_counter() - started
                record |= self._asked(method, document, view, alone)
                if arm is not None and self.task.further:
                    record["after"] = self._asked_after(method, document, view, alone, learned)
        except LocasError as error:
            return {**record, "error": one_line(error), "seconds": time.perf_counter() - started}
        asking = time.perf_counter() - started - seconds
        own = {"seconds": seconds, "seconds_asking": asking, "extra_parameters": learned.extra_parameters}
        return {**record, **own, "error": None, "notes": learned.notes}

    def _asked_after(self, method: str, document: Document, view: View, alone: HostAlone, learned: Learned) -> dict:
        """The same asked again after the same memory has learned further texts."""
        for further in self._further(document):
            learned.learn(further)
        return self._asked(method, document, view, alone)

    def _further(self, document: Document) -> list[Document]:
        """Texts that are learned after this one: invented ones of other seeds, else those that follow it in the data."""
        task = self.task
        if task.data == NONCE:
            return [nonce_document(task.facts, task.seed + _FURTHER_SEED + number) for number in range(task.further)]
        place = self.documents.index(document)
        return [*self.documents[place + 1 :], *self.documents[:place]][: task.further]

    def _asked(self, method: str, document: Document, view: View, alone: HostAlone) -> dict:
        host, prompter, task = self.host, self.prompter, self.task
        ids = torch.tensor(prompter.encode(document.text))
        total = 2 * len(document.questions) - sum(q.kind == "absent" for q in document.questions)
        total += len(alone.right) + len(alone.right_in_float32)
        with question_bar(one_line(f"{method}, {document.title}"), total) as advance:
            entries = ask_all(host, prompter, document, view, task.asking, advance)
            rest = everything_else(host, prompter, view, alone, task.asking, task.seed, advance)
        return {
            "kinds": summarize(entries, task.seed),
            **rest,
            "perplexity": perplexity(host, ids, self.protocol),
            "answers": entries,
        }

    def _too_long(self, document: Document, view: View, alone: HostAlone, before: int) -> str | None:
        """Why the questions do not fit into the window, or None. before: tokens of a cartridge"""
        longest = max(prompt_lengths(self.prompter, [*document.questions, *alone.right, *alone.right_in_float32], view))
        needed, most = before + longest + self.task.asking.max_new_tokens, max_positions(self.host)
        return None if needed <= most else f"does not fit: {needed:,} tokens, the host has {most:,} positions"


# ---- the command -----------------------------------------------------------------------------------------------
def run_recall(task: RecallTask, console: Console) -> dict:
    """Asks every question by every method; prints a table, writes a report and returns the content of results.json.

    A folder that an ended run of the same settings left is continued after its last finished pair of method and text.

    Raises ValueError or OSError for arguments or data that do not fit, LocasError for data of another shape and if a
    library is missing, Interrupted at Ctrl-C.
    """
    _check(task)
    documents = _documents(task)
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    run = Recall(task, documents, host, tokenizer)
    with results.only_run(task.out):
        return _run(run, console)


def _run(run: Recall, console: Console) -> dict:
    task = run.task
    records = results.open_folder(task.out, run.settings)
    done = {(record["method"], record["document"]) for record in records}
    missing = [(m, d) for d in run.documents for m in task.methods if (m, d.title) not in done]
    try:
        alone = host_alone(run.host, run.prompter, task.asking) if missing else None
        for method, document in missing:
            assert alone is not None
            records.append(run.record(method, document, alone))
            results.write(task.out, run.settings, records)
    except KeyboardInterrupt:
        total = len(run.documents) * len(task.methods)
        raise Interrupted(
            f"{len(records)} of {total} pairs of method and text are finished and kept in {task.out}; "
            "the same command continues there"
        ) from None
    content = results.read(task.out)
    console.print(table(content))
    console.print(f"report: {write_report(task.out)}", markup=False)
    return content
