"""The rungs of the ladder: what has learned the text, and what of it stands in the window when questions are asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from locas_ext.evaluation.methods.arm import Arm
from locas_ext.evaluation.methods.registry import reader
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.study.prompts import Prompter

from .asking import View
from .bm25 import BM25
from .documents import Document

MEMORIES = ("locas", "temp-lora")
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
class Learned:
    """A host with what it has learned in place. note: what is said of the learning beside its figures, or None."""

    extra_parameters: int = 0
    note: str | None = None


@contextmanager
def having_read(
    host: Any, prompter: Prompter, arm: Arm | None, document: Document, protocol: Protocol, passes: int
) -> Iterator[Learned]:
    """Inside the block the host has a fresh memory that has read the text `passes` times; without an arm it is alone."""
    if arm is None:
        yield Learned()
        return
    ids = torch.tensor(prompter.encode(document.text), dtype=torch.long)
    with reader(host, arm) as reading:
        for _ in range(passes):
            reading.read(ids, protocol.window, protocol.stride, bos=protocol.bos)
        yield Learned(reading.extra_parameters)
