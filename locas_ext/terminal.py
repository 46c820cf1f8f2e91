"""Where this package writes on a terminal: text from outside is shown as it is, never obeyed."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

# Control characters, and the marks that turn the direction of what stands around them.
_HARMFUL = {"Cc", "Cs"}
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _shown(character: str) -> str:
    if character in "\n\t" or (unicodedata.category(character) not in _HARMFUL and character not in _DIRECTIONS):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"


def neutral(text: str) -> str:
    """The text with a visible sign in the place of each character that a terminal would obey; newlines and tabs stay.

    >>> neutral("red \\x1b[31m")
    'red ␛[31m'
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
