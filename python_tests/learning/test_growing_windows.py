"""Windows over a kept context that are not full yet are replayed from one graph, however long their context is.

On the CPU a replay does the captured Python again, with the length of the context as it was at the capture: so what a graph
would have baked in is as wrong here as there. The oracle is the run without a graph, whose forwards see only rows that
count.
"""

import random

import pytest
import torch
from support.cuda_graphs import eagerly
from support.helpers import random_ids, tiny_model
from support.hosts import tiny

import locas_ext as locas
from locas_ext.learning import captured
from locas_ext.learning.host_kernels.attend import Heads, Span, additive_mask, attend, attend_backward


@pytest.fixture
def captures(device, monkeypatch):
    """The length of the context at each capture, as Python knows it."""
    lengths, capture, prepare = [], captured.capture, captured.Captured._prepare
    contexts = []

    def prepared(self, part):
        contexts[:] = [self.reader.context]
        prepare(self, part)

    def captured_here(work, device):
        (context,) = contexts
        lengths.append(context.context)
        if device.type == "cuda":
            return capture(work, device)

        def replay():
            now = context.context
            context.context = lengths[-1]
            work()
            context.context = now

        return replay

    monkeypatch.setattr(captured.Captured, "_prepare", prepared)
    monkeypatch.setattr(captured, "capture", captured_here)
    return lengths


def attached(device, family="llama", variant="glu", **config):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = tiny_model(family, dtype=dtype, **config) if variant == "glu" else tiny(family).to(dtype)
    return locas.attach(model.to(device), locas.LocasConfig(variant, rank=5, scale="host"))


def assert_same(memory, report, plain, plain_report, device):
    exact = device == "cpu"
    distance = (memory.slots - plain.slots).norm() / plain.slots.norm()
    assert distance < (1e-3 if exact else 0.1), distance
    assert memory.version == plain.version
    ours, theirs = ([chunk.nll for chunk in r.chunks] for r in (report, plain_report))
    assert ours == pytest.approx(theirs, rel=1e-4 if exact else 3e-2)


@pytest.mark.parametrize(
    "family, host, settings",
    [
        ("llama", {}, {}),
        ("qwen3", {}, {"bos": True, "stride": 2}),
        ("mistral", {"sliding_window": 5}, {"context": locas.Keep(sinks=0)}),
        ("llama", {}, {"context": locas.Keep(sinks=2, refresh_every=7), "epochs": 2}),
    ],
    ids=str,
)
def test_they_learn_what_a_run_without_a_graph_learns(device, captures, family, host, settings, monkeypatch):
    settings = {"window": 24, "stride": 1, "context": "keep", "learning_rate": 3e-3, "progress": False, **settings}
    ids = random_ids(random.randrange(35, 45))
    memory, plain = (attached(device, family, **host) for _ in "ab")
    report = memory.memorize(ids, **settings)
    assert_same(memory, report, plain, eagerly(monkeypatch, plain, ids, **settings), device)
    whole, epochs = [chunk for chunk in report.chunks if chunk.tokens == settings["stride"]], settings.get("epochs", 1)
    first = whole[0].memory_version == 0  # the memory's first update
    assert report.graph == locas.GraphReport(len(whole) * epochs - first, memory.version)
    growing, full = captures
    assert growing < full == 23 - settings["stride"]


def test_few_of_them_are_read_eagerly(device, captures):
    report = attached(device).memorize(random_ids(60), window=24, stride=4, context="keep", progress=False)
    assert captures == [19] and report.graph == locas.GraphReport(10, 15)


def test_windows_read_anew_are_not_replayed_before_they_are_full(device, captures, monkeypatch):
    monkeypatch.setattr(captured.Captured, "_prepare", lambda *_: pytest.fail("nothing to capture"))
    report = attached(device).memorize(random_ids(20), window=24, stride=1, progress=False)
    assert report.graph == locas.GraphReport(0, 19)


def test_a_resumed_run_is_bitwise_one_that_was_never_interrupted(device, captures, tmp_path):
    settings = dict(window=24, stride=1, context="keep", learning_rate=3e-3, progress=False)
    ids = random_ids(40)
    whole = attached(device)
    whole_report = whole.memorize(ids, **settings)
    stop = random.randrange(5, 20)
    memory = attached(device)

    def interrupt(chunk):
        if chunk.end == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(ids, **settings, callback=interrupt)
    memory.save_pretrained(tmp_path / "memory", optimizer=True)
    later = attached(device)
    report = later.memorize(ids, **settings, resume=tmp_path / "memory")
    assert torch.equal(later.slots, whole.slots)
    assert [chunk.nll for chunk in report.chunks] == [chunk.nll for chunk in whole_report.chunks]


def test_what_a_full_memory_is_written_of_them(device, captures, monkeypatch):
    update = locas.Write(epsilon=0.05, capacity=9, when_full="drop_oldest")
    settings = dict(window=24, stride=2, context="keep", update=update, progress=False)
    memory, plain = (attached(device, "gpt_neox", "mlp") for _ in "ab")
    ids = random_ids(40)
    report = memory.memorize(ids, **settings)
    assert_same(memory, report, plain, eagerly(monkeypatch, plain, ids, **settings), device)
    assert len(captures) == 2 and report.graph.replayed > 12


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_attention_over_a_span_is_attention_over_its_rows(device, n, window):
    """Rows that do not count hold any numbers at all."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    groups, before = random.randrange(1, 4), random.randrange(8, 20)
    count = random.randrange(0, before)
    heads = Heads(16, 0.3, window)
    query, d_out = (torch.randn(n, 2 * groups, 16, dtype=dtype, device=device) for _ in "qd")
    key, value = (torch.randn(before + n, groups, 16, dtype=dtype, device=device) for _ in "kv")
    span = Span.of(torch.tensor(count, device=device), before, n)
    assert span.queries.tolist() == [0, n] and span.keys.tolist() == [before - count, before + n]

    def both(key, value, span):
        mask = additive_mask(n, len(key), window, query, span) if device == "cpu" else None
        out, saved = attend(query, key, value, heads, mask, span, True)
        return out, *attend_backward(d_out, query, key, value, heads, mask, span, list(saved))

    expected = both(key[before - count :], value[before - count :], None)
    tolerance = 1e-5 if device == "cpu" else 4e-2
    torch.testing.assert_close(both(key, value, span), expected, rtol=tolerance, atol=tolerance)
