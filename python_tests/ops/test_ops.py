"""The FFN operations against float64 formulas: no less exact than the same computation in plain torch."""

import pytest
import torch
from support.cases import DTYPES, SHAPES, Case, alone, alone_formula, fused, fused_formula
from support.helpers import ACTIVATIONS, act_formula, act_torch, assert_as_exact_as_torch

from locas_ext import ops, reference


@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_glu_ffn_forward_and_backward(shape, dtype, activation, backend):
    case = Case(shape, dtype, seed=sum(shape))
    case.compare(fused(case.scale, activation, backend=backend), fused_formula(case.scale, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sideway_glu_forward_and_backward(shape, dtype, activation):
    case = Case(shape, dtype, seed=sum(shape) + 1)
    case.compare(alone(case.scale, activation), alone_formula(case.scale, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads(dtype, two_threads):
    case = Case((130, 64, 300, 130), dtype, seed=2)
    case.compare(fused(0.5, "silu"), fused_formula(0.5, "silu"))


@pytest.mark.parametrize("seed", range(12))
def test_fresh_random_shapes(seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    shape = (draw(70), draw(90), draw(600), draw(80))
    dtype, activation = DTYPES[draw(4) - 1], ACTIVATIONS[draw(len(ACTIVATIONS)) - 1]
    print(f"shape {shape} {dtype} {activation}")
    biases = draw(3) == 1
    for backend in ("auto", "matmul"):
        case = Case(shape, dtype, seed, biases)
        case.compare(fused(case.scale, activation, backend=backend), fused_formula(case.scale, activation))


@pytest.mark.parametrize("backend", ["auto", "matmul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases(dtype, backend):
    case = Case((9, 20, 30, 5), dtype, seed=3, biases=True)
    case.compare(fused(-1.5, "silu", backend=backend), fused_formula(-1.5, "silu"))


@pytest.mark.parametrize("bias", range(3))
def test_a_single_bias(bias):
    case = Case((9, 20, 31, 5), torch.float32, seed=4, biases=True)
    case.host[3:] = [t if i == bias else None for i, t in enumerate(case.host[3:])]
    case.compare(fused(0.5, "gelu"), fused_formula(0.5, "gelu"))


@pytest.mark.parametrize("formula, ours", [(fused_formula, fused), (alone_formula, alone)], ids=["fused", "alone"])
@pytest.mark.parametrize("x_grad, slots_grad", [(True, False), (False, True)])
def test_gradient_of_only_one_input(formula, ours, x_grad, slots_grad):
    case = Case((11, 20, 31, 5), torch.float32, seed=5)
    case.compare(ours(0.5, "silu"), formula(0.5, "silu"), x_grad, slots_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formula, ours", [(fused_formula, fused), (alone_formula, alone)], ids=["fused", "alone"])
def test_float32_slots_with_half_x(formula, ours, dtype):
    """The slots are rounded to x's dtype and their gradient comes back in float32."""
    case = Case((11, 20, 31, 5), dtype, seed=6, slots_dtype=torch.float32)
    rounded = case.slots.to(dtype)
    case.slots = rounded.float()
    case.compare(ours(0.5, "silu"), formula(0.5, "silu"))


@pytest.mark.parametrize("ours", [fused, alone])
def test_leading_dimensions_are_kept(ours):
    case = Case((24, 20, 31, 5), torch.float32, seed=7)
    flat = ours(0.5, "silu")(case.x, case.host, case.slots)
    for shape in ((2, 3, 4, 20), (24, 1, 20), (1, 24, 20)):
        shaped = ours(0.5, "silu")(case.x.view(shape), case.host, case.slots)
        assert shaped.shape == shape and torch.equal(shaped.view(24, 20), flat)
    vector = ours(0.5, "silu")(case.x[3], case.host, case.slots)
    assert vector.shape == (20,)
    torch.testing.assert_close(vector, flat[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formula, ours", [(fused_formula, fused), (alone_formula, alone)], ids=["fused", "alone"])
@pytest.mark.parametrize("layout", ["transposed", "every second row", "columns of a wider one", "broadcast"])
def test_non_contiguous_x_and_gradient(formula, ours, layout, dtype):
    case = Case((12, 20, 31, 5), dtype, seed=8)
    arrange = {
        "transposed": lambda t: t.T.contiguous().T,
        "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
        "columns of a wider one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "broadcast": lambda t: t[:1].expand(t.shape),
    }[layout]
    case.x, case.dy = arrange(case.x), arrange(case.dy)

    def from_view(x, host, slots):
        return ours(0.5, "silu")(arrange(x) if layout != "broadcast" else x, host, slots)

    case.compare(from_view, formula(0.5, "silu"))


def test_non_contiguous_slots_and_weights():
    case = Case((12, 20, 31, 5), torch.float32, seed=9)
    plain = fused(0.5, "silu")(case.x, case.host, case.slots)
    case.slots = case.slots.transpose(0, 2).contiguous().transpose(0, 2)
    case.host[:3] = [t.T.contiguous().T for t in case.host[:3]]
    case.compare(fused(0.5, "silu"), fused_formula(0.5, "silu"))
    torch.testing.assert_close(fused(0.5, "silu")(case.x, case.host, case.slots), plain)


def test_strided_biases_and_slots_that_repeat_a_column():
    case = Case((12, 20, 31, 5), torch.float32, seed=9)
    case.host[3:] = [torch.randn(2 * n)[::2] for n in (31, 31)] + [torch.randn(1).expand(20)]
    case.slots = case.slots[..., :1].expand(case.slots.shape)
    copies = [t.contiguous() for t in case.host]
    ours = fused(0.5, "silu")
    torch.testing.assert_close(ours(case.x, case.host, case.slots), ours(case.x, copies, case.slots.contiguous()))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_slots(backend):
    x, slots = torch.randn(4, 20, requires_grad=True), torch.zeros(3, 0, 20, requires_grad=True)
    y = ops.sideway_glu(x, slots, 0.5, backend=backend)
    y.sum().backward()
    assert not y.any() and not x.grad.any() and slots.grad.shape == slots.shape


@pytest.mark.parametrize("ours", [fused, alone])
@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20)])
def test_no_tokens(ours, shape):
    case = Case((4, 20, 31, 5), torch.float32, seed=10)
    x, slots = torch.zeros(shape, requires_grad=True), case.slots.clone().requires_grad_()
    y = ours(0.5, "silu")(x, case.host, slots)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.equal(slots.grad, torch.zeros_like(slots))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit(dtype, two_threads):
    case = Case((130, 64, 300, 17), dtype, seed=11)
    first, second = (case.run(fused(0.5, "silu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=False))
    importance = lambda: ops.neuron_importance(case.x, *case.host[:2])
    assert torch.equal(importance(), importance())


def test_saved_values_do_not_depend_on_whether_a_gradient_is_needed():
    case = Case((12, 20, 31, 5), torch.float32, seed=12)
    with torch.no_grad():
        plain = fused(0.5, "silu")(case.x, case.host, case.slots)
    assert torch.equal(plain, case.run(fused(0.5, "silu"))[0])


def test_inputs_are_left_alone():
    case = Case((12, 20, 31, 5), torch.float32, seed=13, biases=True)
    operands = [case.x, case.slots, *case.host]
    before = [t.clone() for t in operands]
    x, slots = case.x.requires_grad_(), case.slots.requires_grad_()
    fused(0.5, "silu")(x, case.host, slots).backward(case.dy)
    assert all(torch.equal(a.detach(), b) for a, b in zip(operands, before, strict=False))


def test_the_backward_is_once_differentiable_and_says_so():
    case = Case((4, 20, 31, 5), torch.float32, seed=14)
    x, slots = case.x.requires_grad_(), case.slots.requires_grad_()
    y, dy = fused(0.5, "silu")(x, case.host, slots), case.dy.requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---- importance -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_neuron_importance(activation, dtype, biases):
    case = Case((150, 24, 300, 1), dtype, seed=15, biases=biases)

    def formula(x, host, act):
        gate, up = (torch.nn.functional.linear(x, host[i], host[3 + i]) for i in (0, 1))
        hidden = (act(gate, activation) * up).abs()
        return hidden.to(torch.float64 if x.dtype == torch.float64 else torch.float32).mean(0)

    exact = formula(case.x.double(), [t if t is None else t.double() for t in case.host], act_formula)
    peer = formula(case.x, case.host, act_torch)
    ours = ops.neuron_importance(case.x, *case.host[:2], activation, *case.host[3:5])
    assert ours.dtype == torch.float32
    assert_as_exact_as_torch("importance", ours, peer, exact)


def test_neuron_importance_sees_all_leading_dimensions_and_makes_no_graph():
    case = Case((24, 20, 31, 5), torch.float32, seed=16)
    x = case.x.requires_grad_()
    whole = ops.neuron_importance(x.view(2, 3, 4, 20), *case.host[:2])
    assert torch.equal(whole, ops.neuron_importance(x, *case.host[:2])) and not whole.requires_grad


def test_importance_ranks_by_magnitude_not_by_sign():
    x = torch.ones(2, 1)
    gate, up = torch.tensor([[5.0], [5.0], [5.0]]), torch.tensor([[-3.0], [1.0], [2.0]])
    assert ops.neuron_importance(x, gate, up).argsort(descending=True).tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_is_the_same_for_any_number_of_threads(dtype, two_threads):
    case = Case((150, 24, 600, 1), dtype, seed=16)
    on_two = ops.neuron_importance(case.x, *case.host[:2])
    torch.set_num_threads(1)
    assert torch.equal(ops.neuron_importance(case.x, *case.host[:2]), on_two)


# ---- the reference backend ------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula_in_float64(activation):
    case = Case((7, 13, 29, 3), torch.float64, seed=17, biases=True)
    for ours, formula in ((fused, fused_formula), (alone, alone_formula)):
        mine = case.run(ours(0.5, activation, backend="reference"))
        exact = case.run(lambda *a: formula(0.5, activation)(*a, act_formula))
        for a, b in zip(mine, exact, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_gradcheck_of_the_reference(activation):
    case = Case((3, 5, 7, 2), torch.float64, seed=18, biases=True)
    x, slots = case.x.requires_grad_(), case.slots.requires_grad_()
    function = lambda x, slots: reference.glu_ffn(x, *case.host[:3], slots, 0.5, activation, *case.host[3:])
    assert torch.autograd.gradcheck(function, (x, slots))
    assert torch.autograd.gradcheck(lambda x, slots: reference.sideway_glu(x, slots, 0.5, activation), (x, slots))


# ---- autocast -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ours", [fused, alone])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_computes_in_the_autocast_dtype(ours, backend):
    case = Case((12, 20, 31, 5), torch.float32, seed=19, biases=True)
    function = ours(0.5, "silu", backend=backend)
    x, slots = case.x.clone().requires_grad_(), case.slots.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, case.host, slots)
    assert y.dtype == torch.bfloat16
    y.backward(case.dy.bfloat16())
    assert x.grad.dtype == slots.grad.dtype == torch.float32

    half_host = [t if t is None else t.bfloat16() for t in case.host]
    half_x = case.x.bfloat16().requires_grad_()
    half_slots = case.slots.clone().requires_grad_()
    expected = function(half_x, half_host, half_slots)
    expected.backward(case.dy.bfloat16())
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, half_x.grad.float()) and torch.equal(slots.grad, half_slots.grad)


# ---- special values -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype, activation):
    case = Case((4, 20, 31, 5), dtype, seed=20)
    case.x[1, 3] = float("nan")
    y, dx, d_slots = case.run(fused(0.5, activation))
    assert y[1].isnan().all() and dx[1].isnan().all() and d_slots.isnan().all()
    assert not y[[0, 2, 3]].isnan().any() and not dx[[0, 2, 3]].isnan().any()
    y, dx, d_slots = case.run(alone(0.5, activation))
    assert y[1].isnan().all() and dx[1].isnan().all() and d_slots.isnan().all()
    assert ops.neuron_importance(case.x, *case.host[:2], activation).isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e6])
def test_large_inputs_stay_right(activation, magnitude):
    """One neuron with pre-activations of +-magnitude."""
    for sign in (1.0, -1.0):
        case = Case((1, 1, 1, 1), torch.float32, seed=21)
        case.x = torch.tensor([[sign * magnitude]])
        case.host[:3] = [torch.ones(1, 1) for _ in range(3)]
        case.slots, case.dy = torch.ones(3, 1, 1), torch.ones(1, 1)
        mine = case.run(fused(0.5, activation))
        exact = case.run(lambda *a: fused_formula(0.5, activation)(*a, act_torch), torch.float64)
        for name, a, b in zip(("y", "dx", "d_slots"), mine, exact, strict=False):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6, msg=f"{name} at {sign * magnitude}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype, magnitude", [(torch.float32, 1e9), (torch.bfloat16, 1e9), (torch.float16, 150.0)])
def test_large_inputs_do_not_become_nan(activation, dtype, magnitude):
    case = Case((6, 20, 31, 5), dtype, seed=22)
    if activation[:5] in ("relu2", "xielu") and dtype == torch.float16:
        magnitude = 10.0  # the squares of larger numbers are out of float16's range
    case.x = case.x.clamp(-1, 1) * magnitude
    assert all(t.isfinite().all() for t in case.run(fused(0.5, activation)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation):
    """Each activation and its slope, point by point: one token a value, gate = x, everything else 1."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-30, 2, 500), -torch.logspace(-30, 2, 500)])[:, None]
    slots = torch.zeros(3, 1, 2)
    slots[0, 0, 0] = slots[1, 0, 1] = slots[2, 0, 0] = 1.0
    points = torch.cat([x, torch.ones_like(x)], 1).requires_grad_()
    y = ops.sideway_glu(points, slots, 1.0, activation)
    y[:, 0].sum().backward()
    exact_x = x.double().requires_grad_()
    exact = act_torch(exact_x, activation)
    exact.sum().backward()
    # float32 rounding of x * sigmoid(x): a few units of the result, and of 1 where terms of the slope cancel
    torch.testing.assert_close(y[:, :1].detach().double(), exact.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(points.grad[:, :1].double(), exact_x.grad, rtol=2e-6, atol=2e-6)
