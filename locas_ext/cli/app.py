"""The commands, and how one is run. Each command's arguments are in commands/, what goes wrong in failures.py."""

import shutil
import sys
from functools import partial
from typing import Annotated, Any

import typer

from locas_ext.terminal import Terminal
from locas_ext.version import __version__

from .commands import capability, chat, demo, generate, info, locomo, memorize, merge, perplexity, recall, report, study
from .config_file import origin
from .examples import examples
from .failures import Failure, failure
from .grouped import grouped
from .streams import let_go

_PANELS = 76  # columns under which panels of options would cut the options' names

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _PANELS else None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        Terminal().print(f"locas {__version__}")
        raise typer.Exit


@app.callback()
def _locas(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Memories for Hugging Face language models that learn while they read."""


for command in (demo, memorize, study, perplexity, generate, chat, locomo, recall, merge, capability, report, info):
    name = command.__name__.rpartition(".")[2]
    app.command(name, epilog=examples(command.EXAMPLES))(grouped(getattr(command, name)))


def run(arguments: list[str] | None) -> int:
    """Runs a command line (None: that of this process); returns the exit status."""
    context: Any = None
    try:
        # Not app(): it has answers of its own to Ctrl-C and to a closed pipe.
        context = typer.main.get_command(app).make_context("locas", sys.argv[1:] if arguments is None else list(arguments))
        with context:
            context.command.invoke(context)
        _flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ended = failure(error, partial(origin, context)) if context else failure(error)
    _complain(ended)
    return ended.status


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, "standard output") from error


def _complain(ended: Failure) -> None:
    """Prints the one line."""
    if ended.line:
        Terminal(stderr=True).print(f"locas: {' '.join(ended.line.split())}")
    try:
        sys.stdout.flush()
    except OSError:
        let_go(1)
