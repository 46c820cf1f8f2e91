"""A host spread over several devices has one arena on each: everything must be as with one arena, bit for bit.

Without a second device, layers are put into arenas of their own by another rule than the device.
"""

import copy

import pytest
import torch
import transformers
from support.helpers import SETTINGS, TEXT, logits_of, tiny_model

import locas_ext as locas
from locas_ext.patching import attachment as patch_module
from locas_ext.patching import base
from locas_ext.state import memory_state as slots_module
from locas_ext.state.memory_state import MemoryState

LAYERS = 5
SPLITS = [[[0, 1], [2, 3, 4]], [[0, 2, 4], [1, 3]], [[0], [1], [2], [3], [4]]]


def attach(monkeypatch, groups=None, dtype=torch.float32, **config):
    """A fresh host and its memory, its layers in arenas as `groups` says; None: in one."""
    model = tiny_model(num_hidden_layers=LAYERS, dtype=dtype)
    with monkeypatch.context() as patch:
        if groups is not None:
            patch.setattr(slots_module, "grouped_by_device", lambda devices: groups)
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host", **config))
    assert len(memory.state.arenas) == (1 if groups is None else len(groups))
    return model, memory


def assert_same_state(a, b):
    assert (a.version, a.state.initialized, a.tokens_seen) == (b.version, b.state.initialized, b.tokens_seen)
    tensors, others = a.state.tensors(), b.state.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_layers_are_grouped_by_device_in_the_order_of_their_first():
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "cuda:1", "cuda:0", "cpu")]
    assert slots_module.grouped_by_device(devices) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("groups", SPLITS, ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "shampoo"])
