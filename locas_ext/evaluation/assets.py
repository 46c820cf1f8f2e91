"""The small model and the books that come with the package (ORIGIN.md beside them says where they are from)."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "tiny-glu"


@dataclass(frozen=True)
class Book:
    """The beginning of a book.

    ids: [n] int64 token ids
    chapters: positions in `ids` where a chapter begins
    """

    title: str
    ids: torch.Tensor
    chapters: list[int]


def load_model() -> torch.nn.Module:
    """The shipped model: Qwen3 architecture, 7.3 M parameters, float32 on the CPU, evaluation mode."""
    logging.disable_progress_bar()  # it loads in well under a second
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


def read_book(title: str, name: str, max_tokens: int) -> Book:
    """At most `max_tokens` tokens of the shipped text `name`."""
    text = (ASSETS / name).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    headings = {match.start() for match in re.finditer(r"^CHAPTER [A-Z]+$", text, re.M)}
    offsets = encoded["offset_mapping"][:max_tokens]
    chapters = [index for index, (start, end) in enumerate(offsets) if not headings.isdisjoint(range(start, end))]
    return Book(title, torch.tensor(encoded["input_ids"][:max_tokens]), chapters)
