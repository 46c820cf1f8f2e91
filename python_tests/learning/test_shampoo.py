"""Shampoo's step of value rows and cautious steps against their rules in float64; Shampoo's state as the memory's others."""

import random

import pytest
import torch
from support.helpers import TEXT, attached
from support.writing import IDS, written
from support.written import STEPS, grown

import locas_ext as locas
from locas_ext.learning.optimizers import OPTIMIZERS
from locas_ext.learning.shampoo import inverse_root
from locas_ext.state.memory_state import MemoryState

LEARN = dict(window=24, stride=8, learning_rate=1e-2, progress=False)
CAUTIOUS = locas.Backprop(learning_rate=1e-2, optimizer="shampoo", cautious=True)


def by_eigenvalues(matrix):
    """matrix^(-1/2)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.rsqrt()[..., None, :] @ vectors.mT


class Reference:
    """The rules in float64 for each layer's slots [l, planes, r, d]."""

    def __init__(self, slots, shampoo=True, cautious=False):
        self.shampoo, self.cautious = shampoo, cautious
        self.slots, self.first, self.second = slots.double(), torch.zeros_like(slots).double(), torch.zeros_like(slots).double()
        self.gram, self.updates = torch.zeros(len(slots), slots.shape[2], slots.shape[2], dtype=torch.float64), 0

    def step(self, gradient, rate):
        self.updates += 1
        self.first, self.second = 0.9 * self.first + 0.1 * gradient, 0.999 * self.second + 0.001 * gradient**2
        step = self.first / (1 - 0.9**self.updates) / ((self.second / (1 - 0.999**self.updates)).sqrt() + 1e-8)
        if self.shampoo:
            self.precondition(step[:, -1], gradient[:, -1], self.first[:, -1])
        if self.cautious:
            for numbers, opposed in zip(step.flatten(0, 1), (gradient * self.first <= 0).flatten(0, 1), strict=True):
                numbers[opposed] = 0
                numbers /= max(1 - opposed.sum() / opposed.numel(), 1e-3)
        self.slots -= rate * step
        self.slots /= self.slots.norm(dim=-1, keepdim=True).clamp_min(1)

    def precondition(self, step, values, mean):
        self.gram = 0.95 * self.gram + 0.05 * values @ values.mT
        for number, gram in enumerate(self.gram):
            damping = 1e-2 / len(gram) * torch.eye(len(gram), dtype=torch.float64)
            way = by_eigenvalues(gram / gram.trace() + damping) @ mean[number]
            step[number] = way * (step[number].norm() / way.norm())


