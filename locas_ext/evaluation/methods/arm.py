"""Arms: the methods of a study, each with the settings it runs with."""

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line asks for the names here, and should not wait for torch
    from locas_ext.evaluation.texts import Text

OTHER_TEXT, SHUFFLED = "locas-other-text", "locas-shuffled"
CONTROLS = (OTHER_TEXT, SHUFFLED)
METHODS = ("truncation", "sliding", "long-context", "temp-lora", "locas", *CONTROLS)


@dataclass(frozen=True)
class Arm:
    """One method with its settings.

    label: unique in its study: the method, and what differs from the study's own settings
    settings: what the method runs with; empty for truncation
    other_text: what the memory of OTHER_TEXT learns; None for every other method
    """

    method: str
    label: str
    settings: dict
    other_text: "Text | None" = field(default=None, compare=False)

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return slug(self.label)

    def with_other_text(self, text: "Text") -> "Arm":
        """The same arm, with what its memory is to learn."""
        return replace(self, settings={**self.settings, "other_text": text.fingerprint}, other_text=text)


def slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)


def make_arm(base: dict[str, dict], method: str, **changes) -> Arm:
    """base: the settings of every method; changes: those of this arm that differ."""
    settings = {**base[method], **changes}
    if settings.get("alpha", 0) is None:  # Temp-LoRA's, unless given, follows the rank
        settings["alpha"] = settings["rank"]
    return Arm(method, " ".join([method, *(f"{name}={value}" for name, value in changes.items())]), settings)
