"""A text as the host reads it before anything is attached, with the memory, merged, and after detach().

All states read the same windows, and the logits of one window at a time are all that is ever kept.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from locas_ext import memory as locas
from locas_ext.errors import LocasError
from locas_ext.hosts.text_config import max_positions
from locas_ext.terminal import Terminal

from .distributions import digest, divergence, negative_log_likelihood

TOKENS, NLL, EXCESS_NLL, AGREEING, KL = range(5)  # the columns of a window's row


def windows(tokens: int, window: int) -> list[tuple[int, int]]:
    """[start, end) of the tokens that each window predicts, `window` at most; it reads the tokens [start - 1, end - 1).

    All tokens but the first are predicted once, each from those of its own window: as `truncation` does where the
    stride is the window, but that a last, shorter window reads no more than it predicts.
    """
    bounds = [(max(start, 1), min(start + window, tokens)) for start in range(0, tokens, window)]
    return [(start, end) for start, end in bounds if start < end]


def next_token_logits(model, ids: Tensor, start: int, end: int) -> Tensor:
    """Logits [end - start, vocab_size] for the tokens [start, end) of ids [n], in the model's dtype."""
    return model(input_ids=ids[None, start - 1 : end - 1], use_cache=False).logits[0]


@dataclass
class StateScores:
    """What one state made of one text.

    windows: a row [tokens, nll, nll - the host's, agreeing, kl] a window: positions, nats, nats, positions, nats
    difference: the first window [start, end) in which a bit of the logits is not the host's; None: there is none
    """

    state: str
    windows: list[list[float]] = field(default_factory=list)
    difference: tuple[int, int] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Window:
    """What is kept of the host's reading of tokens [start, end): top1 [end - start], the likeliest tokens."""

    start: int
    end: int
    nll: float
    top1: Tensor
    digest: bytes


def _read(model, ids: Tensor, start: int, end: int, state: str) -> tuple[Tensor, float, Tensor]:
    """-> logits, their NLL, their likeliest tokens."""
    logits = next_token_logits(model, ids, start, end)
    nll = negative_log_likelihood(logits, ids[start:end])
    if not math.isfinite(nll):
        raise LocasError(f"{state}: the loss of tokens {start} to {end} is {nll}, not a finite number")
    return logits, nll, logits.argmax(-1)


@contextmanager
def _timed(scores: StateScores) -> Iterator[None]:
    started = time.perf_counter()
    yield
    scores.seconds += time.perf_counter() - started


def _each(bounds: list, state: str) -> Iterable:
    """The windows one by one, with a progress bar on standard error."""
    return track(bounds, description=f"{state:<10}", console=Terminal(stderr=True))


def _read_host(model, ids: Tensor, window: int) -> tuple[StateScores, list[_Window]]:
    scores, seen = StateScores("host"), []
    for start, end in _each(windows(len(ids), window), "host"):
        with _timed(scores):
            logits, nll, top1 = _read(model, ids, start, end, "host")
        seen.append(_Window(start, end, nll, top1, digest(logits)))
        scores.windows.append([end - start, nll, 0.0, end - start, 0.0])
    return scores, seen


def _compare(scores: StateScores, host: _Window, host_logits: Tensor | None, model, ids: Tensor) -> None:
    """Adds a window, as `model` reads it, to `scores`.

    host_logits: None if the host cannot be asked any more; the same bits then have KL 0, others a KL of NaN
    """
    with _timed(scores):
        logits, nll, top1 = _read(model, ids, host.start, host.end, scores.state)
        kl = math.nan if host_logits is None else divergence(host_logits, logits)
    if digest(logits) == host.digest:
        kl = 0.0
    elif scores.difference is None:
        scores.difference = (host.start, host.end)
    scores.windows.append([host.end - host.start, nll, nll - host.nll, (top1 == host.top1).sum().item(), kl])


def _read_with_memory(memory, merged, ids: Tensor, seen: list[_Window]) -> list[StateScores]:
    """Attached and, if there is a merged model, merged: each window beside the host's reading of it.

    Raises LocasError if a bit of the logits inside disabled() is not that of the host before attach.
    """
    models = {"attached": memory.model} | ({"merged": merged} if merged is not None else {})
    result = [StateScores(state) for state in models]
    for host in _each(seen, " + ".join(models)):
        with memory.disabled():
            host_logits = next_token_logits(memory.model, ids, host.start, host.end)
        if digest(host_logits) != host.digest:
            place = f"tokens {host.start} to {host.end}"
            raise LocasError(f"inside memory.disabled() the logits of {place} are not the host's to the bit")
        for scores in result:
            _compare(scores, host, host_logits, models[scores.state], ids)
    return result


def _read_detached(model, ids: Tensor, seen: list[_Window]) -> StateScores:
    scores = StateScores("detached")
    for host in _each(seen, "detached"):
        _compare(scores, host, None, model, ids)
    return scores


def check(model, ids: Tensor, window: int) -> None:
    """ValueError for a window or text that `measure` cannot take."""
    if not 2 <= window <= max_positions(model):
        raise ValueError(f"window is {window}; expected an integer from 2 to {max_positions(model)}, the host's positions")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"input_ids has shape {list(ids.shape)}; expected [n] with at least 2 tokens")


def measure(model, memory_folder: Path, ids: Tensor, window: int, merged: bool = True) -> list[StateScores]:
    """Reads a text in the states host, attached, merged (if asked for) and detached; the model is plain afterwards.

    model: a plain host in evaluation mode
    memory_folder: what Memory.save_pretrained wrote
    ids: [n] integers on the CPU, n >= 2
    window: the most tokens the model sees at once, >= 2

    Raises ValueError for a text or window that does not fit, LocasError or OSError as `locas.load` does, LocasError for
    a loss that is not finite.
    """
    check(model, ids, window)
    ids = ids.to(model.device)
    with torch.inference_mode():
        host, seen = _read_host(model, ids, window)
    memory = locas.load(model, memory_folder)
    try:
        merged_model = memory.fork().merge_and_unload() if merged else None
        with torch.inference_mode():
            others = _read_with_memory(memory, merged_model, ids, seen)
    finally:
        memory.detach()
    with torch.inference_mode():
        return [host, *others, _read_detached(model, ids, seen)]
