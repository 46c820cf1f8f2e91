"""The memorizing step replayed from a CUDA graph learns what the eager step learns."""

import copy

import pytest
import torch
from support.cuda_graphs import IDS, SETTINGS, TEXT, assert_same_run, attached, eagerly
from support.helpers import logits_of
from support.hosts import TWO_LAYER, tiny

import locas_ext as locas
from locas_ext.hosts import window_reading
from locas_ext.learning.graph_step import GraphStep


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "learning_rate": 0.5},
        {"optimizer": "shampoo"},
        {"learning_rate": None, "update": locas.Backprop(learning_rate=2e-2, cautious=True)},
        {"context_gradient": True},
        {"bos": True},
        {"epochs": 3},
        {"window": 9, "stride": 9},
        {"window": 9, "stride": 8, "bos": True},
        {"window": 31, "stride": 5},
        {"window": 8, "stride": 1},
        {"context": "keep"},
        {"context": locas.Keep(sinks=2, refresh_every=3), "epochs": 2, "bos": True},
        {"context": locas.Keep(sinks=0), "window": 31, "stride": 5},
    ],
    ids=str,
)
def test_a_run_with_a_graph_is_a_run_without(device, settings, monkeypatch):
    settings = {**SETTINGS, **settings}
    memory, plain = attached(device)[1], attached(device)[1]
    report = memory.memorize(TEXT, **settings)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **settings))
    window, stride = settings["window"] - settings.get("bos", False), settings["stride"]
    full = sum(start > 0 and start + stride >= window for start in range(0, len(TEXT) - stride + 1, stride))
    epochs = settings.get("epochs", 1)
    assert report.graph == locas.GraphReport(full * epochs, memory.version) and full > 5
    again = attached(device)[1]
    repeated = again.memorize(TEXT, **settings)
    assert torch.equal(again.slots, memory.slots) and [c.nll for c in repeated.chunks] == [c.nll for c in report.chunks]


@pytest.mark.parametrize("config", [{}, {"clip": 1.5, "row_length": "host"}], ids=str)
@pytest.mark.parametrize("optimizer, rate", [("adamw", 2e-2), ("sgd", 0.5)])
@pytest.mark.parametrize("rates", [{}, {"gate_learning_rate": 1e-2, "value_learning_rate": 5e-3}], ids=str)
def test_rates_that_fade_need_no_new_graph(device, captures, config, optimizer, rate, rates, monkeypatch):
    update = locas.Backprop(learning_rate=rate, optimizer=optimizer, decay_after=2, **rates)
    settings = dict(window=24, stride=7, update=update, progress=False)
    memory, plain = attached(device, **config)[1], attached(device, **config)[1]
    report = memory.memorize(TEXT, **settings)
    assert len(captures) == 1 and report.graph == locas.GraphReport(11, memory.version)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **settings))


@pytest.mark.parametrize(
    "family, host, dtype, rehome",
    [
        ("qwen2", {}, torch.float16, False),
        ("qwen2", {}, torch.float32, True),
        ("qwen3", {}, torch.bfloat16, False),
        ("mistral", {"sliding_window": 9}, torch.float32, False),
        ("mistral", {"sliding_window": 9}, torch.float16, True),
    ],
    ids=str,
)
def test_hosts_dtypes_and_rehomed_weights(device, family, host, dtype, rehome, monkeypatch):
    model, memory = attached(device, family, dtype=dtype, rehome=rehome, settings=host)
    plain_model, plain = attached(device, family, dtype=dtype, settings=host)
    report = memory.memorize(TEXT, **SETTINGS)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS), dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    ours, theirs = (logits_of(m, IDS.to(device)).float() for m in (model, plain_model))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_two_layer_hosts(device, family, monkeypatch):
    memory, plain = (locas.attach(tiny(family).to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = memory.memorize(TEXT, **SETTINGS)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS))
    assert report.graph == locas.GraphReport(11, memory.version)


def test_windows_that_need_one_forward(device, monkeypatch):
    needed = window_reading.Verdict(window_reading.ONE, "it was found to differ")
    monkeypatch.setattr(window_reading, "cheapest", lambda *_, **__: needed)
    memory, plain = attached(device)[1], attached(device)[1]
    report = memory.memorize(TEXT, **SETTINGS)
    expected = plain.memorize(TEXT, **SETTINGS, context_gradient=True)
    assert report.one_forward == ["it was found to differ"] and not expected.one_forward
    assert [chunk.nll for chunk in report.chunks] == pytest.approx([chunk.nll for chunk in expected.chunks], rel=1e-3)


@pytest.mark.parametrize("context", ["recompute", "keep", locas.Keep(refresh_every=2)], ids=str)
@pytest.mark.parametrize("rehome", [False, True])
def test_a_resumed_run_is_bitwise_one_that_was_never_interrupted(device, rehome, context, tmp_path):
    settings = {**SETTINGS, "context": context}
    whole = attached(device, rehome=rehome)[1]
    whole_report = whole.memorize(TEXT, **settings)
    for stop in (14, 42):  # before and behind the first full window
        _, memory = attached(device, rehome=rehome)

        def interrupt(chunk):
            if chunk.end == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            memory.memorize(TEXT, **settings, callback=interrupt)
        memory.save_pretrained(tmp_path / str(stop), optimizer=True)
        _, later = attached(device, rehome=rehome)
        report = later.memorize(TEXT, **settings, resume=tmp_path / str(stop))
        assert torch.equal(later.slots, whole.slots)
        assert [chunk.nll for chunk in report.chunks] == [chunk.nll for chunk in whole_report.chunks]


def test_hosts_that_are_not_captured_say_why(device):
    model, memory = attached(device)
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(0, 15, "model.layers.1 has hooks")
    handle.remove()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert memory.memorize(TEXT, **SETTINGS).graph.why_not == "autocast is on"
    _, reference = attached(device, backend="reference")
    assert reference.memorize(TEXT, **SETTINGS).graph.why_not == "the reference backend waits for the device"
    twin = locas.memory_of(copy.deepcopy(model))
    assert twin.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(11, 15)


def test_no_eager_step_finds_a_graph_that_holds_memory(device, monkeypatch):
    eagerly, graphs = GraphStep.eagerly, []

    def noted(step, *arguments):
        graphs.append(step.captured.graph)
        return eagerly(step, *arguments)

    monkeypatch.setattr(GraphStep, "eagerly", noted)
    assert attached(device)[1].memorize(TEXT, **SETTINGS).graph.replayed > 5
    assert graphs == [None] * len(graphs) and len(graphs) > 2, "before the windows are full, and the last chunk"


def test_on_the_cpu_nothing_is_captured():
    _, memory = attached("cpu")
    assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(0, 15, "the host is on cpu")


def test_a_step_that_no_window_fits_reports_none(device):
    _, memory = attached(device)
    assert memory.memorize(TEXT[:20], **SETTINGS).graph == locas.GraphReport(0, 3)
