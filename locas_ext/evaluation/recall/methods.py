"""The rungs of the ladder: what has learned the text, and what of it stands in the window when questions are asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from locas_ext import memory as locas
from locas_ext.errors import LocasError
from locas_ext.evaluation.methods.arm import Arm, slug
from locas_ext.evaluation.methods.cartridge import cartridge
from locas_ext.evaluation.methods.registry import locas_config, locas_update, reader
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter
from locas_ext.memory import StudySettings

from .asking import View
from .bm25 import BM25
from .documents import Document

STREAMING, STUDYING = ("locas", "temp-lora"), ("study", "study-given")
CARTRIDGE = "cartridge"
MEMORIES = (*STREAMING, *STUDYING, CARTRIDGE)
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


@dataclass
class Learned:
    """A host with what it has learned in place.

    learn: has the same memory learn a further text
    notes: what was said of the learning of each text beside its figures
    """

    learn: Callable[[Document], None]
    extra_parameters: int = 0
    notes: list[str] = field(default_factory=list)


@contextmanager
def having_learned(host: Any, prompter: Prompter, arm: Arm | None, reading: Reading) -> Iterator[Learned]:
    """Inside the block the host has a fresh memory that learns texts; without an arm it is alone and learns nothing.

    `learn` raises LocasError where a method has nothing to learn from.
    """
    if arm is None:
        yield Learned(lambda document: None)
    elif arm.method in STUDYING:
        with _studying(host, prompter, arm, reading) as learned:
            yield learned
    elif arm.method == CARTRIDGE:
        with _with_cartridge(host, prompter, arm, reading) as learned:
            yield learned
    else:
        with reader(host, arm) as reads:
            protocol = reading.protocol

            def learn(document: Document) -> None:
                ids = torch.tensor(prompter.encode(document.text), dtype=torch.long)
                for _ in range(reading.passes):
                    reads.read(ids, protocol.window, protocol.stride, bos=protocol.bos)

            yield Learned(learn, reads.extra_parameters)


@contextmanager
def _studying(host: Any, prompter: Prompter, arm: Arm, reading: Reading) -> Iterator[Learned]:
    """passes of the arm's settings: how often a text is streamed first, by the settings of locas"""
    settings, protocol = arm.settings, reading.protocol
    update = locas_update(settings["memory"])
    memory = locas.attach(host, locas_config(settings["memory"]))
    titles: list[str] = []
    notes: list[str] = []

    def learn(document: Document) -> None:
        pairs = document.written if arm.method == "study-given" else None
        if pairs is not None and not pairs:
            raise LocasError("there are no given pairs: only the invented facts of nonce bring some")
        ids = torch.tensor(prompter.encode(document.text), dtype=torch.long)
        for _ in range(settings["passes"]):
            memory.memorize(ids, protocol.window, protocol.stride, bos=protocol.bos, update=update, on_divergence="ignore")
        titles.append(slug(document.title))
        report = memory.study(
            document.text,
            prompter.tokenizer,
            settings["loss"],
            pairs,
            settings["memory"]["seed"],
            settings=StudySettings(**settings["study"]),
            cache=reading.studies / slug(arm.method) / "+".join(titles),
        )
        notes.append(str(report).replace("\n", "; "))

    try:
        yield Learned(learn, memory.num_parameters, notes)
    finally:
        memory.detach()


@contextmanager
def _with_cartridge(host: Any, prompter: Prompter, arm: Arm, reading: Reading) -> Iterator[Learned]:
    """The same questions as a study's; how many parameters learn is known with the first text."""
    settings, titles = arm.settings, list[str]()
    with cartridge(host, settings["tokens"], settings["learning_rate"]) as prefix:

        def learn(document: Document) -> None:
            titles.append(slug(document.title))
            report = prefix.study(
                document.text,
                prompter,
                settings["loss"],
                StudySettings(**settings["study"]),
                settings["seed"],
                cache=reading.studies / arm.slug / "+".join(titles),
            )
            learned.extra_parameters = sum(parameter.numel() for parameter in prefix.parameters)
            learned.notes.append(str(report).replace("\n", "; "))

        learned = Learned(learn)
        yield learned
