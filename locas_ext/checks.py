"""Checks of plain arguments: each returns the value as a plain Python object or says name, value and what was expected.

numpy's scalars, and arrays and tensors without dimensions, count as the number they hold. A bool is not a number.
"""

import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_SIZE = 2**31 - 1  # of ranks, slots and widths: a file holds no more
MOST_COUNT = 2**53  # of updates, tokens and chunks: what every reader of JSON holds exactly
LEAST_FLOAT32, MOST_FLOAT32 = 1.1754943508222875e-38, 3.4028234663852886e38  # normal numbers


def _plain(value: Any) -> Any:
    """What a numpy scalar or a 0-d array or tensor holds; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _expected(kind: str, bounds: Sequence[str], why: str) -> str:
    return f"expected {kind}{' ' if bounds else ''}{' and '.join(bounds)}{f' ({why})' if why else ''}"


def integer(name: str, value: object, low: float = -math.inf, high: float = math.inf, why: str = "") -> int:
    """The value as an int from low to high, both included.

    Args:
        name: how the caller knows the argument, such as "window" or "--window"
        value: int, or a numpy scalar or 0-d array or tensor of an integer dtype
        low, high: the smallest and the largest value that is taken
        why: where the range comes from, in a few words: "the host's positions"

    Returns:
        The same number as an int.

    Raises:
        TypeError: not an integer
        ValueError: out of range

    >>> integer("window", 8, 2, 512)
    8
    >>> integer("window", 1, 2, 512, "the host's positions")
    Traceback (most recent call last):
    ValueError: window is 1; expected an integer from 2 to 512 (the host's positions)
    """
    plain = _plain(value)
    whole = isinstance(plain, numbers.Integral) and not isinstance(plain, bool)
    if high in (MOST_SIZE, MOST_COUNT) and not (whole and plain > high):
        high = math.inf  # not worth words where nobody meets it
    if math.isfinite(low) and math.isfinite(high):
        bounds = [f"from {low} to {high}"]
    else:
        bounds = [f"{sign} {bound}" for sign, bound in ((">=", low), ("<=", high)) if math.isfinite(bound)]
    if not whole:
        raise TypeError(f"{name} is {value!r}; {_expected('an integer', bounds, why)}")
    if not low <= int(plain) <= high:
        raise ValueError(f"{name} is {plain}; {_expected('an integer', bounds, why)}")
    return int(plain)


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    why: str = "",
) -> float:
    """The value as a finite float in a range.

    Args:
        name: how the caller knows the argument, such as "learning_rate"
        value: int or float, or a numpy scalar or 0-d array or tensor that holds one
        low, high: the smallest and the largest value that is taken
        above, below: bounds that are not taken themselves
        why: where the range comes from, in a few words

    Returns:
        The same number as a float.

    Raises:
        TypeError: not a number
        ValueError: NaN, infinite or out of range

    >>> number("learning_rate", 1, low=0)
    1.0
    >>> number("beta1", 1.0, low=0, below=1)
    Traceback (most recent call last):
    ValueError: beta1 is 1.0; expected a finite number >= 0 and < 1
    """
    plain = _plain(value)
    signs = ((">=", low), (">", above), ("<=", high), ("<", below))
    expected = _expected("a finite number", [f"{sign} {bound}" for sign, bound in signs if math.isfinite(bound)], why)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name} is {value!r}; {expected}")
    try:
        result = float(plain)
    except OverflowError:
        result = math.inf  # an integer that no float can hold
    if not (math.isfinite(result) and low <= result <= high and above < result < below):
        raise ValueError(f"{name} is {plain}; {expected}")
    return result


def boolean(name: str, value: object) -> bool:
    """The value as a bool.

    Args:
        name: how the caller knows the argument
        value: True or False, numpy's and a 0-d tensor's too; 0, 1 and None are something else

    Returns:
        The same value as a bool.

    Raises:
        TypeError: anything else

    >>> boolean("clip", True)
    True
    """
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return plain


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """The value where it is one of these names.

    Args:
        name: how the caller knows the argument
        value: a string, numpy's too
        choices: the names that are taken

    Returns:
        The name as it stands in `choices`.

    Raises:
        ValueError: anything else

    >>> one_of("backend", "fast", ("auto", "matmul"))
    Traceback (most recent call last):
    ValueError: backend is 'fast'; expected one of auto, matmul
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return choices[choices.index(value)]


def path(name: str, value: object) -> Path:
    """The value as a Path.

    Args:
        name: how the caller knows the argument
        value: a str or an os.PathLike that holds one

    Returns:
        The same path as a Path.

    Raises:
        TypeError: anything else

    >>> path("resume", "book-memory").name
    'book-memory'
    >>> path("resume", True)
    Traceback (most recent call last):
    TypeError: resume is True; expected a str or a Path
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {value!r}; expected a str or a Path")
    return Path(value)


def integers(name: str, values: object, low: float = -math.inf, high: float = math.inf, why: str = "") -> tuple[int, ...]:
    """A sequence, or a 1-d array or tensor, as a tuple of ints, each in a range.

    Args:
        name: how the caller knows the argument
        values: a sequence of what `integer` takes, or a 1-d array or tensor of an integer dtype
        low, high, why: as in `integer`, for each item

    Returns:
        The same numbers as ints.

    Raises:
        TypeError: not a sequence, or an item is not an integer
        ValueError: an item is out of range

    >>> integers("layers", range(3))
    (0, 1, 2)
    """
    one_dimensional = len(getattr(values, "shape", ())) == 1 and hasattr(values, "tolist")
    items = values.tolist() if one_dimensional else values  # type: ignore[attr-defined]
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise TypeError(f"{name} is {values!r}; expected a sequence of integers")
    return tuple(integer(f"{name}[{place}]", item, low, high, why) for place, item in enumerate(items))
