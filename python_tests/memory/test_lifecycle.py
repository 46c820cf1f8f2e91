"""Attach, disable, learn, reset, detach, on every host family: the host stays what it was."""

import pytest
import torch
from support.helpers import (
    SETTINGS,
    TEXT,
    assert_same_host,
    attached,
    learned,
    logits_of,
    snapshot,
    tiny_model,
)
from support.hosts import tiny
from support.lifecycle import IDS, families

import locas_ext as locas


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_bitwise_the_hosts_until_something_is_learned(family, dtype):
    model = tiny_model(family, dtype=dtype)
    before, host = snapshot(model), logits_of(model, IDS)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    assert torch.equal(logits_of(model, IDS), host)
    memory.initialize(TEXT[:30])
    assert torch.equal(logits_of(model, IDS), host)
    memory.memorize(TEXT, **SETTINGS)
    assert not torch.equal(logits_of(model, IDS), host)
    with memory.disabled():
        assert torch.equal(logits_of(model, IDS), host)
        with memory.disabled():
            pass
        assert torch.equal(logits_of(model, IDS), host)
    assert not torch.equal(logits_of(model, IDS), host)
    memory.reset()
    assert torch.equal(logits_of(model, IDS), host)
    memory.memorize(TEXT, **SETTINGS)
    memory.detach()
    assert torch.equal(logits_of(model, IDS), host)
    assert_same_host(model, before)


@families
def test_a_gradient_through_the_input_does_not_change_the_outputs_of_an_untaught_memory(family):
    model = tiny_model(family)
    embeddings = model.get_input_embeddings()(IDS)[None].detach().requires_grad_()
    host = model(inputs_embeds=embeddings).logits
    (host_gradient,) = torch.autograd.grad(host.sum(), embeddings)
    locas.attach(model, locas.LocasConfig(rank=4))
    patched = model(inputs_embeds=embeddings).logits
    assert torch.equal(patched, host)
    assert torch.equal(torch.autograd.grad(patched.sum(), embeddings)[0], host_gradient)


@families
def test_state_dict_and_save_pretrained_are_the_hosts(family, tmp_path):
    model = tiny_model(family)
    keys = list(model.state_dict())
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.memorize(TEXT, **SETTINGS)
    assert list(model.state_dict()) == keys and not set(map(id, memory.parameters())) & set(map(id, model.parameters()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with memory.disabled():
        assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learning_lowers_the_loss_on_a_repeated_text(family, dtype):
    model, memory = attached(family, dtype=dtype)
    # one repetition does not fit into the window: what is gained is the memory's
    report = memory.memorize(TEXT.repeat(4), window=12, stride=8, learning_rate=2e-2, progress=False)
    plain = attached(family, dtype=dtype)[1].memorize(TEXT.repeat(4), window=12, stride=8, learning_rate=0.0, progress=False)
    last = slice(-4, None)
    mean = lambda chunks: sum(c.nll for c in chunks) / sum(c.tokens for c in chunks)
    assert mean(report.chunks[last]) < mean(plain.chunks[last]) - 0.1
    assert report.chunks[0].nll == plain.chunks[0].nll


@families
def test_only_the_memory_moves(family):
    model = tiny_model(family)
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    assert not any(p.requires_grad for p in model.parameters())
    memory.memorize(TEXT, **SETTINGS)
    assert_same_host(model, before, what=("state", "training", "config"))
    assert all(p.grad is None for p in model.parameters())
    assert memory.version == 8 and (memory.slots[:, 2] != 0).any(-1).all()


@families
def test_detach_gives_back_requires_grad_and_attributes(family):
    model = tiny_model(family)
    frozen = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].requires_grad_(False)
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    assert "forward" in model.model.layers[0].mlp.__dict__
    memory.detach()
    assert_same_host(model, before)
    assert not frozen.requires_grad
    memory.detach()
    assert_same_host(model, before)
    locas.attach(model, locas.LocasConfig(rank=4)).detach()
    assert_same_host(model, before)


def test_detach_twice_leaves_a_newer_memory_alone():
    model, first = learned()
    first.detach()
    second = locas.attach(model, locas.LocasConfig(rank=3))
    second.memorize(TEXT, **SETTINGS)
    logits = logits_of(model, IDS)
    first.detach()
    assert torch.equal(logits_of(model, IDS), logits) and locas.memory_of(model) is second


def test_a_detached_memory_can_be_read_but_not_used():
    model, memory = learned()
    memory.detach()
    assert memory.version == 8 and memory.slots.isfinite().all()
    for verb in (lambda: memory.memorize(TEXT, **SETTINGS), memory.merge_and_unload, memory.fork):
        with pytest.raises(ValueError, match="no longer attached"):
            verb()
    with pytest.raises(ValueError, match="no memory attached"):
        locas.memory_of(model)


def test_a_detached_memory_does_not_learn_from_the_model_of_a_newer_one():
    model, first = learned()
    first.detach()
    locas.attach(model, locas.LocasConfig(rank=3))
    with pytest.raises(ValueError, match="no longer attached"):
        first.memorize(TEXT, **SETTINGS)


def test_train_mode_is_kept():
    model = tiny_model().train()
    model.model.layers[0].mlp.eval()
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.initialize(TEXT[:20])
    memory.memorize(TEXT, **SETTINGS)
    assert_same_host(model, before, what=("training",))
    memory.detach()
    assert_same_host(model, before)


@families
def test_a_subset_of_the_layers(family):
    model = tiny_model(family, num_hidden_layers=3)
    memory = locas.attach(model, locas.LocasConfig(rank=4, layers=[-1, 0]))
    assert memory.layers == (0, 2) and memory.slots.shape == (2, 3, 4, 32) and memory.scale.shape == (2,)
    assert "forward" not in model.model.layers[1].mlp.__dict__
    memory.memorize(TEXT, **SETTINGS)
    assert [status.layer for status in memory.status()] == [0, 2]
    # the third layer's slots work on the third layer
    seen = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    logits_of(model, IDS)
    hook.remove()
    (x, y), ffn = seen[0], model.model.layers[2].mlp
    gate, key, value = memory.slots[1]
    expected = type(ffn).forward(ffn, x) + memory.scale[1] * (torch.nn.functional.silu(x @ gate.T) * (x @ key.T)) @ value
    torch.testing.assert_close(y, expected)


@families
def test_what_a_learned_memory_adds_is_the_formula(family):
    model, memory = learned(family)
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y)))
        for layer in model.model.layers
    ]
    logits_of(model, IDS)
    for hook in hooks:
        hook.remove()
    for (ffn, x, y), (gate, key, value), tau in zip(seen, memory.slots, memory.scale, strict=False):
        expected = type(ffn).forward(ffn, x) + tau * (torch.nn.functional.silu(x @ gate.T) * (x @ key.T)) @ value
        torch.testing.assert_close(y, expected)
        assert not torch.equal(y, type(ffn).forward(ffn, x))


