"""bench/README.md has a row for every benchmark."""

import re
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_every_script_has_a_row():
    scripts = {file.stem for file in BENCH.glob("*.py") if "__main__" in file.read_text()}
    rows = re.findall(r"^\| `python -m bench\.(\w+)", (BENCH / "README.md").read_text(), re.M)
    assert scripts == set(rows) and (BENCH / "gpu.sh").exists()