def test_learning_is_the_same(groups, optimizer, monkeypatch):
    (model, one), (other, several) = attach(monkeypatch), attach(monkeypatch, groups)
    assert torch.equal(logits_of(other, TEXT), logits_of(model, TEXT))
    for memory in (one, several):
        memory.memorize(TEXT, **SETTINGS, optimizer=optimizer)
    assert_same_state(several, one)
    assert one.version == 8 and all(arena.slots.any() for arena in several.state.arenas)
    assert torch.equal(logits_of(other, TEXT), logits_of(model, TEXT))
    assert several.status() == one.status() and several.layers == one.layers
    assert torch.equal(torch.stack(several.parameters()), several.gather_slots())
    several.detach()
    one.detach()
    assert torch.equal(logits_of(other, TEXT), logits_of(model, TEXT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_does_not_know_how_many_arenas_there_were(dtype, monkeypatch, tmp_path):
    groups = SPLITS[1]
    _, one = attach(monkeypatch, dtype=dtype)
    _, several = attach(monkeypatch, groups, dtype=dtype)
    for name, memory in (("one", one), ("several", several)):
        memory.memorize(TEXT, **SETTINGS)
        memory.save_pretrained(tmp_path / name, optimizer=True)
    assert (tmp_path / "one/locas_memory.safetensors").read_bytes() == (
        tmp_path / "several/locas_memory.safetensors"
    ).read_bytes()
    for name, arenas in (("several", None), ("one", groups)):
        model, memory = attach(monkeypatch, arenas, dtype=dtype)
        memory.load(tmp_path / name)
        assert_same_state(memory, one)
        assert torch.equal(logits_of(model, TEXT), logits_of(one.model, TEXT))
        memory.memorize(TEXT, **SETTINGS)  # goes on from the loaded optimizer states
        again = copy.deepcopy(one)
        again.memorize(TEXT, **SETTINGS)
        assert_same_state(memory, again)


@pytest.mark.parametrize("arenas", [SPLITS[1], None], ids=["several", "one"])
def test_a_run_is_resumed_on_another_number_of_arenas(arenas, monkeypatch, tmp_path):
    _, whole = attach(monkeypatch)
    whole.memorize(TEXT, **SETTINGS)
    _, first = attach(monkeypatch, None if arenas else SPLITS[0])

    def stop(chunk):
        if chunk.end == 40:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        first.memorize(TEXT, **SETTINGS, callback=stop)
    first.save_pretrained(tmp_path / "cut", optimizer=True)
    _, second = attach(monkeypatch, arenas)
    report = second.memorize(TEXT, **SETTINGS, resume=tmp_path / "cut")
    assert_same_state(second, whole)
    assert report.tokens == len(TEXT) - 1


def test_snapshots_forks_copies_and_reset(monkeypatch):
    _, one = attach(monkeypatch)
    model, several = attach(monkeypatch, SPLITS[2])
    for memory in (one, several):
        memory.memorize(TEXT, **SETTINGS)
    kept = several.snapshot()
    twins = [several.fork(), copy.deepcopy(several), locas.memory_of(copy.deepcopy(model))]
    for memory in (one, several):
        memory.memorize(TEXT, **SETTINGS)
    assert_same_state(several, one)
    for twin in twins:
        assert twin.version == 8
        twin.memorize(TEXT, **SETTINGS)
        assert_same_state(twin, one)
    several.restore(kept)
    assert several.version == 8 and torch.equal(several.gather_slots(), kept.tensors["slots"])
    one.restore(kept)
    assert_same_state(one, several)
    for memory in (one, several):
        memory.reset()
    assert_same_state(several, one)
    assert not several.gather_slots().any() and several.state.whole("exp_avg") is None


@pytest.mark.parametrize("kind", ["SlotAdamW", "SlotSGD", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_loops_of_ones_own(kind, dtype, monkeypatch):
    memories = []
    for groups in (None, SPLITS[1]):
        model, memory = attach(monkeypatch, groups, dtype=dtype)
        memory.initialize(TEXT)
        if kind == "stock":
            optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
        else:
            optimizer = getattr(locas, kind)(memory, lr=1e-2, **({"momentum": 0.9} if kind == "SlotSGD" else {}))
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.backward()
            optimizer.step()
        if kind != "stock":
            state = copy.deepcopy(optimizer.state_dict())
            memory.state.reset()
            optimizer.load_state_dict(state)
            for name, tensor in state["state"].items():
                assert torch.equal(memory.state.whole(name), tensor)
        memories.append(memory)
    one, several = memories
    assert one.version == (3 if kind == "stock" else 0)
    assert_same_state(several, one)


def test_a_gradient_that_is_not_finite_in_one_arena_updates_none(monkeypatch):
    model, memory = attach(monkeypatch, SPLITS[0])
    memory.memorize(TEXT, **SETTINGS)
    before, step = memory.gather_slots(), memory.state.whole("step").clone()
    backward = MemoryState.backward

    def overflowing(state, loss):  # stands for a layer whose gradient overflows
        backward(state, loss)
        memory.state.arenas[1].grad[-1, 2, 0, 0] = float("inf")

    monkeypatch.setattr(MemoryState, "backward", overflowing)
    with pytest.raises(locas.LocasError, match="gradient is not finite"):
        memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.gather_slots(), before) and torch.equal(memory.state.whole("step"), step)
    assert not memory.state.whole("grad").any() and memory.version == 8


def test_an_optimizer_state_that_finds_no_room_updates_no_arena(monkeypatch):
    _, memory = attach(monkeypatch, SPLITS[0])
    memory.initialize(TEXT)
    before = memory.gather_slots().clone()

    def no_room(name):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(memory.state.arenas[1], "on_demand", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.gather_slots(), before) and memory.version == 0


@pytest.mark.parametrize("groups", [SPLITS[1], SPLITS[2]], ids=str)
def test_merging_is_the_same(groups, monkeypatch):
    states = []
    for arenas in (None, groups):
        model, memory = attach(monkeypatch, arenas)
        memory.memorize(TEXT, **SETTINGS)
        states.append(memory.merge_and_unload(pad_to_multiple_of=8).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_every_arena_follows_the_hosts_dtype(monkeypatch):
    _, one = attach(monkeypatch)
    _, several = attach(monkeypatch, SPLITS[1])
    for memory in (one, several):
        memory.memorize(TEXT, **SETTINGS)
        memory.model.to(torch.bfloat16)
        memory.memorize(TEXT, **SETTINGS)
        assert all(arena.compute.dtype == torch.bfloat16 for arena in memory.state.arenas)
    assert_same_state(several, one)


def test_a_cache_from_before_an_update_is_refused(monkeypatch):
    model, memory = attach(monkeypatch, SPLITS[1])
    memory.memorize(TEXT, **SETTINGS)
    arguments = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    first = model.generate(input_ids=TEXT[None, :8], **arguments)
    with torch.no_grad():
        memory.parameters()[3].mul_(0.5)  # one layer, in the second arena
    assert memory.version == 9
    with pytest.raises(ValueError, match="past_key_values was filled before the memory changed"):
        model.generate(input_ids=first.sequences, past_key_values=first.past_key_values, **arguments)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_cache_that_a_decoder_continued_is_refused(monkeypatch, by_name):
    model, memory = attach(monkeypatch)
    memory.memorize(TEXT, **SETTINGS)
    cache = transformers.DynamicCache(config=model.config)
    with memory.disabled(), torch.no_grad():
        model(input_ids=TEXT[None, :8], past_key_values=cache)
    with torch.no_grad():
        model.model(TEXT[None, 8:10], past_key_values=cache) if by_name else model.model(TEXT[None, 8:10], None, None, cache)
    with pytest.raises(ValueError, match="past_key_values was filled before the memory changed"):
        model.generate(input_ids=TEXT[None, :12], past_key_values=cache, max_new_tokens=2, pad_token_id=0)


def test_a_layer_or_an_arena_torn_apart_is_an_error(monkeypatch):
    """Devices that this machine need not have, so they are only claimed."""
    model = tiny_model(num_hidden_layers=2)
    down = model.model.layers[1].mlp.down_proj
    monkeypatch.setattr(patch_module, "projection_device", lambda p: torch.device("cuda:1" if p is down else "cpu"))
    with pytest.raises(ValueError, match="FFN of layer 1 lies on cpu and cuda:1; expected a whole layer on one"):
        locas.attach(model, locas.LocasConfig(rank=4))
    assert "forward" not in model.model.layers[0].mlp.__dict__
    monkeypatch.setattr(patch_module, "projection_device", lambda p: torch.device("cpu"))
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.memorize(TEXT, **SETTINGS)
    second = [*model.model.layers[1].mlp.children()]
    monkeypatch.setattr(base, "projection_device", lambda p: torch.device("cuda:1" if p in second else "cpu"))
    slots = memory.gather_slots().clone()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="spread over cpu and cuda:1 after the memory was attached"):
        logits_of(model, TEXT)
    assert torch.equal(memory.gather_slots(), slots)
