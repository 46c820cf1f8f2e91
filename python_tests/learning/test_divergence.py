"""A run whose memory makes the text harder than the host alone says so, and keeps the best state."""

import warnings

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, random_ids, repeated_text, tiny_opt, truncated_nll
from support.hosts import HOST_SETTINGS, config_for, tiny
from support.interrupting import Stop, stop_after
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS, MODEL, load_model
from locas_ext.learning.kept_reader import KeptReader
from locas_ext.state import memory_state
from locas_ext.state.memory_state import MemoryState

HARD = random_ids(160, seed=3)
STEEP = dict(window=64, stride=16, update=locas.Backprop.paper(learning_rate=1.0), progress=False)  # 250 times the paper's
PLAIN = {**SETTINGS, "learning_rate": None, "update": locas.Backprop.paper(learning_rate=1e-2)}
S, WINDOW = STEEP["stride"], STEEP["window"]


@pytest.fixture(scope="module")
def page():
    """20 chunks of a novel, for the shipped model: a random one has nothing to lose."""
    text = (ASSETS / "nostromo.txt").read_text()[:3000]
    return torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][: 20 * S])


def diverging(groups=None, clip=False):
    with pytest.MonkeyPatch.context() as patch:
        if groups is not None:
            patch.setattr(memory_state, "grouped_by_device", lambda devices: groups)
        return locas.attach(load_model(), locas.LocasConfig(rank=16, scale="host", clip=clip))


def states(memory):
    return {name: tensor.clone() for name, tensor in memory.state.tensors().items()}


def assert_states(memory, expected):
    now = states(memory)
    assert now.keys() == expected.keys() and all(torch.equal(now[name], tensor) for name, tensor in expected.items())


# ---- runs that go wrong --------------------------------------------------------------------------------------
def test_a_diverging_run_warns_early_with_what_the_host_alone_scores(page):
    memory, advice = diverging(), r"smaller learning_rate \(now 1\) or a smaller scale \(now 'host'\)"
    with pytest.warns(locas.DivergenceWarning, match=advice) as caught:
        report = memory.memorize(page, **STEEP)
    assert len(caught) == 1 and caught[0].filename == __file__
    harder = report.diverged
    noticed = report.chunks.index(harder.chunk)
    assert noticed <= 4 and len(report.chunks) == 20
    host = load_model()
    for first in range(noticed + 1):  # the latest chunks, as many as were compared in a row
        chunks = report.chunks[first : noticed + 1]
        tokens = sum(chunk.tokens for chunk in chunks)
        alone = sum(truncated_nll(host, page, chunk.start, chunk.end, WINDOW).item() for chunk in chunks)
        if harder.memory == pytest.approx(sum(chunk.nll for chunk in chunks) / tokens):
            assert harder.host == pytest.approx(alone / tokens, rel=1e-4)
            break
    else:
        raise AssertionError("not the loss of any of the latest chunks")
    assert f"{harder.memory:.2f} nats per token against {harder.host:.2f}" in str(caught[0].message)
    assert str(harder) in str(report)


@pytest.mark.parametrize("groups", [None, [[0, 2, 4, 6], [1, 3, 5, 7]]], ids=["one device", "two"])
@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_the_best_state_is_put_back_to_the_bit_and_can_go_on(mode, groups, page):
    clip = mode == "stop"  # with the clip such a run recovers in the end, and its first update does no harm yet
    memory = diverging(groups, clip)
    with pytest.warns(locas.DivergenceWarning, match="put back"):
        report = memory.memorize(page, **STEEP, on_divergence=mode)
    assert (len(report.chunks) == 20) == (mode == "warn")
    seen = memory.tokens_seen
    assert memory.version == report.diverged.restored_version and seen == S * memory.version
    short = diverging(groups, clip)
    assert bool(seen) == clip
    if seen:
        short.memorize(page[:seen], **STEEP, on_divergence="ignore")
        assert memory.texts[0].digest == short.texts[0].digest
    else:
        short.initialize(page[:S])
        assert memory.texts == () and memory.version == 0
    tight = dict(rtol=1e-6, atol=1e-7) if not seen else dict(rtol=0, atol=0)  # initialize() is a forward of its own
    torch.testing.assert_close(states(memory)["slots"], states(short)["slots"], **tight)
    if seen:
        assert_states(memory, states(short))
        for each in (memory, short):
            each.feed(page[seen : seen + S], progress=False, on_divergence="ignore")
        assert_states(memory, states(short))


