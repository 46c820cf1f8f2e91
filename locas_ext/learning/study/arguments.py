"""What a study is given, checked."""

from collections.abc import Sequence
from typing import Any

from .prompts import Prompter

_LEAST_TOKENS = 8


def texts_of(texts: object) -> list[str]:
    """One text or several as a list. TypeError or ValueError that names the one that is none."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise TypeError(f"texts is {type(texts).__name__}; expected a string or a sequence of strings")
    if not texts:
        raise ValueError("texts is empty; expected at least one")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] is {type(text).__name__}; expected a string")
    return list(texts)


def prompter_of(tokenizer: Any, vocab_size: int, texts: list[str]) -> Prompter:
    """The tokenizer as a Prompter. TypeError or ValueError where it is none, not the host's, or a text is too short."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}; expected the host's tokenizer")
    prompter = Prompter(tokenizer)
    for number, text in enumerate(texts):
        ids = prompter.encode(text)
        if len(ids) < _LEAST_TOKENS:
            raise ValueError(f"texts[{number}] holds {len(ids)} tokens; expected at least {_LEAST_TOKENS}, to ask about")
        if max(ids) >= vocab_size:
            raise ValueError(f"tokenizer gives token {max(ids)}; expected ids below {vocab_size}, the host's vocabulary")
    return prompter
