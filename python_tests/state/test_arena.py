"""The traps of one tensor with many views: version counters, dropped gradients, copies, stock optimizers, moves."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from support.helpers import SETTINGS, TEXT, PlainMemory, attached, learned, logits_of, random_ids, relative_distance

import locas_ext as locas


def loss_of(model, ids=TEXT[:32]):
    return torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:])


def train(model, optimizer, steps=3, set_to_none=True):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ready(family="llama", **arguments):
    model, memory = attached(family, **arguments)
    memory.initialize(TEXT[:32])
    return model, memory


def test_parameters_are_views_of_the_arena():
    _, memory = ready()
    for index, parameter in enumerate(memory.parameters()):
        assert parameter.data_ptr() == memory.slots[index].data_ptr() and parameter.shape == memory.slots[index].shape
        assert parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("accumulate", [True, False], ids=["memorize's way", "autograd's way"])
def test_layers_sharing_one_version_counter_do_not_disturb_each_others_backward(accumulate):
    """With the gradient added in place into the arena, a second layer's saved tensors must stay valid."""
    model, memory = learned(model_settings=dict(num_hidden_layers=3))
    state = memory.state
    state.zero_grad()
    with state.accumulating() if accumulate else nullcontext():
        loss_of(model).backward()
    got = torch.stack([p.grad for p in memory.parameters()])
    slots = [layer.detach().double().clone().requires_grad_() for layer in memory.slots]
    plain = PlainMemory(model_without(memory), slots, memory.scale)
    torch.nn.functional.cross_entropy(plain.model(input_ids=TEXT[None, :32]).logits[0, :-1], TEXT[1:32]).backward()
    expected = torch.stack([layer.grad for layer in plain.slots])
    assert relative_distance(got, expected) < 1e-5
    assert torch.equal(state.whole("grad"), got)


def model_without(memory):
    """A plain copy of the host."""
    plain = copy.deepcopy(memory.model)
    locas.memory_of(plain).detach()
    return plain


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_dropped_gradient_comes_back_into_the_arena(set_to_none):
    results = []
    for drop in (set_to_none, False):
        model, memory = ready()
        losses = train(model, locas.SlotAdamW(memory, lr=1e-2), 5, drop)
        results.append(memory.slots.clone())
        assert losses[-1] < losses[0] and memory.version == 5
    assert torch.equal(*results)


def test_slot_adamw_is_torch_adamw_and_the_clip():
    model, memory = ready(scale=0.5)
    other, peer = ready(scale=0.5, clip=False)
    mine, theirs = locas.SlotAdamW(memory, lr=0.03), torch.optim.AdamW(peer.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(6):
        train(model, mine, 1)
        train(other, theirs, 1)
        with torch.no_grad():
            peer.slots.div_(peer.slots.norm(dim=-1, keepdim=True).clamp_min(1))
    assert relative_distance(memory.slots, peer.slots) < 1e-4
    # each step that was clipped by hand counts once for the step and the clip together
    assert memory.version == 6 and memory.slots.norm(dim=-1).max() <= 1 + 1e-6


def test_slot_sgd_is_torch_sgd():
    model, memory = ready(scale=0.5, clip=False)
    other, peer = ready(scale=0.5, clip=False)
    train(model, locas.SlotSGD(memory, lr=0.1, momentum=0.9), 4)
    train(other, torch.optim.SGD(peer.parameters(), lr=0.1, momentum=0.9), 4)
    assert relative_distance(memory.slots, peer.slots) < 1e-5


def test_optimizer_state_dict_round_trip():
    model, memory = ready()
    optimizer = locas.SlotAdamW(memory, lr=1e-2)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    slots = memory.slots.clone()
    train(model, optimizer, 2)
    continued = memory.slots.clone()

    with torch.no_grad():
        memory.slots.copy_(slots)
    fresh = locas.SlotAdamW(memory, lr=0.5)
    fresh.load_state_dict(state)
    train(model, fresh, 2)
    assert torch.equal(memory.slots, continued)
    with pytest.raises(ValueError, match="momentum_buffer"):
        fresh.load_state_dict({"state": {"momentum_buffer": torch.zeros(1)}, "param_groups": []})
    with pytest.raises(ValueError, match="exp_avg has shape"):
        fresh.load_state_dict({"state": {"exp_avg": torch.zeros(1)}, "param_groups": []})


def test_the_optimizers_closure_and_its_bad_arguments():
    model, memory = ready()
    optimizer = locas.SlotAdamW(memory, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() > 0
    assert memory.version == 1
    for arguments in (dict(lr=-1.0), dict(lr=float("nan")), dict(betas=(1.0, 0.9)), dict(eps=-1.0), dict(weight_decay=-1)):
        with pytest.raises(ValueError):
            locas.SlotAdamW(memory, **arguments)
    with pytest.raises(ValueError, match="momentum"):
        locas.SlotSGD(memory, lr=0.1, momentum=1.5)


# ---- stock optimizers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_a_stock_optimizers_step_is_seen_and_counts_as_an_update(dtype, foreach):
    model, memory = ready(dtype=dtype)
    host = logits_of(model, TEXT[:20])
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2, foreach=foreach)
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0] and not torch.equal(logits_of(model, TEXT[:20]), host)
    assert memory.version == 4
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.to(dtype))
    for view, layer in zip(memory.state.arenas[0].views, memory.slots.to(dtype), strict=False):
        assert torch.equal(view.gate_key, layer[:2].flatten(0, 1)) and torch.equal(view.value, layer[2])


