"""The one place where text of the user (names, titles, paths, answers) becomes text of a terminal, a report or a plot."""

import json
import re

_JOINERS = "\u200c\u200d"  # what holds letters of some scripts, and emoji, together
_MARKDOWN = re.compile(r"([\\|*_`<>\[\]&~$#])")
_LINE_START = re.compile(r"^(?:(?=[-+=])|(\d{1,9})(?=[.)](?:\s|$)))")  # where a list, a rule or a heading's underline begins
_LINK = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)


def printable(text: object) -> str:
    r"""The text on one line, with whatever would steer a terminal or turn the reading direction written as \u001b.

    >>> printable("a\x1b[31m\nb")
    'a\\u001b[31m b'
    """
    return "".join(character if _is_plain(character) else _escaped(character) for character in " ".join(str(text).split()))


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in _JOINERS


def _escaped(character: str) -> str:
    """As in JSON, so that a block of JSON stays one."""
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else json.dumps(character)[1:-1]


def printable_lines(text: str) -> str:
    """The same, line by line."""
    return "\n".join("".join(c if _is_plain(c) else _escaped(c) for c in line) for line in text.split("\n"))


def markdown(text: object) -> str:
    r"""Text that stays text in Markdown: in a line, a heading, a list and a table's cell.

    >>> markdown("a|b <i>")
    'a\\|b \\<i\\>'
    """
    escaped = _MARKDOWN.sub(r"\\\1", printable(text))
    return _LINK.sub(lambda match: f"\\{match[0]}", _LINE_START.sub(r"\1\\", escaped))


def code(text: object) -> str:
    """Text as a span of code in Markdown; not for a table, where a | ends the cell also in code."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[:1] in ("`", "") or shown[-1:] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
