"""sideway_mlp and write_slots_, the operations of a Locas-MLP memory, against float64 formulas."""

import math

import pytest
import torch
from support.helpers import ACTIVATIONS, act_formula, act_torch, assert_as_exact_as_torch, plain_sideway_mlp

from locas_ext import _C, ops, reference
from locas_ext.ops.activations import activation_index
from locas_ext.ops.autograd import SidewayMlpFunction
from locas_ext.ops.backends import matmul
from locas_ext.ops.types import SlotViews

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available() or _C.build_info()["cuda_architectures"] is None, reason="no GPU"),
        ],
    ),
]
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
    dtype, activation = DTYPES[draw(4) - 1], ACTIVATIONS[draw(6) - 1]
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
    y, pre = matmul.sideway_mlp_forward(x.detach(), views, 0.5, activation_index("relu"))
    relu = activation_index("relu")
    d_pre, d_slots = matmul.sideway_mlp_backward(dy, x.detach(), pre, views, 0.5, relu, False, None)
    assert d_slots is None and torch.equal(d_pre @ views.gate_key, x.grad)


# ---- write_slots_ ---------------------------------------------------------------------------------------------
def draw_writing(layers, n, d, capacity, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=generator)
    slots = normal(layers, 2, capacity, d).to(device)
    return slots, normal(layers, n, d).to(device, dtype), (normal(layers, n, d) * 1e-3).to(device, dtype)


def written(inputs, gradients, epsilon):
    """The rows by the formula: one token and one layer at a time, in float64. -> [L, 2, n, d], the norms [n]."""
    inputs, gradients = inputs.double().cpu(), gradients.double().cpu()
    rows, norms = torch.zeros(len(inputs), 2, *inputs.shape[1:], dtype=torch.float64), []
    for t in range(inputs.shape[1]):
        norms.append(math.sqrt(math.fsum((gradients[:, t].flatten() ** 2).tolist())))
        for layer in range(len(inputs)):
            length = math.sqrt(math.fsum((inputs[layer, t] ** 2).tolist()))
            if length:
                rows[layer, 0, t] = inputs[layer, t] / length
            if norms[t]:
                rows[layer, 1, t] = epsilon * gradients[layer, t] / norms[t]
    return rows, torch.tensor(norms, dtype=torch.float64)


