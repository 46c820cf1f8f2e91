"""memory.compress: what it keeps, what it reports, what it refuses."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from support.compress import energy_matrix, f
from support.helpers import (
    TEXT,
    logits_of,
    random_ids,
    tiny_model,
)
from support.hosts import TWO_LAYER, activation_of, tiny
from support.writing import (
    IDS,
    SCALE,
    assert_unchanged,
    everything,
    writable,
    written,
)

import locas_ext as locas


def full(family="opt", dtype=torch.float32, texts=2):
    model, memory = writable(family, dtype)
    for seed in range(texts):
        memory.write(random_ids(20, seed), epsilon=0.1)
    return model, memory


@pytest.mark.parametrize("family", [*TWO_LAYER, "llama"])
@pytest.mark.parametrize("rank", [1, 9, 32])
def test_outputs_along_probes_are_kept_and_the_report_is_true(family, rank):
    model, memory = full(family)
    activation, old = activation_of(model), written(memory).clone()
    report = memory.compress(rank)
    assert (report.slots_before, report.slots_used, report.dtype) == (38, rank, "float64")
    assert (memory.state.used, memory.state.capacity, memory.version) == (rank, rank, 3)
    assert memory.slots.shape == (2, 2, rank, 32)
    random = torch.randn(200, 32, dtype=torch.float64)
    for layer, ffn in enumerate(memory._attachment.ffns):
        before, after = old[layer], memory.slots[layer]
        probes = after[0].double()
        torch.testing.assert_close(probes @ probes.T, torch.eye(rank).double(), rtol=0, atol=1e-5)
        expected = SCALE * f(probes, before, activation)
        with torch.no_grad():  # through the FFN of the model
            got = ffn._beside(after[0], None).double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert (expected.norm(dim=1) >= SCALE * f(-probes, before, activation).norm(dim=1) - 1e-6).all()

        spectrum = torch.linalg.eigvalsh(energy_matrix(before)).flip(0)
        kept = (probes @ energy_matrix(before) * probes).sum()
        assert report.kept_energy[layer] == pytest.approx((spectrum[:rank].sum() / spectrum.sum()).item(), rel=1e-5)
        assert kept.item() == pytest.approx(spectrum[:rank].sum().item(), rel=1e-5)
        projected = random @ probes.T @ probes
        error = SCALE * (f(random, before, activation) - f(projected, before, activation)).norm(dim=1)
        outside = (random - projected).norm(dim=1)
        if rank == 32:
            assert report.kept_energy[layer] == pytest.approx(1.0) and report.error_bound[layer] < 1e-4
        else:
            assert (error <= report.error_bound[layer] * outside + 1e-6).all()
            assert (error / outside).max() > report.error_bound[layer] / 50  # a bound, and not just any


def test_a_bound_counts_tau():
    reports = []
    for scale in (0.25, -1.0):
        memory = locas.attach(tiny("opt"), locas.LocasConfig(rank=4, scale=scale, variant="mlp"))
        memory.write(IDS)
        reports.append(memory.compress(4))
    assert [4 * b for b in reports[0].error_bound] == pytest.approx(reports[1].error_bound, rel=1e-4)


def test_as_many_as_there_are_keeps_what_the_text_does():
    """With rank = used the probes span all keys; along each the memory is the same, and the energy is all there."""
    model, memory = writable("opt")
    memory.write(IDS, epsilon=0.5)
    old = written(memory).clone()
    report = memory.compress(12)
    assert report.slots_used == 12 and report.kept_energy == pytest.approx([1.0, 1.0])
    for before, after in zip(old, memory.slots, strict=False):
        projected = before[0] @ after[0].T @ after[0]
        torch.testing.assert_close(projected, before[0], rtol=0, atol=1e-5)


def test_a_compressed_memory_lives_on(tmp_path):
    model, memory = full("gpt2")
    memory.memorize(TEXT[:16], window=16, stride=8, progress=False)
    assert memory.state.whole("exp_avg") is not None
    version = memory.version
    memory.compress(6)
    assert memory.version == version + 1 and memory.state.whole("exp_avg") is None
    memory.save_pretrained(tmp_path / "m")
    assert load_file(tmp_path / "m/locas_memory.safetensors")["slots"].shape == (2, 2, 6, 32)
    other = locas.load(tiny("gpt2"), tmp_path / "m")
    assert torch.equal(logits_of(other.model, IDS), logits_of(model, IDS))
    assert [(s.slots_used, s.capacity) for s in memory.status()] == [(6, 6)] * 2
    for m in (memory, other):
        m.write(IDS)
        m.memorize(TEXT[:16], window=16, stride=8, progress=False)
    assert torch.equal(written(memory), written(other))


def test_a_threshold_leaves_weak_probes_out():
    _, memory = full()
    roots = [torch.linalg.eigvalsh(energy_matrix(layer)).flip(0).sqrt() for layer in written(memory)]
    threshold = (roots[0][4] + roots[0][5]).item() / 2
    report = memory.compress(20, threshold=threshold)
    counts = [int((root >= threshold).sum()) for root in roots]
    assert counts[0] == 5 and report.slots_used == memory.state.capacity == max(counts)
    assert [int(layer[0].any(dim=1).sum()) for layer in memory.slots] == counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_host_is_told(dtype):
    model, memory = full("gpt2", dtype)
    twin = writable("gpt2")[1]
    twin.state.set_slots(memory.slots[:, :, :38].clone(), 2)
    with pytest.warns(UserWarning, match=f"compress: computed in float64.*{dtype} host") as caught:
        report = memory.compress(7)
    assert caught[0].filename == __file__ and report.dtype == "float64"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.compress(7)
    assert torch.equal(memory.slots, twin.slots)
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.to(dtype))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0,), ValueError, "rank is 0; expected an integer from 1 to 12"),
        ((13,), ValueError, "rank is 13; expected an integer from 1 to 12 .the 12 slots in use, and the hidden size 32"),
        ((True,), TypeError, "rank is True"),
        ((3.0,), TypeError, "rank is 3.0"),
        ((3, -1.0), ValueError, "threshold is -1.0"),
        ((3, float("nan")), ValueError, "threshold is nan"),
        ((3, "0"), TypeError, "threshold is '0'"),
        ((3, True), TypeError, "threshold is True"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    _, memory = writable()
    memory.write(IDS, capacity=20)
    before = everything(memory)
    with pytest.raises(error, match=message):
        memory.compress(*arguments)
    assert_unchanged(memory, before)


def test_more_than_the_hidden_size_nothing_and_a_gated_memory():
    _, memory = full()
    before = everything(memory)
    with pytest.raises(ValueError, match="rank is 33; expected an integer from 1 to 32.*hidden size 32"):
        memory.compress(33)
    assert_unchanged(memory, before)
    with pytest.raises(ValueError, match="holds no slots yet"):
        writable()[1].compress(1)
    with pytest.raises(ValueError, match="variant is 'glu'"):
        locas.attach(tiny_model(), locas.LocasConfig(rank=4)).compress(1)


def test_broken_slots_are_not_compressed():
    _, memory = full()
    with torch.no_grad():
        memory.slots[1, 0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        memory.compress(5)
    assert memory.state.used == 38 and memory.state.whole("slots")[0].isfinite().all()
