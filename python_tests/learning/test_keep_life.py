"""A kept context goes where its memory goes: files, snapshots, forks, feed; and never ahead of the stream."""

import json

import pytest
import torch
from support.helpers import TEXT, attached, random_ids, tiny_model
from support.hosts import tiny

import locas_ext as locas

IDS = torch.cat([TEXT, random_ids(76, seed=8)])
RUN = dict(window=24, stride=8, learning_rate=1e-2, progress=False)
KEEPS = {
    "keep": {},
    "refreshed": dict(refresh_every=3),
    "refreshed each time": dict(refresh_every=1),
}


def gemma():
    return locas.attach(
        tiny("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"], initializer_range=0.25),
        locas.LocasConfig(rank=4, scale="host"),
    )


MEMORIES = {"llama": lambda: attached(dtype=torch.bfloat16)[1], "gemma3": gemma}


def assert_same(memory, report, whole, whole_report):
    assert report.chunks == whole_report.chunks and memory.version == whole.version
    tensors, expected = memory.state.tensors(), whole.state.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    ours, theirs = (m._attachment.stream.kept for m in (memory, whole))
    assert ours.to_record() == theirs.to_record()
    ours, theirs = ours.tensors(), theirs.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def saved(memory, tmp_path, make):
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    fresh = make()
    fresh.load(tmp_path / "m")
    fresh.save_pretrained(tmp_path / "m", optimizer=True)  # before it is put in place
    return fresh


def restored(memory, tmp_path, make):
    kept, fresh = memory.snapshot(), make()
    memory.memorize(IDS, **RUN, context="keep")  # the snapshot is a copy
    fresh.restore(kept)
    return fresh


def forked(memory, tmp_path, make):
    fork = memory.fork()
    memory.feed(IDS[:9], progress=False)  # the fork is a memory of its own
    return fork


@pytest.mark.parametrize(
    "make, keep, carry",
    [
        *(("llama", keep, carry) for keep in KEEPS for carry in (saved, restored, forked)),
        *zip(["gemma3"] * 3, KEEPS, (saved, restored, forked), strict=True),
    ],
)
def test_a_run_goes_on_where_its_memory_was_taken(make, keep, carry, tmp_path):
    make, context = MEMORIES[make], locas.Keep(**KEEPS[keep])
    whole, memory = make(), make()
    whole_report = whole.memorize(IDS[:101], **RUN, context=context)
    memory.memorize(IDS[:72], **RUN, context=context)
    memory = carry(memory, tmp_path, make)
    assert_same(memory, memory.feed(IDS[72:101], progress=False), whole, whole_report)


@pytest.mark.parametrize(
    "keep, settings",
    [
        ("keep", {}),
        ("refreshed", dict(epochs=2, bos=True)),
        ("refreshed each time", dict(epochs=2, bos=True)),
        ("keep", dict(window=60)),
        ("keep", dict(stride=4, window=9)),
        ("refreshed", dict(stride=4, window=9)),
    ],
    ids=str,
)
def test_a_resumed_run_is_bitwise_one_that_was_never_interrupted(keep, settings, tmp_path):
    settings = {**RUN, **settings, "context": locas.Keep(**KEEPS[keep])}
    whole = attached()[1]
    whole_report = whole.memorize(IDS[:101], **settings)
    for stop in (8, 56, 72):
        memory, later = attached()[1], attached()[1]

        def interrupt(chunk):
            if chunk.end == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            memory.memorize(IDS[:101], **settings, callback=interrupt)
        memory.save_pretrained(tmp_path, optimizer=True)
        assert_same(later, later.memorize(IDS[:101], **settings, resume=tmp_path), whole, whole_report)