WRITINGS = [
    (1, 1, 1, 1, 0),
    (2, 3, 16, 8, 4),
    (3, 5, 13, 5, 0),
    (2, 1, 300, 4, 3),
    (4, 17, 72, 40, 22),
    (1, 2, 2051, 3, 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers, n, d, capacity, start", WRITINGS)
def test_writing_one_slot_a_token_a_layer(layers, n, d, capacity, start, dtype, device):
    slots, inputs, gradients = draw_writing(layers, n, d, capacity, dtype, seed=d, device=device)
    before = slots.clone()
    compute = torch.full_like(slots, 7.0, dtype=torch.bfloat16)
    norms = ops.write_slots_(slots, start, inputs, gradients, 0.03, compute)
    rows, exact_norms = written(inputs, gradients, 0.03)
    torch.testing.assert_close(norms.cpu().double(), exact_norms, rtol=2e-7, atol=0)
    new = slice(start, start + n)
    torch.testing.assert_close(slots[:, :, new].cpu().double(), rows, rtol=4e-7, atol=0)
    assert torch.equal(compute[:, :, new], slots[:, :, new].bfloat16())
    slots[:, :, new] = before[:, :, new]
    assert torch.equal(slots, before)
    compute[:, :, new] = 7.0
    assert (compute == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copy", DTYPES, ids=str)
def test_the_rounded_copy_is_torchs(copy, device):
    slots, inputs, gradients = draw_writing(2, 6, 45, 9, device=device)
    compute = torch.zeros_like(slots, dtype=copy)
    ops.write_slots_(slots, 1, inputs, gradients, 1.0, compute)
    assert torch.equal(compute[:, :, 1:7], slots[:, :, 1:7].to(copy))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, magnitude",
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e-37),
        (torch.float32, 1e36),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e36),
        (torch.float16, 2e4),
        (torch.float16, 1e-6),
    ],
)
def test_any_magnitude_of_inputs_and_gradients(dtype, magnitude, device):
    """Squares of these leave the range of float32, or the values are the ends of float16's."""
    slots, inputs, gradients = draw_writing(3, 4, 33, 4, device=device)
    limit = torch.finfo(dtype).max
    inputs, gradients = (
        (t.clamp(-3, 3) * s).clamp(-limit, limit).to(dtype) for t, s in ((inputs, magnitude), (gradients * 1e3, 10 * magnitude))
    )
    norms = ops.write_slots_(slots, 0, inputs, gradients, 0.5)
    rows, exact_norms = written(inputs, gradients, 0.5)
    torch.testing.assert_close(norms.cpu().double(), exact_norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(slots.cpu().double(), rows, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(slots[:, 0].cpu().norm(dim=-1), torch.ones(3, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_a_zero_norm_gives_a_row_of_zeros(device):
    slots, inputs, gradients = draw_writing(2, 3, 20, 3, device=device)
    inputs[0, 1], gradients[:, 2] = 0.0, 0.0
    norms = ops.write_slots_(slots, 0, inputs, gradients, 0.5)
    assert not slots[0, 0, 1].any() and not slots[:, 1, 2].any()
    assert norms[2] == 0 and (norms[:2] > 0).all() and slots.isfinite().all()
    assert slots[0, 1, 1].any() and slots[1, 0, 1].any() and slots[:, 0, 2].any(-1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["inputs", "gradients", "gradient_norm"])
def test_nothing_is_written_where_something_is_not_finite(where, value, device):
    slots, inputs, gradients = draw_writing(3, 5, 37, 9, device=device)
    norm = torch.ones(5, device=device)
    if where == "gradient_norm":
        norm[3] = value
    else:
        (inputs if where == "inputs" else gradients)[1, 3, 18] = value
    compute = slots.bfloat16()
    before, copy_before = slots.clone(), compute.clone()
    for given in (norm,) if where == "gradient_norm" else (norm, None):
        norms = ops.write_slots_(slots, 2, inputs, gradients, 0.5, compute, given)
        assert norms.isfinite().tolist() == [True, True, True, False, True] and norms[3].isnan()
        assert torch.equal(slots, before) and torch.equal(compute, copy_before)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_written_where_a_norm_is_beyond_float32(device):
    slots, inputs, gradients = draw_writing(2, 3, 20, 4, device=device)
    gradients[:, 1] = 3e38
    before = slots.clone()
    assert ops.write_slots_(slots, 0, inputs, gradients, 0.5).isnan().tolist() == [False, True, False]
    assert torch.equal(slots, before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_from_outside(device):
    """Two devices with two layers each write what one with all four does."""
    slots, inputs, gradients = draw_writing(4, 6, 33, 7, device=device)
    whole = slots.clone()
    norms = ops.write_slots_(whole, 1, inputs, gradients, 0.25)
    for layers in (slice(0, 2), slice(2, 4)):
        part = slots[layers].clone()
        given = norms.clone()
        assert torch.equal(
            ops.write_slots_(part, 1, inputs[layers].clone(), gradients[layers].clone(), 0.25, None, given), norms
        )
        assert torch.equal(part, whole[layers]) and torch.equal(given, norms)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_gradients(device):
    slots, inputs, gradients = draw_writing(2, 6, 33, 6, device=device)
    plain = slots.clone()
    ops.write_slots_(plain, 0, inputs, gradients, 0.25)
    ops.write_slots_(slots, 0, inputs.transpose(0, 1).contiguous().transpose(0, 1), gradients.mT.contiguous().mT, 0.25)
    assert torch.equal(slots, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_no_new_tokens_write_nothing(device):
    slots, inputs, gradients = draw_writing(2, 0, 33, 4, device=device)
    before = slots.clone()
    assert ops.write_slots_(slots, 4, inputs, gradients, 0.25).shape == (0,)
    assert torch.equal(slots, before)


@pytest.mark.parametrize("device", DEVICES)
def test_writing_repeats_bit_for_bit(device, two_threads):
    slots, inputs, gradients = draw_writing(6, 40, 300, 40, torch.bfloat16, device=device)
    again = slots.clone()
    norms = ops.write_slots_(slots, 0, inputs, gradients, 0.25)
    torch.set_num_threads(1)
    assert torch.equal(ops.write_slots_(again, 0, inputs, gradients, 0.25), norms)
    assert torch.equal(again, slots)


def test_the_values_do_not_depend_on_the_gradients_scale():
    slots, inputs, gradients = draw_writing(2, 6, 33, 6)
    other = slots.clone()
    norms = ops.write_slots_(slots, 0, inputs, gradients, 0.25)
    assert torch.equal(ops.write_slots_(other, 0, inputs, gradients * 1024, 0.25), norms * 1024)
    assert torch.equal(other, slots)


def test_a_written_slot_moves_its_own_token_along_its_gradient():
    """The claim of the method: with ReLU the memory's output at A is tau * ||A|| * value."""
    slots, inputs, gradients = draw_writing(1, 1, 24, 1)
    ops.write_slots_(slots, 0, inputs, gradients, 0.5)
    y = ops.sideway_mlp(inputs[0, 0], slots[0], 2.0)
    torch.testing.assert_close(y, 2.0 * inputs.norm() * 0.5 * gradients[0, 0] / gradients.norm())


def test_autograd_notices_the_writing():
    slots, inputs, gradients = draw_writing(2, 3, 8, 4)
    weight = torch.randn_like(slots, requires_grad=True)
    product = (slots * weight).sum()
    ops.write_slots_(slots, 0, inputs, gradients, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_writes_the_same(dtype):
    slots, inputs, gradients = draw_writing(3, 5, 21, 9)
    gradients[:, 4] = 0.0
    exact = slots.to(dtype)
    copy = torch.zeros_like(exact)
    norms = reference.write_slots_(exact, 2, inputs, gradients, 0.5, copy)
    rows, exact_norms = written(inputs, gradients, 0.5)
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(norms.double(), exact_norms, **tolerance)
    torch.testing.assert_close(exact[:, :, 2:7].double(), rows, **tolerance)
    assert torch.equal(copy[:, :, 2:7], exact[:, :, 2:7]) and not copy[:, :, :2].any() and not copy[:, :, 7:].any()
    before = exact.clone()
    inputs[1, 2, 3] = math.nan
    norms = reference.write_slots_(exact, 2, inputs, gradients, 0.5)
    assert norms.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(exact, before)


# ---- the fused updates on rows of MLP slots -------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
def test_the_fused_updates_take_mlp_slots(device):
    torch.manual_seed(11)
    start, grad = torch.randn(2, 3, 2, 7, 33, device=device) / 33**0.5
    exact, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    reference.update_slots_(exact, grad.double(), first, second, torch.tensor(1), torch.tensor(0.1))
    slots, copy = start.clone(), torch.zeros_like(start, dtype=torch.bfloat16)
    ops.update_slots_(slots, grad, torch.zeros_like(start), torch.zeros_like(start), 1, 0.1, compute=copy)
    torch.testing.assert_close(slots.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy, slots.bfloat16()) and slots.norm(dim=-1).max() <= 1 + 1e-6
    exact, slots = start.double(), start.clone()
    reference.sgd_slots_(exact, grad.double(), torch.tensor(0.1))
    ops.sgd_slots_(slots, grad, 0.1, compute=copy)
    torch.testing.assert_close(slots.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy, slots.bfloat16())


# ---- bad arguments --------------------------------------------------------------------------------------------
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
        (dict(start=-1), rf"start is -1; expected 0 <= start <= 2 \({T} tokens, capacity 6\)"),
        (dict(start=3), rf"start is 3; expected 0 <= start <= 2 \({T} tokens, capacity 6\)"),
        (dict(epsilon=0.0), "epsilon is 0.0; expected a finite number > 0"),
        (dict(epsilon=-1.0), "epsilon is -1.0; expected a finite number > 0"),
        (dict(epsilon=math.nan), "epsilon is nan; expected a finite number > 0"),
        (dict(epsilon=math.inf), "epsilon is inf; expected a finite number > 0"),
        (dict(epsilon=1e39), "epsilon is 1e[+]39; expected a finite number > 0, in float32's range"),
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
        (dict(start=1.0), "start is float; expected an int"),
    ):
        with pytest.raises(TypeError, match=f"write_slots_: {problem}"):
            ops.write_slots_(**writing_arguments(**changes))
