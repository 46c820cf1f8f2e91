"""NL-SVD on its probes, against the memory it compresses, in float64 from the definition; degenerate memories."""

import math

import pytest
import torch
from support.helpers import ACTIVATIONS
from support.nl_svd import SHAPES, assert_agrees_on_probes, energy_matrix, f, slots
from torch.nn.functional import normalize

from locas_ext.transforms.nl_svd import nl_svd


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
