"""Perplexity along a text, from the chunks of a report."""

from locas_ext.learning.perplexity import perplexity
from locas_ext.memory import Chunk


def running_perplexity(chunks: list[Chunk]) -> list[tuple[int, float]]:
    """(position, perplexity of everything before it) at the end of every chunk."""
    curve, nll, tokens = [], 0.0, 0
    for chunk in chunks:
        nll += chunk.nll
        tokens += chunk.tokens
        curve.append((chunk.end, perplexity(nll, tokens)))
    return curve


def local_gain(before: list[Chunk], after: list[Chunk], width: int) -> list[tuple[float, float]]:
    """By how many percent `after` lowers the perplexity of `before`, over the `width` latest chunks.

    Both hold the same chunks of the same text. Returns (position of the middle, percent) for every chunk from the
    first full width on.
    """
    gain = []
    for index in range(width, len(before) + 1):
        part = slice(index - width, index)
        tokens = sum(chunk.tokens for chunk in before[part])
        change = sum(a.nll - b.nll for a, b in zip(after[part], before[part], strict=True))
        middle = (before[index - width].start + before[index - 1].end) / 2
        gain.append((middle, 100 * (1 - perplexity(change, tokens))))
    return gain
