"""The small model and the books that come with the package (ORIGIN.md beside them says where they are from)."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .texts import Text, read_text

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "tiny-glu"


def load_model() -> torch.nn.Module:
    """The shipped model: Qwen3 architecture, 7.3 M parameters, float32 on the CPU, evaluation mode."""
    logging.disable_progress_bar()  # it loads in well under a second
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


def read_book(title: str, name: str, max_tokens: int) -> Text:
    """At most `max_tokens` tokens of the shipped text `name`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    return read_text(ASSETS / name, tokenizer, max_tokens, title)
