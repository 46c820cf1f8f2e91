"""The rungs of the ladder: what has learned the text, and what of it stands in the window when questions are asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locas_ext import memory as locas
from locas_ext.errors import LocasError
from locas_ext.evaluation.methods.arm import Arm, slug
from locas_ext.evaluation.methods.registry import locas_config, reader
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter
from locas_ext.memory import StudySettings

from .asking import View
from .bm25 import BM25
from .documents import Document

STREAMING, STUDYING = ("locas", "temp-lora"), ("study", "study-given")
MEMORIES = (*STREAMING, *STUDYING)
CONTEXTS = ("window", "retrieval")
METHODS = ("none", *CONTEXTS, *MEMORIES, *(f"{memory}+retrieval" for memory in MEMORIES))


def split(method: str) -> tuple[str | None, str | None]:
    """-> the memory and the context of a method.

    >>> split("locas+retrieval"), split("window"), split("none")
    (('locas', 'retrieval'), (None, 'window'), (None, None))
    """
    parts = method.split("+")
    memory = next((part for part in parts if part in MEMORIES), None)
    return memory, next((part for part in parts if part in CONTEXTS), None)


@dataclass(frozen=True)
class Retrieval:
    """What is looked up for a question: the best `chunks` chunks of `tokens` tokens each."""

    chunks: int = 3
    tokens: int = 128


def chunks_of(tokenizer: Any, text: str, tokens: int) -> list[str]:
    """The text in chunks of so many tokens, the last one shorter."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[start : start + tokens]).strip() for start in range(0, len(ids), tokens)]


def view_of(context: str | None, document: Document, prompter: Prompter, retrieval: Retrieval) -> View:
    """What stands in the window: nothing, the whole text, or what BM25 finds for each question."""
    if context is None:
        return View()
    if context == "window":
        return View(shared=document.text.strip())
    chunks = chunks_of(prompter.tokenizer, document.text, retrieval.tokens)
    index = BM25(chunks)
    return View(of=lambda question: "\n".join(chunks[n] for n in index.best(question.text, retrieval.chunks)))


@dataclass(frozen=True)
class Reading:
    """How texts are learned. passes: how often a memory that streams reads each; studies: where studies are kept"""

    protocol: Protocol
    passes: int
    studies: Path


@dataclass(frozen=True)
class Learned:
    """A host with what it has learned in place. note: what is said of the learning beside its figures, or None."""

    extra_parameters: int = 0
    note: str | None = None


@contextmanager
def having_read(host: Any, prompter: Prompter, arm: Arm | None, document: Document, reading: Reading) -> Iterator[Learned]:
    """Inside the block the host has a fresh memory that has learned the text; without an arm it is alone.

    Raises LocasError where a method has nothing to learn from.
    """
    if arm is None:
        yield Learned()
        return
    ids = torch.tensor(prompter.encode(document.text), dtype=torch.long)
    if arm.method in STUDYING:
        with _having_studied(host, prompter, arm, document, ids, reading) as learned:
            yield learned
        return
    with reader(host, arm) as reads:
        for _ in range(reading.passes):
            reads.read(ids, reading.protocol.window, reading.protocol.stride, bos=reading.protocol.bos)
        yield Learned(reads.extra_parameters)


@contextmanager
def _having_studied(
    host: Any, prompter: Prompter, arm: Arm, document: Document, ids: torch.Tensor, reading: Reading
) -> Iterator[Learned]:
    """passes of the arm's settings: how often the text is streamed first, by the settings of locas"""
    settings, pairs = arm.settings, document.written if arm.method == "study-given" else None
    if pairs is not None and not pairs:
        raise LocasError("there are no given pairs: only the invented facts of nonce bring some")
    memory = locas.attach(host, locas_config(settings["memory"]))
    try:
        for _ in range(settings["passes"]):
            protocol = reading.protocol
            learning = {name: settings["memory"][name] for name in ("learning_rate", "epochs")}
            memory.memorize(ids, protocol.window, protocol.stride, bos=protocol.bos, on_divergence="ignore", **learning)
        cache = reading.studies / f"{slug(arm.method)}-{slug(document.title)}"
        report = memory.study(
            document.text,
            prompter.tokenizer,
            settings["loss"],
            pairs,
            settings["memory"]["seed"],
            settings=StudySettings(**settings["study"]),
            cache=cache,
        )
        yield Learned(memory.num_parameters, str(report).replace("\n", "; "))
    finally:
        memory.detach()
