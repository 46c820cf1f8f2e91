"""Ctrl-C before the work has begun, also where an import would swallow it; other signals, which then do the same."""

import os
import signal
import subprocess
import sys

import pytest
from support.command_line import WINDOW, run

from locas_ext.evaluation.assets import MODEL
from locas_ext.learning.run import Run
from locas_ext.storage import checkpoint

LINE = "locas: interrupted: nothing was kept\n"


def ended(code: str) -> tuple[int, str]:
    script = "import os, signal\nfrom locas_ext.cli.interrupts import importing\n"
    script += "def ctrl_c(): os.kill(os.getpid(), signal.SIGINT)\n" + code
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    "inside",
    [
        "ctrl_c()",
        "try: ctrl_c()\n    except BaseException: pass",
        "import weakref, threading\n    weakref.finalize(threading.Event(), ctrl_c)\n    print('late')",
    ],
)
def test_one_line(inside):
    assert ended(f"with importing():\n    {inside}\n") == (130, LINE)


def test_afterwards_it_is_an_exception_again():
    code = "with importing(): pass\ntry: ctrl_c()\nexcept KeyboardInterrupt: os._exit(7)"
    assert ended(code) == (7, "")


def test_another_handler_stays():
    code = "signal.signal(signal.SIGINT, lambda *_: os._exit(9))\nwith importing(): ctrl_c()"
    assert ended(code) == (9, "")


def test_other_threads_may_import():
    code = "import threading\ndef work():\n    with importing(): os._exit(5)\nthreading.Thread(target=work).start()"
    assert ended(code) == (5, "")


def test_a_command_that_is_ended_while_it_imports():
    code = "import sys\nfrom locas_ext.cli import main\n"
    code += "class Finder:\n    def find_spec(self, name, *_):\n        if name == 'torch': ctrl_c()\n"
    code += "sys.meta_path.insert(0, Finder())\nmain(['generate', '--model', 'm', '--prompt', 'x'])"
    assert ended(code) == (130, LINE)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_or_a_closed_terminal_ends_a_run_as_ctrl_c_does(signum, page, tmp_path, capsys, monkeypatch):
    note, chunks = Run._note, []

    def noted(each, chunk):
        note(each, chunk)
        chunks.append(chunk)
        if len(chunks) == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Run, "_note", noted)
    arguments = ["memorize", page, "--model", MODEL, "--out", tmp_path / "m", "--max-tokens", 200, *WINDOW]
    status, _, err = run(capsys, *arguments)
    assert status == 128 + signum and "what was learned from 64 of 200 tokens is kept in" in " ".join(err.split())
    assert checkpoint.read(tmp_path / "m").fields["tokens_seen"] == 64
    assert signal.getsignal(signum) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored():
    code = "from locas_ext.cli.interrupts import ended_alike\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "with ended_alike(): os.kill(os.getpid(), signal.SIGHUP)\nos._exit(3)"
    assert ended(code) == (3, "")
