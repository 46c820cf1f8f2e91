"""What the tests of commands share."""

from locas_ext.cli import main

WINDOW = ["--window", "64", "--stride", "32", "--rank", "4", "--device", "cpu"]


def run(capsys, *arguments):
    """A command. -> its exit status, what it printed, and what it said on standard error."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
