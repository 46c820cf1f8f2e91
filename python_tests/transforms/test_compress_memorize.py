"""memorize(update="write"), end to end, against a plain float64 loop with an NL-SVD of its own."""

import itertools
import math
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from support.compress import energy_matrix, f
from support.helpers import (
    TEXT,
    act_formula,
    assert_same_host,
    chunk_bounds,
    snapshot,
    tiny_model,
    window_begin,
)
from support.hosts import TWO_LAYER, activation_of
from support.writing import (
    PlainWriter,
    assert_unchanged,
    breaking_gradient,
    everything,
    expected_slots,
    writable,
    written,
)

import locas_ext as locas

READ = dict(window=16, stride=6, progress=False)


def written_by(**settings):
    """Arguments of memorize(), with these settings of a Write."""
    return dict(READ, update=locas.Write(**{"epsilon": 0.05, **settings}))


WRITE = written_by()
CYCLE = written_by(capacity=16, compress_to=7)


def plain_nl_svd(slots, rank, activation):
    vectors = torch.linalg.eigh(energy_matrix(slots)).eigenvectors.T.flip(0)[:rank]
    flip = f(-vectors, slots, activation).norm(dim=1) > f(vectors, slots, activation).norm(dim=1)
    probes = torch.where(flip[:, None], -vectors, vectors)
    one = act_formula(torch.ones((), dtype=torch.float64), activation)
    return torch.stack([probes, f(probes, slots, activation) / one])


def plain_loop(model, ids, window, stride, epsilon, capacity, compress_to, context_gradient=False, bos=None, tokens=None):
    """-> each chunk's NLL and the slots at the end; score a chunk, then write its tokens, compress when full."""
    twin, nlls = PlainWriter(model), []
    for start, end in chunk_bounds(len(ids), stride):
        first = max(start, 1)
        begin = window_begin(start, end, window if bos is None else window - 1)
        before = [] if bos is None else [torch.tensor([bos])]
        seen, targets = torch.cat([*before, ids[begin : end - 1]])[None], ids[first:end]
        context, inputs = seen[:, : -len(targets)], seen[:, -len(targets) :]
        if context_gradient or context.shape[1] == 0:
            logits = twin.model(input_ids=seen, use_cache=False).logits[0, -len(targets) :]
        else:
            with torch.no_grad():
                cache = twin.model(input_ids=context, use_cache=True).past_key_values
            logits = twin.model(input_ids=inputs, past_key_values=cache).logits[0]
        nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        nlls.append(nll.sum().item())
        own = torch.arange(len(targets)) if tokens is None else nll.topk(min(tokens, len(nll))).indices.sort().values
        gradients = twin.rows(torch.autograd.grad(-nll[own].sum(), twin.outputs))[:, -len(targets) :][:, own]
        new, _ = expected_slots(twin.rows(twin.inputs).detach()[:, -len(targets) :][:, own], gradients, epsilon)
        for layer, slots in enumerate(new):
            old = twin.slots[layer]
            if old is not None and old.shape[1] + slots.shape[1] > capacity:
                old = plain_nl_svd(old, compress_to, twin.activation)
            twin.slots[layer] = slots if old is None else torch.cat([old, slots], dim=1)
    return nlls, torch.stack(twin.slots)


def outputs(slots, activation, x):
    return torch.stack([f(x, layer, activation) for layer in slots])


