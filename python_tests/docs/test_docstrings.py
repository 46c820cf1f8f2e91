"""The examples in docstrings run, and public docstrings say what goes in, what comes out and what is raised."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import typing

import pytest

import locas_ext

# Modules whose public names are held to the form of a public docstring: those in __all__, or all without an underscore.
DOCUMENTED = ["locas_ext", "locas_ext.checks", "locas_ext.ops"]
# What the paper defines.
FROM_THE_PAPER = {
    *("attach", "Backprop", "LocasConfig", "Write", "SlotAdamW", "Memory.initialize", "Memory.memorize", "Memory.write"),
    *("Memory.compress", "glu_ffn", "sideway_glu", "sideway_mlp", "neuron_importance", "token_nll"),
    *("update_slots_", "sgd_slots_", "write_slots_"),
}

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


def members(cls):
    """-> (name, function or property) for each public one that a class has from this package, inherited ones too."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        code = member.fget if isinstance(member, property) else inspect.unwrap(member)
        if not name.startswith("_") and inspect.isfunction(code) and code.__module__.startswith("locas_ext"):
            yield name, member if isinstance(member, property) else code


def public(name):
    """-> (dotted name, class, function or property) for each public name, with a public class's own."""
    module = load(name)
    for each in getattr(module, "__all__", None) or [each for each in vars(module) if not each.startswith("_")]:
        member = getattr(module, each)
        if not getattr(member, "__module__", "").startswith("locas_ext"):
            continue
        if inspect.isclass(member):
            yield f"{name}.{each}", member
            yield from ((f"{name}.{each}.{own}", code) for own, code in members(member))
        elif inspect.isfunction(member):
            yield f"{name}.{each}", member


ALL = dict(pair for module in DOCUMENTED for pair in public(module))
TWINS = [name for name in locas_ext.reference.__all__ if name != "adamw_slots_"]


def only(*kinds):
    """Those public names that are of these kinds, as parameters of a test."""
    return [pytest.param(member, id=name) for name, member in ALL.items() if any(kind(member) for kind in kinds)]


def is_record(member):
    """Whether it is a dataclass whose fields are there to be read."""
    return dataclasses.is_dataclass(member) and "Attributes:" in (inspect.getdoc(member) or "")


def takes(member):
    return [name for name in inspect.signature(member).parameters if name not in ("self", "cls", "unknown")]


def section(text, *titles):
    """The lines under a section's title, up to the next one or the end."""
    lines, inside = [], False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            inside = line in titles
        elif inside:
            lines.append(line)
    return lines


def undescribed(names, lines):
    """Those names with no line "name: what it is" or "name, another: what they are"."""
    described = {name for line in lines for name in line.partition(":")[0].replace(",", " ").split() if line[4:5] != " "}
    return [name for name in names if name not in described]


@pytest.mark.parametrize("member", only(inspect.isclass, inspect.isfunction, lambda member: isinstance(member, property)))
def test_a_public_docstring_has_a_summary(member):
    first = (inspect.getdoc(member) or "").partition("\n\n")[0]
    assert first.rstrip().endswith(".") or ":" in first


@pytest.mark.parametrize("member", only(inspect.isfunction))
def test_a_public_function_says_what_goes_in_and_comes_out(member):
    text = inspect.getdoc(member)
    if inspect.signature(member).return_annotation not in (None, "None"):
        assert section(text, "Returns:", "Yields:"), "no Returns"
    if takes(member):
        assert section(text, "Raises:"), "no Raises"
        assert undescribed(takes(member), section(text, "Args:")) == []


@pytest.mark.parametrize("member", only(inspect.isclass))
def test_a_public_class_describes_its_arguments_or_fields(member):
    text = inspect.getdoc(member)
    if is_record(member):
        assert undescribed([field.name for field in dataclasses.fields(member)], section(text, "Attributes:")) == []
    elif member is not locas_ext.Memory and not issubclass(member, Exception):  # locas.attach makes the one, a raise the other
        assert section(text, "Raises:"), "no Raises"
        assert undescribed(takes(member), section(text, "Args:")) == []


@pytest.mark.parametrize("member", only(lambda member: isinstance(member, property)))
def test_a_public_property_has_a_type(member):
    assert "return" in typing.get_type_hints(member.fget)


def test_there_is_an_example_of_every_public_class_and_function():
    without = [
        name
        for name, member in ALL.items()
        if not isinstance(member, property)
        and not name.endswith(".adamw_slots_")  # another name of update_slots_
        and not doctest.DocTestParser().get_examples(inspect.getdoc(member) or "")
    ]
    assert without == []


def test_what_the_paper_defines_names_it():
    named = {name.removeprefix("locas_ext.").removeprefix("ops."): inspect.getdoc(member) for name, member in ALL.items()}
    assert [name for name in sorted(FROM_THE_PAPER) if "Source: " not in named[name]] == []


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_in_plain_torch_has_the_operations_arguments(name):
    twin, operation = getattr(locas_ext.reference, name), getattr(locas_ext.ops, name)
    assert f"`locas_ext.ops.{name}`" in inspect.getdoc(twin)
    assert doctest.DocTestParser().get_examples(inspect.getdoc(twin))
    of_both = [name for name in inspect.signature(operation).parameters if name != "backend"]
    assert list(inspect.signature(twin).parameters) == of_both
