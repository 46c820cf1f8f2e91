"""What an option's value may be: read from the command line as text, from a --config file as a YAML value."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from locas_ext import checks
from locas_ext.checks import MOST_COUNT
from locas_ext.config import checked_scale, paper_multiple

LARGEST = 1e30  # a float32 holds it, and ten times it: Adam's first step divides a rate by a tenth


class BadValue(typer.BadParameter):
    """A value that does not fit its option: one line with the option, the value and what was expected."""

    def __init__(self, value: object, expected: str):
        super().__init__(f"is {brief(value)}; expected {expected}")

    def format_message(self) -> str:
        return f"{option_name(self.param)} {self.message}"


def option_name(parameter: Any) -> str:
    """--learning-rate, or TEXT of an argument."""
    if parameter is None:
        return "a value"
    dashed = [name for name in parameter.opts if name.startswith("--")]
    return dashed[0] if dashed else (parameter.metavar or parameter.name).removesuffix("...")


def brief(value: object) -> str:
    """A value as a message quotes it; a long one is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(str(value)) if isinstance(value, Path) else repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        text = "an enormous number"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"


@dataclass(frozen=True)
class Kind:
    """A kind of value: `read` makes it from text or from a YAML value and raises ValueError or TypeError if it cannot.

    metavar: how --help shows it
    expected: how an error names what is taken
    textual: whether text in a --config file may stand for it
    """

    metavar: str
    expected: str
    read: Callable[[Any], Any]
    textual: bool = True

    @property
    def __name__(self) -> str:
        return self.metavar

    def __call__(self, value: Any) -> Any:
        try:
            return self.read(value)
        except (TypeError, ValueError):
            raise BadValue(value if self.textual else _as_number(value), self.expected) from None


def _as_number(value: Any) -> Any:
    """A number that came as text, for a message: 0 and not '0'."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            pass
    return value


def integer(low: int, high: int = MOST_COUNT) -> Kind:
    def read(value: Any) -> int:
        number = checks.integer("", int(value) if isinstance(value, str) else value, low)
        if number > high:
            raise BadValue(number, f"an integer from {low} to {high}")
        return number

    return Kind("N", f"an integer >= {low}" if high == MOST_COUNT else f"an integer from {low} to {high}", read, textual=False)


def number(*, low: float = -math.inf, above: float = -math.inf, high: float = LARGEST, below: float = math.inf) -> Kind:
    def read(value: Any) -> float:
        return checks.number("", float(value) if isinstance(value, str) else value, low, high, above=above, below=below)

    least = f">= {low:g}" if math.isfinite(low) else f"> {above:g}"
    most = f"< {below:g}" if math.isfinite(below) else f"<= {high:g}"
    return Kind("NUMBER", f"a number {least} and {most}", read, textual=False)


def one_of(choices: tuple[str, ...]) -> Kind:
    return Kind("|".join(choices), f"one of {', '.join(choices)}", lambda value: checks.one_of("", value, choices))


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError
    value.encode()  # bytes of the command line that are not UTF-8 are lone surrogates here
    return value


def text(metavar: str) -> Kind:
    return Kind(metavar, "text in UTF-8", _text)


def at_home(path: str) -> str:
    """A path with the home folder in the place of a first ~, which no shell replaces in --out=~/x, a file or a chat."""
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def _path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    return Path(at_home(value))


def _model(value: Any) -> str:
    if not _text(value):
        raise ValueError
    return at_home(value)


MODEL = Kind("MODEL", "a folder, a hub name or a GGUF file", _model)


def path(metavar: str) -> Kind:
    return Kind(metavar, "a path", _path)


def _names(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise TypeError
    return [name.strip() for part in parts if (name := _text(part)).strip()]


def names(choices: tuple[str, ...] | None = None) -> Kind:
    """NAME,... on the command line, a list or the same text in a file. Of `choices` at least one, and none of them twice."""

    def read(value: Any) -> list[str]:
        found = _names(value)
        if choices and (not found or len(set(found)) < len(found)):
            raise ValueError
        return [checks.one_of("", name, choices) if choices else name for name in found]

    return Kind("NAME,...", f"names of {', '.join(choices)}, each once" if choices else "names", read)


def _layers(value: Any) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TypeError
    return checks.integers("", [int(part) if isinstance(value, str) else part for part in parts])


def _scale(value: Any) -> str | float:
    named = value == "host" or paper_multiple(value) is not None
    return checked_scale(float(value) if isinstance(value, str) and not named else value)


LAYERS = Kind("N,...", "layer indices such as 0,1,-1", _layers)
SCALE = Kind(
    "paper|16x|host|NUMBER", "paper, a multiple of it such as 16x, host or a number other than 0, from -1e6 to 1e6", _scale
)


def _tokens(value: Any) -> str:
    kind, _, amount = _text(value).partition(":")
    if value == "all":
        return value
    if kind == "top-loss":
        checks.integer("", int(amount), 1, MOST_COUNT)
    elif kind == "loss-above":
        checks.number("", float(amount))
    else:
        raise ValueError
    return value


TOKENS = Kind(
    "all|top-loss:N|loss-above:NATS",
    "all, top-loss:N (the N with the largest loss) or loss-above:NATS (those with a larger loss)",
    _tokens,
)
