"""What the tests of online memorization share."""

import locas_ext as locas
from support.helpers import SETTINGS


def memorize(memory, ids, **changes):
    return memory.memorize(ids, **{**SETTINGS, **changes})


def papers(optimizer, learning_rate, epochs=1, **others):
    """Arguments of memorize() by which a PlainMemory learns the same: a rate that stays, no Shampoo."""
    update = locas.Backprop.paper(optimizer=optimizer, learning_rate=learning_rate, epochs=epochs)
    return {"learning_rate": None, "update": update, **others}
