"""Log-probabilities of many requests, in batches of like length; what many requests begin with is read only once.

Batches are padded on the right, where nothing that is asked for sees it: the models are causal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext.evaluation.locomo.answers import copies
from locas_ext.hosts.cache_names import cache_argument, returned_cache

from .requests import Request

_KEY = 64  # requests that begin with the same so many tokens may share a beginning
_LEAST = 16  # so many requests make it worth while
_BLOCK = 1 << 26  # logits at once in float32

Scores = list[tuple[float, bool]]  # of each choice: nats, and whether its tokens are the likeliest ones


@dataclass(frozen=True)
class Budget:
    """What one forward may hold.

    tokens: that go in; cached: of all copies of a shared beginning with them; logits: numbers; rows: requests
    """

    tokens: int
    cached: int
    logits: int
    rows: int

    @classmethod
    def of(cls, device: torch.device, rows: int | None) -> "Budget":
        """For a device; rows: None: as many as the rest allows."""
        most = 1 << 30 if rows is None else rows
        return cls(1 << 15, 1 << 17, 1 << 30, most) if device.type == "cuda" else cls(1 << 11, 1 << 14, 1 << 26, most)


def score_requests(model: Any, requests: list[Request], budget: Budget, advance: Callable[[int], None]) -> list[Scores]:
    """The scores of each request's choices, by the model as it is.

    advance: called with the number of requests after each batch
    """
    result: list[Scores] = [[] for _ in requests]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    with torch.inference_mode():
        for members, shared in groups(requests):
            cache = _beginning(model, requests[members[0]].ids[:shared]) if shared else None
            if cache is None:  # nothing to share, or a model that keeps nothing
                shared = 0
            for batch in batches(requests, members, shared, budget, vocabulary):
                chosen = [requests[index] for index in batch]
                for index, scores in zip(batch, _score(model, chosen, shared, cache), strict=True):
                    result[index] = scores
                advance(len(batch))
    return result


def groups(requests: list[Request]) -> Iterator[tuple[list[int], int]]:
    """(requests by number, how many tokens all of them begin with): those that share a beginning, then all others."""
    by_beginning: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        by_beginning.setdefault(request.ids[:_KEY].tobytes(), []).append(index)
    rest = []
    for members in by_beginning.values():
        if len(members) < _LEAST or len(requests[members[0]].ids) < _KEY:
            rest += members
        else:
            yield members, _shared(requests, members)
    if rest:
        yield rest, 0


def _shared(requests: list[Request], members: list[int]) -> int:
    """The tokens that all of them begin with; each keeps those of its own that are asked about."""
    first = requests[members[0]].ids
    length = len(first)
    for index in members:
        request = requests[index]
        ids = request.ids[:length]
        different = np.flatnonzero(ids != first[: len(ids)])
        length = min(int(different[0]) if len(different) else len(ids), len(request.ids) - request.scored)
    return length


def batches(requests: list[Request], members: list[int], shared: int, budget: Budget, vocabulary: int) -> Iterator[list[int]]:
    """The members in batches of like length that the budget holds, the longest first: memory runs out soon or never."""
    batch: list[int] = []
    longest = keep = 0
    for index in sorted(members, key=lambda index: -len(requests[index].ids)):
        length = len(requests[index].ids) - shared
        begin = length - requests[index].scored
        rows, wide, wanted = len(batch) + 1, max(longest, length), max(keep, max(longest, length) - begin)
        over = (rows * wide > budget.tokens, rows * (shared + wide) > budget.cached, rows * wanted * vocabulary > budget.logits)
        if batch and (rows > budget.rows or any(over)):
            yield batch
            batch, wide, wanted = [], length, requests[index].scored
        batch.append(index)
        longest, keep = wide, wanted
    if batch:
        yield batch


def _beginning(model: Any, ids: np.ndarray) -> Any:
    """The KV cache of what many requests begin with."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    return returned_cache(model(input_ids=inputs, use_cache=True, logits_to_keep=1))


def _score(model: Any, requests: list[Request], shared: int, cache: Any) -> list[Scores]:
    own = [request.ids[shared:] for request in requests]
    longest = max(map(len, own))
    keep = max(longest - len(ids) + request.scored for ids, request in zip(own, requests, strict=True))
    inputs = np.zeros((len(own), longest), dtype=np.int64)
    for row, ids in enumerate(own):
        inputs[row, : len(ids)] = ids
    given = {**cache_argument(model, copies(cache, len(own))), "use_cache": cache is not None}
    logits = model(input_ids=torch.from_numpy(inputs).to(model.device), logits_to_keep=keep, **given).logits
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for row, (ids, request) in enumerate(zip(own, requests, strict=True)):
        begin = len(ids) - request.scored - (longest - logits.shape[1])
        for tokens in request.targets:
            rows += [row] * len(tokens)
            places += range(begin, begin + len(tokens))
            targets += tokens
    nats, likeliest = _at(logits, *(torch.tensor(each, device=logits.device) for each in (rows, places, targets)))
    return list(_gathered(requests, nats, likeliest))


def _at(logits: Tensor, rows: Tensor, places: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probabilities of single tokens, and whether each is the likeliest."""
    nats, likeliest = [], []
    for part in torch.arange(len(rows), device=logits.device).split(max(1, _BLOCK // logits.shape[-1])):
        taken = logits[rows[part], places[part]].float()
        nats.append(-F.cross_entropy(taken, targets[part], reduction="none").double())
        likeliest.append(taken.argmax(-1) == targets[part])
    return torch.cat(nats).tolist(), torch.cat(likeliest).tolist()


def _gathered(requests: list[Request], nats: list[float], likeliest: list[bool]) -> Iterator[Scores]:
    values = iter(zip(nats, likeliest, strict=True))
    for request in requests:
        scores = []
        for tokens in request.targets:
            each = [next(values) for _ in tokens]
            scores.append((sum(value for value, _ in each), all(best for _, best in each)))
        yield scores
