"""Where this package writes on a terminal: text from outside is shown as it is, never obeyed."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

_KEPT = "\n\t\u200c\u200d"  # the joiners hold letters of some scripts, and emoji, together


def _shown(character: str) -> str:
    if character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def neutral(text: str) -> str:
    r"""The text with escapes in the place of what a terminal would obey or what turns the reading direction.

    Newlines and tabs stay.

    >>> neutral("red \x1b[31m")
    'red \\u001b[31m'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


class Terminal(Console):
    """A rich console on which a string is text: no markup, no emoji codes, no control characters."""

    def __init__(self, stderr: bool = False, **options: Any):
        # Soft wrapping: piped into a file or pasted into a report, lines stay whole.
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(neutral(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Called while a BrokenPipeError is handled; goes on with it, where rich would end the process."""
        raise