def test_writing_into_the_slots_by_hand_counts_as_an_update():
    model, memory = ready(dtype=torch.bfloat16)
    host = logits_of(model, TEXT[:20])
    with torch.no_grad():
        memory.slots[:, 2] = 0.5
    assert memory.version == 1
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.bfloat16())
    assert not torch.equal(logits_of(model, TEXT[:20]), host)


# ---- copies ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["model", "memory"])
def test_a_deep_copy_is_independent_and_keeps_learning(what, dtype):
    model, memory = learned(dtype=dtype)
    ids, slots, logits = random_ids(20), memory.slots.clone(), logits_of(model, random_ids(20))
    if what == "model":
        twin = copy.deepcopy(model)
        twin_memory = locas.memory_of(twin)
    else:
        twin_memory = copy.deepcopy(memory)
        twin = twin_memory.model
    assert twin is not model and twin_memory is not memory
    assert torch.equal(twin_memory.slots, slots) and twin_memory.slots.data_ptr() != memory.slots.data_ptr()
    assert torch.equal(logits_of(twin, ids), logits) and twin_memory.version == memory.version

    twin_memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.slots, slots) and torch.equal(logits_of(model, ids), logits)
    assert not torch.equal(twin_memory.slots, slots) and not torch.equal(logits_of(twin, ids), logits)
    # the original learns on exactly as the copy did: both had the same optimizer states
    memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.slots, twin_memory.slots)

    twin_memory.detach()
    assert "forward" not in twin.model.layers[0].mlp.__dict__
    assert "forward" in model.model.layers[0].mlp.__dict__


def test_a_copys_parameters_are_views_of_its_own_arena():
    _, memory = learned()
    twin = copy.deepcopy(memory)
    train(twin.model, torch.optim.SGD(twin.parameters(), lr=0.1), 1)
    assert not torch.equal(twin.slots, memory.slots)
    assert torch.equal(torch.stack([p.detach() for p in twin.parameters()]), twin.slots)


# ---- moves ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_memory_follows_the_hosts_dtype(dtype):
    model, memory = learned()
    slots, parameters = memory.slots.clone(), memory.parameters()
    with memory.disabled():
        before_host = logits_of(model, TEXT[:20])
    before = logits_of(model, TEXT[:20])
    model.to(dtype)
    after = logits_of(model, TEXT[:20])
    assert after.dtype == dtype
    assert relative_distance(after, before) < (0.1 if dtype != torch.float64 else 1e-5)
    assert relative_distance(after, before_host) > relative_distance(after, before)
    assert memory.slots.dtype == torch.float32 and torch.equal(memory.slots, slots)
    assert all(a is b for a, b in zip(memory.parameters(), parameters, strict=False))

    if dtype != torch.float64:
        memory.memorize(TEXT, **SETTINGS)
        assert not torch.equal(memory.slots, slots) and torch.equal(memory.state.arenas[0].compute, memory.slots.to(dtype))
    model.to(torch.float32)
    if dtype == torch.float64:
        torch.testing.assert_close(logits_of(model, TEXT[:20]), before)


@pytest.mark.parametrize("through", ["pickle", "torch.save", "memory"])
def test_pickling_is_refused_and_names_what_to_use(through):
    model, memory = learned()
    with pytest.raises(TypeError, match="save_pretrained"):
        if through == "pickle":
            pickle.dumps(model)
        elif through == "torch.save":
            torch.save(model, io.BytesIO())
        else:
            pickle.dumps(memory)


def test_two_models_in_one_process_do_not_meet():
    first, first_memory = attached("llama")
    second, second_memory = attached("qwen2", seed=1)
    second_logits = logits_of(second, TEXT[:20])
    first_memory.memorize(TEXT, **SETTINGS)
    assert second_memory.version == 0 and torch.equal(logits_of(second, TEXT[:20]), second_logits)
    first_slots = first_memory.slots.clone()
    second_memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(first_memory.slots, first_slots)
    assert locas.memory_of(first) is first_memory and locas.memory_of(second) is second_memory

    alone, alone_memory = attached("qwen2", seed=1)
    alone_memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(alone_memory.slots, second_memory.slots)
