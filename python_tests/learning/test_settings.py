"""Settings of a run: what is filled in, what a file holds of them, and the paper's."""

import json

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, tiny_model, tiny_opt
from support.writing import writable

import locas_ext as locas
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.selectors import select, selector_from_json, selector_to_json
from locas_ext.learning.settings import Settings


# ---- window, stride, BOS --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "positions, window, stride, bos, expected",
    [
        (64, None, None, False, (64, 16)),
        (4096, None, None, False, (2048, 512)),
        (64, 20, None, False, (20, 5)),
        (64, 3, None, False, (3, 1)),
        (64, 20, 20, False, (20, 20)),
        (64, 20, 19, True, (20, 19)),
        (64, torch.tensor(20), torch.tensor(4), False, (20, 4)),
    ],
)
def test_the_protocol_is_filled_in(positions, window, stride, bos, expected):
    protocol = Protocol.of(tiny_opt(positions=positions), window, stride, bos)
    assert (protocol.window, protocol.stride, protocol.bos) == (*expected, bos)
    assert protocol.room == expected[0] - bos


def test_a_protocol_names_its_arguments_as_they_were_given():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^--window is 65; expected an integer from 2 to 64 \(the host's positions\)$"):
        Protocol.of(model, 65, None, False, prefix="--")
    with pytest.raises(ValueError, match=r"^--stride is 8; expected an integer from 1 to 7 \(the window without its BOS"):
        Protocol.of(model, 8, 8, True, prefix="--")


# ---- records --------------------------------------------------------------------------------------------------
ASKED = [
    Settings(16, 4, locas.Backprop.paper()),
    Settings(16, 4, locas.Backprop.paper(learning_rate=1e-3, epochs=3, optimizer="sgd"), context_gradient=True),
    Settings(16, 4, locas.Write(), bos=True),
    Settings(16, 4, locas.Write(epsilon=0.5, tokens=locas.TopLoss(3), capacity=20, when_full="drop_oldest")),
    Settings(16, 4, locas.Write(tokens=locas.LossAbove(1.5), when_full="error")),
    Settings(16, 4, locas.Write(capacity=20, compress_to=5)),
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_record_is_json_and_comes_back(asked):
    _, memory = writable()
    resolved = asked.resolve(memory._attachment.host, memory.state)
    settings = resolved.as_settings()
    record = json.loads(json.dumps(settings.to_record()))
    assert list(record) == "window stride learning_rate epochs optimizer update context_gradient bos write".split()
    again = Settings.from_record(record)
    assert again == settings and again.resolve(memory._attachment.host, memory.state) == resolved


def test_a_record_names_what_is_not_the_papers():
    record = json.loads(json.dumps(Settings(16, 4).to_record()))
    assert (record["optimizer"], record["decay_after"], record["cautious"]) == ("shampoo", 10, True)
    assert Settings.from_record(record) == Settings(16, 4)
    del record["decay_after"]
    assert Settings.from_record(record).update == locas.Backprop(decay_after=None)


@pytest.mark.parametrize(
    "written, meant", [("all", "all"), (4, locas.TopLoss(4)), (2.0, locas.LossAbove(2.0)), (4.5, locas.LossAbove(4.5))]
)
def test_tokens_of_format_1_are_read_as_selectors(written, meant):
    assert selector_from_json(written) == meant
    assert selector_from_json(json.loads(json.dumps(selector_to_json(meant)))) == meant


@pytest.mark.parametrize("written", [True, None, 0, float("inf"), {"top_loss": 0}, {"top": 3}, [1]])
def test_tokens_that_no_file_holds(written):
    with pytest.raises((TypeError, ValueError)):
        selector_from_json(written)


def test_what_selectors_select():
    nll = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert select("all", nll).tolist() == [0, 1, 2, 3]
    assert select(locas.TopLoss(2), nll).tolist() == [1, 3]
    assert select(locas.TopLoss(9), nll).tolist() == [0, 1, 2, 3]
    assert select(locas.LossAbove(1), nll).tolist() == [1, 2, 3]
    assert select((1, 4), nll).tolist() == [0, 3]


# ---- the same thing said in several ways ----------------------------------------------------------------------
def test_flat_arguments_are_short_for_backprop():
    memories = [attached()[1] for _ in range(3)]
    protocol = dict(window=24, stride=8, progress=False)
    memories[0].memorize(TEXT, **protocol, learning_rate=0.01, epochs=2, optimizer="sgd")
    memories[1].memorize(TEXT, **protocol, update=locas.Backprop(learning_rate=0.01, epochs=2, optimizer="sgd"))
    memories[2].memorize(TEXT, **protocol, update="backprop", learning_rate=0.01, epochs=2, optimizer="sgd")
    assert all(torch.equal(memory.slots, memories[0].slots) for memory in memories)
    assert all(memory.version == 16 for memory in memories)


def test_the_papers_settings_and_the_defaults():
    papers = dict(learning_rate=4e-3, epochs=1, optimizer="adamw", decay_after=None, cautious=False)
    assert locas.Backprop.paper() == locas.Backprop(**papers) != locas.Backprop()
    ours = dict(learning_rate=6e-3, epochs=1, optimizer="shampoo", decay_after=10, cautious=True)
    assert locas.Backprop() == locas.Backprop(**ours)
    assert not locas.Backprop(optimizer="adamw").cautious and not locas.Backprop(optimizer="sgd").cautious
    assert locas.LocasConfig() == locas.LocasConfig.paper(scale="host") != locas.LocasConfig.paper()
    assert locas.Backprop.paper(epochs=2).epochs == 2
    config = locas.LocasConfig.paper(rank=16)
    assert (config.variant, config.rank, config.init, config.scale, config.clip) == ("glu", 16, "topk", "paper", True)
    with pytest.raises(TypeError):
        locas.Backprop.paper(rate=3)


def test_updates_are_keyword_only_and_cannot_be_changed():
    for update in (locas.Backprop, locas.Write):
        with pytest.raises(TypeError):
            update(1e-3)
        with pytest.raises(AttributeError):
            update().epochs = 3


# ---- reports --------------------------------------------------------------------------------------------------
def test_a_report_prints_as_one_short_line():
    report = attached()[1].memorize(TEXT, **SETTINGS)
    assert str(report).startswith(f"63 tokens in 8 chunks, perplexity {report.perplexity:.2f}, ")
    assert len(str(report)) < 80 and "\n" not in str(report) and "Chunk" not in repr(report)
    assert report.graph == locas.GraphReport(0, 8, "the host is on cpu")


def test_status_has_its_parts_as_fields():
    _, memory = attached()
    memory.memorize(TEXT, **SETTINGS)
    for entry in memory.status():
        assert (entry.path, entry.backend) == ("whole", f"{entry.backend_name}, whole")
    _, written = writable()
    assert {(entry.backend_name, entry.path) for entry in written.status()} == {("matmul", "sideway")}


def test_slots_gathered_are_a_copy():
    _, memory = attached()
    memory.memorize(TEXT, **SETTINGS)
    gathered = memory.gather_slots()
    assert torch.equal(gathered, memory.slots)
    gathered.zero_()
    assert memory.slots.any()
    memory.slots.zero_()  # the memory itself
    assert not memory.gather_slots().any()


@pytest.mark.parametrize(
    "graph, sentence",
    [
        (locas.GraphReport(11, 15), "11 of 15 updates"),
        (locas.GraphReport(0, 3), "0 of 3 updates"),
        (locas.GraphReport(0, 15, "the host is on cpu"), "not used: the host is on cpu"),
        (locas.GraphReport(4, 15, "it moved"), "4 of 15 updates, then not: it moved"),
    ],
)
def test_what_is_said_of_the_graph(graph, sentence):
    assert locas.MemorizeReport(graph=graph).cuda_graph == sentence
