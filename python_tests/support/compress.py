"""What the tests of compress share: the formula of a memory, and the energy of its slots."""

from support.helpers import (
    act_formula,
)


def f(x, slots, activation):
    return act_formula(x @ slots[0].double().T, activation) @ slots[1].double()


def energy_matrix(slots):
    key, value = slots.double()
    return (key * value.norm(dim=1, keepdim=True)).T @ (key * value.norm(dim=1, keepdim=True))
