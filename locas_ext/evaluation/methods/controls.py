"""Controls: what a memory gains on a text without having read it in order.

Much of what online learning gains on a book is that the host gets used to its kind: names of an age, an author's sentences.
A memory of another text has only that. A memory that learns this text's chunks in random order has what they tell, but not
what was told just before.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext.hosts.text_config import bos_token_id
from locas_ext.learning.chunk import Window
from locas_ext.learning.inputs import token_ids
from locas_ext.learning.protocol import Protocol
from locas_ext.memory import Chunk, MemorizeReport, Memory

from .truncation import truncation


def other_text(
    memory: Memory,
    other_ids: Tensor,
    input_ids: Any,
    window: int,
    stride: int,
    learning: dict[str, Any],
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Learns another text, then scores this one without learning from it.

    Args:
        memory: a fresh one
        other_ids: [m] what it learns
        learning: further arguments of `Memory.memorize`
        input_ids, window, stride, progress, callback, bos: as in `truncation`

    Returns a MemorizeReport of this text, whose chunks all have the version that the other text left; its seconds are of both.
    Raises as `Memory.memorize` does.
    """
    learned = memory.memorize(other_ids, window, stride, bos=bos, progress=progress, **learning)
    report = truncation(memory.model, input_ids, window, stride, progress=progress, callback=callback, bos=bos)
    report.chunks[:] = [Chunk(c.start, c.end, c.tokens, c.nll, memory.version) for c in report.chunks]
    report.seconds += learned.seconds
    return report


def shuffled_blocks(tokens: int, stride: int, seed: int) -> list[tuple[int, int]]:
    """[start, end) of a text's chunks in random order, but for a last, shorter one, which stays last.

    >>> sorted(shuffled_blocks(10, 4, seed=1)) == [(0, 4), (4, 8), (8, 10)], shuffled_blocks(10, 4, seed=1)[-1]
    (True, (8, 10))
    """
    blocks = [(start, min(start + stride, tokens)) for start in range(0, tokens, stride)]
    whole = [block for block in blocks if block[1] - block[0] == stride]
    return random.Random(seed).sample(whole, len(whole)) + blocks[len(whole) :]


def shuffled(
    memory: Memory,
    input_ids: Any,
    window: int,
    stride: int,
    seed: int,
    learning: dict[str, Any],
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Learns a text whose chunks were shuffled; scores each, before it is learned, behind what stands before it in the text.

    So the windows that are scored are those of `truncation`, while what the memory has learned comes from anywhere in the text.

    Args:
        memory: a fresh one
        seed: of the order
        learning: further arguments of `Memory.memorize`
        input_ids, window, stride, progress, callback, bos: as in `truncation`; the callback is called in the order of reading

    Returns a MemorizeReport with the chunks in the order of the text; their versions tell the order of reading. Raises as
    `Memory.memorize` does.
    """
    model: Any = memory.model
    protocol = Protocol.of(model, window, stride, bos)
    ids = token_ids(input_ids, model.config.get_text_config(decoder=True).vocab_size, at_least=2)
    blocks = shuffled_blocks(len(ids), protocol.stride, seed)
    token = bos_token_id(model) if bos else None
    chunks: list[Chunk] = []
    waiting = iter(blocks)

    def score_next(learned: Chunk | None = None) -> None:
        start, end = next(waiting, (0, 0))
        if end < 2:  # a text's first token alone, or nothing any more
            return
        part = Window.of(ids, start, end, protocol.window, token).to(model.device)
        chunks.append(Chunk(start, end, len(part.targets), _nll(model, part), memory.version))
        if callback is not None:
            callback(chunks[-1])

    score_next()
    if protocol.stride == 1:  # no chunk comes of the first token
        score_next()
    mixed = torch.cat([ids[start:end] for start, end in blocks])
    report = memory.memorize(mixed, window, stride, bos=bos, progress=progress, callback=score_next, **learning)
    return MemorizeReport(chunks=sorted(chunks, key=lambda chunk: chunk.start), seconds=report.seconds)


@torch.no_grad()
def _nll(model: Any, part: Window) -> float:
    context, inputs, targets = part
    logits = model(input_ids=torch.cat([context, inputs])[None], use_cache=False, logits_to_keep=len(targets)).logits
    return F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