@pytest.mark.parametrize("family", TWO_LAYER)
@pytest.mark.parametrize("changes", [{}, dict(context_gradient=True), dict(bos=True), dict(tokens=4)], ids=str)
def test_chunk_losses_are_those_of_a_plain_loop(family, changes):
    model, memory = writable(family, torch.float64)
    plain = dict(changes, bos=1) if "bos" in changes else changes
    nlls, slots = plain_loop(model, TEXT[:40], 16, 6, 0.05, 16, 7, **plain)
    tokens = locas.TopLoss(changes["tokens"]) if "tokens" in changes else "all"
    reading = {name: value for name, value in changes.items() if name != "tokens"}
    report = memory.memorize(TEXT[:40], **written_by(capacity=16, compress_to=7, tokens=tokens), **reading)
    assert [chunk.nll for chunk in report.chunks] == pytest.approx(nlls, rel=1e-5)
    assert report.tokens == 39 and report.perplexity == pytest.approx(math.exp(sum(nlls) / 39), rel=1e-5)
    assert report.graph == locas.GraphReport(0, len(report.chunks), "the host is on cpu")
    versions = [chunk.memory_version for chunk in report.chunks]
    assert versions[0] == 0 and {b - a for a, b in itertools.pairwise(versions)} == {1, 2}  # 2: compressed
    assert memory.state.used == slots.shape[2] and memory.state.capacity == 16
    x = torch.randn(50, 32, dtype=torch.float64)  # eigenvectors of near eigenvalues may differ; what they do, less so
    expected, activation = outputs(slots, activation_of(model), x), activation_of(model)
    assert (outputs(written(memory), activation, x) - expected).norm() < 1e-3 * expected.norm()


def test_it_grows_where_full_is_an_error_and_no_capacity_is_given():
    _, memory = writable()
    memory.memorize(TEXT[:40], **written_by(when_full="error"))
    assert memory.state.used == 39 and memory.version == 7


def test_by_default_it_is_compressed_to_half():
    _, memory = writable(rank=10)
    memory.memorize(TEXT[:40], **WRITE)
    assert memory.state.capacity == 20 and memory.version > 7 and memory.state.used <= 20


def test_the_oldest_may_be_dropped_instead():
    _, grows = writable()
    _, memory = writable()
    grows.memorize(TEXT[:12], **written_by(when_full="error"))
    memory.memorize(TEXT[:12], **written_by(capacity=8, when_full="drop_oldest"))
    assert memory.state.used == 8
    # the second chunk is read with 5 slots in both, so what is written is the same
    torch.testing.assert_close(memory.slots, written(grows)[:, :, -8:], rtol=0, atol=0)


def test_writing_a_text_again_and_again_makes_it_likelier():
    _, memory = writable(rank=48)
    losses = [memory.memorize(TEXT[:32], **written_by(epsilon=1.0, when_full="error")).nll for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


class Stop(Exception):
    pass


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        CYCLE,
        WRITE,
        written_by(when_full="error"),
        written_by(capacity=9, when_full="drop_oldest"),
    ],
    ids=["cycle", "default", "grows", "drops"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, chunks, settings, dtype):
    _, whole = writable(dtype=dtype)
    full_report = whole.memorize(TEXT[:44], **settings)

    def stop(chunk):
        if chunk.end == 6 * chunks:
            raise Stop

    _, memory = writable(dtype=dtype)
    with pytest.raises(Stop):
        memory.memorize(TEXT[:44], **settings, callback=stop)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = writable(dtype=dtype)
    report = later.memorize(TEXT[:44], **settings, resume=tmp_path / "m")
    assert report.chunks == full_report.chunks and later.version == whole.version
    assert torch.equal(written(later), written(whole))
    with pytest.raises(ValueError, match="other settings: write was"):
        other = replace(settings["update"], epsilon=0.06)
        writable(dtype=dtype)[1].memorize(TEXT[:44], **{**settings, "update": other}, resume=tmp_path / "m")
    with pytest.raises(ValueError, match="other settings: "):
        writable(dtype=dtype)[1].memorize(TEXT[:44], **READ, resume=tmp_path / "m")


def test_a_second_text_is_resumed_with_the_capacity_it_began_with(tmp_path):
    """The default capacity depends on the slots used when the text was begun, not on those of the saved memory."""

    def second(memory, **arguments):
        memory.memorize(TEXT[:20], **WRITE)
        return memory.memorize(TEXT[3:47], **WRITE, **arguments)

    _, whole = writable()
    full_report = second(whole)

    def stop(chunk):
        if chunk.end == 30:
            raise Stop

    _, memory = writable()
    with pytest.raises(Stop):
        second(memory, callback=stop)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = writable()
    assert later.memorize(TEXT[3:47], **WRITE, resume=tmp_path / "m").chunks == full_report.chunks
    assert torch.equal(written(later), written(whole))


