"""What the tests of online memorization share."""

from support.helpers import (
    SETTINGS,
)


def memorize(memory, ids, **changes):
    return memory.memorize(ids, **{**SETTINGS, **changes})
