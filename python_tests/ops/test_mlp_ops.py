"""sideway_mlp, the forward and backward of a Locas-MLP memory, against float64 formulas."""

import pytest
import torch
from support.devices import DEVICES, DTYPES
from support.helpers import ACTIVATIONS, act_formula, act_torch, assert_as_exact_as_torch, plain_sideway_mlp

from locas_ext import ops, reference
from locas_ext.ops.activations import activation_index
from locas_ext.ops.autograd import SidewayMlpFunction
from locas_ext.ops.backends import matmul
from locas_ext.ops.types import SlotViews

# tokens, d, r
SHAPES = {
    "one token": (1, 16, 4),
    "odd": (7, 13, 3),
    "one slot": (5, 32, 1),
    "all ones": (1, 1, 1),
    "two blocks": (33, 24, 257),
    "many tokens": (130, 64, 40),
}


class Case:
    """Random operands of one shape, in `dtype`; everything exact is computed from them in float64."""

    def __init__(self, shape, dtype, seed, slots_dtype=None, device="cpu"):
        tokens, d, r = shape
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        self.dtype, self.scale = dtype, 0.37
        self.x, self.dy = normal(tokens, d).to(device, dtype), normal(tokens, d).to(device, dtype)
        # values that the compute dtype holds, so that float32 slots are rounded to the very same
        self.slots = (normal(2, r, d) / d**0.5).to(dtype).to(device, slots_dtype or dtype)

    def run(self, function, to=None, x_grad=True, slots_grad=True):
        """-> y, dx, d_slots of function(x, slots) with the operands as `to` asks (a dtype or None)."""
        cast = lambda t: t.detach().clone() if to is None else t.to(to)
        x, slots = cast(self.x).requires_grad_(x_grad), cast(self.slots).requires_grad_(slots_grad)
        y = function(x, slots)
        y.backward(cast(self.dy))
        return y.detach(), x.grad, slots.grad

    def compare(self, activation, ours=None, **which):
        """Our y, dx and d_slots with the formula's in float64 and with what torch makes of it at our dtype."""
        ours = ours or (lambda x, slots: ops.sideway_mlp(x, slots, self.scale, activation))
        formula = lambda act: lambda x, slots: plain_sideway_mlp(x, slots, self.scale, activation, act)
        exact = self.run(formula(act_formula), torch.float64, **which)
        peer = self.run(formula(act_torch), self.dtype, **which)
        mine = self.run(ours, **which)
        for name, a, b, c in zip(("y", "dx", "d_slots"), mine, peer, exact, strict=False):
            assert (a is None) == (c is None), name
            if a is not None:
                assert_as_exact_as_torch(name, a, b, c, torch.finfo(self.dtype).eps)
        assert mine[0].dtype == self.dtype
        assert mine[2] is None or mine[2].dtype == self.slots.dtype
        return mine


# ---- sideway_mlp ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sideway_mlp_forward_and_backward(shape, dtype, activation, device):
    Case(shape, dtype, seed=sum(shape), device=device).compare(activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(8))
def test_fresh_random_shapes(seed, device):
    generator = torch.Generator().manual_seed(2000 + seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=generator))
    shape = (draw(70), draw(90), draw(600))
    dtype, activation = DTYPES[draw(4) - 1], ACTIVATIONS[draw(len(ACTIVATIONS)) - 1]
    print(f"shape {shape} {dtype} {activation}")
    Case(shape, dtype, seed, device=device).compare(activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [dict(x_grad=False), dict(slots_grad=False)], ids=str)
def test_gradient_of_only_one_input(which, dtype):
    Case((11, 20, 5), dtype, seed=1).compare("gelu", **which)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_slots_with_half_x(dtype):
    Case((11, 20, 5), dtype, seed=2, slots_dtype=torch.float32).compare("relu")


def test_two_threads(two_threads):
    Case((130, 64, 300), torch.float32, seed=3).compare("relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every second row", "columns of a wider one"])
def test_non_contiguous_x_and_gradient(layout, dtype):
    case = Case((12, 20, 5), dtype, seed=4)
    arrange = {
        "transposed": lambda t: t.T.contiguous().T,
        "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
        "columns of a wider one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    }[layout]
    case.x, case.dy = arrange(case.x), arrange(case.dy)
    case.compare("silu", lambda x, slots: ops.sideway_mlp(arrange(x), slots, case.scale, "silu"))


def test_leading_dimensions_are_kept():
    case = Case((24, 20, 5), torch.float32, seed=5)
    flat = ops.sideway_mlp(case.x, case.slots, 0.5)
    for shape in ((2, 3, 4, 20), (24, 1, 20)):
        assert torch.equal(ops.sideway_mlp(case.x.view(shape), case.slots, 0.5), flat.view(shape))
    torch.testing.assert_close(ops.sideway_mlp(case.x[3], case.slots, 0.5), flat[3])


@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20)])
def test_no_tokens(shape):
    x, slots = torch.zeros(shape, requires_grad=True), torch.randn(2, 5, 20, requires_grad=True)
    y = ops.sideway_mlp(x, slots, 0.5)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.equal(slots.grad, torch.zeros(2, 5, 20))


