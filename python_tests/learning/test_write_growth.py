"""A memory that grows by writing: its capacity, and what happens when it is full."""

import copy

import pytest
import torch
from support.helpers import TEXT
from support.writing import (
    IDS,
    PlainWriter,
    assert_unchanged,
    everything,
    expected_slots,
    writable,
    written,
)
from support.written import STEPS, grown

import locas_ext as locas


def test_the_capacity_doubles_and_a_longer_text_gets_what_it_needs():
    _, memory = writable(rank=4)
    sizes = []
    for tokens in ([1, 2, 3], [1], [1], [1, 2, 3], [1], "all"):
        memory.write(TEXT[:40], tokens=tokens)
        sizes.append((memory.state.used, memory.state.capacity))
    assert sizes == [(3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (48, 48)]
    assert [len(parameter[0]) for parameter in memory.parameters()] == [48, 48]


def test_a_capacity_is_reserved_at_once():
    _, memory = writable(rank=4)
    memory.write(IDS, capacity=20)
    assert (memory.state.used, memory.state.capacity) == (12, 20)


def test_full_is_an_error_that_names_slots_and_ways_out():
    _, memory = writable()
    memory.write(IDS)
    before = everything(memory)
    for arguments in (dict(), dict(tokens=locas.TopLoss(3)), dict(tokens=locas.LossAbove(0)), dict(tokens=[1, 2, 3])):
        with pytest.raises(ValueError, match=r"12 of 14 slots are used and \d+ more.*drop_oldest.*compress"):
            memory.write(IDS, capacity=14, **arguments)
        assert_unchanged(memory, before)
    memory.write(IDS, capacity=14, tokens=locas.TopLoss(2))
    assert memory.state.used == memory.state.capacity == 14


def test_dropping_the_oldest_keeps_the_order_and_the_optimizers_states():
    model, memory = writable(dtype=torch.bfloat16)
    memory.write(IDS)
    memory.memorize(TEXT[:16], **STEPS)
    kept = {name: tensor.clone() for name, tensor in memory.state.tensors().items()}
    assert kept["exp_avg"][:, :, 5:].any()
    memory.write(IDS, tokens=[2, 4, 6, 8, 10], capacity=14, when_full="drop_oldest")
    assert (memory.state.used, memory.state.capacity, memory.version) == (14, 14, 4)
    for name in ("slots", "exp_avg", "exp_avg_sq"):
        assert torch.equal(memory.state.whole(name)[:, :, :9], kept[name][:, :, 3:]), name
    assert not memory.state.whole("exp_avg")[:, :, 9:].any()
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.bfloat16())
    assert memory.slots[:, :, 9:].norm(dim=-1).min() > 0


def test_all_may_be_dropped_for_a_text_that_just_fits():
    model, memory = writable()
    memory.write(IDS[:9], capacity=12)
    inputs, gradients, _ = PlainWriter(model, written(memory)).ask(IDS)
    memory.write(IDS, capacity=12, when_full="drop_oldest")
    expected, _ = expected_slots(inputs, gradients, 1e-2)
    torch.testing.assert_close(written(memory).double(), expected, rtol=1e-3, atol=1e-6)
    assert memory.state.used == 12


def test_dropping_where_there_is_more_room_than_allowed():
    _, memory = grown()
    slots = memory.slots.clone()
    memory.write(IDS, tokens=[1, 2], capacity=14, when_full="drop_oldest")
    assert memory.state.used == 14 and torch.equal(memory.slots[:, :, :12], slots[:, :, 1:13])
    assert not memory.slots[:, :, 14:].any()


def test_compressing_when_full():
    model, memory = writable("gpt2")
    memory.write(IDS, epsilon=0.5)
    twin = writable("gpt2")[1]
    twin.write(IDS, epsilon=0.5)
    twin.compress(5)
    inputs, gradients, _ = PlainWriter(model, written(memory)).ask(IDS[:6])
    memory.write(IDS[:6], capacity=16, compress_to=5)
    assert (memory.state.used, memory.state.capacity, memory.version) == (10, 12, 3)  # no more room than was needed
    assert torch.equal(memory.slots[:, :, :5], twin.slots)
    expected, _ = expected_slots(inputs, gradients, 1e-2)  # of the memory that read the text
    torch.testing.assert_close(written(memory, 5).double(), expected, rtol=1e-3, atol=1e-6)
    assert not memory.slots[:, :, 10:].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(capacity=12, when_full="drop_oldest"), "up to 13 tokens.*capacity is 12; expected a capacity of at least 13"),
        (dict(capacity=16, compress_to=8), "capacity is 16 and compress_to 8; expected a capacity of at least 21"),
        (dict(capacity=16, when_full="compress", tokens=list(range(1, 10)), compress_to=9), "at least 18"),
    ],
)
def test_more_tokens_than_can_ever_fit(arguments, message):
    _, memory = writable()
    memory.write(IDS)
    before = everything(memory)
    with pytest.raises(ValueError, match=message):
        memory.write(TEXT[:14], **arguments)
    assert_unchanged(memory, before)


def test_backprop_trains_the_slots_used_and_no_others():
    _, memory = grown()
    full = memory.slots.clone()
    memory.memorize(TEXT[:32], **STEPS)
    assert memory.slots[:, :, 13:].count_nonzero() == 0 and memory.state.used == 13
    assert (memory.slots - full)[:, :, :13].norm(dim=-1).gt(0).float().mean() > 0.9
    full = memory.slots.clone()
    optimizer = locas.SlotAdamW(memory, lr=1e-2, weight_decay=0.1)
    memory.model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
    optimizer.step()
    assert memory.slots[:, :, 13:].count_nonzero() == 0 and memory.state.used == 13
    assert not torch.equal(memory.slots, full)
    memory.write(IDS[:3])
    assert memory.state.used == 15


def test_learning_does_not_depend_on_unused_room():
    memories = [grown()[1], grown()[1]]
    memories[1].state.resize(13)
    for memory in memories:
        memory.memorize(TEXT[:32], **STEPS)
    assert torch.equal(*(written(memory) for memory in memories))


def test_an_optimizers_state_goes_round():
    _, memory = grown()
    twin = memory.fork()

    def step(m, optimizer):
        optimizer.zero_grad()
        m.model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()

    optimizer = locas.SlotAdamW(memory, lr=1e-2)
    step(memory, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"]["exp_avg"].shape == (2, 2, 13, 32)
    twin.restore(memory.snapshot())
    twin.state.resize(20)
    twin.state.load_optimizer({name: torch.full_like(t, 7) for name, t in saved["state"].items()})
    other = locas.SlotAdamW(twin, lr=1e-2)
    other.load_state_dict(saved)
    for m, o in ((memory, optimizer), (twin, other)):
        step(m, o)
    assert torch.equal(written(memory), written(twin))
    memory.write(IDS)
    with pytest.raises(ValueError, match=r"exp_avg has shape \[2, 2, 13, 32\]; expected \[2, 2, 25, 32\]"):
        optimizer.load_state_dict(saved)
    step(memory, optimizer)  # the parameters are still the optimizer's
    assert memory.state.used == 25 and memory.version == 6
