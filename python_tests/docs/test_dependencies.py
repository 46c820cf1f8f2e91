"""What the package imports pyproject.toml declares: a dependency, or one of an extra."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE_OF = {"yaml": "pyyaml"}  # where module and package have different names


def imported() -> set[str]:
    """The top-level modules that the package's files import, the standard library's and its own left out."""
    names = set()
    for file in (ROOT / "locas_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"locas_ext"}


def test_every_imported_library_is_declared():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["eval"] + project["optional-dependencies"]["gguf"]
    names = {re.split(r"[\[<>=~! ]", line)[0].lower().replace("-", "_") for line in declared}
    assert {PACKAGE_OF.get(name, name).lower() for name in imported()} <= names


def test_every_environment_variable_is_in_the_readme():
    sources = [ROOT / "setup.py", *(ROOT / "locas_ext").rglob("*.py")]
    read = {name for file in sources for name in re.findall(r'environ(?:\.get\(|\[)"(LOCAS_\w+)"', file.read_text())}
    listed = set(re.findall(r"^\| `(LOCAS_\w+)` \|", (ROOT / "README.md").read_text(), re.M))
    assert read == listed and "LOCAS_PROBE" in read
