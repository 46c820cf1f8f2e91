"""NL-SVD off its probes: error bounds, invariances, bad input."""

import math

import pytest
import torch
from support.helpers import ACTIVATIONS
from support.nl_svd import SHAPES, assert_agrees_on_probes, energy_matrix, f, slots
from torch.nn.functional import normalize

from locas_ext import _C
from locas_ext.ops.activations import activate
from locas_ext.transforms import nl_svd as nl_svd_module
from locas_ext.transforms.nl_svd import nl_svd

LIPSCHITZ = {
    "relu": 1.0,
    "silu": 1.09984,
    "gelu": 1.12891,
    "gelu_pytorch_tanh": 1.129,
    "gelu_new": 1.129,
    "relu2": math.inf,
    "quick_gelu": 1.09984,
    "xielu(0.75,1.25)": math.inf,
}


# ---- off the probes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, d, rank", [(37, 11, 5), (200, 12, 3), (12, 29, 7), (17, 17, 16), (23, 10, 1)])
def test_bound_holds_off_the_span(m, d, rank, activation):
    key, value = slots(m, d)
    value = value + 3 * value.norm(dim=1, keepdim=True) * normalize(torch.randn(d, dtype=torch.float64), dim=0)
    new = nl_svd(key, value, rank, activation)
    off = torch.randn(500, d, dtype=torch.float64)
    off -= off @ new.key.T @ new.key
    off *= torch.logspace(-2, 2, 500)[:, None]
    bound = new.error_bound * off.norm(dim=1)
    inside = torch.randn(500, rank, dtype=torch.float64) @ new.key
    change = f(inside + off, key, value, activation) - f(inside, key, value, activation)
    assert (change.norm(dim=1) <= bound).all()
    # Beside a probe it bounds the whole error of the compressed memory, which sees no more than the probe.
    probe = new.key[torch.arange(500) % rank]
    error = f(probe + off, key, value, activation) - f(probe + off, new.key, new.value, activation)
    assert (error.norm(dim=1) <= bound + 1e-9).all()
    discarded = sorted(torch.linalg.eigvalsh(energy_matrix(key, value)).tolist())[-rank - 1]
    assert new.error_bound <= LIPSCHITZ[activation] * 1.001 * math.sqrt(m * discarded)


def test_the_steepest_slope_of_every_activation_is_known():
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    assert set(nl_svd_module._LIPSCHITZ) == set(_C.ACTIVATIONS)
    for name, bound in nl_svd_module._LIPSCHITZ.items():
        (slope,) = torch.autograd.grad(activate(x, name).sum(), x)
        if name == "relu2":  # grows without end
            assert bound == math.inf and slope.max() == 60
            continue
        assert slope.abs().max() <= bound <= 1.001 * slope.abs().max(), name


@pytest.mark.parametrize("copies", [1, 4, 9])
def test_bound_is_nearly_reached_by_slots_that_agree(copies):
    """A strong slot, and `copies` of a weak one that all say the same: off the span their sum is what is lost."""
    d, weak = 5, 0.3
    axes = torch.eye(d, dtype=torch.float64)
    key = torch.cat([3 * axes[:1], weak * axes[1:2].repeat(copies, 1)])
    value = torch.cat([axes[2:3], axes[3:4].repeat(copies, 1)])
    new = nl_svd(key, value, 1)
    lost = f(axes[1:2], key, value).norm()
    assert lost == pytest.approx(copies * weak)
    assert lost <= new.error_bound == pytest.approx(weak * math.sqrt(copies) * (copies**2 + 1) ** 0.25, rel=1e-5)


def test_bound_of_nothing_left_out_is_rounding():
    key, value = slots(30, 8)
    assert nl_svd(key, value, 8).error_bound < 1e-5 * nl_svd(key, value, 7).error_bound


def test_eigenvalues_that_rounding_made_negative_are_zero():
    for _ in range(20):  # d - 1 directions: the last eigenvalue is rounding, of either sign
        value = torch.randn(9, 7, dtype=torch.float64)
        key = torch.randn(9, 6, dtype=torch.float64) @ torch.randn(6, 7, dtype=torch.float64)
        new = nl_svd(key, value, 7)
        assert len(new.key) == 6 and 0 < new.error_bound < 1e-3 and new.discarded_energy >= 0


