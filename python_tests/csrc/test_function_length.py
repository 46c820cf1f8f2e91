"""No C++ function is longer than 60 lines, unless the comment above it says why ("Long, as ...")."""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
FILES = [path for path in sorted(CSRC.rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
MOST_LINES = 60
# Comments, strings, characters, directives: their braces close nothing.
BLANKED = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#[^\n]*(?:\\\n[^\n]*)*", re.DOTALL | re.MULTILINE
)
NO_FUNCTION = re.compile(r"\s*(namespace|struct|class|union|enum|extern|if|for|while|switch|do|else)\b")


def functions(text):
    """(first line, lines, the comment above) of each braced body that follows a parenthesis: functions and lambdas."""
    code = BLANKED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    lines, heads, begin = text.splitlines(), [], 0
    for at, character in enumerate(code):
        if character not in "{};":
            continue
        if character == "{":
            heads.append((begin, at))
        elif character == "}":
            start, opening = heads.pop()
            head = code[start:opening]
            if ")" in head and not NO_FUNCTION.match(head.strip().removeprefix("template")):
                first = code.count("\n", 0, start + len(head) - len(head.lstrip()))
                above = first
                while above and lines[above - 1].lstrip().startswith("//"):
                    above -= 1
                yield first + 1, code.count("\n", 0, at) - first + 1, "\n".join(lines[above:first])
        begin = at + 1


def test_functions_are_found():
    body = "  a();\n" * 70
    (found,) = functions(f"namespace n {{\n\n// Long, as it is.\nint f(int x) {{\n{body}}}\n}}\n")
    assert found == (4, 72, "// Long, as it is.")
    assert sum(1 for path in FILES for _ in functions(path.read_text())) > 400


def test_no_long_function_without_a_reason():
    long = [
        f"{path.relative_to(CSRC)}:{line} has {length} lines"
        for path in FILES
        for line, length, comment in functions(path.read_text())
        if length > MOST_LINES and not re.search(r"\bLong, as\b", comment)
    ]
    assert not long
