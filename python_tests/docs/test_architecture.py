"""docs/architecture.md draws the tree: every file is in it, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".cmake"}


def test_the_tree_names_every_file_of_the_package_and_of_csrc():
    tree = re.search(r"```\n(locas_ext/.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)[1]
    # cuda/ptx is named by subject, its files all being .cuh
    named = set(re.findall(r"[\w]+\.(?:pyi?|cpp|cuh?|h|cmake)\b", tree)) | {
        f"{name}.cuh" for name in re.search(r"ptx/ .*?PTX: (.*?) \(", tree)[1].split(", ")
    }
    files = [
        file
        for folder in ("locas_ext", "csrc")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SUFFIXES and "simt" not in file.parts
    ]
    missing = {file.name for file in files if file.stat().st_size} - named - {"__init__.py"}
    commands = {file.name for file in (ROOT / "locas_ext" / "cli" / "commands").iterdir()}
    assert missing - commands == set()
    assert named - {file.name for file in files} == set()