def test_room_is_reserved_when_the_capacity_is_given():
    _, memory = writable()
    memory.memorize(TEXT[:13], **written_by(capacity=50, compress_to=20))
    assert memory.slots.shape[2] == memory.status()[0].capacity == 50 and memory.status()[0].slots_used == 12


def test_a_memory_that_learned_nothing_is_not_compressed():
    _, memory = writable()
    memory.initialize(TEXT[:20])
    before = memory.slots.clone()
    with pytest.raises(ValueError, match="values are all 0"):
        memory.compress(1)
    assert torch.equal(memory.slots, before) and memory.version == 0


def test_ctrl_c_takes_effect_behind_the_running_chunk():
    model, memory = writable()
    model.train()
    handler, before = signal.getsignal(signal.SIGINT), snapshot(model)

    def press(chunk):
        if chunk.end == 12:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3):
                time.sleep(0.01)
            press.survived = True

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(TEXT, **CYCLE, callback=press)
    expected = writable()[1]
    expected.memorize(TEXT[:12], **CYCLE)
    assert press.survived and torch.equal(memory.slots, expected.slots) and memory.version == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_host(model, before)


@pytest.mark.parametrize("chunks", [2, 3])
def test_a_gradient_that_is_not_finite_leaves_the_memory_of_the_last_chunk(chunks):
    """Chunk 3 would compress the memory first."""
    model, memory = writable()

    def breaks(chunk):
        if chunk.end == 6 * chunks:
            breaking_gradient(model)

    with pytest.raises(locas.LocasError, match="not finite"):
        memory.memorize(TEXT, **CYCLE, callback=breaks)
    expected = writable()[1]
    expected.memorize(TEXT[: 6 * chunks], **CYCLE)
    assert torch.equal(written(memory), written(expected)) and memory.version == expected.version


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(epsilon=0.0), ValueError, "epsilon is 0.0"),
        (dict(tokens=[1, 2]), ValueError, "tokens holds positions, which only memory.write"),
        (dict(tokens=torch.tensor([1, 2])), ValueError, "tokens holds positions"),
        (dict(tokens="some"), TypeError, "tokens is 'some'"),
        (dict(tokens=3), TypeError, r"tokens is 3; write locas.TopLoss\(3\)"),
        (dict(tokens=0.5), TypeError, r"tokens is 0.5; write locas.LossAbove\(0.5\)"),
        (dict(when_full="grow"), ValueError, "when_full is 'grow'; expected one of error, drop_oldest, compress"),
        (dict(capacity=0), ValueError, "capacity is 0; expected an integer >= 1"),
        (dict(compress_to=2.0), TypeError, "compress_to is 2.0"),
    ],
    ids=str,
)
def test_a_write_that_means_nothing_is_refused_when_it_is_made(settings, error, message):
    with pytest.raises(error, match=message):
        locas.Write(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(capacity=5, when_full="drop_oldest"), "up to 6 tokens.*at least 6"),
        (dict(capacity=10, compress_to=5), "capacity is 10 and compress_to 5.*at least 11"),
        (dict(capacity=10, compress_to=10), "compress_to is 10"),
    ],
    ids=str,
)
def test_a_write_that_does_not_fit_the_memory(settings, message):
    _, memory = writable()
    before = everything(memory)
    with pytest.raises(ValueError, match=message):
        memory.memorize(TEXT, **written_by(**settings))
    assert_unchanged(memory, before)


def test_a_gated_memory_is_not_written():
    memory = locas.attach(tiny_model(), locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match="update is 'write', but the variant is 'glu'"):
        memory.memorize(TEXT, **WRITE)
