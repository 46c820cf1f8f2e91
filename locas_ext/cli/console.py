"""Where the commands print."""

from rich.console import Console


def console() -> Console:
    # Soft wrapping: piped into a file or pasted into a report, lines stay whole.
    return Console(highlight=False, soft_wrap=True)
