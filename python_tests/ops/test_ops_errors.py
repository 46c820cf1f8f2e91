"""Every bad argument of the operations is an error that names the tensor and what was expected."""

import pytest
import torch

from locas_ext import ops

T, D, M, R = 4, 8, 12, 3


def glu_arguments(**changes):
    arguments = dict(
        x=torch.randn(T, D),
        gate_weight=torch.randn(M, D),
        up_weight=torch.randn(M, D),
        down_weight=torch.randn(D, M),
        slots=torch.randn(3, R, D),
        scale=0.5,
    )
    return {**arguments, **changes}


WRONG_SHAPES = {
    "gate_weight": [(M, D + 1), (D,), (M, D, 1)],
    "up_weight": [(M + 1, D), (M, D - 1), (D, M)],
    "down_weight": [(M, D), (D + 1, M), (D, M + 1)],
    "slots": [(2, R, D), (3, R, D + 1), (R, D), (1, 3, R, D)],
    "gate_bias": [(M + 1,), (1, M), ()],
    "up_bias": [(D,), (M, 1)],
    "down_bias": [(M,), (D + 1,)],
}
EXPECTED = {
    "gate_weight": f"[m, {D}]",
    "up_weight": f"[{M}, {D}]",
    "down_weight": f"[{D}, {M}]",
    "slots": f"[3, r, {D}]",
    "gate_bias": f"[{M}]",
    "up_bias": f"[{M}]",
    "down_bias": f"[{D}]",
}


@pytest.mark.parametrize("name, shape", [(n, s) for n, shapes in WRONG_SHAPES.items() for s in shapes])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_glu_ffn_names_the_tensor_of_a_wrong_shape(name, shape, backend):
    with pytest.raises(ValueError) as error:
        ops.glu_ffn(**glu_arguments(**{name: torch.zeros(shape)}), backend=backend)
    message = str(error.value)
    assert f"glu_ffn: {name}" in message and str(list(shape)) in message and EXPECTED[name] in message


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_glu_ffn_names_the_tensor_of_a_wrong_dtype(name):
    shape = {
        "slots": (3, R, D),
        "gate_weight": (M, D),
        "up_weight": (M, D),
        "down_weight": (D, M),
        "gate_bias": (M,),
        "up_bias": (M,),
        "down_bias": (D,),
    }[name]
    with pytest.raises(ValueError, match=f"glu_ffn: {name} is torch.bfloat16; expected torch.float32"):
        ops.glu_ffn(**glu_arguments(**{name: torch.zeros(shape, dtype=torch.bfloat16)}))


@pytest.mark.parametrize("name", ["gate_weight", "up_weight", "down_weight", "slots"])
@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_glu_ffn_names_what_is_not_a_tensor(name, value):
    with pytest.raises(TypeError, match=f"glu_ffn: {name} is {type(value).__name__}; expected a torch.Tensor"):
        ops.glu_ffn(**glu_arguments(**{name: value}))


