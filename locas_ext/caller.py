"""Whose line a warning is about."""

import os
import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep


def caller_stacklevel() -> int:
    """The `stacklevel` with which a warning points at the nearest line outside locas_ext, whatever calls lie between.

    To be called in the `warnings.warn(...)` call itself.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
