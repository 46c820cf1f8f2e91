"""Where the paper is silent: rates of gate, key and value rows, lengths to clip at, rates that fade."""

import copy
import math
import random
from functools import partial

import pytest
import torch
from support.helpers import TEXT, attached, tiny_model, tiny_opt

import locas_ext as locas
from locas_ext.learning.backprop import rates_of
from locas_ext.learning.optimizers import adamw_step, sgd_step
from locas_ext.state.memory_state import MemoryState


def random_state(planes, dtype=torch.float32):
    """A memory's state of random size with slots and lengths to clip at."""
    layers, rank, d = random.randint(1, 4), random.randint(1, 9), random.randint(9, 40)
    state = MemoryState(tuple(range(layers)), planes, rank, d, [1.0] * layers, [torch.device("cpu")] * layers, dtype)
    state.set_slots(torch.randn(layers, planes, rank, d), version=1)
    return state


def clipped(slots, longest):
    return slots * (longest[..., None, None] / slots.norm(dim=-1, keepdim=True)).clamp_max(1)


# ---- the updates ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("planes", [2, 3])
@pytest.mark.parametrize("own_lengths", [False, True])
def test_adamw_with_a_rate_per_kind_of_row(planes, own_lengths):
    state = random_state(planes)
    (arena,) = state.arenas
    longest = torch.rand(len(state.layers), planes) * 5 + 0.5 if own_lengths else torch.ones(len(state.layers), planes)
    if own_lengths:
        state.clip_at(longest.tolist())
    rates = torch.rand(planes, dtype=torch.float64) * 0.1
    peers = [arena.slots[:, plane].double().clone().requires_grad_() for plane in range(planes)]
    groups = [{"params": [peer], "lr": rate} for peer, rate in zip(peers, rates.tolist(), strict=True)]
    torch_adamw = torch.optim.AdamW(groups, betas=(0.7, 0.95), weight_decay=0.0)
    for _ in range(5):
        arena.grad.copy_(torch.randn_like(arena.grad) * 10 ** random.uniform(-3, 1))
        for plane, peer in enumerate(peers):
            peer.grad = arena.grad[:, plane].double() * 0.5
        torch_adamw.step()
        for plane, peer in enumerate(peers):
            peer.data = clipped(peer.data[:, None], longest[:, plane : plane + 1].double())[:, 0]
        adamw_step(state, rates, betas=(0.7, 0.95), gradient_scale=0.5)
        expected = torch.stack([peer.detach() for peer in peers], 1)
        torch.testing.assert_close(arena.slots.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_rate_for_all_planes_is_the_same_as_three():
    one = random_state(3)
    three = copy.deepcopy(one)
    gradient = torch.randn_like(one.arenas[0].grad)
    for state, rate in ((one, 0.02), (three, torch.tensor([0.02, 0.02, 0.02]))):
        for _ in range(3):
            state.arenas[0].grad.copy_(gradient)
            adamw_step(state, rate)
    torch.testing.assert_close(one.arenas[0].slots, three.arenas[0].slots, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [adamw_step, sgd_step])
def test_rows_of_no_length_stay_numbers(step):
    state = random_state(3)
    state.clip_at([[0.0, 1.0, 2.0]] * len(state.layers))
    for _ in range(2):
        step(state, 0.1)
    rows = state.arenas[0].slots
    assert not rows[:, 0].any() and rows[:, 1:].norm(dim=-1).min() > 0.5


@pytest.mark.parametrize("step", [adamw_step, sgd_step, partial(adamw_step, shampoo=True)], ids=["adamw", "sgd", "shampoo"])
def test_a_gradient_that_is_not_finite_changes_nothing(step):
    state = random_state(3)
    (arena,) = state.arenas
    rates = torch.tensor([0.1, 0.2, 0.3])
    step(state, rates)
    arena.grad.fill_(math.nan)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    step(state, rates, finite=torch.tensor(0))
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


# ---- Backprop -------------------------------------------------------------------------------------------------
def test_rates_of_planes_and_how_they_fade():
    update = locas.Backprop(learning_rate=0.01, gate_learning_rate=0.02, value_learning_rate=0.03, decay_after=4)
    assert rates_of(update, 3, 0) == [0.02, 0.01, 0.03] and rates_of(update, 2, 0) == [0.01, 0.03]
    assert rates_of(update, 3, updates=12) == pytest.approx([0.01, 0.005, 0.015])
    assert rates_of(locas.Backprop(learning_rate=0.5), 3, updates=9) == [0.5]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(value_learning_rate=-1), "value_learning_rate is -1"),
        (dict(gate_learning_rate="x"), "gate_learning_rate is 'x'"),
        (dict(decay_after=0), "decay_after is 0"),
        (dict(optimizer="lion"), "optimizer is 'lion'"),
        (dict(cautious=1), "cautious is 1"),
        (dict(cautious=True, optimizer="sgd"), "cautious is True, but optimizer is 'sgd'.*expected 'adamw' or 'shampoo'"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        locas.Backprop(**wrong)


def test_rates_fade_with_the_updates():
    fading, plain = (attached(rank=4, clip=False)[1] for _ in range(2))
    for memory in (fading, plain):
        memory.memorize(TEXT[:48], 16, 8, update=locas.Backprop(learning_rate=0.0), progress=False)
    for updates, part in enumerate(TEXT[:24].split(8), start=6):
        assert fading.version == updates
        fading.memorize(part, 16, 8, update=locas.Backprop(learning_rate=0.3, decay_after=2), progress=False)
        plain.memorize(part, 16, 8, update=locas.Backprop(learning_rate=0.3 / math.sqrt(1 + updates / 2)), progress=False)
        torch.testing.assert_close(fading.slots, plain.slots, rtol=1e-6, atol=1e-7)


def test_slots_without_gates_have_no_rate_of_gates():
    memory = locas.attach(tiny_opt(), locas.LocasConfig("mlp", rank=4))
    update = locas.Backprop(gate_learning_rate=1e-3, value_learning_rate=0.0)
    with pytest.raises(ValueError, match="gate_learning_rate is 0.001, but the variant is 'mlp'"):
        memory.memorize(TEXT[:32], 16, 8, update=update, progress=False)
    update = locas.Backprop(learning_rate=1e-2, value_learning_rate=0.0)
    memory.memorize(TEXT[:32], 16, 8, update=update, progress=False)
    assert memory.version == 4 and not memory.slots[:, 1].any()  # value rows begin at 0


def test_no_rate_of_a_memory_that_bears_little_may_be_high():
    _, memory = attached(rank=4, init="activation", scale="host")
    update = locas.Backprop(learning_rate=1e-5, value_learning_rate=1e-2)
    with pytest.raises(ValueError, match="value_learning_rate is 0.01, at which init='activation'"):
        memory.memorize(TEXT[:32], 16, 8, update=update, progress=False)


# ---- in a file ------------------------------------------------------------------------------------------------
OWN = dict(gate_learning_rate=1e-3, value_learning_rate=2e-2, decay_after=5)


@pytest.mark.parametrize("optimizer, cautious", [("adamw", True), ("sgd", False)])
def test_a_run_with_settings_of_its_own_is_resumed_bit_for_bit(tmp_path, optimizer, cautious):
    config = locas.LocasConfig(rank=4, scale="host", clip=1.5, row_length="host")
    update = locas.Backprop(learning_rate=4e-3, optimizer=optimizer, cautious=cautious, **OWN)
    whole = locas.attach(tiny_model(), config)
    whole.memorize(TEXT[:64], 16, 4, update=update, progress=False)
    half = locas.attach(tiny_model(), config)

    def interrupt(chunk):
        if chunk.end == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.memorize(TEXT[:64], 16, 4, update=update, progress=False, callback=interrupt)
    half.save_pretrained(tmp_path, optimizer=True)
    again = locas.load(tiny_model(), tmp_path)
    assert again.config == locas.LocasConfig(**{**config.to_dict(), "layers": again.config.layers})
    with pytest.raises(ValueError, match=r"decay_after was 5, is None") as raised:
        again.memorize(TEXT[:64], 16, 4, update=locas.Backprop(**{**OWN, "decay_after": None}), progress=False, resume=tmp_path)
    assert ("cautious was True, is False" in str(raised.value)) == cautious
    again.memorize(TEXT[:64], 16, 4, update=update, progress=False, resume=tmp_path)
    assert torch.equal(again.slots, whole.slots)


def test_the_length_of_value_rows_follows_a_loaded_scale(tmp_path):
    """Tau times it is a number of times the length of the host's own value rows."""
    settings = dict(rank=4, clip=1.5, model_settings=dict(num_hidden_layers=3), layers=[0, 2])
    _, saved = attached(scale=0.5, **settings)
    saved.save_pretrained(tmp_path)
    _, memory = attached(scale="host", **settings)
    memory.load(tmp_path)
    torch.testing.assert_close(memory.state.arenas[0].longest, saved.state.arenas[0].longest)
