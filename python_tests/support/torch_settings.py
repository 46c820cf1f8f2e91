"""torch's global settings, for the time of a block."""

import contextlib


@contextlib.contextmanager
def setting(put, value, before):
    """Inside, a setting is `value`; put: sets it."""
    put(value)
    try:
        yield
    finally:
        put(before)
