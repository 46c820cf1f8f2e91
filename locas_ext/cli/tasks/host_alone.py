"""What the host alone would have scored, on a few of the chunks that a memory read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locas_ext.learning.perplexity import perplexity
from locas_ext.memory import Chunk, MemorizeReport, Memory

MOST_CHUNKS = 8
_SHARE = 16  # at most one chunk in so many, so that the comparison costs a few percent of the run
_FEW_TOKENS = 4096  # of the whole run: then it is cheap whatever its share


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Perplexity on the same `chunks` chunks: by the host alone, and with the memory while it read."""

    chunks: int
    host: float
    memory: float


def _sample(chunks: list[Chunk]) -> list[Chunk]:
    """Chunks at even distances, the last one among them."""
    cheap = bool(chunks) and chunks[-1].end <= _FEW_TOKENS
    count = min(MOST_CHUNKS, len(chunks) if cheap else len(chunks) // _SHARE)
    return [chunks[round((index + 1) * len(chunks) / count) - 1] for index in range(count)]


@torch.inference_mode()
def _loss(model, ids: Tensor, chunk: Chunk, room: int, bos: int | None) -> float:
    """The summed loss of the chunk's scored tokens, from one forward over its window."""
    text = ids[min(max(0, chunk.end - room), max(chunk.start, 1) - 1) : chunk.end]
    inputs = text if bos is None else torch.cat([torch.tensor([bos]), text])
    inputs = inputs.to(model.device)[None]
    logits = model(input_ids=inputs[:, :-1], logits_to_keep=chunk.tokens).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), inputs[0, -chunk.tokens :], reduction="sum").item()


def compare(memory: Memory, ids: Tensor, report: MemorizeReport, window: int, bos: int | None) -> Sides | None:
    """Both sides on a sample of the report's chunks; None where a sample would cost more than a few percent of the run.

    ids: [n] int64, the text of the report
    window, bos: the run's window and its BOS token, if it had one
    """
    chunks = _sample(report.chunks)
    if not chunks:
        return None
    room = window - (bos is not None)
    with memory.disabled():
        alone = math.fsum(_loss(memory.model, ids, chunk, room, bos) for chunk in chunks)
    tokens = sum(chunk.tokens for chunk in chunks)
    return Sides(
        chunks=len(chunks),
        host=perplexity(alone, tokens),
        memory=perplexity(math.fsum(chunk.nll for chunk in chunks), tokens),
    )
