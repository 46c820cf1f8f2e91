"""What several commands check before they begin, so that it is refused in the same words: a ValueError of one line."""

from collections.abc import Sequence
from pathlib import Path

from locas_ext.checks import integer, number, one_of
from locas_ext.errors import LocasError


def choose(name: str, values: list[str], valid: Sequence[str]) -> None:
    """ValueError for an empty list, for a value that is not one of `valid`, and for one that is named twice."""
    if not values:
        raise ValueError(f"{name} is empty; expected some of {', '.join(valid)}")
    for value in values:
        one_of(name, value, valid)
        if values.count(value) > 1:
            raise ValueError(f"{name} names {value} twice")


def once(name: str, paths: Sequence[Path]) -> None:
    """ValueError for a file that is named twice: it would count twice."""
    places = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"{name} names {twice[0]} twice")


def at_least(least: int, **options: int | None) -> None:
    """ValueError or TypeError for an option that is not an integer >= `least`, or None.

    options: `max_tokens` is the option --max-tokens
    """
    for name, value in options.items():
        if value is not None:
            integer(f"--{name.replace('_', '-')}", value, least)


def needs_extra(what: str, library: str, error: ImportError, extra: str = "eval") -> LocasError:
    """The error for a library that could not be imported."""
    return LocasError(f"{what} needs {library}, which is not installed ({error}): pip install 'locas_ext[{extra}]'")


def check_temp_lora(temp_lora: dict) -> None:
    """ValueError or TypeError for settings of Temp-LoRA that no host can make good."""
    at_least(1, temp_lora_rank=temp_lora["rank"], temp_lora_epochs=temp_lora["epochs"])
    number("--temp-lora-lr", temp_lora["learning_rate"], 0)
    if temp_lora["alpha"] is not None:
        number("--temp-lora-alpha", temp_lora["alpha"], above=0)
