"""Rows of tokens read together: padded behind their ends, where a causal model cannot see it, with logits where wanted only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOGETHER = 1 << 14  # tokens of rows that are read together without a graph


@dataclass(frozen=True)
class Targets:
    """What is expected at each target of a row: the likeliest tokens of another reading and their log-probabilities.

    indices: [n, k] int64; log_probs: [n, k] float32, of the whole distribution
    """

    indices: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `first` on are targets; each is predicted from all before it.

    targets: None: the tokens themselves are what is expected
    """

    ids: tuple[int, ...]
    first: int
    targets: Targets | None = None

    @property
    def count(self) -> int:
        """How many targets it has."""
        return len(self.ids) - self.first


@contextmanager
def _only_places(model: Any, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the language-model head computes the logits [1, n, V] of n places (rows, columns) alone."""
    rows, columns = places

    def choose(module: Any, arguments: tuple) -> tuple:
        (hidden,) = arguments
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def places_of(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Where the rows' targets are predicted, row by row."""
    at = [index for index, row in enumerate(rows) for _ in range(row.count)]
    columns = [column for row in rows for column in range(row.first - 1, len(row.ids) - 1)]
    return torch.tensor(at), torch.tensor(columns)


def logits_of(model: Any, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Logits [n, V] of all targets of all rows, in one forward."""
    width = max(len(row.ids) for row in rows) - 1  # nothing is predicted from the last token
    padded = torch.tensor([list(row.ids[:width]) + [0] * (width - len(row.ids[:width])) for row in rows], device=device)
    with _only_places(model, places_of(rows)):
        return model(input_ids=padded, use_cache=False).logits[0]


def targets_of(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The tokens [n] that are the targets of all rows."""
    return torch.tensor([token for row in rows for token in row.ids[row.first :]], device=device)


def in_batches(rows: Sequence[Row], together: int = TOGETHER) -> Iterator[list[int]]:
    """Indices of rows to be read together, of about one length, at most `together` tokens with their padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index].ids) > together:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# ---- losses ----------------------------------------------------------------------------------------------------
def distance(logits: Tensor, targets: Targets) -> Tensor:
    """[n] nats: KL from the expected distribution to that of logits [n, V], all tokens but the expected k as one.

    Never more than the whole KL (merging outcomes only loses distance), and 0 where the distributions are the same.
    """
    tiny = torch.finfo(torch.float32).tiny
    mine = logits.float().log_softmax(-1).gather(1, targets.indices)
    p, log_p = targets.log_probs.exp(), targets.log_probs
    rest_p = (1 - p.sum(-1)).clamp_min(0.0)
    rest_mine = (1 - mine.exp().sum(-1)).clamp_min(1e-7)
    rest = rest_p * (rest_p.clamp_min(tiny).log() - rest_mine.log())
    return (p * (log_p - mine)).sum(-1) + torch.where(rest_p > 1e-6, rest, 0.0)


def likeliest(logits: Tensor, top_k: int) -> Targets:
    """The k likeliest tokens of logits [n, V], on the CPU."""
    top = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]))
    return Targets(top.indices.cpu(), top.values.cpu())


def expectations(
    model: Any, rows: Sequence[Row], top_k: int, device: torch.device, advance: Callable[[int], None] = lambda count: None
) -> list[tuple[Targets, float]]:
    """For each row what the model expects at its targets, and the share of targets that are its likeliest token.

    advance: told of so many more rows
    """
    result: dict[int, tuple[Targets, float]] = {}
    with torch.no_grad():
        for batch in in_batches(rows):
            those = [rows[index] for index in batch]
            logits = logits_of(model, those, device)
            hits = (logits.argmax(-1) == targets_of(those, logits.device)).float().cpu()
            found, start = likeliest(logits, top_k), 0
            for index in batch:
                part = slice(start, start + rows[index].count)
                targets = Targets(found.indices[part].clone(), found.log_probs[part].clone())
                result[index] = targets, hits[part].mean().item()
                start = part.stop
            advance(len(batch))
    return [result[index] for index in range(len(rows))]


def joined(rows: Sequence[Row], device: torch.device) -> Targets:
    """The targets of rows that all have some, as one."""
    those = [row.targets for row in rows if row.targets is not None]
    return Targets(*(torch.cat([getattr(each, name) for each in those]).to(device) for name in ("indices", "log_probs")))
