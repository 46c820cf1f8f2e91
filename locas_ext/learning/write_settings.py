"""What closed-form writing is asked for: its arguments, checked, and the room they leave in a memory."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WHEN_FULL = ("error", "drop_oldest", "compress")

Tokens = str | float | int | Sequence[int] | Tensor  # which tokens get a slot; once resolved a str, float, int or tuple


@dataclass(frozen=True)
class WriteSettings:
    """The arguments of `Memory.write` and `Memory.memorize` that decide what is written and where."""

    epsilon: float = 1e-2
    tokens: Tokens = "all"
    capacity: int | None = None
    when_full: str | None = None
    compress_to: int | None = None


def _positive_integer(name: str, value: object, at_most: float, why: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected an integer, {why}")
    if not 1 <= int(value) <= at_most:
        limit = ">= 1" if at_most == math.inf else f"from 1 to {at_most}"
        raise ValueError(f"{name} is {value}; expected an integer {limit}, {why}")
    return int(value)


def _resolve_tokens(tokens, text: int | None):
    """tokens as WriteSettings holds it; `text` is how many ids there are, None where positions mean nothing."""
    if tokens is None or (isinstance(tokens, str) and tokens == "all"):
        return "all"
    expected = "'all', a loss threshold (float), how many to take (int) or a sequence of positions"
    integers = isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.dtype != torch.bool
    if integers and tokens.dim() == 1:
        tokens = tokens.tolist()
    if isinstance(tokens, (str, bytes, bool)) or not isinstance(tokens, (Sequence, numbers.Real)):
        raise TypeError(f"tokens is {tokens!r}; expected {expected}")
    if isinstance(tokens, numbers.Integral):
        return _positive_integer("tokens", tokens, math.inf, "the number of tokens to write")
    if isinstance(tokens, numbers.Real):
        if not math.isfinite(tokens):
            raise ValueError(f"tokens is {tokens}; expected a finite loss in nats")
        return float(tokens)
    if any(isinstance(t, bool) or not isinstance(t, numbers.Integral) for t in tokens):
        raise TypeError(f"tokens is {list(tokens)!r}; expected {expected}")
    if text is None:
        raise ValueError("tokens holds positions, which only write() takes; expected 'all', a float or an int")
    positions = sorted(int(t) for t in tokens)
    if not positions:
        raise ValueError("tokens is empty; expected at least one position")
    if positions[0] < 1 or positions[-1] >= text:
        wrong = positions[0] if positions[0] < 1 else positions[-1]
        raise ValueError(f"tokens holds {wrong}; expected positions from 1 to {text - 1}: the first token is never predicted")
    if len(set(positions)) != len(positions):
        raise ValueError(f"tokens names position {next(p for p in positions if positions.count(p) > 1)} twice")
    return tuple(positions)


def resolve(settings: WriteSettings, hidden_size: int, used: int, text: int | None) -> WriteSettings:
    """The settings with what follows from others filled in; ValueError or TypeError for one out of range.

    used: the slots that the memory holds; text: how many token ids there are, None where positions mean nothing.
    """
    epsilon = settings.epsilon
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        raise TypeError(f"epsilon is {epsilon!r}; expected a number > 0")
    largest = torch.finfo(torch.float32).max
    if not 0 < epsilon <= largest:
        raise ValueError(f"epsilon is {epsilon}; expected a number > 0, at most {largest:.3g}, as slots are float32")
    capacity, when_full, compress_to = settings.capacity, settings.when_full, settings.compress_to
    if when_full is None:
        when_full = "error" if compress_to is None else "compress"
    if when_full not in WHEN_FULL:
        raise ValueError(f"when_full is {when_full!r}; expected one of {', '.join(WHEN_FULL)}")
    if capacity is None and when_full != "error":
        raise ValueError(f"when_full is {when_full!r}, but capacity is None, so the memory grows and is never full")
    if capacity is not None:
        capacity = _positive_integer("capacity", capacity, math.inf, "slots a layer")
        if capacity < used:
            raise ValueError(f"capacity is {capacity}; expected at least {used}, the slots used, or compress() first")
    if when_full == "compress":
        if capacity < 2:
            raise ValueError(f"capacity is {capacity}; expected at least 2 with when_full='compress'")
        most = min(capacity - 1, hidden_size)
        why = "fewer than the capacity and no more than the hidden size"
        wanted = min(capacity // 2, most) if compress_to is None else compress_to
        compress_to = _positive_integer("compress_to", wanted, most, why)
    elif compress_to is not None:
        raise ValueError(f"compress_to is {compress_to}, but when_full is {when_full!r}; expected when_full='compress'")
    return WriteSettings(float(epsilon), _resolve_tokens(settings.tokens, text), capacity, when_full, compress_to)


def check_fits(count: int, settings: WriteSettings) -> None:
    """ValueError if `count` slots at once find no room even in a memory that was compressed or emptied for them."""
    kept = settings.compress_to or 0  # None unless when_full is "compress"
    assert settings.capacity is not None, "a memory without a limit is never full"
    if kept + count > settings.capacity:
        beside = f" and compress_to {kept}" if kept else ""
        raise ValueError(
            f"up to {count} tokens are to be written at once, but capacity is {settings.capacity}{beside}; expected a "
            f"capacity of at least {kept + count}"
        )


def check_room(used: int, count: int, settings: WriteSettings) -> None:
    """ValueError if `count` more slots find no room, whatever may be done to make some."""
    if settings.capacity is None or used + count <= settings.capacity:
        return
    if settings.when_full == "error":
        raise ValueError(
            f"the memory is full: {used} of {settings.capacity} slots are used and {count} more tokens are to be "
            "written; pass a larger capacity, when_full='drop_oldest' or 'compress', or call compress() first"
        )
    check_fits(count, settings)
