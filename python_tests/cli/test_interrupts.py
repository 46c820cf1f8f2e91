"""Ctrl-C before the work has begun: 130 and one line, also where an import would swallow it."""

import subprocess
import sys

import pytest

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
