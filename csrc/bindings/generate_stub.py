"""Writes locas_ext/_C.pyi, the types of the compiled module, from the signatures that pybind11 keeps in its docstrings.

    python csrc/bindings/generate_stub.py            after a change of a binding
    python csrc/bindings/generate_stub.py --check    what `make lint` runs: fails, with the difference, where the file is stale

A CPU build has the same functions as one with CUDA, so one stub holds for both; CI checks it against the CPU build.
"""

import argparse
import difflib
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).resolve().parents[2] / "locas_ext" / "_C.pyi"
HEADER = '''"""Native kernels of locas_ext, with and without CUDA. Written by csrc/bindings/generate_stub.py: do not edit."""

'''
# pybind11's words for what it converts -> the types that callers pass. The versions of pybind11 differ in the former.
PLAIN_TYPES = {
    r"typing\.SupportsInt( \| typing\.SupportsIndex)?": "int",
    r"typing\.SupportsFloat( \| typing\.SupportsIndex)?": "float",
    r'typing\.Annotated\[(.+?), "FixedSize\(\d+\)"\]': r"\1",
}


def compiled_module() -> ModuleType:
    """locas_ext._C by itself: importing the package would import torch first."""
    spec = PathFinder.find_spec("_C", [str(STUB.parent)])
    if spec is None or spec.loader is None:
        sys.exit(f"generate_stub: no compiled module _C in {STUB.parent}; build it first, for example with make test")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(signature: str) -> str:
    for pattern, replacement in PLAIN_TYPES.items():
        signature = re.sub(pattern, replacement, signature)
    return signature


def declaration(name: str, member: object) -> str:
    """The stub's line for a function or a constant."""
    if isinstance(member, bool | int | float | str):
        return f"{name}: {type(member).__name__}"
    if isinstance(member, tuple):
        return f"{name}: tuple[{', '.join(type(item).__name__ for item in member)}]"
    signature = (member.__doc__ or "").partition("\n")[0]
    if not re.fullmatch(rf"{name}\(.*\) -> .+", signature):
        sys.exit(
            f"generate_stub: _C.{name} has the docstring {signature!r}; expected one signature, as in {name}(x: int) -> int"
        )
    return f"def {plain(signature)}: ..."


def stub() -> str:
    members = sorted(vars(compiled_module()).items())
    body = "\n".join(declaration(name, member) for name, member in members if not name.startswith("__")) + "\n"
    modules = sorted(set(re.findall(r"\b([a-z.]+)\.[A-Z]", body)))  # torch of torch.Tensor
    text = HEADER + "".join(f"import {module}\n" for module in modules) + "\n" + body
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", STUB.name, "-"]
    return subprocess.run(ruff, input=text, capture_output=True, text=True, check=True, cwd=STUB.parents[1]).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes locas_ext/_C.pyi from the compiled module.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is not what would be written")
    check = parser.parse_args().check
    new, old = stub(), STUB.read_text() if STUB.exists() else ""
    if not check:
        STUB.write_text(new)
    elif new != old:
        changes = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "locas_ext/_C.pyi", "the compiled module")
        sys.exit("".join(changes) + "\ngenerate_stub: locas_ext/_C.pyi is stale; run python csrc/bindings/generate_stub.py")


if __name__ == "__main__":
    main()
