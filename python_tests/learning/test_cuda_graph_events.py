"""What happens on the way of a run with a CUDA graph: changes, a number that is not finite, a capture that fails."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from support.cuda_graphs import IDS, SETTINGS, TEXT, assert_same_run, attached, eagerly
from support.fused import on_gpu
from support.helpers import logits_of
from support.hosts import tiny

import locas_ext as locas
from locas_ext.learning import captured, graph_step

UPDATES = [locas.Backprop.paper(learning_rate=1e-2), locas.Backprop(optimizer="sgd"), locas.Backprop(learning_rate=1e-2)]


def test_a_memory_that_grows_on_the_way(device, captures, monkeypatch):
    """Slots written from a callback: the memory is another one, in another place, so the step is captured anew."""

    def run(memory, memorize):
        def callback(chunk):
            if chunk.end == 56:
                memory.write(IDS, epsilon=0.5, tokens=locas.TopLoss(7))

        report = memorize(callback)
        assert memory.status()[0].slots_used == 12 and memory.status()[0].capacity == 12
        return report

    memory, plain = (locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = run(memory, lambda callback: memory.memorize(TEXT, **SETTINGS, callback=callback))
    assert len(captures) == 2 and report.graph == locas.GraphReport(11, 15)
    plain_report = run(plain, lambda callback: eagerly(monkeypatch, plain, TEXT, **SETTINGS, callback=callback))
    assert_same_run(memory, report, plain, plain_report)


def test_a_callback_that_looks_and_changes(device, monkeypatch):
    """A forward between the chunks; and the memory, its optimizer's states and the host's weights put elsewhere."""

    def run(memory, memorize):
        model = memory.model
        seen = []

        def callback(chunk):
            seen.append(logits_of(model, IDS.to(device)))
            if chunk.end == 35:
                callback.taken = memory.snapshot()
            if chunk.end == 56:
                memory.restore(callback.taken)
            if chunk.end == 63:
                with torch.no_grad():
                    memory.slots.mul_(0.5)
            if chunk.end == 70:
                other_scale = memory.snapshot()
                other_scale.tensors["scale"].mul_(-0.5)
                memory.restore(other_scale)
            if chunk.end == 77:
                model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight * 0.5
            if chunk.end == 84:
                memory.reset()

        return memorize(memory, TEXT, **SETTINGS, callback=callback), seen

    for rehome in (False, True):
        memory, plain = attached(device, rehome=rehome)[1], attached(device)[1]
        report, seen = run(memory, lambda m, *a, **k: m.memorize(*a, **k))
        plain_report, plain_seen = run(plain, lambda *a, **k: eagerly(monkeypatch, *a, **k))
        assert_same_run(memory, report, plain, plain_report)
        for ours, theirs in zip(seen, plain_seen, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_swapped_module_is_captured_anew(device, captures, monkeypatch):
    def run(memory, memorize):
        def callback(chunk):
            if chunk.end == 56:
                attention = memory.model.model.layers[1].self_attn
                attention.q_proj = copy.deepcopy(attention.q_proj)
                attention.q_proj.weight.mul_(0.5)

        return memorize(memory, TEXT, **SETTINGS, callback=torch.no_grad()(callback))

    memory, plain = (attached(device)[1] for _ in "ab")
    report = run(memory, locas.Memory.memorize)
    assert len(captures) == 2
    assert_same_run(memory, report, plain, run(plain, lambda *a, **k: eagerly(monkeypatch, *a, **k)))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_a_loss_that_is_not_finite_leaves_the_last_good_memory(device, update, epochs):
    settings = {**SETTINGS, "learning_rate": None, "update": replace(update, epochs=epochs)}
    model, memory = attached(device)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    clean = torch.where(TEXT == 60, 59, TEXT)
    poisoned = clean.clone()
    poisoned[50] = 60  # in chunk 7, a full window
    with pytest.raises(locas.LocasError, match=rf"loss is nan at chunk 7 \(tokens 49 to 55\).*version {7 * epochs}"):
        memory.memorize(poisoned, **settings)
    good = attached(device)[1]
    good.memorize(clean[:49], **settings)
    assert memory.version == good.version == 7 * epochs
    for name, tensor in good.state.tensors().items():
        assert torch.equal(memory.state.tensors()[name], tensor), name
    assert not memory.state.whole("grad").any()
    memory.memorize(clean[49:], **settings)  # it can go on
    good.memorize(clean[49:], **settings)
    assert torch.equal(memory.slots, good.slots)


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_a_gradient_that_is_not_finite_is_not_learned(device, update, monkeypatch):
    model, memory = attached(device)
    factor, gradient = torch.ones((), device=device), graph_step.gradient

    def overflowing(attachment, *arguments):
        loss, arena = gradient(attachment, *arguments), attachment.state.arenas[0]
        for tensor in [arena.grad] if arena.factors is None else [factors.tensors[0] for factors in arena.factors]:
            tensor.mul_(factor)
        return loss

    monkeypatch.setattr(graph_step, "gradient", overflowing)
    kept = []

    def callback(chunk):
        if chunk.end == 63:
            kept.append({name: tensor.clone() for name, tensor in memory.state.tensors().items()})
            factor.fill_(float("inf"))

    with pytest.raises(locas.LocasError, match=r"gradient is not finite at chunk 9 \(tokens 63 to 69\).*version 9"):
        memory.memorize(TEXT, **{**SETTINGS, "learning_rate": None, "update": update}, callback=callback)
    assert memory.version == 9 and not memory.state.whole("grad").any()
    for name, tensor in kept[0].items():
        assert torch.equal(memory.state.tensors()[name], tensor), name


@pytest.mark.parametrize("part", ["rehearse", "capture"])
@pytest.mark.parametrize("rehome", [False, True])
def test_a_capture_that_fails_warns_once_and_loses_nothing(device, part, rehome, monkeypatch):
    memory, plain = attached(device, rehome=rehome)[1], attached(device, rehome=rehome)[1]
    real = getattr(captured, part)

    def fails(work, device):
        real(work, device)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(captured, part, fails)
    with pytest.warns(UserWarning, match="without a CUDA graph.*no graphs today") as warned:
        report = memory.memorize(TEXT, **SETTINGS)
    assert len(warned) == 1
    assert report.graph.replayed == 0 and "no graphs today" in report.graph.why_not
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_host_that_waits_for_the_device_runs_eagerly(device):
    model, memory = attached(device)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def waits(hidden_states, *args, **kwargs):
        hidden_states.sum().item()
        return forward(hidden_states, *args, **kwargs)

    attention.forward = waits
    with pytest.warns(UserWarning, match="without a CUDA graph.*test_cuda_graph_events.py:.* waits for the device"):
        report = memory.memorize(TEXT, **SETTINGS)
    assert report.graph.replayed == 0 and "waits for the device" in report.graph.why_not
    assert torch.randn(3, device=device).isfinite().all()  # the generator still works
    attention.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(11, 15)
