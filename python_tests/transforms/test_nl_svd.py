"""NL-SVD against the memory it compresses, evaluated in float64 from the definition, and against closed forms."""

import math

import pytest
import torch
from support.helpers import ACTIVATIONS, act_formula
from torch.nn.functional import normalize

from locas_ext.transforms.nl_svd import nl_svd

# m, d, rank: more slots than dimensions, fewer, as many; full rank and rank 1.
SHAPES = [
    (37, 11, 5),
    (40, 13, 13),
    (12, 29, 7),
    (9, 31, 9),
    (17, 17, 8),
    (16, 16, 16),
    (23, 10, 1),
    (6, 14, 1),
    (1, 5, 1),
]
LIPSCHITZ = {"relu": 1.0, "silu": 1.09984, "gelu": 1.12891, "gelu_pytorch_tanh": 1.129, "gelu_new": 1.129}


def slots(m, d, dtype=torch.float64):
    """Random keys and values whose lengths differ by two orders, like closed-form slots of strong and weak tokens."""
    lengths = torch.logspace(-1, 1, m, dtype=dtype)[torch.randperm(m), None]
    return torch.randn(m, d, dtype=dtype) * lengths, torch.randn(m, d, dtype=dtype) * lengths.flip(0)


def f(x, key, value, activation="relu"):
    return act_formula(x.double() @ key.double().T, activation) @ value.double()


def energy_matrix(key, value):
    """From the definition: sum of s_i^2 k_i^T k_i with unit keys."""
    key, value = key.double(), value.double()
    alpha, beta = key.norm(dim=1), value.norm(dim=1)
    fires = alpha > 0
    units = key[fires] / alpha[fires, None]
    return torch.einsum("m,mi,mj->ij", ((alpha * beta) ** 2)[fires], units, units)


def assert_agrees_on_probes(new, key, value, activation, tolerance):
    lengths = torch.tensor([0.0, 1e-3, 0.7, 1.0, 13.0]) if activation == "relu" else torch.tensor([0.0, 1.0])
    for length in lengths:
        x = length * new.key
        expected = f(x, key, value, activation)
        largest = float(expected.abs().max()) if len(expected) else 0.0
        torch.testing.assert_close(f(x, new.key, new.value, activation), expected, rtol=0, atol=tolerance * largest)


def assert_orthonormal(rows, tolerance=1e-12):
    assert rows.isfinite().all()
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=tolerance)


# ---- what holds on the probes ---------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, d, rank", SHAPES)
def test_agrees_with_the_memory_on_every_probe(m, d, rank, activation):
    key, value = slots(m, d)
    new = nl_svd(key, value, rank, activation)
    assert new.key.shape == new.value.shape == (rank, d) and new.key.dtype == new.value.dtype == torch.float64
    assert_orthonormal(new.key)
    assert (f(new.key, key, value, activation).norm(dim=1) > 0).all()
    assert_agrees_on_probes(new, key, value, activation, 1e-12)


@pytest.mark.parametrize("m, d, rank", SHAPES)
def test_probes_are_the_directions_of_most_energy(m, d, rank):
    key, value = slots(m, d)
    new = nl_svd(key, value, rank)
    energy = energy_matrix(key, value)
    eigenvalues, eigenvectors = torch.linalg.eigh(energy)
    leading = eigenvectors[:, -rank:]
    torch.testing.assert_close(new.key.T @ new.key, leading @ leading.T, rtol=0, atol=1e-8)
    along = torch.einsum("ni,ij,nj->n", new.key, energy, new.key)
    torch.testing.assert_close(along, eigenvalues.flip(0)[:rank], rtol=1e-9, atol=1e-9 * float(eigenvalues[-1]))
    total = float((key.norm(dim=1) * value.norm(dim=1)).square().sum())
    assert new.kept_energy == pytest.approx(float(along.sum()))
    assert new.discarded_energy == pytest.approx(total - float(along.sum()), abs=1e-9 * total)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeps_the_sign_that_says_more(activation):
    key, value = slots(30, 12)
    new = nl_svd(key, value, 12, activation)
    kept, other = (f(x, key, value, activation).norm(dim=1) for x in (new.key, -new.key))
    assert (kept > other).all()
    # eigh's own signs do not know of f: a slot and its mirror image have the same energy matrix and opposite probes.
    mirrored = nl_svd(-key, value, 12, activation)
    torch.testing.assert_close(mirrored.key, -new.key, rtol=0, atol=1e-9)
    torch.testing.assert_close(mirrored.value, new.value, rtol=1e-9, atol=1e-9)