def test_status():
    model, memory = attached(rank=5, scale=0.25)
    fresh = memory.status()
    assert [s.layer for s in fresh] == [0, 1] and all(s.slots_used == 0 and s.value_norm == 0 for s in fresh)
    memory.memorize(TEXT, **SETTINGS)
    for status, slots in zip(memory.status(), memory.slots, strict=False):
        assert (status.device, status.dtype, status.slots_used, status.scale) == ("cpu", "torch.float32", 5, 0.25)
        norms = slots.norm(dim=-1).mean(-1).tolist()
        assert [status.gate_norm, status.key_norm, status.value_norm] == pytest.approx(norms)
        assert "whole" in status.backend and status.reason
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: None)
    assert "sideway" in memory.status()[1].backend and "gate_proj has hooks" in memory.status()[1].reason
    assert "version 8" in repr(memory)


def test_reset_forgets_everything():
    _, memory = learned()
    memory.reset()
    assert memory.version == 0 and not memory.slots.any() and not memory.state.initialized
    assert memory.state.whole("exp_avg") is None and memory.state.whole("step").item() == 0
    memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.slots, learned()[1].slots)


def test_optimizer_states_are_kept_over_calls():
    """AdamW's step count, and with it the bias correction, goes on."""
    _, memory = learned()
    assert memory.state.whole("step").item() == 8
    memory.memorize(TEXT, **SETTINGS)
    assert memory.state.whole("step").item() == 16 and memory.version == 16


def test_a_memory_whose_parameters_are_all_frozen_is_not_learned():
    model, memory = learned()
    before = memory.slots.clone()
    for parameter in memory.parameters():
        parameter.requires_grad_(False)
    for verb in (lambda: memory.memorize(TEXT, **SETTINGS), lambda: memory.feed(TEXT, progress=False)):
        with pytest.raises(ValueError, match="requires_grad is False on all of memory.parameters"):
            verb()
    assert torch.equal(memory.slots, before) and memory.version == 8
    memory.parameters()[1].requires_grad_(True)
    memory.feed(TEXT, progress=False)
    assert memory.version == 16


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_optimizers_step_of_a_memory_that_nobody_initialized(family, backend, tmp_path):
    model = tiny(family)
    host = logits_of(model, IDS)
    config = locas.LocasConfig("mlp" if family == "opt" else "glu", rank=4, backend=backend)
    memory = locas.attach(model, config)
    locas.SlotAdamW(memory).step()
    torch.testing.assert_close(logits_of(model, IDS), host)
    assert memory.version == 1 and memory.status()[0].slots_used == 4
    memory.save_pretrained(tmp_path)
    assert locas.load(tiny(family), tmp_path).version == 1
