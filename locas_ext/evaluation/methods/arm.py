"""Arms: the methods of a study, each with the settings it runs with."""

import re
from dataclasses import dataclass

METHODS = ("truncation", "sliding", "long-context", "temp-lora", "locas")


@dataclass(frozen=True)
class Arm:
    """One method with its settings.

    label: unique in its study: the method, and what differs from the study's own settings
    settings: what the method runs with; empty for truncation
    """

    method: str
    label: str
    settings: dict

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return slug(self.label)


def slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)


def make_arm(base: dict[str, dict], method: str, **changes) -> Arm:
    """base: the settings of every method; changes: those of this arm that differ."""
    settings = {**base[method], **changes}
    if settings.get("alpha", 0) is None:  # Temp-LoRA's, unless given, follows the rank
        settings["alpha"] = settings["rank"]
    return Arm(method, " ".join([method, *(f"{name}={value}" for name, value in changes.items())]), settings)
