"""What the tests of commands share."""

import sys

import torch

from locas_ext.cli import main

WINDOW = ["--window", "64", "--stride", "32", "--rank", "4", "--device", "cpu"]


def run(capsys, *arguments):
    """A command. -> its exit status, what it printed, and what it said on standard error."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def exit_with_status(command):
    """Ends this process as the command ends."""
    torch.set_num_threads(1)  # as in the tests' process: torch's products may differ by threads
    sys.exit(main(command))
