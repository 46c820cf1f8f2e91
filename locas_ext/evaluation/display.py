"""Text of the user (names, titles, paths, answers) in a report or a plot; locas_ext/terminal.py has it on a terminal."""

import json
import re

from locas_ext.terminal import neutral

_MARKDOWN = re.compile(r"([\\|*_`<>\[\]&~$#])")
_LINE_START = re.compile(r"^(?:(?=[-+=])|(\d{1,9})(?=[.)](?:\s|$)))")  # where a list, a rule or a heading's underline begins
_LINK = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)


def one_line(text: object) -> str:
    r"""The text on one line, with a visible sign for each character that would be obeyed instead of shown.

    >>> one_line("a\x1b[31m\nb")
    'a\\u001b[31m b'
    """
    return neutral(" ".join(str(text).split()))


def markdown(text: object) -> str:
    r"""Text that stays text in Markdown: in a line, a heading, a list and a table's cell.

    >>> markdown("a|b <i>")
    'a\\|b \\<i\\>'
    """
    escaped = _MARKDOWN.sub(r"\\\1", one_line(text))
    return _LINK.sub(lambda match: f"\\{match[0]}", _LINE_START.sub(r"\1\\", escaped))


def code(text: object) -> str:
    """Text as a span of code in Markdown; not for a table, where a | ends the cell also in code."""
    shown = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[:1] in ("`", "") or shown[-1:] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def json_block(content: object) -> list[str]:
    """Lines of Markdown that show JSON, as JSON: what would be obeyed is escaped."""
    lines = json.dumps(content, indent=1, ensure_ascii=False).split("\n")
    shown = ("".join(c if neutral(c) == c else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in line) for line in lines)
    return ["```json", *shown, "```"]
