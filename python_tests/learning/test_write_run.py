"""Closed-form writing: one forward, one backward, and the host as before."""

import pytest
import torch
from support.helpers import TEXT, assert_same_host, logits_of, snapshot
from support.hosts import tiny
from support.writing import (
    IDS,
    assert_unchanged,
    breaking_gradient,
    everything,
    writable,
)
from support.written import STEPS

import locas_ext as locas
from locas_ext.state import memory_state as slots_module
from locas_ext.state.scope import Scope, scope_of


def test_one_forward_one_backward_and_the_host_as_before():
    model, memory = writable(host=tiny("opt", dropout=0.5, attention_dropout=0.5))
    model.train()
    model.model.decoder.layers[0].eval()
    for parameter in memory.parameters():
        parameter.grad.fill_(3.0)
    before, counts = snapshot(model), {"forward": 0, "layer": 0, "backward": 0}

    def count(name, result=None):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [
        model.register_forward_hook(count("forward")),
        model.model.decoder.layers[0].register_forward_hook(count("layer")),
        model.lm_head.register_full_backward_pre_hook(count("backward")),
    ]
    grads = [parameter.grad for parameter in memory.parameters()]
    with torch.no_grad():
        memory.write(IDS)
    assert counts == {"forward": 1, "layer": 1, "backward": 1}
    memory.write(IDS, tokens=[3, 4, 5], exact=True)
    assert counts == {"forward": 2, "layer": 2, "backward": 4}
    for hook in hooks:
        hook.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert scope_of(memory.state) == Scope()
    assert len(grads) == len(memory.parameters())
    for parameter in memory.parameters():
        assert (parameter.grad[:, :4] == 3).all() and not parameter.grad[:, 4:].any()
    assert_same_host(model, before)
    # dropout was off: the same slots as of a host that has none
    _, quiet = writable(host=tiny("opt", dropout=0.0))
    quiet.write(IDS)
    torch.testing.assert_close(memory.slots[:, :, :12], quiet.slots[:, :, :12], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(mode):
    _, plain = writable()
    model, memory = writable()
    plain.write(IDS)
    plain.compress(5)
    with mode():
        memory.write(IDS)
        memory.compress(5)
        assert not torch.is_grad_enabled()
    assert torch.equal(memory.slots, plain.slots)
    for m in (plain, memory):
        m.write(IDS)
        m.memorize(TEXT[:16], **STEPS)
    assert torch.equal(memory.slots, plain.slots)


def test_an_exception_inside_the_host_changes_nothing():
    model, memory = writable()
    memory.write(IDS)
    before, state = snapshot(model), everything(memory)

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        memory.write(IDS)
    hook.remove()
    assert_unchanged(memory, state)
    assert_same_host(model, before)
    assert scope_of(memory.state) == Scope()


def test_a_compiled_host_is_written_as_an_eager_one():
    _, eager = writable("gpt2")
    model, memory = writable("gpt2")
    model.compile(backend="aot_eager")
    for m in (eager, memory):
        m.write(IDS)
        m.write(IDS[:6])
    assert torch.equal(memory.slots, eager.slots)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(eager.model, IDS), rtol=1e-5, atol=1e-5)


def test_beneath_accelerates_hooks():
    accelerate = pytest.importorskip("accelerate")
    _, plain = writable("opt")
    host = tiny("opt")
    accelerate.cpu_offload(host, execution_device=torch.device("cpu"))
    _, memory = writable(host=host)
    for m in (plain, memory):
        m.write(IDS)
    torch.testing.assert_close(memory.slots, plain.slots, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[0, 2], [1]]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:compress. computed in float64")
def test_several_arenas_are_written_as_one(groups, dtype, monkeypatch):
    memories = []
    for arenas in (None, groups):
        with monkeypatch.context() as patch:
            if arenas is not None:
                patch.setattr(slots_module, "grouped_by_device", lambda devices: arenas)
            memories.append(writable(host=tiny("gpt_neox", num_hidden_layers=3).to(dtype))[1])
    one, several = memories
    for m in memories:
        m.write(IDS)
        m.write(IDS[:6], capacity=14, when_full="drop_oldest")
        m.compress(9)
        m.write(IDS[:6], tokens=[4], exact=True)
    assert len(several.state.arenas) == len(groups) and several.version == one.version == 4
    torch.testing.assert_close(several.gather_slots(), one.slots, rtol=1e-5, atol=1e-6 * one.slots.abs().max().item())
    hook, state = breaking_gradient(several.model), everything(several)
    with pytest.raises(locas.LocasError, match="not finite"):
        several.write(IDS)
    hook.remove()
    assert_unchanged(several, state)
