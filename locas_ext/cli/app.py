"""The command line: arguments in, one line for what goes wrong. Each command's arguments are in commands/.

Exit status: 0 done, 1 failed, 2 bad arguments (a path that is not what it should be is one), 130 ended by Ctrl-C.
"""

from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from locas_ext.errors import Interrupted, LocasError

from .commands import capability, demo, generate, info, locomo, memorize, merge, perplexity, report

_WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
UsageError: Any = typer.BadParameter.__base__  # typer's or click's, whichever this typer is built on

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Memories for Hugging Face language models that learn while they read.",
)
for command in (
    demo.demo,
    memorize.memorize,
    perplexity.perplexity,
    generate.generate,
    locomo.locomo,
    merge.merge,
    capability.capability,
    report.report,
    info.info,
):
    app.command()(command)


def _complain(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"locas: {' '.join(message.split())}"))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (None: that of this process) and returns the exit status."""
    try:
        status = app(arguments, prog_name="locas", standalone_mode=False) or 0
    except Interrupted as interrupt:
        _complain(f"interrupted: {interrupt}")
        return 130
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except UsageError as error:
        if message := error.format_message():  # empty where help was printed instead
            _complain(message)
        return 2
    except OSError as error:
        # What the system says comes without the file's name, what transformers says as a whole sentence.
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 2 if isinstance(error, _WRONG_PATH) else 1
    except LocasError as error:
        _complain(str(error))
        return 1
    except ValueError as error:
        _complain(str(error))
        return 2
    if status == 130:
        _complain("interrupted: nothing was kept")
    return status