# ---- invariances ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("m, d, rank", SHAPES[:6])
def test_order_and_lengths_of_the_slots_do_not_matter(m, d, rank, activation):
    key, value = slots(m, d)
    x = torch.randn(50, d, dtype=torch.float64)
    new = nl_svd(key, value, rank, activation)
    order = torch.randperm(m)
    permuted = nl_svd(key[order], value[order], rank, activation)
    expected = f(x, new.key, new.value, activation)
    torch.testing.assert_close(f(x, permuted.key, permuted.value, activation), expected, rtol=1e-7, atol=1e-7)
    assert permuted.error_bound == pytest.approx(new.error_bound)
    if activation == "relu":  # a relu slot may keep its length in the key or in the value
        lengths = torch.rand(m, 1, dtype=torch.float64) + 0.1
        moved = nl_svd(key * lengths, value / lengths, rank)
        torch.testing.assert_close(f(x, moved.key, moved.value), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, d, rank", SHAPES)
def test_float32_agrees_with_float64(m, d, rank, activation):
    key, value = slots(m, d, torch.float32)
    single, double = nl_svd(key, value, rank, activation), nl_svd(key.double(), value.double(), rank, activation)
    assert single.key.dtype == single.value.dtype == torch.float32
    torch.testing.assert_close(single.key.double(), double.key, rtol=0, atol=1e-6)
    largest = float(double.value.abs().max())
    torch.testing.assert_close(single.value.double(), double.value, rtol=1e-5, atol=1e-5 * largest)
    assert_agrees_on_probes(single, key, value, activation, 2e-5)
    assert single.kept_energy == pytest.approx(double.kept_energy)


def test_compressing_what_is_compressed_changes_nothing():
    key, value = slots(40, 12)
    once = nl_svd(key, value, 6)
    twice = nl_svd(once.key, once.value, 6)
    x = torch.randn(50, 12, dtype=torch.float64)
    torch.testing.assert_close(f(x, twice.key, twice.value), f(x, once.key, once.value), rtol=1e-8, atol=1e-8)


def test_needs_no_gradient_and_leaves_the_slots_alone():
    key, value = (t.requires_grad_() for t in slots(9, 5))
    before = key.detach().clone(), value.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = nl_svd(key, value, 3)
    assert not new.key.requires_grad and not new.value.requires_grad and key.grad is None
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])
    assert_agrees_on_probes(new, key.detach(), value.detach(), "relu", 1e-12)


# ---- bad input ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, rank", [((6, 9), 7), ((9, 6), 7), ((9, 6), 0), ((6, 9), -1)])
def test_rank_out_of_range(shape, rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}; expected an integer from 1 to 6 .*{shape[0]} slots.*{shape[1]}"):
        nl_svd(torch.randn(shape), torch.randn(shape), rank)


@pytest.mark.parametrize("rank", [2.0, True, None])
def test_rank_is_an_integer(rank):
    with pytest.raises(TypeError, match="rank is .*; expected an integer"):
        nl_svd(torch.randn(4, 4), torch.randn(4, 4), rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_half_precision_is_refused(dtype):
    for which in ("key", "value"):
        slots = {"key": torch.ones(4, 4), "value": torch.ones(4, 4)}
        slots[which] = slots[which].to(dtype)
        with pytest.raises(ValueError, match=f"{which} is {dtype}; expected torch.float32 or torch.float64: convert"):
            nl_svd(**slots, rank=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
def test_not_finite(which, bad):
    slots = {"key": torch.ones(4, 4), "value": torch.ones(4, 4)}
    slots[which][2, 1] = bad
    with pytest.raises(ValueError, match=f"{which} holds NaN or infinity"):
        nl_svd(**slots, rank=2)


def test_shapes_dtypes_and_settings_that_do_not_fit():
    key = torch.ones(4, 5)
    for value, message in (
        (torch.ones(4, 6), "value has shape .*4, 6.*expected that of key, .*4, 5"),
        (torch.ones(4, 5, dtype=torch.float64), "value has dtype torch.float64.*torch.float32"),
        (torch.ones(1, 4, 5), r"value has shape \[1, 4, 5\]; expected \[m, d\]"),
        (torch.ones(0, 5), r"value has shape \[0, 5\]; expected \[m, d\] with m and d at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            nl_svd(key, value, 2)
    for threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold is .*; expected a finite number >= 0"):
            nl_svd(key, key, 2, threshold=threshold)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected one of"):
        nl_svd(key, key, 2, "tanh")
