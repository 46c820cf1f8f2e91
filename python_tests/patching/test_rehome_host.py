"""The host of re-homed weights is the same, wherever its parameters are taken."""

import copy

import pytest
import torch
from support.fused import on_gpu
from support.helpers import (
    SETTINGS,
    TEXT,
    assert_same_host,
    attached,
    logits_of,
    random_ids,
    snapshot,
    tiny_model,
)
from support.rehome import HOME, IDS, learned, reasons, rehomed

import locas_ext as locas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"mlp_bias": True}])
def test_the_host_stays_what_it_was(settings, dtype, tmp_path):
    model = tiny_model(dtype=dtype, **settings)
    before, host = snapshot(model), logits_of(model, IDS)
    parameters = dict(model.named_parameters())
    memory = locas.attach(model, locas.LocasConfig(rank=5, scale="host"), rehome=True)
    assert torch.equal(logits_of(model, IDS), host)
    memory.memorize(TEXT, **SETTINGS)
    assert not torch.equal(logits_of(model, IDS), host)
    with memory.disabled():
        assert torch.equal(logits_of(model, IDS), host)
    assert_same_host(model, before, what=("state", "training", "config"))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert_same_host(again, before, what=("state",))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before["state"].items())
    memory.detach()  # save_pretrained itself adds to the config
    assert_same_host(model, before, what=("state", "requires_grad", "training", "attributes"))
    assert torch.equal(logits_of(model, IDS), host)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and parameter is parameters[name]
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_takes_effect(assign):
    model, memory = learned()
    plain_model, plain = attached(rank=5)
    other = tiny_model(seed=1).requires_grad_(False).state_dict()
    for each in (model, plain_model):
        each.load_state_dict(copy.deepcopy(other), assign=assign)
        each.requires_grad_(False)
    plain.state.set_slots(memory.slots, version=1)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain_model, IDS), rtol=1e-4, atol=1e-5)
    assert reasons(memory) == {HOME}
    memory.detach()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.items())


def test_to_another_dtype_moves_out_and_in_again():
    model, memory = learned()
    model.to(torch.bfloat16)
    assert reasons(memory) == {"rehomed; the weights have been moved since and move back in at the next forward"}
    half = logits_of(model, IDS)
    assert half.dtype == torch.bfloat16 and reasons(memory) == {HOME}
    plain_model, plain = attached(rank=5, dtype=torch.bfloat16)
    plain.restore(memory.snapshot())
    torch.testing.assert_close(half, logits_of(plain_model, IDS), rtol=0.05, atol=0.1)
    model.to(torch.float64)  # no kernels: plain torch, and nothing moves
    logits_of(model, IDS)
    memory.detach()
    assert all(p.dtype == torch.float64 and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_to_another_device_and_back(device):
    model, memory = rehomed()
    before = snapshot(model)
    model.to(device)
    memory.memorize(TEXT, **SETTINGS)
    assert reasons(memory) == {HOME} and memory._attachment.ffns[0].rehomed.down.is_cuda
    there = logits_of(model, IDS.to(device)).cpu()
    model.to("cpu")
    torch.testing.assert_close(logits_of(model, IDS), there, rtol=1e-3, atol=1e-3)
    assert reasons(memory) == {HOME}
    assert_same_host(model, before, what=("state",))


def test_weights_that_cannot_move_back_run_without_the_buffers():
    model, memory = learned()
    first, second = (layer.mlp for layer in model.model.layers)
    with torch.no_grad():
        second.up_proj.weight = first.up_proj.weight  # tied behind our back
    tied = logits_of(model, IDS)
    assert reasons(memory) == {HOME, "not rehomed: up is tied to another parameter or shares its storage"}
    plain_model, plain = attached(rank=5)
    plain_model.load_state_dict(model.state_dict())
    plain.state.set_slots(memory.slots, version=1)
    torch.testing.assert_close(tied, logits_of(plain_model, IDS), rtol=1e-4, atol=1e-5)
    memory.detach()
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_deep_copy_is_independent_and_a_fork_leaves_the_weights_where_they_are():
    model, memory = learned()
    taught = logits_of(model, IDS)
    twin = copy.deepcopy(model)
    twin_memory = locas.memory_of(twin)
    assert torch.equal(logits_of(twin, IDS), taught) and reasons(twin_memory) == {HOME}
    with torch.no_grad():
        twin.model.layers[0].mlp.gate_proj.weight.zero_()
    assert torch.equal(logits_of(model, IDS), taught)
    fork = memory.fork()
    torch.testing.assert_close(logits_of(fork.model, IDS), taught, rtol=1e-4, atol=1e-5)
    assert reasons(fork) == {"not rehomed: the weights are shared with the memory this one was forked from"}
    fork.memorize(random_ids(64, seed=9), **SETTINGS)
    assert torch.equal(logits_of(model, IDS), taught) and reasons(memory) == {HOME}
    assert reasons(locas.memory_of(copy.deepcopy(fork.model))) == {"not rehomed: not moved in yet"}
    forked = logits_of(fork.model, IDS)
    memory.detach()
    torch.testing.assert_close(logits_of(fork.model, IDS), forked, rtol=1e-4, atol=1e-5)


def test_merging_a_rehomed_memory():
    model, memory = learned()
    taught = logits_of(model, IDS)
    merged = memory.merge_and_unload(pad_to_multiple_of=8)
    torch.testing.assert_close(logits_of(merged, IDS), taught, rtol=1e-4, atol=1e-5)
    before = tiny_model().state_dict()
    assert all(torch.equal(locas.unmerge(merged).state_dict()[name], before[name]) for name in ["lm_head.weight"])
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in before.items())