@pytest.mark.parametrize("op", ["glu_ffn", "sideway_glu", "neuron_importance"])
def test_x_is_checked(op):
    rest = glu_arguments()
    del rest["x"]
    call = {
        "glu_ffn": lambda x, **o: ops.glu_ffn(x, **rest, **o),
        "sideway_glu": lambda x, **o: ops.sideway_glu(x, rest["slots"], 0.5, **o),
        "neuron_importance": lambda x, **o: ops.neuron_importance(x, rest["gate_weight"], rest["up_weight"], **o),
    }[op]
    with pytest.raises(TypeError, match=f"{op}: x is list"):
        call([[1.0]])
    with pytest.raises(ValueError, match=f"{op}: x has no dimensions"):
        call(torch.tensor(1.0))
    with pytest.raises(ValueError, match=f"{op}: .*expected .*{D + 1}"):
        call(torch.randn(T, D + 1))
    with pytest.raises(ValueError, match=f"{op}: x is torch.float64; expected float32, bfloat16 or float16"):
        call(torch.randn(T, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{op}: x is torch.int64"):
        call(torch.ones(T, D, dtype=torch.int64), backend="reference")
    with pytest.raises(ValueError, match=f"{op}: backend is 'cuda'; expected one of auto, fused, matmul, reference"):
        call(torch.randn(T, D), backend="cuda")
    for activation in ("mish", None, 3):
        with pytest.raises(ValueError, match="activation is .*; expected one of silu"):
            call(torch.randn(T, D), activation=activation)


def test_a_tensor_on_another_device():
    with pytest.raises(ValueError, match="glu_ffn: slots is on meta; expected cpu as x"):
        ops.glu_ffn(**glu_arguments(slots=torch.zeros(3, R, D, device="meta")))
    with pytest.raises(ValueError, match="glu_ffn: up_weight is on meta; expected cpu as x"):
        ops.glu_ffn(**glu_arguments(up_weight=torch.zeros(M, D, device="meta")))


@pytest.mark.parametrize("name", ["gate_weight", "up_weight", "down_weight"])
def test_host_weights_that_require_a_gradient(name):
    arguments = glu_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"glu_ffn: {name} requires a gradient.*{name}.requires_grad_\(False\)"):
        ops.glu_ffn(**arguments)
    with torch.no_grad():
        ops.glu_ffn(**arguments)


def test_importance_of_no_tokens():
    with pytest.raises(ValueError, match="x holds no tokens"):
        ops.neuron_importance(torch.zeros(0, D), torch.randn(M, D), torch.randn(M, D))


# ---- updates --------------------------------------------------------------------------------------------------
def adamw_arguments(**changes):
    zeros = {name: torch.zeros(2, 3, R, D) for name in ("slots", "grad", "exp_avg", "exp_avg_sq")}
    return {**zeros, "step": torch.tensor(1), "learning_rate": torch.tensor(0.1), **changes}


def sgd_arguments(**changes):
    zeros = {name: torch.zeros(2, 3, R, D) for name in ("slots", "grad", "momentum_buffer")}
    return {**zeros, "learning_rate": torch.tensor(0.1), "momentum": 0.9, **changes}


STATES = [(ops.update_slots_, adamw_arguments, n) for n in ("grad", "exp_avg", "exp_avg_sq")]
STATES += [(ops.sgd_slots_, sgd_arguments, n) for n in ("grad", "momentum_buffer")]
BAD_COPIES = [torch.zeros(2, 3, R, D + 1), torch.zeros(2, 3, R, D, dtype=torch.float64), torch.zeros(2, 3, D, R).mT]


@pytest.mark.parametrize("op, arguments, name", STATES)
def test_update_states_are_checked(op, arguments, name):
    for bad, problem in (
        (torch.zeros(2, 3, R, D + 1), rf"{name} has shape \[2, 3, {R}, {D + 1}\]; expected \[2, 3, {R}, {D}\]"),
        (torch.zeros(2, 3, R, D, dtype=torch.float16), f"{name} is torch.float16; expected torch.float32"),
        (torch.zeros(2, 3, D, R).mT, f"{name} must be contiguous"),
        (torch.zeros(2, 3, R, D, device="meta"), f"{name} is on meta; expected cpu"),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: {problem}"):
            op(**arguments(**{name: bad}))


@pytest.mark.parametrize("op, arguments", [(ops.update_slots_, adamw_arguments), (ops.sgd_slots_, sgd_arguments)])
def test_update_slots_rate_and_copy_are_checked_and_nothing_is_changed(op, arguments):
    given = arguments(slots=torch.full((2, 3, R, D), 0.25), grad=torch.ones(2, 3, R, D))
    for bad in (torch.zeros(2, 3, R, D, dtype=torch.bfloat16), torch.tensor(1.0), torch.zeros(2, 3, D, R).mT):
        with pytest.raises(ValueError, match=f"{op.__name__}: slots"):
            op(**{**given, "slots": bad})
    for rate in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{op.__name__}: learning_rate is {rate}"):
            op(**{**given, "learning_rate": torch.tensor(rate)})
    with pytest.raises(ValueError, match=rf"{op.__name__}: learning_rate has shape \[2\]; expected a 0-d tensor"):
        op(**{**given, "learning_rate": torch.ones(2)})
    for copy in BAD_COPIES:
        with pytest.raises(ValueError, match=f"{op.__name__}: compute"):
            op(**given, compute=copy)
    assert torch.equal(given["slots"], torch.full((2, 3, R, D), 0.25))


def test_adamw_step_and_betas_are_checked():
    for step in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="update_slots_: step is .*counted from 1"):
            ops.update_slots_(**adamw_arguments(step=torch.tensor(step)))
    for name in ("beta1", "beta2"):
        for value in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match=f"update_slots_: {name} is {value}"):
                ops.update_slots_(**adamw_arguments(), **{name: value})


def test_sgd_with_momentum_needs_a_buffer():
    with pytest.raises(ValueError, match="momentum is 0.9 but momentum_buffer is None"):
        ops.sgd_slots_(**sgd_arguments(momentum_buffer=None))
