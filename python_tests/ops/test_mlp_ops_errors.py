"""Every bad argument of sideway_mlp and write_slots_ is an error that names it, and nothing is changed."""

import math

import pytest
import torch

from locas_ext import ops

T, D, R = 4, 8, 3


def test_sideway_mlp_arguments_are_checked():
    x, slots = torch.randn(T, D), torch.randn(2, R, D)
    for bad in ((3, R, D), (2, R, D + 1), (R, D)):
        with pytest.raises(ValueError) as error:
            ops.sideway_mlp(x, torch.zeros(bad), 0.5)
        assert f"sideway_mlp: slots has shape {list(bad)}; expected [2, r, {D}]" in str(error.value)
    with pytest.raises(ValueError, match="sideway_mlp: slots is torch.float64; expected torch.float32"):
        ops.sideway_mlp(x, slots.double(), 0.5)
    with pytest.raises(ValueError, match="sideway_mlp: slots is on meta; expected cpu as x"):
        ops.sideway_mlp(x, slots.to("meta"), 0.5)
    with pytest.raises(ValueError, match="sideway_mlp: backend is 'fused', which exists for hosts with a GLU"):
        ops.sideway_mlp(x, slots, 0.5, backend="fused")
    with pytest.raises(TypeError, match="sideway_mlp: slots is NoneType"):
        ops.sideway_mlp(x, None, 0.5)


def writing_arguments(**changes):
    arguments = dict(
        slots=torch.full((2, 2, 6, D), 0.25),
        start=1,
        inputs=torch.randn(2, T, D),
        gradients=torch.randn(2, T, D),
        epsilon=0.1,
        compute=None,
        gradient_norm=None,
    )
    return {**arguments, **changes}


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(slots=torch.zeros(2, 3, 6, D)), r"slots must be a float32 tensor \[L, 2, capacity, d\]"),
        (dict(slots=torch.zeros(2, 6, D)), r"slots must be a float32 tensor \[L, 2, capacity, d\]"),
        (dict(slots=torch.zeros(2, 2, 6, D, dtype=torch.bfloat16)), "slots must be a float32 tensor"),
        (dict(slots=torch.zeros(2, 2, D, 6).mT), "slots must be contiguous"),
        (dict(inputs=torch.zeros(3, T, D)), rf"inputs has shape \[3, {T}, {D}\]; expected \[2, n, {D}\]"),
        (dict(inputs=torch.zeros(2, T, D + 1)), rf"inputs has shape \[2, {T}, {D + 1}\]; expected \[2, n, {D}\]"),
        (dict(inputs=torch.zeros(2, T, D).double()), "inputs is torch.float64; expected torch.float32 or torch.bfloat16"),
        (dict(inputs=torch.zeros(2, T, D, device="meta")), "inputs is on meta; expected cpu"),
        (dict(gradients=torch.zeros(2, T + 1, D)), rf"gradients has shape .*; expected \[2, {T}, {D}\]"),
        (dict(gradients=torch.zeros(2, T, D).half()), "gradients is torch.float16; expected torch.float32"),
        (dict(compute=torch.zeros(2, 2, 5, D)), rf"compute has shape .*; expected \[2, 2, 6, {D}\]"),
        (dict(compute=torch.zeros(2, 2, 6, D).double()), "compute is torch.float64; expected torch.float32 or"),
        (dict(compute=torch.zeros(2, 2, D, 6).mT), "compute must be contiguous"),
        (dict(gradient_norm=torch.ones(T + 1)), rf"gradient_norm has shape .*; expected \[{T}\]"),
        (dict(gradient_norm=torch.ones(T).double()), "gradient_norm is torch.float64; expected torch.float32"),
        (dict(start=-1), rf"start is -1; expected an integer from 0 to 2 \({T} tokens, capacity 6\)"),
        (dict(start=3), rf"start is 3; expected an integer from 0 to 2 \({T} tokens, capacity 6\)"),
        (dict(epsilon=0.0), "epsilon is 0.0; expected a finite number > 0"),
        (dict(epsilon=-1.0), "epsilon is -1.0; expected a finite number > 0"),
        (dict(epsilon=math.nan), "epsilon is nan; expected a finite number > 0"),
        (dict(epsilon=math.inf), "epsilon is inf; expected a finite number > 0"),
        (dict(epsilon=1e39), r"epsilon is 1e[+]39; expected a finite number > 0 and <= 3.4.*e[+]38 \(the slots are float32\)"),
        (
            dict(start=0, inputs=torch.zeros(2, 7, D), gradients=torch.zeros(2, 7, D)),
            "inputs holds 7 tokens; expected at most 6",
        ),
    ],
)
def test_writing_arguments_are_checked_and_nothing_is_changed(changes, problem):
    arguments = writing_arguments(**changes)
    before = arguments["slots"].clone()
    with pytest.raises(ValueError, match=f"write_slots_: {problem}"):
        ops.write_slots_(**arguments)
    assert torch.equal(arguments["slots"], before)


def test_writing_arguments_of_another_type():
    for changes, problem in (
        (dict(inputs=None), "inputs is NoneType"),
        (dict(gradients=3), "gradients is int"),
        (dict(start=1.0), "start is 1.0; expected an integer from 0 to 2"),
    ):
        with pytest.raises(TypeError, match=f"write_slots_: {problem}"):
            ops.write_slots_(**writing_arguments(**changes))
