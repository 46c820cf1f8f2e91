"""`locas info`: its arguments and their help."""

from locas_ext.cli.console import console
from locas_ext.errors import LocasError


def info() -> None:
    """Versions, build, devices and a self-test of the kernels, to paste into a bug report."""
    from locas_ext.cli.tasks.info import info as print_info

    if not print_info(console()):
        raise LocasError("the self-test failed: the lines above say where")
