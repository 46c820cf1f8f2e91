"""The record of a run that learned several texts at once: a place in each of them."""

import copy

import pytest
from support.checkpoints import CONFIG, put, rewrite

import locas_ext as locas
from locas_ext.storage import checkpoint


def as_two_texts(record):
    """As a run that learned two texts at once left it, here twice the same."""
    record["stream"]["settings"]["texts"] = 2
    record["other_streams"] = [copy.deepcopy(record["stream"])]


def test_the_places_in_texts_that_were_learned_at_once(folder):
    rewrite(folder, as_two_texts)
    stream = checkpoint.read(folder).stream
    assert stream.ranks == [stream, stream] and stream.of_rank(1).ranks is stream.ranks


@pytest.mark.parametrize(
    "place, value, named",
    [
        ("other_streams", [], "other_streams has 0 entries"),
        ("other_streams.0.position", 3, "stream.position is 3"),
        ("other_streams.0.settings.stride", 3, "other_streams has settings of another run"),
        ("other_streams.0.chunks.1.start", 7, r"stream.chunks\[1\]"),
        ("other_streams.0.tail", [1] * 1000, "stream.tail has 1000 tokens"),
        ("other_streams.0.text_digest", "ab", r"other_streams\[0\].text_digest"),
        ("stream.settings.texts", 1, "stream.settings.texts is 1"),
        ("stream.settings.texts", 3, "other_streams has 1 entries"),
        ("stream", None, "other_streams is there without stream"),
    ],
)
def test_senseless_places_in_several_texts(folder, place, value, named):
    def change(record):
        as_two_texts(record)
        put(place, value)(record)

    rewrite(folder, change)
    with pytest.raises(locas.LocasError, match=f"{CONFIG} does not describe a memory: .*{named}"):
        checkpoint.read(folder)
