"""Definitions in float64 for the tests of NL-SVD."""

import torch

from support.helpers import act_formula

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
