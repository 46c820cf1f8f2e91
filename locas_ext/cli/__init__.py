"""The command line: `locas`, `python -m locas_ext`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (None: that of this process) and returns the exit status."""
    from .interrupts import ended_alike, importing
    from .streams import prepare

    prepare()
    with ended_alike():
        with importing():
            from .app import run
        return run(arguments)
