"""Options' values: from the command line as text and from a file as YAML values, refused in the same words."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locas_ext.cli import values
from locas_ext.cli.options import DTYPES
from locas_ext.cli.values import BadValue, integer, names, number, one_of, path, text
from locas_ext.config import LocasConfig

KINDS = [
    integer(1),
    integer(0, 9),
    number(low=0),
    number(above=0),
    one_of(DTYPES),
    text("T"),
    path("P"),
    names(),
    values.LAYERS,
    values.SCALE,
    values.TOKENS,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
)


@given(st.sampled_from(KINDS), JSON | st.sampled_from(["9" * 5000, "1e999", "nan", "\0", "\udcff", "-0", "0x1", "1_0"]))
def test_any_value_is_read_or_refused_in_one_short_line(kind, value):
    try:
        once = kind(value)
    except BadValue as error:
        assert "; expected " in error.message and "\n" not in error.message and len(error.message) < 300
        return
    assert once == kind(once), "what was read can be read again: typer does it with defaults"


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (integer(1), "12", 12),
        (number(low=0), "4e-3", 4e-3),
        (names(), "a, b,,c", ["a", "b", "c"]),
        (names(), ["a", "b"], ["a", "b"]),
        (values.LAYERS, "0,5,-1", (0, 5, -1)),
        (values.LAYERS, [0, 2], (0, 2)),
        (values.SCALE, "16x", "16x"),
        (values.SCALE, "0.3", 0.3),
        (values.SCALE, 2, 2.0),
        (values.TOKENS, "top-loss:2", "top-loss:2"),
        (values.TOKENS, "loss-above:2.0", "loss-above:2.0"),
    ],
)
def test_read(kind, value, expected):
    assert kind(value) == expected


@pytest.mark.parametrize(
    "kind, value",
    [
        (integer(1), "0"),
        (integer(1), 2.5),
        (integer(1), True),
        (integer(0, 9), "10"),
        (number(low=0), "-1"),
        (number(low=0), math.nan),
        (number(above=0), 0),
        (one_of(DTYPES), "float64"),
        (text("T"), "\udcff"),
        (values.LAYERS, "a"),
        (values.LAYERS, []),
        (values.SCALE, "0"),
        (values.TOKENS, "2"),
        (values.TOKENS, "top-loss:0"),
        (values.TOKENS, "top-loss:1.5"),
        (values.TOKENS, "loss-above:inf"),
        (names(DTYPES), ""),
        (names(DTYPES), " , "),
        (names(DTYPES), "float16,float32,float16"),
        (values.MODEL, ""),
        (number(low=0), "1e300"),
        (integer(0), 2**53 + 1),
    ],
)
def test_refused(kind, value):
    with pytest.raises(BadValue):
        kind(value)


@given(st.text(max_size=6) | st.floats() | st.integers())
def test_scale_takes_what_the_config_takes(value):
    try:
        expected = LocasConfig(scale=values.SCALE(value)).scale
    except BadValue:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            LocasConfig(scale=float(value) if isinstance(value, str) and value not in ("host",) else value)
        return
    assert expected == values.SCALE(value)


def test_a_home_folder_is_meant_where_no_shell_has_replaced_it(monkeypatch):
    """As in --out=~/memory and in a file: a folder called ~ would be made, and one day be removed with all that ~ means."""
    monkeypatch.setenv("HOME", "/home/ada")
    assert path("P")("~/a") == Path("/home/ada/a") and path("P")("~") == Path("/home/ada")
    assert values.MODEL("~/host") == "/home/ada/host" and values.MODEL("Qwen/~x") == "Qwen/~x"
    assert path("P")("~a/b") == Path("~a/b") and path("P")("a/~") == Path("a/~") and path("P")("./~") == Path("~")