@pytest.mark.parametrize("rows", [1, 2, 13, 90])
@pytest.mark.parametrize("kind", ["random", "of one direction", "of very different lengths"])
def test_the_inverse_root_is_that_of_eigenvalues(rows, kind):
    gradient = torch.randn(3, rows, 1 if kind == "of one direction" else 40, dtype=torch.float64)
    if kind == "of very different lengths":
        gradient *= torch.logspace(0, -9, rows, dtype=torch.float64)[:, None]
    least = 10 ** random.uniform(-7, -1)
    gram = gradient @ gradient.mT / gradient.square().sum((1, 2), keepdim=True)
    gram = (1 - least) * gram + least * torch.eye(rows, dtype=torch.float64)
    torch.testing.assert_close(inverse_root(gram, least), by_eigenvalues(gram), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("optimizer, cautious", [("shampoo", False), ("shampoo", True), ("adamw", True)])
def test_the_rule(optimizer, cautious, planes):
    layers, r, d = random.randint(1, 4), random.randint(1, 9), random.randint(9, 40)
    state = MemoryState(tuple(range(layers)), planes, r, d, [1.0] * layers, [torch.device("cpu")] * layers, torch.float32)
    state.set_slots(torch.randn(layers, planes, r, d) / 9, version=1)
    reference, rule = Reference(state.arenas[0].slots, optimizer == "shampoo", cautious), {"cautious": True} if cautious else {}
    for number in range(1, 6):
        if planes == 2 and number == 3:
            state.resize(r + 3)  # room that nothing is in
        gradient = torch.randn(layers, planes, r, 1) * torch.randn(layers, planes, 1, d) + 0.1 * torch.randn(
            layers, planes, r, d
        )
        gradient *= 10 ** random.uniform(-6, 1)
        state.arenas[0].grad[:, :, :r] = gradient
        OPTIMIZERS[optimizer](state, 0.1 / number, clip=True, gradient_scale=0.5, **rule)
        reference.step(gradient.double() * 0.5, 0.1 / number)
        torch.testing.assert_close(state.arenas[0].slots[:, :, :r].double(), reference.slots, rtol=1e-4, atol=1e-5)
    assert not state.arenas[0].slots[:, :, r:].any()
    if optimizer == "shampoo":
        assert state.arenas[0].value_gram.shape == (layers, *[state.capacity] * 2)


@pytest.mark.parametrize("rule", [{}, {"cautious": True}], ids=str)
def test_without_a_gradient_nothing_moves(rule):
    state = MemoryState((0, 1), 3, 4, 8, [1.0] * 2, [torch.device("cpu")] * 2, torch.float32)
    state.set_slots(torch.randn(2, 3, 4, 8) / 9, version=1)
    before = state.arenas[0].slots.clone()
    OPTIMIZERS["shampoo"](state, 0.1, clip=True, gradient_scale=1.0, **rule)
    assert torch.equal(state.arenas[0].slots, before)


# ---- its state ------------------------------------------------------------------------------------------------
def test_slots_that_come_and_go():
    _, memory = grown()
    twin = memory.fork()
    twin.state.resize(13)
    for each in (memory, twin):
        each.memorize(TEXT[:32], **{**STEPS, "learning_rate": None}, update=CAUTIOUS)
    assert torch.equal(written(memory), written(twin))  # unused room is of no consequence
    gram = memory.state.tensors()["value_gram"].clone()
    assert gram.shape == (2, 13, 13) and torch.equal(twin.state.whole("value_gram"), gram)
    memory.write(IDS, tokens=[1, 2], capacity=14, when_full="drop_oldest")
    kept = memory.state.whole("value_gram")
    assert torch.equal(kept[:, :12, :12], gram[:, 1:, 1:]) and not kept[:, 12:].any() and not kept[:, :, 12:].any()
    memory.write(IDS)
    assert torch.equal(memory.state.whole("value_gram")[:, :14, :14], kept[:, :14, :14])
    memory.reset()
    assert memory.state.whole("value_gram") is None


def test_a_file_without_it_starts_anew(tmp_path):
    _, memory = attached(rank=4)
    memory.memorize(TEXT[:40], **LEARN, optimizer="adamw")
    memory.save_pretrained(tmp_path, optimizer=True)
    with pytest.raises(locas.LocasError, match="optimizer was 'adamw', is 'shampoo'"):
        memory.memorize(TEXT[:40], **LEARN, optimizer="shampoo", resume=tmp_path)
    _, other = attached(rank=4)
    other.load(tmp_path)
    for each in (memory, other):
        each.memorize(TEXT[:40], **LEARN, optimizer="shampoo")
    assert torch.equal(memory.slots, other.slots)


def test_a_file_with_another_size_of_it_is_refused(tmp_path):
    _, memory = attached(rank=4)
    memory.memorize(TEXT[:40], **LEARN, optimizer="shampoo")
    memory.state.arenas[0].value_gram = torch.zeros(len(memory.layers), 3, 3)
    with pytest.raises(locas.LocasError, match=r"value_gram is torch.float32 \[2, 3, 3\]; expected torch.float32 \[2, 4, 4\]"):
        memory.save_pretrained(tmp_path, optimizer=True)


def test_a_memory_that_bears_little_bears_no_higher_rate_of_shampoo():
    _, memory = attached(rank=4, init="activation", scale="host")
    with pytest.raises(ValueError, match="learning_rate is 0.01, at which init='activation'"):
        memory.memorize(TEXT[:32], **LEARN, optimizer="shampoo")


def test_many_slots_are_warned_of(monkeypatch):
    _, memory = attached()
    slots = memory.slots.shape[2]
    monkeypatch.setattr("locas_ext.learning.memorize._MANY_SLOTS", slots - 1)
    with pytest.warns(UserWarning, match=rf"'shampoo'.*60 r\^3.*memory's {slots} slots"):
        memory.memorize(TEXT[:16], **LEARN, optimizer="shampoo")
    monkeypatch.setattr("locas_ext.learning.memorize._MANY_SLOTS", slots)
    memory.memorize(TEXT[:16], **LEARN, optimizer="shampoo")  # warnings are errors here
