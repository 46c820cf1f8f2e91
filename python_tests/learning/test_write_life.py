"""The life of a memory that grew by writing: saved, forked, merged, reset."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import TEXT, logits_of
from support.hosts import TWO_LAYER, projections, tiny
from support.writing import (
    IDS,
    PlainWriter,
    expected_slots,
    writable,
    written,
)
from support.written import grown

import locas_ext as locas


def test_writing_twice_appends():
    model, memory = writable()
    memory.write(IDS[:6])
    first = written(memory).clone()
    inputs, gradients, _ = PlainWriter(model, first).ask(IDS)
    memory.write(IDS)
    assert torch.equal(memory.slots[:, :, :5], first)
    expected, _ = expected_slots(inputs, gradients, 1e-2)
    torch.testing.assert_close(written(memory, 5).double(), expected, rtol=1e-3, atol=1e-6)


def test_disabled_is_the_host():
    model = tiny("gpt2")
    host = logits_of(model, IDS)
    _, memory = writable(host=model)
    memory.write(IDS, epsilon=1.0)
    changed = logits_of(model, IDS)
    assert not torch.allclose(changed, host)
    with memory.disabled():
        assert torch.equal(logits_of(model, IDS), host)
        with pytest.raises(ValueError, match="disabled here"):
            memory.write(IDS)
    assert torch.equal(logits_of(model, IDS), changed)
    memory.detach()
    assert torch.equal(logits_of(model, IDS), host)


def test_snapshot_restore_fork_and_deepcopy():
    model, memory = grown()
    logits, kept = logits_of(model, IDS), memory.snapshot()
    twins = [memory.fork(), locas.memory_of(copy.deepcopy(model))]
    memory.write(IDS)
    slots = written(memory).clone()
    assert not torch.equal(logits_of(model, IDS), logits)
    for twin in twins:
        assert torch.equal(logits_of(twin.model, IDS), logits) and twin.state.used == 13
        twin.write(IDS)
        assert torch.equal(written(twin), slots)
    memory.restore(kept)
    assert memory.state.used == 13 and torch.equal(logits_of(model, IDS), logits)
    memory.write(IDS)
    assert torch.equal(written(memory), slots)


def test_the_file_holds_the_slots_used_and_fits_a_memory_of_another_size(tmp_path):
    model, memory = grown()
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    assert load_file(tmp_path / "m/locas_memory.safetensors")["slots"].shape == (2, 2, 13, 32)
    assert json.loads((tmp_path / "m/locas_config.json").read_text())["slots_used"] == 13
    assert {(entry.slots_used, entry.capacity) for entry in memory.status()} == {(13, 16)}
    larger = writable(rank=8)[1]
    larger.write(TEXT[:50])
    for other in (writable(rank=8)[1], larger, locas.load(tiny("opt"), tmp_path / "m")):
        other.load(tmp_path / "m")
        assert (other.state.used, other.version) == (13, 2)
        assert torch.equal(written(other), written(memory))
        assert torch.equal(logits_of(other.model, IDS), logits_of(model, IDS))
    memory.write(IDS)
    larger.write(IDS)
    assert torch.equal(written(larger), written(memory))  # whether there was room or not


@pytest.mark.parametrize("family", TWO_LAYER)
def test_merging_a_grown_memory_gives_the_attached_output(family):
    model, memory = grown(family)
    memory.write(IDS, epsilon=1.0)
    before = logits_of(model, IDS)
    merged = memory.merge_and_unload(pad_to_multiple_of=1)
    torch.testing.assert_close(logits_of(merged, IDS), before, rtol=1e-4, atol=1e-4)
    assert {projection.weight.numel() // 32 for pair in projections(merged) for projection in pair} == {48 + 25}


def test_reset_shrinks_back_to_the_rank():
    model = tiny("opt")
    host = logits_of(model, IDS)
    _, memory = writable(host=model, rank=8)
    memory.write(IDS)
    memory.reset()
    assert memory.slots.shape == (2, 2, 8, 32) and not memory.slots.any()
    assert (memory.state.used, memory.version) == (0, 0) and torch.equal(logits_of(model, IDS), host)
    memory.write(IDS)
    assert memory.state.used == 12


@pytest.mark.parametrize("change", [lambda m: m.write(IDS), lambda m: m.compress(3)], ids=["write", "compress"])
def test_a_cache_from_before_is_refused(change):
    model, memory = writable("gpt2")
    memory.write(IDS)
    out = model.generate(IDS[None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    change(memory)
    with pytest.raises(ValueError, match="allow_stale_cache"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)
