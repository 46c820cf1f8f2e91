"""The figures of `locas capability`: losses and divergences against float64, intervals against statistics, the four states."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_same_host, learned, logits_of, random_ids, snapshot, tiny_model

import locas_ext as locas
from locas_ext.evaluation.capability import bootstrap, command, distributions, held_out
from locas_ext.evaluation.capability.bootstrap import interval, resampled_sums
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.evaluation.report.capability import detached_verdict
from locas_ext.memory import Memory


# ---- the bootstrap ---------------------------------------------------------------------------------------------
def test_the_interval_of_a_gaussian_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered, widths = 0, []
    for experiment in range(400):
        sample = generator.normal(5.0, 2.0, size=(60, 1))
        low, high = interval(resampled_sums(sample, 600, seed=experiment)[:, 0] / 60)
        covered += low <= 5.0 <= high
        widths.append(high - low)
    assert 0.90 <= covered / 400 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(60), rel=0.05)


def test_rows_stay_paired():
    """Two columns that vary together: their difference varies little, in the same resamples only."""
    generator = np.random.default_rng(0)
    common = generator.normal(size=200)
    pair = np.stack([common, common + 0.01 * generator.normal(size=200)], axis=1)
    paired = resampled_sums(pair, 2000, seed=1)
    unpaired = np.stack([resampled_sums(pair[:, [column]], 2000, seed=column)[:, 0] for column in (0, 1)], axis=1)
    widths = [np.subtract(*interval(sums[:, 0] - sums[:, 1])[::-1]) for sums in (paired, unpaired)]
    assert widths[0] == pytest.approx(2 * 1.96 * 0.01 * math.sqrt(200), rel=0.2)
    assert widths[1] > 50 * widths[0]


def test_a_resample_is_n_rows_with_replacement(monkeypatch):
    values = np.stack([np.ones(7), 10.0 ** np.arange(7)], axis=1)  # the digits of a sum tell how often each was drawn
    whole = resampled_sums(values, 501, seed=4)
    assert whole.shape == (501, 2) and (whole[:, 0] == 7).all()
    drawn = np.array([[int(digit) for digit in f"{int(total):07d}"] for total in whole[:, 1]])
    assert (drawn.sum(1) == 7).all() and drawn.mean(0) == pytest.approx(np.ones(7), abs=0.15)
    assert np.array_equal(resampled_sums(values, 501, seed=4), whole)
    assert not np.array_equal(resampled_sums(values, 501, seed=5), whole)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7 * 100)  # six blocks, the last of one resample
    assert np.array_equal(resampled_sums(values, 501, seed=4), whole)


@pytest.mark.parametrize("values, resamples", [(np.ones((1, 3)), 10), (np.ones(5), 10), (np.ones((5, 2)), 0)])
def test_what_has_no_spread_is_refused(values, resamples):
    with pytest.raises(ValueError, match="expected"):
        resampled_sums(values, resamples)


# ---- distributions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, vocab, block", [(1, 5, 1 << 22), (13, 7, 7 * 4), (8, 31, 31 * 8), (5, 9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_divergences_are_those_of_float64(monkeypatch, rows, vocab, block, dtype):
    monkeypatch.setattr(distributions, "_BLOCK", block)
    host, other = (4 * torch.randn(2, rows, vocab)).to(dtype)
    targets = torch.randint(vocab, (rows,))
    assert distributions.negative_log_likelihood(host, targets) == pytest.approx(
        F.cross_entropy(host.double(), targets, reduction="sum").item(), rel=1e-12
    )
    p, q = host.double().softmax(-1), other.double().softmax(-1)
    assert distributions.divergence(host, other) == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-9)
    assert distributions.divergence(host, host) == 0.0


def test_a_token_the_host_rules_out_adds_nothing():
    host, other = torch.randn(2, 3, 6)
    host[:, 2] = -math.inf
    rest = [0, 1, 3, 4, 5]
    p, log_q = host[:, rest].double().softmax(-1), other.double().log_softmax(-1)[:, rest]
    expected = (p * (p.log() - log_q)).sum().item()
    assert distributions.divergence(host, other) == pytest.approx(expected, rel=1e-9)
    other[:, 2] = -math.inf
    assert math.isfinite(distributions.divergence(host, other))


def test_the_digest_sees_every_bit():
    logits = torch.randn(3, 5)
    same, different = logits.clone(), logits.clone()
    different[2, 4] = torch.nextafter(different[2, 4], torch.tensor(math.inf))
    assert distributions.digest(same) == distributions.digest(logits) != distributions.digest(different)
    assert distributions.digest(torch.tensor([[0.0]])) != distributions.digest(torch.tensor([[-0.0]]))


# ---- the four states -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["llama", "qwen3"])
def saved(request, tmp_path_factory):
    """-> a family and the folder of a memory that has learned something on it."""
    _, memory = learned(request.param)
    folder = tmp_path_factory.mktemp("memory") / request.param
    memory.save_pretrained(folder)
    return request.param, folder


def plain_figures(model, host, ids, window):
    """Per window: tokens, NLL, NLL less the host's, agreeing positions, KL; by float64 softmaxes of whole windows."""
    rows = []
    for start in range(0, len(ids), window):
        targets = ids[max(start, 1) : start + window]
        if len(targets) == 0:
            continue
        first = max(start, 1)
        inputs = ids[first - 1 : first - 1 + len(targets)]
        log_q, log_p = (logits_of(each, inputs).double().log_softmax(-1) for each in (model, host))
        nll, host_nll = (-log.gather(1, targets[:, None]).sum().item() for log in (log_q, log_p))
        agreeing = (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
        rows.append([len(targets), nll, nll - host_nll, agreeing, (log_p.exp() * (log_p - log_q)).sum().item()])
    return np.array(rows)


@pytest.mark.parametrize("n, window", [(53, 16), (33, 16), (9, 64), (2, 2), (17, 5)])
def test_every_state_is_measured_as_by_hand(saved, n, window):
    family, folder = saved
    ids = random_ids(n, seed=n)
    model, host = tiny_model(family), tiny_model(family)
    states = {scores.state: scores for scores in held_out.measure(model, folder, ids, window)}
    assert list(states) == ["host", "attached", "merged", "detached"]
    attached, merged = tiny_model(family), tiny_model(family)
    locas.load(attached, folder)
    locas.load(merged, folder).merge_and_unload()
    for state, other in (("host", host), ("attached", attached), ("merged", merged), ("detached", host)):
        expected = plain_figures(other, host, ids, window)
        assert np.allclose(np.array(states[state].windows), expected, rtol=1e-6, atol=1e-6), state
    assert expected[:, 0].sum() == n - 1
    assert states["attached"].difference == states["merged"].difference == (1, min(n, window))
    assert states["host"].difference is None and states["detached"].difference is None
    assert np.abs(states["attached"].windows)[:, 4].sum() > 1e-6  # the memory does something


def test_the_host_is_as_it_was(saved):
    family, folder = saved
    model = tiny_model(family)
    before = snapshot(model)
    held_out.measure(model, folder, random_ids(30), 8)
    assert_same_host(model, before)


def test_inside_disabled_every_bit_is_the_plain_hosts(saved):
    family, folder = saved
    ids = random_ids(21)
    model = tiny_model(family)
    memory = locas.load(model, folder)
    with memory.disabled(), torch.no_grad():
        logits = held_out.next_token_logits(model, ids, 5, 21)
    assert torch.equal(logits, logits_of(tiny_model(family), ids[4:20]))
    assert not torch.equal(logits, logits_of(model, ids[4:20]))


def test_perplexity_is_that_of_truncation_without_overlap(saved):
    family, folder = saved
    ids = random_ids(48)
    rows = np.array(held_out.measure(tiny_model(family), folder, ids, 16, merged=False)[0].windows)
    report = truncation(tiny_model(family), ids, 16, 16, progress=False)
    assert math.exp(rows[:, 1].sum() / rows[:, 0].sum()) == pytest.approx(report.perplexity, rel=1e-6)


def test_a_host_that_detach_did_not_give_back_is_found_and_placed(saved, monkeypatch):
    family, folder = saved
    ids = random_ids(40).clamp(max=59)
    ids[25:] = 60  # a token that nothing before has, so the windows before do not see the change
    detach = Memory.detach

    def broken(memory):
        detach(memory)
        with torch.no_grad():
            memory.model.model.embed_tokens.weight[60, 3] += 1e-3

    monkeypatch.setattr(Memory, "detach", broken)
    model = tiny_model(family)
    detached = held_out.measure(model, folder, ids, 8, merged=False)[-1]
    assert detached.difference == (24, 32)
    assert [math.isnan(row[4]) for row in detached.windows] == [False, False, False, True, True]
    record = command._text_record("a.txt", detached, seed=0)
    assert record["kl"] is None and record["kl_interval"] is None and not record["same_bits_as_host"]
    json.dumps(record, allow_nan=False)
    is_host, sentence = detached_verdict([record])
    assert not is_host and "tokens 24 to 32 of a.txt" in sentence


def test_a_disabled_memory_that_still_speaks_is_an_error(saved, monkeypatch):
    from contextlib import nullcontext

    family, folder = saved
    monkeypatch.setattr(Memory, "disabled", lambda memory: nullcontext())
    with pytest.raises(locas.LocasError, match="tokens 1 to 8 are not the host's to the bit"):
        held_out.measure(tiny_model(family), folder, random_ids(20), 8)


def test_a_loss_that_is_not_finite_is_an_error_that_names_state_and_place(saved):
    family, folder = saved
    model = tiny_model(family)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
    ids = random_ids(20).clamp(max=59)
    ids[13] = 60
    with pytest.raises(locas.LocasError, match="host: the loss of tokens 8 to 16 is nan"):
        held_out.measure(model, folder, ids, 8)


@pytest.mark.parametrize("ids, window", [(random_ids(1), 8), (random_ids(8)[None], 8), (random_ids(8), 1), (random_ids(8), 65)])
def test_texts_and_windows_that_do_not_fit_are_refused(saved, ids, window):
    family, folder = saved
    with pytest.raises(ValueError, match="expected"):
        held_out.measure(tiny_model(family), folder, ids, window)


# ---- records ---------------------------------------------------------------------------------------------------
def test_a_record_says_what_the_windows_say():
    windows = [[8, 20.0, 1.0, 7, 0.5], [8, 18.0, -0.5, 8, 0.25], [4, 9.0, 0.25, 3, 0.125]]
    record = command._text_record("a.txt", held_out.StateScores("attached", windows, (1, 8)), seed=0)
    assert record["tokens"] == 20 and record["windows"] == 3
    assert record["perplexity"] == pytest.approx(math.exp(47 / 20))
    assert record["perplexity_ratio"] == pytest.approx(math.exp(0.75 / 20))
    assert record["top1_agreement"] == pytest.approx(18 / 20) and record["kl"] == pytest.approx(0.875 / 20)
    # The 27 resamples of three windows are all there is: the interval is among them.
    sums = [np.sum([windows[i] for i in (a, b, c)], axis=0) for a in range(3) for b in range(3) for c in range(3)]
    low, high = np.quantile([total[4] / total[0] for total in sums], [0.025, 0.975], method="inverted_cdf")
    assert record["kl_interval"] == pytest.approx([low, high])


def test_one_window_has_no_interval():
    record = command._text_record("a.txt", held_out.StateScores("host", [[8, 20.0, 0.0, 8, 0.0]]), seed=0)
    assert record["perplexity_interval"] is None and record["perplexity"] == pytest.approx(math.exp(20 / 8))
