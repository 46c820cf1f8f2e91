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


# ---- what is written ------------------------------------------------------------------------------------------
def overlapping(a, b):
    """Two tensors of the arguments' shape: the same one, or one that begins in the middle of the other."""
    shape, n = (2, 3, R, D), 6 * R * D
    both = torch.rand(2 * n)
    return {a: both[:n].view(shape), b: both[n // 2 : n // 2 + n].view(shape)}, dict.fromkeys((a, b), both[n:].view(shape))


ADAMW, SGD = (ops.update_slots_, adamw_arguments), (ops.sgd_slots_, sgd_arguments)
PAIRS = [
    *[(*ADAMW, *pair) for pair in (("slots", "grad"), ("exp_avg", "exp_avg_sq"), ("exp_avg", "grad"), ("slots", "compute"))],
    *[(*SGD, *pair) for pair in (("slots", "momentum_buffer"), ("momentum_buffer", "grad"), ("slots", "compute"))],
]


@pytest.mark.parametrize("op, arguments, a, b", PAIRS)
def test_what_is_written_shares_memory_with_nothing(op, arguments, a, b):
    for tensors in overlapping(a, b):
        given = arguments(**tensors)
        before = {name: tensor.clone() for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
        with pytest.raises(ValueError, match=f"{op.__name__}: {b} shares memory with {a}, which is written"):
            op(**given)
        assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["inputs", "gradients", "compute"])
def test_slots_are_written_from_elsewhere(name):
    slots, n = torch.rand(1, 2, 8, D), 4
    given = dict(inputs=torch.rand(1, n, D), gradients=torch.rand(1, n, D))
    given[name] = slots if name == "compute" else slots[:, 0, :n]
    with pytest.raises(ValueError, match=f"write_slots_: {name} shares memory with slots"):
        ops.write_slots_(slots, 0, epsilon=0.5, **given)


@pytest.mark.parametrize(
    "update, changes",
    [
        (ADAMW, dict(eps=0.0)),
        (ADAMW, dict(eps=1e-50)),
        (ADAMW, dict(weight_decay=1e39)),
        (ADAMW, dict(learning_rate=1e7)),
        (ADAMW, dict(learning_rate=torch.tensor(1e30))),
        (SGD, dict(learning_rate=1e300)),
        (SGD, dict(momentum=1e300)),
        (SGD, dict(weight_decay=-1e300)),
    ],
)
def test_numbers_that_make_float32_slots_nan_or_nothing(update, changes):
    (op, arguments), (name,) = update, changes
    with pytest.raises(ValueError, match=f"{op.__name__}: {name} is .*; expected a finite number"):
        op(**arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16])
def test_the_dtype_of_step_and_rate(dtype):
    for name in ("step", "learning_rate"):
        with pytest.raises(ValueError, match=f"update_slots_: {name} is {dtype}; expected torch.int64 or"):
            ops.update_slots_(**adamw_arguments(**{name: torch.ones((), dtype=dtype)}))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_hidden_size_of_zero(backend):
    x, weight = torch.zeros(T, 0), torch.zeros(M, 0)
    for op, given in (
        (ops.glu_ffn, dict(gate_weight=weight, up_weight=weight, down_weight=weight.T, slots=torch.zeros(3, R, 0))),
        (ops.sideway_glu, dict(slots=torch.zeros(3, R, 0))),
        (ops.sideway_mlp, dict(slots=torch.zeros(2, R, 0))),
    ):
        with pytest.raises(ValueError, match=rf"{op.__name__}: x has shape \[{T}, 0\]; expected .* with d at least 1"):
            op(x, **given, scale=0.5, backend=backend)


def test_targets_of_another_shape_and_no_vocabulary():
    with pytest.raises(ValueError, match=r"token_nll: targets has shape \[3, 2\]; expected \[2, 3\]"):
        ops.token_nll(torch.zeros(2, 3, 5), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_nll: logits is .* V at least 1"):
        ops.token_nll(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("scale", [1e39, -1e300])
def test_a_scale_that_float32_cannot_hold(scale):
    with pytest.raises(ValueError, match="sideway_glu: scale is .*; expected a finite number"):
        ops.sideway_glu(torch.zeros(T, D), torch.zeros(3, R, D), scale)


@pytest.mark.parametrize("name", ["xielu(1e,2)", "xielu(--,1)", "xielu(1,+)"])
def test_an_activation_with_numbers_that_are_none(name):
    with pytest.raises(ValueError, match="activation is .*; expected one of silu"):
        ops.sideway_glu(torch.zeros(T, D), torch.zeros(3, R, D), 0.5, name)
