"""The examples in docstrings run, and public docstrings say what goes in, what comes out and what is raised."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import locas_ext

# Modules whose public names are held to the form of a public docstring: those in __all__, or all without an underscore.
DOCUMENTED = ["locas_ext.checks", "locas_ext.ops"]

MODULES = ["locas_ext", *(module.name for module in pkgutil.walk_packages(locas_ext.__path__, "locas_ext."))]
OPTIONAL = {"lm_eval", "nltk", "peft"}


def load(name):
    """The module; the test is skipped where a library is missing that the package does not require."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name and error.name.split(".")[0] in OPTIONAL:
            pytest.skip(f"needs {error.name}")
        raise


def examples(name):
    """The module's own docstrings with at least one example."""
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(load(name)) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("__main__", "._C"))])
def test_the_examples_run(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failures = []
    for test in examples(name):
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


def public(name):
    """-> (dotted name, function) for each public function and each public method of a public class."""
    module = load(name)
    for each in getattr(module, "__all__", None) or [each for each in vars(module) if not each.startswith("_")]:
        member = getattr(module, each)
        if not getattr(member, "__module__", "").startswith("locas_ext"):
            continue
        if inspect.isclass(member):
            yield f"{name}.{each}", member
            for method, function in vars(member).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{each}.{method}", function
        elif inspect.isfunction(member):
            yield f"{name}.{each}", member


def arguments(member):
    return [name for name in inspect.signature(member).parameters if name not in ("self", "cls")]


PUBLIC = [pytest.param(member, id=name) for module in DOCUMENTED for name, member in public(module)]


@pytest.mark.parametrize("member", PUBLIC)
def test_a_public_docstring_is_complete(member):
    text = inspect.getdoc(member) or ""
    assert text.partition("\n")[0].rstrip().endswith(".") or ":" in text.partition("\n")[0], "no summary line"
    if not arguments(member):
        return
    for section in ("Args:", "Raises:") if inspect.isclass(member) else ("Args:", "Returns:", "Raises:"):
        assert section in text, f"no {section}"
    described = text[text.index("Args:") : text.index("Returns:") if "Returns:" in text else text.index("Raises:")]
    for name in arguments(member):
        assert any(name in line.partition(":")[0].replace(",", " ").split() for line in described.splitlines()), name


def test_there_are_examples_of_every_operation():
    documented = {
        test.name.rpartition(".")[2] for name in MODULES if name.startswith("locas_ext.ops.") for test in examples(name)
    }
    assert set(locas_ext.ops.__all__) - {"adamw_slots_"} <= documented  # which is another name of update_slots_
