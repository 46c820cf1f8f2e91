"""The command line: `locas`, `python -m locas_ext`."""

from .app import main

__all__ = ["main"]
