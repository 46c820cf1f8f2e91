"""Truncation and long-context against one plain forward a chunk, in float64."""

import copy

import pytest
import torch
from support.helpers import chunk_bounds, random_ids, tiny_model, truncated_nll

from locas_ext.evaluation.methods.long_context import long_context
from locas_ext.evaluation.methods.truncation import truncation

SHAPES = {"fits": (40, 64, 8), "just": (41, 41, 7), "scrolls": (61, 30, 7), "stride 1": (12, 5, 1), "odd": (47, 17, 17)}


@pytest.mark.parametrize("method", [truncation, long_context])
@pytest.mark.parametrize("length, window, stride", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen3", {}),
        ("llama", {}),
        ("mistral", dict(sliding_window=9)),
    ],
    ids=["qwen3", "llama", "sliding window"],
)
def test_every_chunk_has_the_loss_of_one_plain_forward(method, length, window, stride, family, settings):
    model, ids = tiny_model(family, **settings), random_ids(length)
    plain = copy.deepcopy(model).double()
    report = method(model, ids, window, stride, progress=False)
    bounds = [bound for bound in chunk_bounds(length, stride) if bound != (0, 1)]
    assert [(chunk.start, chunk.end) for chunk in report.chunks] == bounds
    assert report.tokens == length - 1
    for chunk in report.chunks:
        expected = truncated_nll(plain, ids, chunk.start, chunk.end, window).item()
        assert chunk.nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", [truncation, long_context])
@pytest.mark.parametrize("length, window, stride", [(40, 64, 8), (61, 30, 7), (12, 5, 4)])
def test_bos_stands_before_every_window(method, length, window, stride):
    model, ids = tiny_model("llama"), random_ids(length)
    plain = copy.deepcopy(model).double()
    report = method(model, ids, window, stride, progress=False, bos=True)
    for chunk in report.chunks:
        begin = min(max(0, chunk.end - (window - 1)), max(chunk.start, 1) - 1)
        text = torch.cat([torch.tensor([1]), ids[begin : chunk.end]])  # as if the text began there, after BOS
        with torch.no_grad():
            log_p = plain(input_ids=text[None, :-1]).logits[0].log_softmax(-1)
        expected = -log_p.gather(1, text[1:, None])[-chunk.tokens :].sum().item()
        assert chunk.nll == pytest.approx(expected, rel=1e-5)


def test_while_the_text_fits_every_token_is_read_once():
    model, read = tiny_model("llama"), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, y: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    long_context(model, random_ids(40), 40, 8, progress=False)
    assert sum(read) == 39
    read.clear()
    long_context(model, random_ids(48), 40, 8, progress=False)
    assert read == [7, 8, 8, 8, 8, 39]


@pytest.mark.parametrize("method", [truncation, long_context])
@pytest.mark.parametrize(
    "window, stride, bos, complaint",
    [
        (8, 9, False, "stride is 9; expected an integer from 1 to 8"),
        (8, 8, True, "stride is 8; expected an integer from 1 to 7"),
        (1, 1, False, "window is 1"),
        (8, 0, False, "stride is 0"),
    ],
)
def test_windows_that_do_not_fit_are_refused(method, window, stride, bos, complaint):
    with pytest.raises(ValueError, match=complaint):
        method(tiny_model("llama"), random_ids(20), window, stride, progress=False, bos=bos)


def test_bos_needs_a_bos_token():
    with pytest.raises(ValueError, match="no bos_token_id"):
        truncation(tiny_model("llama", bos_token_id=None), random_ids(20), 8, 4, progress=False, bos=True)
