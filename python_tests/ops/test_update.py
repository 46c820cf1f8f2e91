"""The fused optimizer steps against torch.optim in float64, the row clip and the rounded copy."""

import pytest
import torch
from support.devices import DEVICES
from support.helpers import relative_distance

from locas_ext import ops

SHAPES = [(2, 3, 5, 33), (1, 3, 1, 1), (3, 7), (5,), (2, 3, 4, 300)]
EPS = torch.finfo(torch.float32).eps


def row_clip(slots):
    return slots / slots.norm(dim=-1, keepdim=True).clamp_min(1.0)


class TorchUpdates:
    """torch.optim in float64, followed by the row clip."""

    def __init__(self, slots, clip, optimizer, **settings):
        self.slots, self.clip = slots.double().clone().requires_grad_(), clip
        self.optimizer = optimizer([self.slots], foreach=False, **settings)

    def step(self, grad, learning_rate=None):
        if learning_rate is not None:
            self.optimizer.param_groups[0]["lr"] = learning_rate
        self.slots.grad = grad.double()
        self.optimizer.step()
        if self.clip:
            self.slots.data = row_clip(self.slots.data)


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0 ** (i % 3 - 1) for i in range(steps)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("settings", [{}, dict(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)], ids=["default", "own"])
def test_adamw_is_torch_adamw(shape, clip, settings):
    settings = {"weight_decay": 0.0, **settings}
    slots = torch.randn(shape)
    peer = TorchUpdates(slots, clip, torch.optim.AdamW, lr=0.05, **settings)
    exp_avg, exp_avg_sq, rate = torch.zeros(shape), torch.zeros(shape), torch.tensor(0.05)
    mine = dict(zip(("beta1", "beta2"), settings.get("betas", (0.9, 0.999)), strict=False))
    mine |= {name: settings[name] for name in ("eps", "weight_decay") if name in settings}
    for step, grad in enumerate(gradients(shape, 8), start=1):
        ops.update_slots_(slots, grad, exp_avg, exp_avg_sq, torch.tensor(step), rate, clip=clip, **mine)
        peer.step(grad)
        # each step rounds a number of size 1 a few times
        torch.testing.assert_close(slots.double(), peer.slots.detach(), rtol=8 * step * EPS, atol=8 * step * EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd(shape, clip, momentum):
    slots = torch.randn(shape)
    peer = TorchUpdates(slots, clip, torch.optim.SGD, lr=0.02, momentum=momentum, weight_decay=0.0)
    buffer = torch.zeros(shape) if momentum else None
    for step, grad in enumerate(gradients(shape, 6), start=1):
        ops.sgd_slots_(slots, grad, torch.tensor(0.02), buffer, momentum, clip=clip)
        peer.step(grad)
        torch.testing.assert_close(slots.double(), peer.slots.detach(), rtol=1e-5, atol=32 * step * EPS)


def test_sgd_weight_decay_is_decoupled():
    slots = torch.full((2, 4), 0.25)
    ops.sgd_slots_(slots, torch.ones(2, 4), torch.tensor(0.1), weight_decay=0.5)
    torch.testing.assert_close(slots, torch.full((2, 4), 0.25 * (1 - 0.1 * 0.5) - 0.1))


def test_500_adamw_steps_stay_with_torch():
    """A least-squares fit with the clip at work, and a learning rate that changes on the way."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    target = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    slots = torch.randn(6, 16, generator=generator) / 8
    peer = TorchUpdates(slots, True, torch.optim.AdamW, lr=0.0, weight_decay=0.0)
    exp_avg, exp_avg_sq = torch.zeros(6, 16), torch.zeros(6, 16)
    gradient = lambda w: ((a.to(w.dtype) @ w.T - target.to(w.dtype)).T @ a.to(w.dtype)) / 40
    first = gradient(peer.slots.detach()).norm()
    for step in range(1, 501):
        rate = 0.01 * (1 - step / 600)
        ops.update_slots_(slots, gradient(slots), exp_avg, exp_avg_sq, torch.tensor(step), torch.tensor(rate))
        peer.step(gradient(peer.slots.detach()), rate)
    assert gradient(peer.slots.detach()).norm() < first / 2  # it did train
    assert relative_distance(slots, peer.slots.detach()) < 1e-4


@pytest.mark.parametrize("op", ["adamw", "sgd"])
@pytest.mark.parametrize("d", [1, 3, 64, 300])
def test_clip_brings_long_rows_to_length_1_and_leaves_the_others_alone(op, d):
    rows = torch.nn.functional.normalize(torch.randn(8, d), dim=-1)
    lengths = torch.tensor([0.0, 1e-20, 0.5, 0.999, 1.001, 7.0, 1e4, 1e15])
    slots = rows * lengths[:, None]
    before, zeros = slots.clone(), torch.zeros(8, d)
    if op == "adamw":
        ops.update_slots_(slots, zeros, zeros.clone(), zeros.clone(), torch.tensor(1), torch.tensor(0.1))
    else:
        ops.sgd_slots_(slots, zeros, torch.tensor(0.1))
    assert torch.equal(slots[:4], before[:4])
    torch.testing.assert_close(slots[4:].norm(dim=-1), torch.ones(4), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(slots[4:], rows[4:], rtol=1e-5, atol=1e-6)


def test_without_clip_long_rows_stay_long():
    slots, zeros = torch.full((2, 4), 3.0), torch.zeros(2, 4)
    ops.update_slots_(slots, zeros, zeros.clone(), zeros.clone(), torch.tensor(1), torch.tensor(0.1), clip=False)
    assert torch.equal(slots, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_the_rounded_copy_is_exact(dtype, op):
    """Any bit pattern, subnormals, ties, overflows and NaN among them, rounds as torch rounds it."""
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (16, 301), generator=generator, dtype=torch.int64).to(torch.int32)
    slots = bits.view(torch.float32).clone()
    halves = torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    slots.view(-1)[: halves.numel() // 4] = halves[: halves.numel() // 4] * (1 + 2.0**-11)  # ties of float16
    slots.view(-1)[-4:] = torch.tensor([65504.0, 65520.0, -65519.9, 2.0**-24])
    before, zeros, copy = slots.clone(), torch.zeros_like(slots), torch.empty_like(slots, dtype=dtype)
    if op == "adamw":
        ops.update_slots_(slots, zeros, zeros.clone(), zeros.clone(), 1, 0.0, clip=False, compute=copy)
    else:
        ops.sgd_slots_(slots, zeros, 0.0, clip=False, compute=copy)
    torch.testing.assert_close(slots, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(copy, before.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_copy_is_that_of_the_clipped_row():
    slots, zeros = torch.full((1, 4), 3.0), torch.zeros(1, 4)
    copy = torch.zeros(1, 4, dtype=torch.bfloat16)
    ops.sgd_slots_(slots, zeros, 0.1, compute=copy)
    assert torch.equal(copy, torch.full((1, 4), 0.5, dtype=torch.bfloat16))


def test_step_and_rate_of_every_dtype_and_plain_numbers_mean_the_same():
    start, grad = torch.randn(3, 7), torch.randn(3, 7)
    results = []
    for step in (torch.tensor(4), torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64), 4):
        for rate in (torch.tensor(0.125), torch.tensor(0.125, dtype=torch.float64), 0.125):
            slots, exp_avg, exp_avg_sq = start.clone(), torch.ones(3, 7), torch.ones(3, 7)
            ops.update_slots_(slots, grad, exp_avg, exp_avg_sq, step, rate)
            results.append(slots)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_step_is_read_and_not_advanced_and_the_gradient_is_left_alone():
    step, grad = torch.tensor(1), torch.randn(3, 7)
    before = grad.clone()
    ops.update_slots_(torch.zeros(3, 7), grad, torch.zeros(3, 7), torch.zeros(3, 7), step, 0.1)
    assert step.item() == 1 and torch.equal(grad, before)


def test_autograd_notices_the_change_in_place():
    slots = torch.randn(3, 7)
    weight = torch.randn(3, 7, requires_grad=True)
    product = (slots * weight).sum()
    ops.sgd_slots_(slots, torch.ones(3, 7), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nan_in_a_gradient_stays_in_its_row():
    slots, grad = torch.zeros(3, 7), torch.ones(3, 7)
    grad[1, 2] = float("nan")
    ops.update_slots_(slots, grad, torch.zeros(3, 7), torch.zeros(3, 7), 1, 0.01)
    assert slots[1, 2].isnan() and slots[[0, 2]].isfinite().all()


def test_no_rows():
    empty = torch.zeros(0, 3, 5, 8)
    ops.update_slots_(empty, empty.clone(), empty.clone(), empty.clone(), 1, 0.1)


def test_threads_change_nothing(two_threads):
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        slots, grad = torch.arange(120000.0).sin().view(400, 300), torch.arange(120000.0).cos().view(400, 300)
        copy = torch.zeros(400, 300, dtype=torch.bfloat16)
        ops.update_slots_(slots, grad, torch.zeros(400, 300), torch.zeros(400, 300), 1, 0.1, compute=copy)
        results.append((slots, copy))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=False))


# ---- the flag that refuses a gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 36), (2, 3, 5, 33), (1, 3, 2, 5000)], ids=str)
def test_where_finite_is_0_nothing_is_written(shape, dtype, device):
    def updates(finite):
        torch.manual_seed(0)
        slots, grad, first, second, buffer = torch.randn(5, *shape, device=device)
        compute = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        tensors = (slots, first, second.square_(), buffer, compute)
        before = [tensor.clone() for tensor in tensors]
        one = torch.ones((), device=device)
        ops.update_slots_(slots, grad, first, second, one, 0.1 * one, compute=compute, finite=finite)
        ops.sgd_slots_(slots, grad, 0.1 * one, buffer, 0.9, compute=compute, finite=finite)
        return before, tensors

    before, after = updates(torch.zeros((), dtype=dtype, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    _, after = updates(torch.ones((), dtype=dtype, device=device))
    assert all(torch.equal(a, b) for a, b in zip(updates(None)[1], after, strict=False))


@pytest.mark.parametrize(
    "finite, message",
    [
        (torch.ones(2), r"finite has shape \[2\]"),
        (torch.ones((), dtype=torch.float16), "finite has dtype float16; expected float32"),
    ],
)
def test_a_flag_that_does_not_fit_is_an_error(finite, message):
    slots = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=message):
        ops.sgd_slots_(slots, slots.clone(), torch.tensor(0.1), finite=finite)
