"""Online memorization: what is scored, and with which memory."""

import math

import pytest
import torch
from support.helpers import (
    FAMILIES,
    TEXT,
    attached,
    chunk_bounds,
    double_host,
    logits_of,
    random_ids,
    tiny_model,
    truncated_nll,
)
from support.online import memorize

families = pytest.mark.parametrize("family", FAMILIES)
# length, window, stride
WINDOWS = {
    "usual": (61, 24, 8),
    "stride is the window": (50, 12, 12),
    "one chunk": (7, 24, 8),
    "n = stride": (8, 24, 8),
    "n = stride + 1": (9, 24, 8),
    "one over a chunk boundary": (49, 16, 8),
    "shortest text": (2, 24, 8),
    "shortest window": (9, 2, 2),
    "stride 1": (9, 6, 1),
    "window 2, stride 1": (7, 2, 1),
    "odd": (47, 17, 5),
    "window beyond the text": (40, 64, 16),
}


# ---- scores ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("initialized, context_gradient", [(False, False), (True, True)])
@pytest.mark.parametrize("length, window, stride", WINDOWS.values(), ids=WINDOWS)
def test_without_learning_every_chunk_has_the_loss_of_the_truncated_host(length, window, stride, initialized, context_gradient):
    model, memory = attached()
    plain, ids = double_host(tiny_model()), random_ids(length)
    if initialized:
        memory.initialize(ids)
    report = memorize(memory, ids, window=window, stride=stride, learning_rate=0.0, context_gradient=context_gradient)
    scored = [bounds for bounds in chunk_bounds(length, stride) if bounds != (0, 1)]
    assert [(c.start, c.end) for c in report.chunks] == scored
    for chunk in report.chunks:
        assert chunk.tokens == chunk.end - max(chunk.start, 1)
        expected = truncated_nll(plain, ids, chunk.start, chunk.end, window)
        assert chunk.nll == pytest.approx(expected.item(), rel=1e-5)
    assert report.tokens == length - 1
    assert report.nll == pytest.approx(sum(c.nll for c in report.chunks))
    assert report.perplexity == pytest.approx(math.exp(report.nll / (length - 1)))
    assert report.seconds > 0


@families
def test_every_family_is_scored_as_its_plain_self(family):
    _, memory = attached(family)
    plain, ids = double_host(tiny_model(family)), random_ids(60)
    for chunk in memorize(memory, ids, learning_rate=0.0).chunks:
        assert chunk.nll == pytest.approx(truncated_nll(plain, ids, chunk.start, chunk.end, 24).item(), rel=1e-5)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("mistral", dict(sliding_window=6)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    ],
)
def test_hosts_with_sliding_attention(family, settings):
    model, memory = attached(family, model_settings=settings)
    plain, ids = double_host(tiny_model(family, **settings)), random_ids(60)
    for chunk in memorize(memory, ids, learning_rate=0.0).chunks:
        assert chunk.nll == pytest.approx(truncated_nll(plain, ids, chunk.start, chunk.end, 24).item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    _, memory = attached(model_settings=dict(attn_implementation=attention))
    plain, ids = double_host(tiny_model()), random_ids(60)
    for chunk in memorize(memory, ids, learning_rate=0.0).chunks:
        assert chunk.nll == pytest.approx(truncated_nll(plain, ids, chunk.start, chunk.end, 24).item(), rel=1e-5)


def test_memory_version_is_that_which_scored():
    _, memory = attached()
    report = memorize(memory, TEXT, epochs=2)
    assert [c.memory_version for c in report.chunks] == [2 * i for i in range(8)] and memory.version == 16
    again = memorize(memory, TEXT)
    assert again.chunks[0].memory_version == 16


# ---- bos ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("initialized", [False, True], ids=["fresh", "initialized"])
def test_bos_stands_before_every_window_and_is_never_scored(initialized):
    _, memory = attached()
    plain, ids = double_host(tiny_model()), random_ids(60)
    if initialized:
        memory.initialize(ids[:8])
    report = memorize(memory, ids, learning_rate=0.0, bos=True)
    assert report.tokens == 59
    for chunk in report.chunks:
        begin, first = max(0, chunk.end - 23), max(chunk.start, 1)
        window = torch.cat([torch.tensor([1]), ids[begin : chunk.end]])
        log_p = logits_of(plain, window[:-1]).log_softmax(-1)[-(chunk.end - first) :]
        expected = -log_p.gather(1, ids[first : chunk.end, None]).sum().item()
        assert chunk.nll == pytest.approx(expected, rel=1e-5), chunk


@pytest.mark.parametrize("window, stride", [(24, 8), (12, 12), (64, 64), (64, 63), (3, 1)])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("initialized", [False, True], ids=["fresh", "initialized"])
def test_the_host_never_sees_more_than_a_window(window, stride, bos, initialized):
    model, memory = attached()
    if initialized:
        memory.initialize(random_ids(8))
    seen = []

    def watch(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        seen.append(kwargs["input_ids"].shape[1] + (cache.get_seq_length() if cache is not None else 0))

    model.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        memorize(memory, random_ids(130), window=window, stride=stride, bos=bos)
    except ValueError as error:
        assert bos and stride == window and "stride" in str(error)  # no room is left for the BOS token
        return
    assert seen and max(seen) <= window


def test_bos_needs_a_host_that_has_one():
    _, memory = attached(model_settings=dict(bos_token_id=None))
    with pytest.raises(ValueError, match="bos_token_id"):
        memorize(memory, TEXT, bos=True)


# ---- causality ------------------------------------------------------------------------------------------------
@families
@pytest.mark.parametrize("t", [1, 8, 9, 40, 63])
def test_tokens_from_t_on_change_no_score_that_ends_before(family, t):
    def run(ids):
        _, memory = attached(family)
        slots = []
        report = memorize(memory, ids, callback=lambda chunk: slots.append(memory.slots.clone()))
        return report.chunks, slots

    ids = random_ids(64)
    other = ids.clone()
    other[t:] = (ids[t:] - 3 + random_ids(64 - t, seed=1)) % 58 + 3
    assert (other[t:] != ids[t:]).any()
    (chunks, slots), (other_chunks, other_slots) = run(ids), run(other)
    for chunk, other_chunk, after, other_after in zip(chunks, other_chunks, slots, other_slots, strict=False):
        if chunk.end <= t:
            assert chunk == other_chunk and torch.equal(after, other_after)
    assert chunks[-1] != other_chunks[-1]


def test_a_chunk_is_scored_before_it_is_learned():
    """The first chunks' scores do not depend on the learning rate; later ones do."""
    still, moving = (memorize(attached()[1], TEXT, learning_rate=rate).chunks for rate in (0.0, 0.5))
    assert still[0].nll == moving[0].nll and still[1].nll != moving[1].nll


def test_a_longer_text_begins_like_its_beginning():
    whole = memorize(attached()[1], TEXT).chunks
    assert memorize(attached()[1], TEXT[:24]).chunks == whole[:3]
