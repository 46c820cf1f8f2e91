"""SlotAdamW and SlotSGD as torch optimizers: their states go round, and nothing is updated that must not be."""

import copy
import pickle

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached

import locas_ext as locas

KINDS = {"SlotAdamW": dict(lr=0.05), "SlotSGD": dict(lr=0.5, momentum=0.9)}


def ready(kind):
    model, memory = attached()
    memory.memorize(TEXT, **{**SETTINGS, "optimizer": "sgd"})  # which keeps no state
    return model, memory, getattr(locas, kind)(memory, **KINDS[kind])


def step(model, memory, optimizer):
    optimizer.zero_grad()
    model(input_ids=TEXT[None, :32], labels=TEXT[None, :32]).loss.backward()
    optimizer.step()
    return memory.slots.clone()


def states(memory):
    return {name: tensor.clone() for name, tensor in memory.state.tensors().items()}


def assert_states(memory, before):
    now = states(memory)
    assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_state_starts_anew(kind):
    model, memory, optimizer = ready(kind)
    slots, fresh = memory.slots.clone(), copy.deepcopy(optimizer.state_dict())
    first = step(model, memory, optimizer)
    second = step(model, memory, optimizer)
    assert not torch.equal(first, second)
    with torch.no_grad():
        memory.slots.copy_(slots)
    optimizer.load_state_dict(fresh)
    assert torch.equal(step(model, memory, optimizer), first)
    assert torch.equal(step(model, memory, optimizer), second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_and_its_state_go_round(kind):
    def make(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    model, memory, optimizer = ready(kind)
    scheduler = make(optimizer)
    step(model, memory, optimizer)
    scheduler.step()
    saved, slots = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict())), memory.slots.clone()
    assert saved[0]["param_groups"][0]["params"] == [0, 1]
    expected = step(model, memory, optimizer)
    with torch.no_grad():
        memory.slots.copy_(slots)
    other = getattr(locas, kind)(memory, **KINDS[kind])
    later = make(other)
    other.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    assert other.param_groups[0]["lr"] == KINDS[kind]["lr"] / 2
    assert torch.equal(step(model, memory, other), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_another_parameter_group_is_refused(kind):
    model, memory, optimizer = ready(kind)
    other = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="give other parameters an optimizer of their own"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1
    step(model, memory, optimizer)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(param_groups=[]), ValueError, "holds 0 groups; expected 1"),
        (dict(param_groups=[{}, {}]), ValueError, "holds 2 groups"),
        (dict(param_groups=[{"lr": -1.0}]), ValueError, "lr is -1.0"),
        (dict(param_groups=[{"lr": "fast"}]), TypeError, "lr is 'fast'"),
        (dict(state={"step": torch.zeros(2)}), ValueError, "step has shape"),
        (dict(state={"momentum_buffer": torch.zeros(1)}), ValueError, "momentum_buffer"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    model, memory, optimizer = ready("SlotAdamW")
    step(model, memory, optimizer)
    before, group = states(memory), dict(optimizer.param_groups[0])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict({**optimizer.state_dict(), **change})
    assert_states(memory, before)
    assert optimizer.param_groups[0] == group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(kind, value):
    model, memory, optimizer = ready(kind)
    step(model, memory, optimizer)
    before, version = states(memory), memory.version
    optimizer.zero_grad()
    (model(input_ids=TEXT[None, :32], labels=TEXT[None, :32]).loss * value).backward()
    with pytest.raises(locas.LocasError, match=f"gradient is not finite; the memory stays at version {version}"):
        optimizer.step()
    assert_states(memory, before)
    assert memory.version == version
    step(model, memory, optimizer)
    assert memory.version == version + 1


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("SlotAdamW", dict(lr="fast"), "lr is 'fast'"),
        ("SlotAdamW", dict(lr=float("inf")), "lr is inf"),
        ("SlotAdamW", dict(betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
        ("SlotAdamW", dict(eps=True), "eps is True"),
        ("SlotSGD", dict(lr=0.1, momentum=-0.5), "momentum is -0.5"),
        ("SlotSGD", dict(lr=0.1, weight_decay=float("nan")), "weight_decay is nan"),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(locas, kind)(attached()[1], **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_optimizer_steps_a_copied_memory_and_none_is_pickled(kind):
    model, memory, optimizer = ready(kind)
    step(model, memory, optimizer)
    other = copy.deepcopy(optimizer)
    assert other.memory is not memory
    assert all(a is b for a, b in zip(other.param_groups[0]["params"], other.memory.parameters(), strict=True))
    assert torch.equal(step(other.memory.model, other.memory, other), step(model, memory, optimizer))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(optimizer)


def test_a_state_out_of_range_is_refused():
    _, memory, optimizer = ready("SlotAdamW")
    before = states(memory)
    for name, value in {"step": -5, "exp_avg": float("nan"), "exp_avg_sq": -1.0}.items():
        state = optimizer.state_dict()
        state["state"] = {name: torch.full_like(before["step" if name == "step" else "slots"], value)}
        with pytest.raises(ValueError, match=f"optimizer state: {name} holds"):
            optimizer.load_state_dict(state)
    assert_states(memory, before)
