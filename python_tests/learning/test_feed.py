"""memory.feed(): a run goes on without the text before, bit for bit as if the whole text had been at hand."""

import copy

import pytest
import torch
from support.helpers import assert_same_host, attached, random_ids, snapshot
from support.writing import writable

import locas_ext as locas
from locas_ext.learning.text_digest import TextDigest, text_digest

IDS = random_ids(200, seed=3)
RUN = dict(window=16, stride=8, progress=False)
WRITE = locas.Write(epsilon=0.05, capacity=24, compress_to=9)
MEMORIES = {
    "glu": (lambda: attached()[1], dict(learning_rate=1e-2)),
    "glu adamw": (lambda: attached()[1], dict(update=locas.Backprop.paper())),
    "glu sgd, 2 epochs": (lambda: attached()[1], dict(learning_rate=0.3, optimizer="sgd", epochs=2)),
    "glu with context gradient": (lambda: attached()[1], dict(context_gradient=True)),
    "glu bfloat16": (lambda: attached(dtype=torch.bfloat16)[1], {}),
    "mlp": (lambda: writable()[1], dict(learning_rate=1e-2)),
    "mlp write": (lambda: writable()[1], dict(update=WRITE)),
    "mlp write of the default capacity": (lambda: writable()[1], dict(update="write")),
}


def assert_same(memory, report, whole, whole_report):
    assert report.chunks == whole_report.chunks and memory.version == whole.version
    tensors, expected = memory.state.tensors(), whole.state.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert memory._attachment.stream == whole._attachment.stream and memory.tokens_seen == whole.tokens_seen
    texts = [(text.title, text.digest, text.tokens) for text in memory.texts]
    assert texts == [(text.title, text.digest, text.tokens) for text in whole.texts]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("case", MEMORIES)
def test_feeding_is_memorizing_the_whole(case, bos):
    make, settings = MEMORIES[case]
    whole, memory = make(), make()
    settings = dict(RUN, **settings, bos=bos, title="a text")
    whole_report = whole.memorize(IDS[:61], **settings)
    memory.memorize(IDS[:24], **settings)
    memory.feed(IDS[24:32], progress=False)
    assert_same(memory, memory.feed(IDS[32:61], progress=False), whole, whole_report)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("case", ["glu", "mlp", "mlp write"])
def test_under_another_grad_mode(case, mode):
    make, settings = MEMORIES[case]
    whole, memory = make(), make()
    whole_report = whole.memorize(IDS[:61], **RUN, **settings)
    with mode():
        memory.memorize(IDS[:24].clone(), **RUN, **settings)
        report = memory.feed(IDS[24:61].clone(), progress=False)
    assert_same(memory, report, whole, whole_report)


@pytest.mark.parametrize("first", [8, 72, 136])
@pytest.mark.parametrize("window, stride", [(2, 1), (8, 8), (40, 4)])
def test_windows_that_reach_back_less_or_more_than_is_there(first, window, stride):
    whole, memory = attached()[1], attached()[1]
    settings = dict(window=window, stride=stride, progress=False)
    report = whole.memorize(IDS[: first + 9], **settings)
    memory.memorize(IDS[:first], **settings)
    assert_same(memory, memory.feed(IDS[first : first + 9].tolist(), progress=False), whole, report)


def saved(memory, tmp_path, make):
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    fresh = make()
    fresh.load(tmp_path / "m")
    return fresh


def restored(memory, tmp_path, make):
    kept, fresh = memory.snapshot(), make()
    memory.reset()  # the snapshot is a copy
    fresh.restore(kept)
    return fresh


def forked(memory, tmp_path, make):
    fork = memory.fork()
    memory.feed(IDS[:9], progress=False)  # the fork is a memory of its own
    return fork


@pytest.mark.parametrize("carry", [saved, restored, forked])
@pytest.mark.parametrize("case", ["glu", "mlp write"])
def test_a_run_goes_on_where_its_memory_was_taken(case, carry, tmp_path):
    make, settings = MEMORIES[case]
    whole, memory = make(), make()
    whole_report = whole.memorize(IDS[:90], **RUN, **settings)
    memory.memorize(IDS[:72], **RUN, **settings)
    memory = carry(memory, tmp_path, make)
    assert_same(memory, memory.feed(IDS[72:90], progress=False), whole, whole_report)
    memory.feed(IDS[90:95], progress=False)  # chunks now begin where the last short one ended
    assert memory.tokens_seen == 95 and memory.texts[0].digest == text_digest(IDS[:95])


def test_an_interrupted_run_is_fed_from_where_it_stood():
    whole, memory = attached()[1], attached()[1]
    whole_report = whole.memorize(IDS[:64], **RUN)

    def stop(chunk):
        if chunk.end == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(IDS[:64], **RUN, callback=stop)
    assert_same(memory, memory.feed(IDS[40:64], progress=False), whole, whole_report)


