"""Checks of plain arguments: what is taken comes back as plain Python, what is not is named."""

import doctest
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from locas_ext import checks

INTEGERS = [3, np.int64(3), np.uint8(3), np.int16(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)]
NUMBERS = [0.5, np.float32(0.5), np.float16(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
NOT_NUMBERS = [None, "3", b"3", True, np.bool_(True), torch.tensor(True), [3], np.array([3]), torch.tensor([3]), 3j, object]


def test_the_examples():
    assert doctest.testmod(checks).failed == 0


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_an_integer_comes_back_plain(value):
    assert type(checks.integer("rank", value, 3, 3)) is int
    assert checks.integer("rank", value) == 3
    assert type(checks.number("scale", value)) is float


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_a_number_comes_back_plain(value):
    assert type(checks.number("scale", value, 0.5, 0.5)) is float
    with pytest.raises(TypeError, match="expected an integer"):
        checks.integer("rank", value)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name_and_value(value):
    for check in (checks.integer, checks.number):
        with pytest.raises(TypeError) as error:
            check("rank", value)
        assert str(error.value).startswith(f"rank is {value!r}; expected a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32(np.nan), torch.tensor(torch.inf), 10**400])
def test_a_number_is_finite(value):
    with pytest.raises(ValueError, match="expected a finite number"):
        checks.number("epsilon", value)


@pytest.mark.parametrize("seed", range(20))
def test_ranges(seed):
    """Against plain comparisons, with bounds drawn at random."""
    rng = np.random.default_rng(seed)
    low, high = sorted(int(bound) for bound in rng.integers(-5, 6, 2))
    for value in range(-7, 8):
        for bounds, taken in (
            ({"low": low}, low <= value),
            ({"high": high}, value <= high),
            ({"low": low, "high": high}, low <= value <= high),
        ):
            for check in (checks.integer, checks.number):
                if taken:
                    assert check("n", value, **bounds) == value
                else:
                    with pytest.raises(ValueError, match=rf"n is {value}; expected .*{'|'.join(map(str, bounds.values()))}"):
                        check("n", value, **bounds)
        for bounds, taken in (({"above": low}, low < value), ({"below": high}, value < high)):
            if taken:
                assert checks.number("n", value, **bounds) == value
            else:
                with pytest.raises(ValueError, match=f"n is {value}; expected a finite number [<>] "):
                    checks.number("n", value, **bounds)


def test_the_reason_of_a_range_is_told():
    with pytest.raises(ValueError, match=r"window is 9; expected an integer from 2 to 8 \(the host's positions\)$"):
        checks.integer("window", 9, 2, 8, "the host's positions")
    with pytest.raises(TypeError, match=r"rank is None; expected an integer >= 1 \(slots per layer\)$"):
        checks.integer("rank", None, 1, why="slots per layer")
    with pytest.raises(ValueError, match=r"beta1 is 1.0; expected a finite number >= 0 and < 1$"):
        checks.number("beta1", 1.0, low=0, below=1)


def test_booleans():
    for value in (True, False, np.bool_(True), torch.tensor(False)):
        assert checks.boolean("clip", value) is bool(value)
    for value in (0, 1, None, "yes", np.int64(1)):
        with pytest.raises(TypeError, match="clip is .*; expected True or False"):
            checks.boolean("clip", value)


def test_names():
    assert checks.one_of("backend", "auto", ("auto", "matmul")) == "auto"
    assert type(checks.one_of("backend", np.str_("auto"), ("auto", "matmul"))) is str
    for value in ("Auto", "", None, 3, ["auto"], np.array(["auto", "matmul"])):
        with pytest.raises(ValueError, match="backend is .*; expected one of auto, matmul"):
            checks.one_of("backend", value, ("auto", "matmul"))


@pytest.mark.parametrize("values", [[1, 2], (np.int64(1), 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])], ids=repr)
def test_sequences_of_integers(values):
    result = checks.integers("layers", values)
    assert result == (1, 2) and all(type(value) is int for value in result)


@pytest.mark.parametrize("values", [None, 3, "12", b"12", [1, True], [1.0], {1, 2}, np.array([[1]]), np.array([0.5])], ids=repr)
def test_other_sequences_are_refused(values):
    with pytest.raises(TypeError, match="layers"):
        checks.integers("layers", values)
    with pytest.raises(ValueError, match=r"layers\[1\] is 9; expected an integer <= 8"):
        checks.integers("layers", [1, 9], high=8)
