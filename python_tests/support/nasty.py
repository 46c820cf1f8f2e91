"""Names that try to be more than text: markup, formulas, control characters, other scripts."""

from hypothesis import strategies as st

MARKDOWN = [
    "|",
    "\\",
    "`",
    "```",
    "*",
    "_",
    "~~",
    "[x](http://a.b)",
    "![",
    "]",
    "http://a.b",
    "www.a.b",
    "#",
    "# x",
    "> ",
    "---",
]
LISTS = ["- ", "+ ", "1. ", "===", "---", "{"]
HTML = ["<b>", "</details>", "<!--", "&lt;"]
FORMULAS = ["$", "$\\frac{", "$x^2$"]
CONSOLE = ["[/red]", "[bold]", ":smile:", "\x1b[31m", "\x1b]0;x\x07", "\x00", "\x7f", "\x9b31m", "\u202e", "\u2066", "\u2028"]
SPACE = ["\n", "\r\n", "\t", " "]
LETTERS = ["a", "Z", "0", "../", "/", "%s", "e\u0301", "\u4e2d\u6587", "\u05e2\u05d1", "\U0001f600"]
PIECES = [*MARKDOWN, *LISTS, *HTML, *FORMULAS, *CONSOLE, *SPACE, *LETTERS]

names = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(lambda name: name.strip())