def test_relu_probes_are_lost_on_the_other_side():
    key = torch.tensor([[2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    value = torch.tensor([[0.0, 3.0], [4.0, 0.0]], dtype=torch.float64)
    new = nl_svd(key, value, 2)
    torch.testing.assert_close(new.key, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(new.value, torch.tensor([[0.0, 6.0]], dtype=torch.float64))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_orthogonal_slots_come_back_as_they_were(activation):
    """The memory of n orthonormal keys with values of different lengths is its own compression."""
    key = torch.linalg.qr(torch.randn(19, 19, dtype=torch.float64)).Q[:7]
    value = torch.randn(7, 19, dtype=torch.float64) * torch.arange(7, 0, -1)[:, None]
    order = value.norm(dim=1).argsort(descending=True)
    new = nl_svd(key, value, 7, activation)
    torch.testing.assert_close(new.key, key[order], rtol=0, atol=1e-11)
    torch.testing.assert_close(new.value, value[order], rtol=0, atol=1e-10)
    assert new.discarded_energy == pytest.approx(0, abs=1e-9) and new.error_bound < 1e-4


# ---- degenerate memories --------------------------------------------------------------------------------------
def degenerate():
    m, d = 24, 15
    key, value = slots(m, d)
    repeated = key[torch.arange(m) % 4]
    zero_keys, zero_values = key.clone(), value.clone()
    zero_keys[::2] = 0
    zero_values[::5] = 0
    low_rank = torch.randn(m, 3, dtype=torch.float64) @ torch.randn(3, d, dtype=torch.float64)
    identical = key[:1].repeat(m, 1), value[:1].repeat(m, 1)
    orthonormal = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return {  # key, value, the energy matrix's rank
        "repeated keys": (repeated, value, 4),
        "identical slots": (*identical, 1),
        "zero keys": (zero_keys, value, 12),
        "zero values": (key, zero_values, 15),
        "zero keys and values, fewer than d": (zero_keys[:10], zero_values[:10], 4),
        "opposite keys": (torch.cat([repeated, -repeated]), torch.cat([value, value.flip(0)]), 4),
        "low rank": (low_rank, value, 3),
        "low rank, fewer than d": (low_rank[:8], value[:8], 3),
        "all eigenvalues equal": (orthonormal, normalize(value[:d], dim=1), 15),
        "tiny": (1e-18 * key, 1e-18 * value, 15),
        "one slot among zeros": (torch.cat([key[:1], 0 * key]), torch.cat([value[:1], 0 * value]), 1),
        "nothing": (0 * key, value, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", degenerate())
def test_degenerate_memories_give_as_many_probes_as_they_have_directions(case, dtype):
    key, value, directions = degenerate()[case]
    key, value = key.to(dtype), value.to(dtype)
    rank = min(key.shape)
    new = nl_svd(key, value, rank)
    assert new.key.shape == new.value.shape == (directions, key.shape[1])
    assert_orthonormal(new.key, 1e-12 if dtype == torch.float64 else 1e-5)
    assert new.value.isfinite().all() and math.isfinite(new.error_bound)
    assert_agrees_on_probes(new, key, value, "relu", 1e-11 if dtype == torch.float64 else 1e-5)
    # The probes span all keys that carry energy, so what is discarded is rounding.
    carries = value.norm(dim=1) > 0
    outside = key[carries] - key[carries] @ new.key.T @ new.key
    assert outside.abs().max() <= 1e-5 * max(float(key.abs().max()), 1e-30)
    total = new.kept_energy + new.discarded_energy
    assert new.discarded_energy <= 1e-10 * total


def test_rank_counts_more_probes_than_a_memory_has():
    key, value, _ = degenerate()["repeated keys"]
    assert len(nl_svd(key, value, 3).key) == 3 and len(nl_svd(key, value, 5).key) == 4


def test_weak_directions_are_not_taken_for_noise_in_float32():
    """A direction 1e-4 as strong as the strongest is far under what float32 eigenvalues resolve, and is there."""
    key = torch.eye(20) * torch.logspace(0, -4, 20)[:, None]
    key = key @ torch.linalg.qr(torch.randn(20, 20)).Q
    value = normalize(torch.randn(20, 20), dim=1)
    new = nl_svd(key, value, 20)
    assert len(new.key) == 20
    torch.testing.assert_close(new.value.norm(dim=1), torch.logspace(0, -4, 20), rtol=1e-2, atol=0)


def test_rounding_of_float32_input_is_taken_for_noise():
    for _ in range(300):
        key = torch.randn(6, 3) @ torch.randn(3, 5)
        assert len(nl_svd(key, torch.randn(6, 5), 5).key) == 3


def test_threshold_is_a_weighted_norm():
    key = torch.eye(6, dtype=torch.float64) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])[:, None]
    value = torch.eye(6, dtype=torch.float64).roll(1, 0) * 2
    for threshold, kept in ((0.0, 6), (1.01, 5), (2.5, 4), (7.9, 2), (8.1, 1), (11.0, 0), (1e200, 0)):
        new = nl_svd(key, value, 6, threshold=threshold)
        assert len(new.key) == kept
        energies = (2 * key.diagonal()).square()
        assert new.kept_energy == pytest.approx(float(energies[:kept].sum()))
        assert new.discarded_energy == pytest.approx(float(energies[kept:].sum()))
    assert len(nl_svd(key, value, 2, threshold=2.5).key) == 2


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
    with pytest.raises(ValueError, match=rf"rank is {rank}; expected 1 to 6, .*{shape[0]} slots.*{shape[1]}"):
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
