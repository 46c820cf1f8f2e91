"""A text in passages, a passage in sentences, and the words of a sentence that a host would not have guessed."""

import re
from dataclasses import dataclass
from typing import Any

from .prompts import Prompter

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n")
_WORD = re.compile(r"\w[\w'\u2019-]*")
_SHORTEST = 3  # letters of a word that is asked about


@dataclass(frozen=True)
class Passage:
    """A part of a text.

    Attributes:
        text: its words
        ids: its tokens, as in the text
        of: which text it is of
    """

    text: str
    ids: tuple[int, ...]
    of: int


def passages_of(prompter: Prompter, texts: list[str], tokens: int) -> list[Passage]:
    """Each text in passages of at most so many tokens that end where a sentence does, if one ends in their second half."""
    result = []
    for number, text in enumerate(texts):
        ids = prompter.encode(text)
        while ids:
            cut = _end_of_sentence(prompter, ids, tokens) if len(ids) > tokens else len(ids)
            words = prompter.tokenizer.decode(ids[:cut]).strip()
            if words:
                result.append(Passage(words, tuple(ids[:cut]), number))
            ids = ids[cut:]
    return result


def _end_of_sentence(prompter: Prompter, ids: list[int], tokens: int) -> int:
    for cut in range(tokens, tokens // 2, -1):
        if prompter.tokenizer.decode(ids[cut - 1 : cut]).rstrip("\"')]\u00bb\u201d\u2019 \n")[-1:] in (".", "!", "?"):
            return cut
    return tokens


def sentences_of(text: str) -> list[str]:
    """Its sentences, white space as single spaces; those of fewer than four words are left out.

    >>> sentences_of("It rained all day. Yes! Who would have thought so?")
    ['It rained all day.', 'Who would have thought so?']
    """
    parts = (" ".join(part.split()) for part in _SENTENCE_END.split(text))
    return [part for part in parts if len(part.split()) >= 4]


def words_of(sentence: str) -> list[tuple[int, int]]:
    """[start, end) of the words that can be asked about: of three letters or more, and numbers; words of names in one.

    >>> [("In May Anna Bell left Rome.")[a:b] for a, b in words_of("In May Anna Bell left Rome.")]
    ['May Anna Bell', 'left', 'Rome']
    """
    spans: list[tuple[int, int]] = []
    for match in _WORD.finditer(sentence):
        word, start, end = match[0], match.start(), match.end()
        if not (len(word) >= _SHORTEST or word[0].isdigit()):
            continue
        named = word[0].isupper() and start > 0
        if named and spans and sentence[spans[-1][1] : start] == " " and sentence[spans[-1][0]].isupper() and spans[-1][0] > 0:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def surprise(sentence: str, spans: list[tuple[int, int]], offsets: list[tuple[int, int]], nats: list[float]) -> list[float]:
    """The negative log-likelihood of each span: the sum over the tokens that begin in it or right before it.

    offsets: [start, end) in the sentence of each token; nats: the loss of each
    """
    result = []
    for start, end in spans:
        inside = [loss for (a, b), loss in zip(offsets, nats, strict=True) if b > start and a < end]
        result.append(sum(inside))
    return result


def offsets_of(tokenizer: Any, sentence: str) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Its ids and their places; None for a tokenizer that does not tell them."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
