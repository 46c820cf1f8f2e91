"""Layers of a memory whose parameters do not require a gradient stay as they are, whatever updates the others."""

import copy

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, tiny_model, tiny_opt

import locas_ext as locas

LAYERS = 4
FROZEN = [[0], [1], [3], [0, 2], [1, 2, 3]]


def memory_of(variant="glu", dtype=torch.float32, **config):
    if variant == "mlp":
        return locas.attach(tiny_opt().to(dtype), locas.LocasConfig("mlp", rank=5, scale="host", **config))
    return attached(rank=5, dtype=dtype, model_settings=dict(num_hidden_layers=LAYERS), **config)[1]


def freeze(memory, layers):
    for layer in layers:
        memory.parameters()[layer].requires_grad_(False)


def states(memory):
    state = memory.state
    names = "slots", "exp_avg", "exp_avg_sq", "value_gram"
    return {name: state.whole(name).clone() for name in names if state.whole(name) is not None}


def assert_frozen(memory, before, frozen):
    now = states(memory)
    for name, tensor in before.items():
        assert all(torch.equal(now[name][layer], tensor[layer]) for layer in frozen), name
    others = [layer for layer in range(len(memory.layers)) if layer not in frozen]
    assert all(not torch.equal(now["slots"][layer], before["slots"][layer]) for layer in others)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("update", [locas.Backprop.paper(), locas.Backprop(optimizer="sgd")], ids=str)
@pytest.mark.parametrize("when", ["before", "between", "during"])
def test_frozen_layers_stay_bit_for_bit(when, update, dtype, frozen):
    memory, settings = memory_of(dtype=dtype), {**SETTINGS, "learning_rate": None, "update": update}
    before = {}

    def callback(chunk):
        if when == "during" and chunk.end == 32:
            freeze(memory, frozen)
            before.update(states(memory))

    if when == "between":
        memory.memorize(TEXT, **settings)
    elif when == "before":
        memory.initialize(TEXT[:8])
    if when != "during":
        freeze(memory, frozen)
        before.update(states(memory))
    memory.memorize(TEXT, **settings, callback=callback)
    assert_frozen(memory, before, frozen)


def test_a_two_layer_host_too():
    memory = memory_of("mlp")
    memory.memorize(TEXT, **SETTINGS, optimizer="shampoo")
    freeze(memory, [1])
    before = states(memory)
    memory.memorize(TEXT, **SETTINGS, optimizer="shampoo")
    assert_frozen(memory, before, [1])
    assert not torch.equal(memory.state.whole("value_gram")[0], before["value_gram"][0])


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_an_optimizer_of_ones_own_moves_what_torchs_would(frozen):
    """SlotAdamW with weight decay against torch.optim.AdamW on the same losses, layers frozen after two steps."""
    memory = memory_of(clip=False)
    memory.memorize(TEXT, **{**SETTINGS, "optimizer": "sgd"})
    ours = locas.memory_of(copy.deepcopy(memory.model))
    settings = dict(lr=0.02, weight_decay=0.3)
    for each, optimizer in (
        (ours, locas.SlotAdamW(ours, **settings)),
        (memory, torch.optim.AdamW(memory.parameters(), **settings)),
    ):
        for step in range(5):
            if step == 2:
                freeze(each, frozen)
                before = states(each)
            optimizer.zero_grad()
            each.model(input_ids=TEXT[None, :32], labels=TEXT[None, :32]).loss.backward()
            optimizer.step()
        assert all(torch.equal(each.slots[layer], before["slots"][layer]) for layer in frozen)
    # AdamW divides a gradient by its own size, and where that is rounding noise so is the direction
    assert (ours.slots - memory.slots).norm() < 1e-3 * memory.slots.norm()


def test_a_clip_of_frozen_rows_would_be_a_change_too():
    memory = memory_of()
    memory.memorize(TEXT, **SETTINGS)
    with torch.no_grad():
        memory.slots[2] *= 3  # beyond the clip
    freeze(memory, [2])
    before = states(memory)
    memory.memorize(TEXT, **SETTINGS)
    assert_frozen(memory, before, [2])


def test_a_layer_that_is_thawed_learns_again():
    memory = memory_of()
    freeze(memory, [1])
    memory.memorize(TEXT, **SETTINGS)
    assert not memory.slots[1, 2].any()
    memory.parameters()[1].requires_grad_(True)
    memory.memorize(TEXT, **SETTINGS)
    assert memory.slots[1, 2].any()


def test_a_fork_is_frozen_where_its_origin_is():
    memory = memory_of()
    memory.memorize(TEXT, **SETTINGS)
    freeze(memory, [0])
    fork = memory.fork()
    assert [parameter.requires_grad for parameter in fork.parameters()] == [False, True, True, True]
    before = states(fork)
    fork.memorize(TEXT, **SETTINGS)
    assert_frozen(fork, before, [0])


def test_freezing_the_last_layer_during_a_run_ends_it_with_the_reason():
    memory = locas.attach(tiny_model(), locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match=r"requires_grad is False on all of memory.parameters\(\)"):
        memory.memorize(TEXT, **SETTINGS, callback=lambda chunk: freeze(memory, [0, 1]))
    assert memory.version == 1 and memory.tokens_seen == 8
