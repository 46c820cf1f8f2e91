"""Memory files: bit for bit there and back."""

import json
from datetime import datetime, timedelta, timezone

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import CONFIG, IDS, MEMORY, files, rewrite
from support.helpers import FAMILIES, SETTINGS, TEXT, attached, learned, logits_of, random_ids, tiny_model

import locas_ext as locas


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bitwise(family, optimizer, dtype, tmp_path):
    model, memory = learned(family, dtype=dtype, clip=False, seed=3)
    memory.save_pretrained(tmp_path / "m", optimizer=optimizer)
    assert sorted(files(tmp_path / "m")) == [CONFIG, MEMORY]
    assert set(load_file(tmp_path / "m" / MEMORY)) == {"slots", "scale"} | (
        {"exp_avg", "exp_avg_sq", "value_gram", "step"} if optimizer else set()
    )
    fresh = tiny_model(family, seed=3, dtype=dtype)
    loaded = locas.load(fresh, tmp_path / "m")
    assert torch.equal(loaded.slots, memory.slots) and torch.equal(loaded.scale, memory.scale)
    assert loaded.version == memory.version and loaded.layers == memory.layers
    assert (loaded.config.clip, loaded.config.rank) == (False, 4)
    assert torch.equal(logits_of(fresh, IDS), logits_of(model, IDS))
    if optimizer:
        for run in (memory, loaded):
            run.memorize(TEXT, **SETTINGS)
        assert torch.equal(loaded.slots, memory.slots)


def test_everything_in_the_config_comes_back(tmp_path):
    model = tiny_model(num_hidden_layers=3)
    config = locas.LocasConfig(rank=5, layers=[-1, 0], init="random", scale=0.25, clip=False, backend="reference", seed=9)
    memory = locas.attach(model, config)
    memory.memorize(TEXT, **SETTINGS)
    memory.save_pretrained(tmp_path / "m")
    loaded = locas.load(tiny_model(num_hidden_layers=3), tmp_path / "m")
    assert {**loaded.config.to_dict(), "layers": None} == {**config.to_dict(), "layers": None}
    assert loaded.layers == (0, 2) and loaded.scale.tolist() == [0.25, 0.25]


def test_an_untaught_memory_round_trips(tmp_path):
    model, memory = attached()
    for name in ("attached", "initialized"):
        memory.save_pretrained(tmp_path / name)
        fresh = tiny_model()
        loaded = locas.load(fresh, tmp_path / name)
        assert loaded.version == 0 and torch.equal(loaded.slots, memory.slots)
        assert torch.equal(logits_of(fresh, IDS), logits_of(tiny_model(), IDS))
        loaded.memorize(TEXT, **SETTINGS)
        memory.initialize(TEXT[:8])


def test_swapping_memories_in_an_attached_model(tmp_path):
    model, memory = attached()
    outputs, slots = {}, {}
    for name, text in (("a", TEXT), ("b", random_ids(64, seed=8))):
        memory.reset()
        memory.memorize(text, **SETTINGS)
        memory.save_pretrained(tmp_path / name)
        outputs[name], slots[name] = logits_of(model, IDS), memory.slots.clone()
    assert not torch.equal(outputs["a"], outputs["b"])
    for name in ("a", "b", "a"):
        memory.load(tmp_path / name)
        assert torch.equal(memory.slots, slots[name]) and torch.equal(logits_of(model, IDS), outputs[name])
        assert memory.state.whole("exp_avg") is None  # saved without


def test_saving_over_an_older_memory_replaces_it(tmp_path):
    _, memory = learned()
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    memory.memorize(TEXT, **SETTINGS)
    memory.save_pretrained(str(tmp_path / "m"))
    assert sorted(files(tmp_path / "m")) == [CONFIG, MEMORY]
    assert torch.equal(locas.load(tiny_model(), tmp_path / "m").slots, memory.slots)


def test_the_saved_files_do_not_depend_on_what_happens_later(tmp_path, saved):
    _, memory = learned()
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    before = files(tmp_path / "m")
    memory.memorize(TEXT, **SETTINGS)
    assert files(tmp_path / "m") == before and before[MEMORY] == files(saved[0])[MEMORY]
    one, other = (json.loads(content[CONFIG]) for content in (before, files(saved[0])))
    for record in (one, other):  # all but the times
        del record["created_at"], record["config_sha256"], record["texts"][0]["learned_at"]
    assert one == other


def test_one_file_fits_a_host_in_another_dtype(saved):
    loaded = locas.load(tiny_model(dtype=torch.bfloat16), saved[0])
    assert torch.equal(loaded.slots, saved[1])
    assert torch.equal(loaded.state.arenas[0].compute, saved[1].bfloat16())


def test_a_changed_slot_by_hand_is_what_is_saved(tmp_path):
    _, memory = learned()
    with torch.no_grad():
        memory.slots[0, 2, 1] = 0.125
    memory.save_pretrained(tmp_path / "m")
    loaded = locas.load(tiny_model(), tmp_path / "m")
    assert torch.equal(loaded.slots, memory.slots) and loaded.version == memory.version == 9


def test_what_a_memory_has_learned_comes_back(tmp_path):
    """Its texts with their titles, from files, snapshots and forks; a control character in a title is one when read again."""
    _, memory = attached()
    memory.memorize(TEXT, title="one \x1b[31m\u202e", **SETTINGS)
    memory.memorize(random_ids(40, seed=3), **SETTINGS)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    record = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert [(text["title"], text["tokens"]) for text in record["texts"]] == [("one \x1b[31m\u202e", 64), (None, 40)]
    before, now = datetime.fromisoformat(record["created_at"]), datetime.now(timezone.utc)
    assert timedelta(0) <= now - before < timedelta(minutes=10) and record["locas_ext_version"] == locas.__version__
    texts, snapshot = memory.texts, memory.snapshot()
    assert locas.load(tiny_model(), tmp_path / "m").texts == memory.fork().texts == texts and len(texts) == 2
    memory.reset()
    assert memory.texts == ()
    memory.restore(snapshot)
    assert memory.texts == texts
    tail = memory.snapshot().stream.tail
    assert tail and tail == snapshot.stream.tail == record["stream"]["tail"]


def test_a_backend_in_a_file_is_a_preference(tmp_path):
    _, memory = learned()
    memory.save_pretrained(tmp_path / "m")
    rewrite(tmp_path / "m", lambda record: record["config"].update(backend="fused"))
    model = tiny_model(dtype=torch.float16)  # which no CPU has fused kernels for
    with pytest.raises(ValueError, match="backend is 'fused', but"):
        locas.attach(model, locas.LocasConfig(rank=4, backend="fused"))
    with pytest.warns(UserWarning, match="names a backend that is not available here: backend is 'fused'.*'auto' is used"):
        loaded = locas.load(model, tmp_path / "m")
    assert loaded.config.backend == "auto" and torch.equal(loaded.slots, memory.slots)


def test_a_backend_that_is_there_is_used_without_a_word(tmp_path):
    _, memory = learned(backend="reference")
    memory.save_pretrained(tmp_path / "m")
    assert locas.load(tiny_model(), tmp_path / "m").config.backend == "reference"