def test_a_fed_run_is_resumed_with_the_whole_text(tmp_path):
    whole, memory = attached()[1], attached()[1]
    whole_report = whole.memorize(IDS, **RUN)
    memory.memorize(IDS[:80], **RUN)
    memory.feed(IDS[80:120], progress=False)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    later = attached()[1]
    assert_same(later, later.memorize(IDS, **RUN, resume=tmp_path / "m"), whole, whole_report)
    changed = IDS.clone()
    for position in (3, 63, 64, 119):
        changed[position] += 1 if changed[position] < 60 else -1
        with pytest.raises(ValueError, match="another text"):
            attached()[1].memorize(changed, **RUN, resume=tmp_path / "m")
        changed[position] = IDS[position]
    with pytest.raises(ValueError, match="another text"):
        attached()[1].memorize(IDS[:119], **RUN, resume=tmp_path / "m")


def test_a_callback_sees_the_new_chunks_and_the_host_stays_as_it_was():
    model, memory = attached()
    memory.memorize(IDS[:32], **RUN)
    model.train()
    before, seen = snapshot(model), []
    report = memory.feed(IDS[32:50], progress=False, callback=seen.append)
    assert [(chunk.start, chunk.end) for chunk in seen] == [(32, 40), (40, 48), (48, 50)]
    assert report.chunks[-3:] == seen and report.tokens == 49
    assert_same_host(model, before)


def test_what_cannot_be_fed(tmp_path):
    _, memory = attached()
    with pytest.raises(ValueError, match="feed: there is no run to continue; begin a text with memorize"):
        memory.feed(IDS)
    memory.memorize(IDS[:32], **RUN)
    before = memory.slots.clone()
    for ids, error, message in (
        ([], ValueError, "holds 0 tokens; expected at least 1"),
        ([61], ValueError, "holds token 61"),
        ([[1, 2], [3, 4]], ValueError, "shape"),
        ([1.5], TypeError, "expected integers"),
    ):
        with pytest.raises(error, match=message):
            memory.feed(ids, progress=False)
    with pytest.raises(TypeError, match="callback is 3"):
        memory.feed(IDS, callback=3)
    with memory.disabled(), pytest.raises(ValueError, match="feed: the memory is disabled"):
        memory.feed(IDS)
    assert torch.equal(memory.slots, before) and memory.tokens_seen == 32
    memory._attachment.stream.tail = None  # as of a file of format 1
    with pytest.raises(ValueError, match="format 1.*resume"):
        memory.feed(IDS)
    memory.save_pretrained(tmp_path / "m")  # without the optimizer, and so without the place
    memory.load(tmp_path / "m")
    with pytest.raises(ValueError, match="no run to continue"):
        memory.feed(IDS)
    for end in (memory.reset, memory.detach):
        memory.memorize(IDS[:32], **RUN)
        end()
        with pytest.raises(ValueError, match="feed: "):
            memory.feed(IDS)


# ---- the digest that goes on ----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_a_digest_does_not_depend_on_how_the_text_comes(seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(0, 300, (), generator=generator))
    ids, digest, position, kept = torch.randint(0, 2**40, (length,), generator=generator), TextDigest(), 0, []
    while position < length:
        step = int(torch.randint(1, 150, (), generator=generator))
        digest.update(ids[position : position + step])
        position = min(length, position + step)
        digest = TextDigest(copy.copy(digest.blocks), ids[position - position % 64 : position].tolist())
        kept.append(digest.hexdigest())
        assert kept[-1] == text_digest(ids[:position])
    assert len(set(kept)) == len(kept) and text_digest(ids) == digest.hexdigest()


def test_digests_tell_texts_apart():
    texts = [IDS[:n] for n in (0, 1, 63, 64, 65, 127, 128, 200)] + [IDS.flip(0), torch.zeros(3, dtype=torch.int64)]
    assert len({text_digest(text) for text in texts}) == len(texts)


def test_what_a_memory_keeps_of_its_chunks_is_nobody_elses():
    whole, memory, streams = attached()[1], attached()[1], []
    whole_report = whole.memorize(IDS[:32], **RUN)
    report = memory.memorize(IDS[:24], **RUN, callback=lambda chunk: streams.append(memory._attachment.stream))
    assert [list(stream.chunks) for stream in streams] == [report.chunks[:count] for count in (1, 2, 3)]
    assert streams[1].chunks[-1] == report.chunks[1] and copy.deepcopy(streams[1]).chunks == report.chunks[:2]
    report.chunks.clear()
    assert_same(memory, memory.feed(IDS[24:32], progress=False), whole, whole_report)
