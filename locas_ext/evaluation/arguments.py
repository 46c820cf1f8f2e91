"""What several commands check before they begin, so that it is refused in the same words: a ValueError of one line."""

import math

from locas_ext.errors import LocasError


def choose(name: str, values: list[str], valid) -> None:
    """For a value that is not valid or is named twice, and for none at all."""
    if not values:
        raise ValueError(f"{name} is empty; expected some of {', '.join(valid)}")
    for value in values:
        if value not in valid:
            raise ValueError(f"{name} is {value!r}; expected {', '.join(valid)}")
        if values.count(value) > 1:
            raise ValueError(f"{name} names {value} twice")


def at_least(least: int, **options: int | None) -> None:
    """For an option below `least`; None is one that was left out. `max_tokens` is the option --max-tokens."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected an integer >= {least}")


def needs_extra(what: str, library: str, error: ImportError) -> LocasError:
    """The error for a library that could not be imported."""
    return LocasError(f"{what} needs {library}, which is not installed ({error}): pip install 'locas_ext[eval]'")


def check_learning(locas: dict, temp_lora: dict) -> None:
    """For settings of the two kinds of memory that no host can make good."""
    at_least(1, rank=locas["rank"], epochs=locas["epochs"])
    at_least(1, temp_lora_rank=temp_lora["rank"], temp_lora_epochs=temp_lora["epochs"])
    rates = {"--learning-rate": locas["learning_rate"], "--temp-lora-lr": temp_lora["learning_rate"]}
    for name, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise ValueError(f"{name} is {rate}; expected a finite number >= 0")
    alpha = temp_lora["alpha"]
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--temp-lora-alpha is {alpha}; expected a finite number > 0")
