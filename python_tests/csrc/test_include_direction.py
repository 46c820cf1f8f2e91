"""Which folder of csrc may include which: bindings -> {cpu, cuda} -> common, where an arrow means "includes".

cpu and cuda never see each other. Of cuda only the kernels see ptx/, and only ptx/ sees simt, the runner.
"""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
FILES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*") if path.suffix in SUFFIXES)

# A file belongs to the longest of these that its path begins with.
MAY_INCLUDE = {
    "common/": {"common/"},
    "bindings/": {"bindings/", "cpu/kernels.h", "cuda/api.h", "common/"},
    "cpu/": {"cpu/", "cpu/kernels.h", "common/"},
    "cpu/kernels.h": {"common/"},
    "cuda/": {"cuda/", "cuda/api.h", "cuda/ptx/", "common/"},
    "cuda/api.h": {"common/"},
    "cuda/ptx/": {"cuda/ptx/", "simt/", "common/"},
    "simt/": {"simt/"},
    "simt/tests/": {"simt/tests/", "simt/", "cuda/", "cuda/api.h", "cuda/ptx/", "common/"},
}
# Where the headers of others may be included.
OUTSIDE = {
    r"pybind11/|Python\.h": {"bindings/"},
    r"cuda|nv": {"cuda/", "cuda/ptx/"},
    r"immintrin\.h": {"cpu/"},
}


def part(file):
    return max((name for name in MAY_INCLUDE if file.startswith(name)), key=len)


def includes(file, marks):
    """What the file includes between the two marks, wherever #if stands."""
    pattern = rf"^\s*#\s*include\s*{re.escape(marks[0])}([^{marks[1]}]+){re.escape(marks[1])}"
    return re.findall(pattern, (CSRC / file).read_text(), re.MULTILINE)


def test_every_include_names_a_file_from_csrc():
    assert len(FILES) > 50
    wrong = [f"{file}: {name}" for file in FILES for name in includes(file, '""') if name not in FILES]
    assert not wrong


def test_includes_go_in_one_direction():
    wrong = [
        f"{file} includes {name}, of {part(name)}"
        for file in FILES
        for name in includes(file, '""')
        if part(name) not in MAY_INCLUDE[part(file)]
    ]
    assert not wrong


def test_headers_of_others_stay_in_their_part():
    wrong = [
        f"{file} includes <{name}>"
        for file in FILES
        for name in includes(file, "<>")
        for pattern, parts in OUTSIDE.items()
        if re.match(pattern, name) and part(file) not in parts
    ]
    assert not wrong


def test_only_ptx_holds_inline_assembly():
    """Of the CUDA kernels; the runner's switch of fibers is assembly too."""
    assembly = re.compile(r"\b(asm|__asm__)\b")
    wrong = [file for file in FILES if part(file) == "cuda/" and assembly.search((CSRC / file).read_text())]
    assert not wrong
