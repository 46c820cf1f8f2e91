"""memory.texts: which texts a memory has learned from, wherever it goes."""

from datetime import datetime, timedelta, timezone

import pytest
from support.helpers import attached, random_ids
from support.writing import writable

import locas_ext as locas
from locas_ext.learning.text_digest import text_digest

A, B = random_ids(40, seed=1), random_ids(30, seed=2)
RUN = dict(window=16, stride=8, progress=False)


def said(memory):
    return [(text.title, text.digest, text.tokens) for text in memory.texts]


def test_every_text_is_listed_once_in_order():
    _, memory = attached()
    assert memory.texts == ()
    started = datetime.now(timezone.utc)
    memory.memorize(A, **RUN, title="A")
    memory.memorize(B, **RUN)
    memory.memorize(A, **RUN, title="A")  # read twice
    assert said(memory) == [("A", text_digest(A), 40), (None, text_digest(B), 30), ("A", text_digest(A), 40)]
    times = [datetime.fromisoformat(text.learned_at) for text in memory.texts]
    assert times == sorted(times) and started <= times[0] and times[-1] <= datetime.now(timezone.utc)
    assert all(time.utcoffset() == timedelta(0) for time in times)
    assert isinstance(memory.texts[0], locas.TextRecord)


def test_only_what_was_learned_counts():
    _, memory = attached()

    def stop(chunk):
        if chunk.end == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(A, **RUN, title="A", callback=stop)
    assert said(memory) == [("A", text_digest(A[:16]), 16)]
    with pytest.raises(ValueError):
        memory.memorize([1], **RUN, title="B")
    assert len(memory.texts) == 1


@pytest.mark.parametrize("change", ["reset", "restore", "initialize"])
def test_what_a_callback_makes_the_memory_forget_is_not_listed(change):
    _, memory = attached()
    memory.memorize(B, **RUN, title="B")
    kept, learned_before = memory.snapshot(), said(memory)
    before = learned_before if change == "restore" else []
    changes = dict(reset=memory.reset, restore=lambda: memory.restore(kept), initialize=lambda: memory.initialize(B))

    def forget(chunk):
        if chunk.end == 16:
            changes[change]()
            assert said(memory) == before

    memory.memorize(A[:32], **RUN, title="A", callback=forget)
    assert said(memory) == [*before, ("A", text_digest(A[16:32]), 16)]
    memory.feed(A[32:], progress=False)  # whose beginning is not known: another record
    assert said(memory)[-2:] == [("A", text_digest(A[16:32]), 16), (None, text_digest(A[32:]), 8)]


def test_a_resumed_or_fed_text_goes_on_in_its_record(tmp_path):
    _, memory = attached()
    memory.memorize(B, **RUN, title="B")

    def stop(chunk):
        if chunk.end == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(A[:32], **RUN, title="A", callback=stop)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = attached()
    later.memorize(A[:32], **RUN, resume=tmp_path / "m")
    assert said(later) == [("B", text_digest(B), 30), ("A", text_digest(A[:32]), 32)]
    later.feed(A[32:], progress=False)
    assert said(later) == [("B", text_digest(B), 30), ("A", text_digest(A), 40)]
    _, renamed = attached()
    renamed.memorize(A[:32], **RUN, resume=tmp_path / "m", title="another name")
    assert said(renamed)[1:] == [("another name", text_digest(A[:32]), 32)]


def test_the_list_goes_where_the_memory_goes(tmp_path):
    _, memory = attached()
    memory.memorize(A, **RUN, title="A")
    texts, kept, fork = memory.texts, memory.snapshot(), memory.fork()
    memory.save_pretrained(tmp_path / "m")
    memory.memorize(B, **RUN, title="B")
    assert fork.texts == texts and len(memory.texts) == 2
    memory.restore(kept)
    assert memory.texts == texts
    memory.reset()
    assert memory.texts == ()
    memory.load(tmp_path / "m")
    assert memory.texts == texts
    memory.initialize(A)  # loses what was learned
    assert memory.texts == ()
    memory.restore(kept)
    assert memory.texts == texts


def test_written_texts_are_listed_too():
    _, memory = writable()
    memory.write(A)
    memory.write(B, tokens=locas.LossAbove(1e9))  # none
    memory.memorize(B, **RUN, update="write", title="B")
    assert said(memory) == [(None, text_digest(A), 40), ("B", text_digest(B), 30)]
