"""Where this package writes on a terminal: text from outside is shown as it is, never obeyed."""

import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

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


class _OnTheSide:
    """Standard error, where what cannot be written is left out.

    A closed pipe, a full disk or a terminal that has hung up must not end a run that has only been telling how far it is.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Terminal(Console):
    """A rich console on which a string is text: no markup, no emoji codes, no control characters.

    On standard error what cannot be written is left out; on standard output it is an error.
    """

    def __init__(self, stderr: bool = False, **options: Any):
        # Soft wrapping: piped into a file or pasted into a report, lines stay whole.
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(neutral(segment.text), segment.style)

    @property
    def file(self) -> Any:
        return _OnTheSide(super().file) if self.stderr else super().file

    @file.setter
    def file(self, stream: Any) -> None:
        self._file = stream

    def on_broken_pipe(self) -> None:
        """Called while a BrokenPipeError is handled; continues, where rich would end the process."""
        raise


def _plain(text: str) -> Text:
    """Neither markup nor control characters, whatever console it is printed on."""
    return Text(neutral(text))


class Figures(Table):
    """A table that cuts no figure: where the terminal is too narrow for it, its rows stand one below the other.

    Args:
        titles: of the columns
        title: of the table
        left: how many columns, the first ones, are labels: left-aligned, and wrapped between words
    """

    def __init__(self, titles: Sequence[str], title: str | None = None, left: int = 1):
        heading = None if title is None else _plain(title)
        super().__init__(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for index, name in enumerate(titles):
            self.add_column(_plain(name), justify="left" if index < left else "right", overflow="fold")

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(_plain(str(cell)) for cell in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [_least_width(column) for column in self.columns]
        for column, width in zip(self.columns, widths, strict=True):
            column.min_width = width
        if sum(widths) + 3 * len(widths) + 1 <= options.max_width:  # a space on both sides, and what divides columns
            yield from super().__rich_console__(console, options)
        else:
            yield from self._stacked()

    def _stacked(self) -> Iterable[Text]:
        if self.title:
            yield Text(str(self.title))
        labels = [column for column in self.columns if column.justify == "left"]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield Text(", ".join(filter(None, map(str, row[: len(labels)]))))
            for column, cell in zip(self.columns[len(labels) :], row[len(labels) :], strict=True):
                if str(cell):
                    yield Text(f"  {column.header}: {cell}")


def _least_width(column: Column) -> int:
    """Its longest word; of figures, its longest cell."""
    words = str(column.header).split()
    for cell in column.cells:
        words += str(cell).split() if column.justify == "left" else [str(cell)]
    return max(map(cell_len, words), default=0)
