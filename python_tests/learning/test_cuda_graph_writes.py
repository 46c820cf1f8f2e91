"""What is written of full windows comes from a CUDA graph as far as the memory keeps its size."""

import pytest
from support.cuda_graphs import TEXT, WRITE, assert_same_run, eagerly
from support.hosts import TWO_LAYER, tiny

import locas_ext as locas
from locas_ext.learning import captured


@pytest.mark.parametrize("tokens", ["all", locas.TopLoss(3)], ids=str)
@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_full_memory_is_written_from_a_graph(device, family, tokens, monkeypatch):
    """Once the oldest slots give way everything stays in its place."""
    update = locas.Write(epsilon=0.05, tokens=tokens, capacity=14, when_full="drop_oldest")
    memory, plain = (locas.attach(tiny(family).to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = memory.memorize(TEXT, **WRITE, update=update)
    plain_report = eagerly(monkeypatch, plain, TEXT, **WRITE, update=update)
    assert_same_run(memory, report, plain, plain_report)
    assert report.graph == locas.GraphReport(11 if tokens == "all" else 9, 15)


@pytest.mark.parametrize(
    "update, why_not",
    [
        (dict(tokens=locas.LossAbove(0.1), capacity=14, when_full="drop_oldest"), "known only when they are scored"),
        (dict(when_full="error"), "did not keep one size"),
        (dict(capacity=21, when_full="compress", compress_to=7), "did not keep one size"),
    ],
    ids=str,
)
def test_a_memory_that_is_another_one_with_each_chunk_is_written_eagerly(device, update, why_not):
    memory = locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host"))
    report = memory.memorize(TEXT, **WRITE, update=locas.Write(epsilon=0.05, **update))
    assert report.graph.replayed == 0 and report.graph.updates == 15 and why_not in report.graph.why_not


@pytest.mark.parametrize("part", ["rehearse", "capture"])
def test_a_write_that_cannot_be_captured_goes_on(device, part, monkeypatch):
    real = getattr(captured, part)

    def fails(work, device):
        real(work, device)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(captured, part, fails)
    update = locas.Write(epsilon=0.05, capacity=14, when_full="drop_oldest")
    memory, plain = (locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    with pytest.warns(UserWarning, match="without a CUDA graph.*no graphs today"):
        report = memory.memorize(TEXT, **WRITE, update=update)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **WRITE, update=update))
