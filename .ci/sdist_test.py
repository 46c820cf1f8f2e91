"""Builds an sdist, a wheel from it, and runs the command line of the wheel: `make sdist-test`.

The wheel is built where torch is not installed, without CUDA. It is installed into a fresh environment that borrows torch and
the other dependencies from the one that runs this file.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nsdist-test: {' '.join(map(str, command))} ended with {result.returncode}")
    return result.stdout


def compare_with_checkout(sdist: Path) -> None:
    """The sdist holds the files of the checkout, and nothing that was built there."""
    listed = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    expected = {name for name in listed.splitlines() if (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    found = {name for name in found - MADE_BY_SETUPTOOLS if ".egg-info/" not in name}
    if found != expected:
        lines = [f"  only in the checkout: {name}" for name in sorted(expected - found)]
        lines += [f"  only in the sdist: {name}" for name in sorted(found - expected)]
        sys.exit("sdist-test: the sdist differs from the checkout; see MANIFEST.in\n" + "\n".join(lines))


def fresh_environment(folder: Path) -> Path:
    """The Python of a new environment: its own packages first, then those of the one that runs this, without its .pth files.

    So the editable locas_ext of the latter is not seen.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(own, "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    return python


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="locas-sdist-") as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", work, ROOT, cwd=work)
        (sdist,) = work.glob("*.tar.gz")
        compare_with_checkout(sdist)
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", work, sdist, cwd=work, LOCAS_CUDA="0")
        (wheel,) = work.glob("*.whl")

        python = fresh_environment(work / "venv")
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=work)
        files = run(python, "-c", "import locas_ext._C; print(locas_ext.__file__, locas_ext._C.__file__)", cwd=work)
        if any(not Path(file).is_relative_to(work / "venv") for file in files.split()):
            sys.exit(f"sdist-test: imported from elsewhere than {work / 'venv'}:\n{files}")
        print(run(work / "venv" / "bin" / "locas", "info", cwd=work))
        print(f"{sdist.name} ({sdist.stat().st_size / 1e6:.1f} MB) holds the checkout; {wheel.name} works")


if __name__ == "__main__":
    main()
