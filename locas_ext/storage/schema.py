"""What a value read from a file may be: kinds to write tables with, each a check that says what is wrong and where."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Kind = Callable[[Any, str], None]  # takes a value and its place in the file; raises Wrong


class Wrong(Exception):
    """A value that is not what the table says; the text names its place, the value and what was expected."""


def short(value: Any) -> str:
    """A value for a message: printable, and no longer than a line."""
    plain = isinstance(value, list) and len(value) <= 8 and all(type(item) is int for item in value)
    if isinstance(value, (dict, list)) and not plain:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(value: Any, place: str, expected: str) -> None:
    raise Wrong(f"{place} is {short(value)}; expected {expected}")


def integer(low: int, high: int) -> Kind:
    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(value, place, f"an integer from {low} to {high}")

    return check


def number(low: float, high: float) -> Kind:
    """A finite int or float; JSON has one kind of numbers."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            _refuse(value, place, f"a number from {low:g} to {high:g}")

    return check


def boolean(value: Any, place: str) -> None:
    if type(value) is not bool:
        _refuse(value, place, "true or false")


def text(value: Any, place: str) -> None:
    if type(value) is not str:
        _refuse(value, place, "a text")


def matching(pattern: str, expected: str) -> Kind:
    """A text of a form."""

    def check(value: Any, place: str) -> None:
        if type(value) is not str or not re.fullmatch(pattern, value, re.ASCII):
            _refuse(value, place, expected)

    return check


def one_of(*choices: str | int | None) -> Kind:
    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            _refuse(value, place, f"one of {', '.join(map(repr, choices))}")

    return check


def either(*kinds: Kind) -> Kind:
    """Any of these; the message is that of the last."""

    def check(value: Any, place: str) -> None:
        for kind in kinds[:-1]:
            try:
                return kind(value, place)
            except Wrong:
                pass
        kinds[-1](value, place)

    return check


def nullable(kind: Kind) -> Kind:
    def check(value: Any, place: str) -> None:
        if value is not None:
            kind(value, place)

    return check


def list_of(kind: Kind) -> Kind:
    def check(value: Any, place: str) -> None:
        if type(value) is not list:
            _refuse(value, place, "a list")
        for index, item in enumerate(value):
            kind(item, f"{place}[{index}]")

    return check


def record(fields: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these keys, all of them, those of `optional` or not, and no other."""
    known = {**fields, **(optional or {})}

    def check(value: Any, place: str) -> None:
        prefix = f"{place}." if place else ""
        if type(value) is not dict:
            _refuse(value, place or "it", "an object")
        for name in fields:
            if name not in value:
                raise Wrong(f"{prefix}{name} is missing")
        for name in value:
            if name not in known:
                raise Wrong(f"{prefix}{short(name)} is unknown; expected the keys {', '.join(fields)}")
        for name, item in value.items():
            known[name](item, prefix + name)

    return check