@pytest.mark.parametrize("window, stride, sinks", [(2, 1, 0), (3, 1, 0), (9, 8, 0), (9, 7, 1), (40, 4, 7), (6, 1, 4)])
def test_short_chunks_and_small_windows_are_fed_too(window, stride, sinks, tmp_path):
    """Chunks after a short one begin elsewhere, so they see more or less than the ones before; a file goes between."""
    settings = dict(RUN, window=window, stride=stride, context=locas.Keep(sinks=sinks))
    one, other = attached()[1], attached()[1]
    one.memorize(IDS[:50], **settings)
    other.memorize(IDS[:50], **settings)
    for begin, end in ((50, 53), (53, 54), (54, 75), (75, 77), (77, 100)):
        other.save_pretrained(tmp_path, optimizer=True)
        other = attached()[1]
        other.load(tmp_path)
        report, again = one.feed(IDS[begin:end], progress=False), other.feed(IDS[begin:end].tolist(), progress=False)
        assert_same(other, again, one, report)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_chunk_that_fails_leaves_what_was_kept_where_the_stream_is(keep, epochs):
    context, settings = locas.Keep(**KEEPS[keep]), dict(RUN, epochs=epochs, optimizer="sgd")
    model, memory = attached()
    peer = attached()[1]
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    clean = torch.where(IDS == 60, 59, IDS)
    poisoned = clean.clone()
    poisoned[50] = 60
    with pytest.raises(locas.LocasError, match="loss is nan"):
        memory.memorize(poisoned[:60], **settings, context=context)
    peer.memorize(clean[:48], **settings, context=context)
    assert memory.tokens_seen == 48
    for begin, end in ((48, 51), (51, 80)):  # shorter than the chunk that failed, and so with a longer context
        report, expected = (m.feed(clean[begin:end], progress=False) for m in (memory, peer))
        assert_same(memory, report, peer, expected)


def test_a_callback_that_looks_and_restores_does_not_move_the_run():
    plain, memory = attached()[1], attached()[1]
    expected = plain.memorize(IDS, **RUN, context="keep")
    taken = []

    def callback(chunk):
        taken.append(memory.snapshot())
        memory.restore(taken[-1])
        memory.fork()

    assert_same(memory, memory.memorize(IDS, **RUN, context="keep", callback=callback), plain, expected)


def test_a_new_text_begins_with_nothing_kept():
    memory, peer = attached()[1], attached()[1]
    memory.memorize(IDS[:50], **RUN, context="keep")
    state = memory.snapshot()
    peer.restore(state)
    peer._attachment.stream = None
    reports = [m.memorize(IDS[60:], **RUN, context="keep") for m in (memory, peer)]
    assert_same(memory, reports[0], peer, reports[1])


# ---- files ----------------------------------------------------------------------------------------------------
def test_rows_are_saved_with_the_optimizer_only_and_not_before_a_refresh(tmp_path):
    from safetensors.torch import load_file

    def names(context, optimizer=True, length=48):
        memory = attached()[1]
        memory.memorize(IDS[:length], **RUN, context=context)
        memory.save_pretrained(tmp_path, optimizer=optimizer)
        record = json.loads((tmp_path / "locas_config.json").read_text())
        return {name for name in load_file(tmp_path / "locas_memory.safetensors") if "kept" in name}, record

    rows = {f"kept_{kind}_{layer}" for kind in ("keys", "values") for layer in range(2)}
    assert names("keep")[0] == rows
    assert names("keep", optimizer=False)[0] == set()
    assert names(locas.Keep(refresh_every=3))[0] == set()  # the seventh chunk is read anew
    assert names(locas.Keep(refresh_every=4))[0] == rows
    record = names("recompute")[1]
    assert "context" not in record["stream"]["settings"] and "kept" not in record["stream"]


def test_a_host_of_another_dtype_goes_on_with_the_same_rows(tmp_path):
    memory = attached()[1]
    memory.memorize(IDS[:48], **RUN, context="keep")
    memory.save_pretrained(tmp_path, optimizer=True)
    exact = memory.feed(IDS[48:96], progress=False)
    half = locas.load(tiny_model(dtype=torch.bfloat16), tmp_path)
    assert half.feed(IDS[48:96], progress=False).perplexity == pytest.approx(exact.perplexity, rel=0.05)
