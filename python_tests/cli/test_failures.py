"""What ends a command: one line and an exit status, for every kind of error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import locas_ext.cli.tasks.generate
from locas_ext import checks
from locas_ext.cli import main
from locas_ext.cli.failures import failure
from locas_ext.errors import Interrupted, LocasError

COMMAND = ["generate", "--prompt", "a", "--model", "m"]


def ending(monkeypatch, error):
    """A command whose work ends like this."""

    def work(task):
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(locas_ext.cli.tasks.generate, "run_generate", work)
    return main(COMMAND)


@pytest.mark.parametrize(
    "error, status, line",
    [
        (Interrupted("7 tokens are kept"), 130, "interrupted: 7 tokens are kept"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was kept"),
        (LocasError("x is\n damaged"), 1, "x is damaged"),
        (ModuleNotFoundError("No module named 'torch'"), 1, "No module named 'torch'"),
        (FileNotFoundError(2, "No such file", "a [/b]\x1b[31m"), 2, "a [/b]\\u001b[31m: No such file"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory: no more could be had"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9\nmore"), 1, "out of memory: DefaultCPUAllocator: "),
        (lambda: checks.integer("rank", 0, 1), 2, "rank is 0; expected an integer >= 1"),
        (lambda: checks.integer("rank", "a", 1), 2, "rank is 'a'; expected an integer >= 1"),
    ],
)
def test_the_line(monkeypatch, capsys, error, status, line):
    assert ending(monkeypatch, error) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(f"locas: {line}") and captured.err.count("\n") == 1 and not captured.out


def test_a_checkout_that_is_not_built_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "locas_ext._C", None)
    with pytest.raises(ImportError, match=r"^locas_ext is not built here; run pip install \."):
        locas_ext.__getattr__("_C")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of a library"),
        TypeError("of a library"),
        lambda: [][5],
        lambda: checks.integer("rank", 1, *[0] * 9),  # a wrong call in the package itself
        lambda: {}["config"],
        RecursionError("maximum recursion depth"),
        RuntimeError("[red]\x1b[31m" + "x" * 1000),
        AssertionError(),
    ],
)
def test_what_should_not_happen_is_logged(monkeypatch, capsys, error, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ending(monkeypatch, error) == 1
    (line,) = capsys.readouterr().err.splitlines()
    log = re.fullmatch(r"locas: this should not have happened \(\w+.*\); please report this with the log (\S+)", line)
    assert log and len(line) < 600 and "\x1b" not in line
    text = Path(log[1]).read_text()
    assert "Traceback" in text and "in work" in text and Path(log[1]).stat().st_mode & 0o077 == 0


def test_no_room_for_the_log(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert ending(monkeypatch, RuntimeError("x")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no log could be written" in line


def test_a_closed_pipe_is_quiet():
    assert failure(BrokenPipeError(32, "Broken pipe")).status == 141
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m locas_ext memorize --help | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert result.returncode in (0, 141) and result.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "locas_ext", "memorize", "--help"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and re.fullmatch(r"locas: .*No space left on device\n", result.stderr)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"locas {locas_ext.__version__}\n"
