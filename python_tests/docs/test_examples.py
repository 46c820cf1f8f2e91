"""The examples in docstrings run and show what they say."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import locas_ext

# __main__ runs the command line; _C is compiled.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(locas_ext.__path__, "locas_ext.")
    if not module.name.endswith(("__main__", "_C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    results = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_the_public_surface_has_examples():
    finder = doctest.DocTestFinder()
    shown = {test.name for name in MODULES for test in finder.find(import_module(name)) if test.examples}
    wanted = ("attach", "load", "Memory.memorize", "Memory.feed", "Memory.write", "Backprop", "Write", "TopLoss", "LossAbove")
    assert [name for name in wanted if not any(full.endswith(f".{name}") for full in shown)] == []