def test_no_slots_are_a_no_op():
    x, slots = torch.randn(4, 20, requires_grad=True), torch.zeros(2, 0, 20, requires_grad=True)
    y = ops.sideway_mlp(x, slots, 0.5)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(4, 20)) and torch.equal(x.grad, torch.zeros(4, 20))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula_in_float64(activation):
    case = Case((7, 13, 3), torch.float64, seed=6)
    mine = case.run(lambda x, slots: ops.sideway_mlp(x, slots, 0.5, activation, backend="reference"))
    exact = case.run(lambda x, slots: plain_sideway_mlp(x, slots, 0.5, activation, act_formula))
    for a, b in zip(mine, exact, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    case = Case((3, 5, 2), torch.float64, seed=7)
    x, slots = case.x.requires_grad_(), case.slots.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, slots: reference.sideway_mlp(x, slots, 0.5, activation), (x, slots))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_computes_in_the_autocast_dtype(backend):
    case = Case((12, 20, 5), torch.float32, seed=8)
    case.dy = case.dy.bfloat16()
    x, slots = case.x.clone().requires_grad_(), case.slots.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.sideway_mlp(x, slots, 0.5, backend=backend)
    y.backward(case.dy)
    half_x, same_slots = case.x.bfloat16().requires_grad_(), case.slots.clone().requires_grad_()
    expected = ops.sideway_mlp(half_x, same_slots, 0.5, backend=backend)
    expected.backward(case.dy)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert torch.equal(x.grad, half_x.grad.float()) and torch.equal(slots.grad, same_slots.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype, activation):
    case = Case((4, 20, 5), dtype, seed=9)
    case.x[1, 3] = float("nan")
    y, dx, d_slots = case.run(lambda x, slots: ops.sideway_mlp(x, slots, 0.5, activation))
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()
    assert not dx[[0, 2, 3]].isnan().any() and d_slots.isnan().any()


def test_the_gradient_of_relu_at_zero_is_zero():
    x, slots = torch.zeros(1, 4, requires_grad=True), torch.ones(2, 3, 4)
    ops.sideway_mlp(x, slots, 1.0, "relu").sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 4))


# ---- the first rows of a larger memory ------------------------------------------------------------------------
def partly_used(dtype, device="cpu", capacity=9, used=5):
    """-> x, dy, the parameter [2, capacity, d] float32, and views of its used rows in dtype."""
    torch.manual_seed(10)
    x, dy = torch.randn(2, 12, 20, device=device).to(dtype)
    slots = torch.randn(2, capacity, 20, device=device)
    compute = slots.to(dtype, copy=True)
    return x, dy, slots, SlotViews.of(compute[:, :used]), compute


def test_views_of_mlp_slots_are_views_of_the_used_rows():
    _, _, _, views, compute = partly_used(torch.bfloat16)
    compute.zero_()
    assert views.gate_key.shape == views.value.shape == (5, 20)
    assert not views.gate_key.any() and not views.value.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_used_rows_count_and_get_a_gradient(dtype, device):
    x, dy, slots, views, compute = partly_used(dtype, device)
    x.requires_grad_(), slots.requires_grad_()
    y = SidewayMlpFunction.apply(x, slots, views, 0.5, activation_index("relu"), None)
    y.backward(dy)
    used_x, used = x.detach().clone().requires_grad_(), compute[:, :5].clone().requires_grad_()
    expected = ops.sideway_mlp(used_x, used, 0.5, "relu")
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(x.grad, used_x.grad)
    assert slots.grad.dtype == torch.float32 and torch.equal(slots.grad[:, :5], used.grad.float())
    assert not slots.grad[:, 5:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_added_to_a_slice_of_the_arena(dtype, device):
    x, dy, slots, views, compute = partly_used(dtype, device)
    x.requires_grad_(), slots.requires_grad_()
    grad = torch.randn(2, 9, 20, device=device)
    before = grad.clone()
    SidewayMlpFunction.apply(x, slots, views, 0.5, activation_index("gelu"), grad[:, :5]).backward(dy)
    used = compute[:, :5].clone().requires_grad_()
    ops.sideway_mlp(x.detach(), used, 0.5, "gelu").backward(dy)
    assert slots.grad is None
    torch.testing.assert_close(grad[:, :5], before[:, :5] + used.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad[:, 5:], before[:, 5:])


def test_frozen_slots_cost_no_gradient_of_theirs():
    x, dy, slots, views, _ = partly_used(torch.float32)
    x.requires_grad_()
    grad = torch.zeros(2, 9, 20)
    SidewayMlpFunction.apply(x, slots, views, 0.5, activation_index("relu"), grad[:, :5]).backward(dy)
    assert x.grad is not None and slots.grad is None and not grad.any()
    relu = activation_index("relu")
    y, saved = matmul.sideway_mlp_forward(x.detach(), views, 0.5, relu)
    dx, d_slots = matmul.sideway_mlp_backward(dy, x.detach(), saved, views, 0.5, relu, True, False, None)
    assert d_slots is None and torch.equal(dx, x.grad)