def good_then_bad(memory, chunks=20, **settings):
    """A run whose slots somebody spoils after so many chunks."""

    def spoil(chunk):
        if chunk.end == 8 * chunks:
            with torch.no_grad():
                memory.slots.mul_(-60)

    return memory.memorize(repeated_text(16, chunks // 2 + 6), **PLAIN, callback=spoil, **settings)


@pytest.mark.parametrize(
    "context, chunks, version",
    [("recompute", 20, 16), ("recompute", 15, 4), ("recompute", 80, 64), ("keep", 20, 16), ("keep", 15, 4)],
)
def test_what_was_learned_before_it_went_wrong_is_kept(context, chunks, version):
    """Version 16 was compared; 4 and 64 are judged when they are needed."""
    context = locas.Keep(sinks=1) if context == "keep" else context
    _, memory = attached()
    put_back = f"the state of version {version} is put back, which has learned {8 * version} tokens"
    with pytest.warns(locas.DivergenceWarning, match=put_back):
        report = good_then_bad(memory, chunks, on_divergence="stop", context=context)
    assert report.chunks[-1].end <= 8 * chunks + 40 and memory.tokens_seen == 8 * version
    _, short = attached()
    short.memorize(repeated_text(16, chunks)[: 8 * version], **PLAIN, context=context)
    for each in (memory, short):
        each.feed(repeated_text(16, chunks)[8 * version :][:40], progress=False, on_divergence="ignore")
    assert_states(memory, states(short))


def test_a_state_that_is_bad_already_is_not_put_back(monkeypatch):
    monkeypatch.setattr("locas_ext.learning.divergence_watch.UNJUDGED", (20,))
    _, memory = attached()
    with pytest.warns(locas.DivergenceWarning, match="the state of version 16 is put back"):
        good_then_bad(memory, on_divergence="stop")


def test_a_kept_context_that_reads_worse_is_no_harm_of_the_memory(page, monkeypatch):
    """Here it reads worse with any memory, and with none: by 3 nats per token."""
    loss = KeptReader.loss
    monkeypatch.setattr(KeptReader, "loss", lambda self, window: loss(self, window) + 3 * len(window.targets))
    memory = locas.attach(load_model(), locas.LocasConfig(rank=16))
    report = memory.memorize(page, window=96, stride=32, context="keep", progress=False)  # 32 tokens are enough to conclude
    host = load_model()
    harder = [chunk.nll - truncated_nll(host, page, chunk.start, chunk.end, 96).item() for chunk in report.chunks[1:]]
    assert min(harder) / 32 > 2, "a comparison with the host's own reading would find harm"
    assert report.diverged is None


def test_a_kept_context_is_put_back_with_the_state_that_it_belongs_to(page):
    steep = {**STEEP, "context": locas.Keep(sinks=2)}
    memory, short = diverging(clip=True), diverging(clip=True)
    with pytest.warns(locas.DivergenceWarning, match="put back"):
        memory.memorize(page, **steep, on_divergence="stop")
    seen = memory.tokens_seen
    assert seen == S * memory.version > 0
    short.memorize(page[:seen], **steep, on_divergence="ignore")
    for each in (memory, short):
        each.feed(page[seen : seen + 5 * S], progress=False, on_divergence="ignore")
    assert_states(memory, states(short))


def test_a_written_memory_too():
    def fresh():
        return locas.attach(tiny_opt(), locas.LocasConfig("mlp", rank=4, scale="host"))

    update = locas.Write(epsilon=100.0)
    settings = dict(window=48, stride=16, progress=False, update=update)
    memory = fresh()
    with pytest.warns(locas.DivergenceWarning, match=r"smaller epsilon \(now 100\)"):
        report = memory.memorize(HARD, **settings, on_divergence="stop")
    assert len(report.chunks) < 8 and memory.version == report.diverged.restored_version
    expected = fresh()
    if memory.tokens_seen:
        expected.memorize(HARD[: memory.tokens_seen], **settings, on_divergence="ignore")
    assert memory.state.used == expected.state.used
    assert_states(memory, states(expected))


def test_a_warning_that_is_an_error_ends_the_run_between_chunks(tmp_path, page):
    memory = diverging()
    with warnings.catch_warnings(), pytest.raises(locas.DivergenceWarning):
        warnings.simplefilter("error")
        memory.memorize(page, **STEEP)
    assert memory.tokens_seen == S * memory.version > 0
    memory.save_pretrained(tmp_path, optimizer=True)
    whole = diverging()
    whole.memorize(page, **STEEP, on_divergence="ignore")
    memory.memorize(page, **STEEP, on_divergence="ignore", resume=tmp_path)
    assert_states(memory, states(whole))


def test_ctrl_c_keeps_what_was_learned_and_puts_nothing_back(page):
    memory = diverging()
    with pytest.warns(locas.DivergenceWarning), pytest.raises(Stop):
        memory.memorize(page, **STEEP, callback=stop_after(12))
    assert memory.version == 12 and memory.tokens_seen == 12 * S


def test_a_text_fed_on_is_watched_too(page):
    memory = diverging()
    memory.memorize(page[:S], **STEEP)
    with pytest.warns(locas.DivergenceWarning):
        report = memory.feed(page[S:], progress=False, on_divergence="stop")
    assert report.diverged is not None and len(report.chunks) < 20


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_run_with_a_cuda_graph_too(page, captures):
    """With stand-ins for the capture: the host is scored between the replays, and what a replay takes for granted holds."""
    for clip, mode in ((True, "ignore"), (True, "warn"), (False, "stop")):
        captures.clear()
        memory = diverging(clip=clip)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steep = STEEP if mode == "stop" else {**STEEP, "update": locas.Backprop.paper()}
            report = memory.memorize(page, **steep, on_divergence=mode)
        assert len(caught) == (mode == "stop") and (report.diverged is not None) == (mode == "stop")
        if mode == "ignore":
            plain = (states(memory), report.graph)
        elif mode == "warn":
            assert_states(memory, plain[0])
            assert report.graph == plain[1] and report.graph.replayed == 17 and len(captures) == 1


# ---- runs that do not ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [{}, dict(epochs=2), dict(stride=24), dict(context_gradient=True), dict(bos=True), dict(context="keep")],
    ids=str,
)
def test_watching_changes_no_bit_of_a_run(changes):
    runs = []
    for mode in ("warn", "stop", "ignore"):
        _, memory = attached()
        report = memory.memorize(TEXT, **{**SETTINGS, **changes}, on_divergence=mode)
        assert report.diverged is None
        runs.append((memory, report))
    for memory, report in runs[:2]:
        assert report.chunks == runs[2][1].chunks
        assert_states(memory, states(runs[2][0]))


@pytest.mark.parametrize("family", HOST_SETTINGS)
def test_the_defaults_never_warn(family):
    memory = locas.attach(tiny(family), locas.LocasConfig(rank=4, variant=config_for(family).variant))
    assert memory.memorize(HARD % 58 + 3, window=32, stride=8, progress=False).diverged is None


def test_how_often_the_host_alone_reads(monkeypatch):
    reads, disable = [], MemoryState.disable

    def counted(self):
        reads.append(1)
        return disable(self)

    for mode, expected in (("ignore", 0), ("warn", 2)):  # chunks 1 and 16; 0 is the host's own
        _, memory = attached()
        memory.initialize(TEXT[:8])
        monkeypatch.setattr(MemoryState, "disable", counted)
        reads.clear()
        memory.memorize(TEXT.repeat(3), **SETTINGS, on_divergence=mode)
        monkeypatch.undo()
        assert len(reads) == expected


@pytest.mark.parametrize("wrong", ["Stop", "", None, 1])
def test_other_values_are_refused(wrong):
    _, memory = attached()
    with pytest.raises((ValueError, TypeError), match="on_divergence is .*warn.*stop.*ignore"):
        memory.memorize(TEXT, **SETTINGS, on_divergence=wrong)
    assert memory.version == 0 and not memory.state.initialized
