"""write_slots_, the closed-form step of a Locas-MLP memory, and the fused updates on its rows, against float64 formulas."""

import math

import pytest
import torch
from support.devices import DEVICES, DTYPES

from locas_ext import ops, reference


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
