"""Standard streams that are closed, full or of another encoding."""

import os
import subprocess
import sys

import pytest

PREPARED = "import os, sys\nfrom locas_ext.cli.streams import prepare\nprepare()\n"


def ended(code, redirected="", **environment):
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, PREPARED + code]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_file_never_gets_the_number_of_a_closed_stream(closed, tmp_path):
    code = f"file = open({str(tmp_path / 'memory')!r}, 'w')\nprint('a')\nprint('b', file=sys.stderr)\nsys.stdin.read()\n"
    code += "os.write(1, b'c')\nos.write(2, b'd')\nos._exit(file.fileno())"
    assert ended(code, closed).returncode > 2
    assert (tmp_path / "memory").read_bytes() == b""


def test_what_standard_output_cannot_encode_is_escaped():
    result = ended("print('t\\xe9 \\U0001f600')", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and result.stdout == b"t\\xe9 \\U0001f600\n"
