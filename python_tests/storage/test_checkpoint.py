"""Memory files: bit for bit there and back, never half a memory, never a wrong one without an error."""

import errno
import hashlib
import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support.helpers import FAMILIES, SETTINGS, TEXT, attached, learned, logits_of, random_ids, tiny_model

import locas_ext as locas

CONFIG, MEMORY = "locas_config.json", "locas_memory.safetensors"
IDS = random_ids(20, seed=5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved memory with optimizer states, and its slots."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    _, memory = learned()
    memory.save_pretrained(folder, optimizer=True)
    return folder, memory.slots.clone()


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(saved[0], tmp_path / "m")
    return tmp_path / "m"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, change_record=lambda record: None, change_tensors=None):
    """Changes a memory's files and mends both checksums: an attacker, or a bug in a writer."""
    record = json.loads((folder / CONFIG).read_text())
    if change_tensors is not None:
        tensors = load_file(folder / MEMORY)
        tensors = change_tensors(tensors) or tensors
        save_file(tensors, folder / MEMORY)
        record["memory_sha256"] = hashlib.sha256((folder / MEMORY).read_bytes()).hexdigest()
    change_record(record)
    record.pop("config_sha256", None)
    record["config_sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(record))


def assert_refused(folder, error=locas.LocasError, match=None):
    """Neither an attached memory nor a plain model takes it, and both stay as they were."""
    model, memory = attached()
    memory.memorize(TEXT[:16], **SETTINGS)
    slots, scale, logits = memory.slots.clone(), memory.scale.clone(), logits_of(model, IDS)
    with pytest.raises(error, match=match):
        memory.load(folder)
    assert torch.equal(memory.slots, slots) and torch.equal(memory.scale, scale) and memory.version == 2
    assert torch.equal(logits_of(model, IDS), logits)
    plain = tiny_model()
    with pytest.raises(error, match=match):
        locas.load(plain, folder)
    with pytest.raises(ValueError, match="no memory attached"):
        locas.memory_of(plain)
    assert "forward" not in plain.model.layers[0].mlp.__dict__ and all(p.requires_grad for p in plain.parameters())


# ---- there and back -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bitwise(family, optimizer, dtype, tmp_path):
    model, memory = learned(family, dtype=dtype, clip=False, seed=3)
    memory.save_pretrained(tmp_path / "m", optimizer=optimizer)
    assert sorted(files(tmp_path / "m")) == [CONFIG, MEMORY]
    assert set(load_file(tmp_path / "m" / MEMORY)) == {"slots", "scale"} | (
        {"exp_avg", "exp_avg_sq", "step"} if optimizer else set()
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
    assert files(tmp_path / "m") == before == files(saved[0])


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


# ---- the wrong thing ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family, settings, difference",
    [
        ("llama", dict(seed=1), "weights_sha256"),
        ("mistral", {}, "model_type 'llama' there, 'mistral' here"),
        ("llama", dict(num_hidden_layers=3), "num_hidden_layers 2 there, 3 here"),
        ("llama", dict(intermediate_size=48), "intermediate_size 40 there, 48 here"),
        ("llama", dict(hidden_size=64, num_attention_heads=8), "hidden_size 32 there, 64 here"),
        ("llama", dict(vocab_size=70), "vocab_size 61 there, 70 here"),
    ],
)
def test_a_memory_of_another_host(saved, family, settings, difference):
    model = tiny_model(family, **settings)
    with pytest.raises(locas.LocasError, match=f"another host.*{difference}"):
        locas.load(model, saved[0])
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    with pytest.raises(locas.LocasError, match="another host"):
        memory.load(saved[0])
    assert memory.version == 0 and not memory.slots.any()


@pytest.mark.parametrize(
    "config, problem",
    [
        (dict(rank=5), "rank 4; attached is 5"),
        (dict(rank=4, layers=[0]), r"layers \[0, 1\]; attached are \[0\]"),
    ],
)
def test_a_memory_of_other_slots(saved, config, problem):
    memory = locas.attach(tiny_model(), locas.LocasConfig(**config))
    with pytest.raises(locas.LocasError, match=problem):
        memory.load(saved[0])


def test_nothing_there(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "nowhere", FileNotFoundError, "nowhere")
    assert_refused(tmp_path / "empty", FileNotFoundError, CONFIG)
    assert_refused(folder / CONFIG, FileNotFoundError, "not a folder")
    (folder / MEMORY).rename(folder / "elsewhere")
    assert_refused(folder, FileNotFoundError, MEMORY)
    (folder / "elsewhere").rename(folder / MEMORY)
    (folder / CONFIG).unlink()
    assert_refused(folder, FileNotFoundError, CONFIG)


@pytest.mark.parametrize("name", [CONFIG, MEMORY])
@pytest.mark.parametrize("keep", [0, 1, 10, 0.3, 0.999])
def test_truncated_files(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_refused(folder, match=f"{name} is damaged")


@pytest.mark.parametrize("name", [CONFIG, MEMORY])
def test_bytes_after_the_end(folder, name):
    with open(folder / name, "ab") as file:
        file.write(b"\0more")
    assert_refused(folder, match="damaged")


def flipped(content, draw):
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged), f"byte {place}, bit {bit}"


def overwritten(content, draw):
    place, byte = draw.randrange(len(content)), draw.randrange(256)
    return content[:place] + bytes([byte]) + content[place + 1 :], f"byte {place} as {byte}"


def cut_off(content, draw):
    keep = draw.randrange(len(content))
    return content[:keep], f"{keep} bytes kept"


@pytest.mark.parametrize("name", [CONFIG, MEMORY])
@pytest.mark.parametrize("damage", [flipped, overwritten, cut_off])
def test_damage_anywhere_never_loads_as_other_numbers(folder, name, damage):
    """200 random places in each file: an error that leaves the memory as it was, or the very memory that was saved."""
    _, memory = attached()
    memory.load(folder)
    whole = memory.snapshot()
    memory.reset()
    memory.memorize(TEXT[:16], **SETTINGS)
    before, content, draw = memory.snapshot(), (folder / name).read_bytes(), random.Random(name)
    for _ in range(200):
        damaged, what = damage(content, draw)
        (folder / name).write_bytes(damaged)
        try:
            memory.load(folder)
        except locas.LocasError:
            assert_same_snapshot(memory.snapshot(), before, what)
            continue
        # the same byte again, or in the config a blank that became another or a digit beyond a float's precision
        assert name == CONFIG or damaged == content, what
        assert_same_snapshot(memory.snapshot(), whole, what)
        memory.restore(before)


def assert_same_snapshot(a, b, what):
    assert replace(a, tensors={}) == replace(b, tensors={}), what
    assert a.tensors.keys() == b.tensors.keys(), what
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), f"{what}: {name}"


def test_swapped_and_mixed_up_files(folder, tmp_path):
    _, memory = attached()
    memory.memorize(random_ids(64), **SETTINGS)
    memory.save_pretrained(tmp_path / "other", optimizer=True)
    shutil.copy(tmp_path / "other" / MEMORY, folder / MEMORY)
    assert_refused(folder, match="checksum")


@pytest.mark.parametrize("name", ["slots", "scale", "exp_avg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(folder, name, value):
    def poison(tensors):
        tensors[name].view(-1)[1] = value

    rewrite(folder, change_tensors=poison)
    assert_refused(folder, match=f"{name} holds numbers that are not finite")


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop("slots") is None, "lacks slots"),
        (lambda t: t.pop("scale") is None, "lacks scale"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensors: extra"),
        (
            lambda t: t.update(slots=t["slots"][:, :, :3].contiguous()),
            r"slots is .* \[2, 3, 3, 32\]; expected .* \[2, 3, 4, 32\]",
        ),
        (lambda t: t.update(slots=t["slots"].half()), "slots is torch.float16"),
        (lambda t: t.update(scale=t["scale"][:1].contiguous()), "scale is"),
        (lambda t: t.update(step=torch.tensor(1.0)), "step is torch.float32"),
    ],
    ids=["no slots", "no scale", "extra", "shape", "dtype", "scale", "step"],
)
def test_strict_tensors(folder, change, problem):
    rewrite(folder, change_tensors=lambda tensors: change(tensors) and None)
    assert_refused(folder, match=problem)


def test_an_unknown_format_version(folder):
    rewrite(folder, lambda record: record.update(format_version=99))
    assert_refused(folder, match="format version 99")


@pytest.mark.parametrize(
    "key",
    [
        "format_version",
        "config",
        "layers",
        "host",
        "memory_version",
        "initialized",
        "stream",
        "memory_sha256",
    ],
)
def test_a_missing_key_in_the_config(folder, key):
    rewrite(folder, lambda record: record.pop(key) and None)
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["config"].update(rank=0),
        lambda record: record["config"].update(colour="blue"),
        lambda record: record["config"].update(init="best"),
        lambda record: record["config"].pop("rank"),
        lambda record: record.update(memory_version="many"),
        lambda record: record.update(memory_version=-1),
        lambda record: record.update(host=[]),
        lambda record: record.update(layers="all"),
        lambda record: record.update(config=7),
        lambda record: record.update(stream={"position": 3}),
        lambda record: record.update(memory_version=1.5),
    ],
    ids=[
        "rank 0",
        "unknown setting",
        "unknown init",
        "no rank",
        "version text",
        "version -1",
        "host",
        "layers",
        "config",
        "stream",
        "version 1.5",
    ],
)
def test_nonsense_in_the_config(folder, change):
    rewrite(folder, lambda record: change(record) and None)
    assert_refused(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format_version": "1"}', "{" * 100000, "\xff"])
def test_a_config_that_is_no_config(folder, text):
    (folder / CONFIG).write_text(text, encoding="latin-1")
    assert_refused(folder)


def test_a_tensor_file_that_is_none(folder):
    content = b"\xff" * 64
    (folder / MEMORY).write_bytes(content)
    record = json.loads((folder / CONFIG).read_text())
    record["memory_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / CONFIG).write_text(json.dumps(record))
    rewrite(folder)
    assert_refused(folder, match="damaged")


# ---- writing goes wrong ---------------------------------------------------------------------------------------
def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nth_call_fails(monkeypatch, module, name, n, error=full_disk):
    """Lets module.name work n - 1 times and then fail once."""
    real, calls = getattr(module, name), []

    def function(*arguments, **options):
        calls.append(1)
        return error() if len(calls) == n else real(*arguments, **options)

    monkeypatch.setattr(module, name, function)


def killed():
    raise KeyboardInterrupt


FAILURES = [("replace", 1), ("replace", 2), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4)]


@pytest.mark.parametrize("error, raised", [(full_disk, OSError), (killed, KeyboardInterrupt)], ids=["full", "killed"])
@pytest.mark.parametrize("name, n", FAILURES)
def test_whatever_moment_a_save_fails_a_whole_memory_stays(folder, saved, monkeypatch, name, n, error, raised):
    _, memory = learned()
    memory.memorize(TEXT, **SETTINGS)
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, name, n, error)
        with pytest.raises(raised):
            memory.save_pretrained(folder)
    loaded = locas.load(tiny_model(), folder)
    assert torch.equal(loaded.slots, saved[1]) or torch.equal(loaded.slots, memory.slots)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, memory.slots)
    assert sorted(files(folder)) == [CONFIG, MEMORY]


@pytest.mark.parametrize("first", FAILURES)
@pytest.mark.parametrize("second", FAILURES)
def test_a_second_failed_save_does_not_finish_what_the_first_began(folder, saved, monkeypatch, first, second):
    """The disk stays full: every further attempt must leave the old memory as it is, too."""
    _, memory = learned()
    candidates = [saved[1]]
    for name, n in (first, second):
        memory.memorize(TEXT, **SETTINGS)
        candidates.append(memory.slots.clone())
        with monkeypatch.context() as patched:
            nth_call_fails(patched, os, name, n)
            with pytest.raises(OSError):
                memory.save_pretrained(folder)
    loaded = locas.load(tiny_model(), folder)
    assert any(torch.equal(loaded.slots, slots) for slots in candidates)


@pytest.mark.parametrize("name, n", FAILURES)
def test_a_failed_first_save_is_no_memory_and_can_be_repeated(tmp_path, monkeypatch, name, n):
    _, memory = learned()
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, name, n)
        with pytest.raises(OSError, match="cannot save the memory: No space left on device: .*m'"):
            memory.save_pretrained(tmp_path / "m")
    try:
        assert torch.equal(locas.load(tiny_model(), tmp_path / "m").slots, memory.slots)
    except FileNotFoundError:
        pass
    memory.save_pretrained(tmp_path / "m")
    assert torch.equal(locas.load(tiny_model(), tmp_path / "m").slots, memory.slots)


def test_a_folder_that_cannot_be_written(tmp_path):
    """Below a regular file nothing can be made, even as root."""
    (tmp_path / "file").write_text("text")
    _, memory = learned()
    for path in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(OSError, match="file"):
            memory.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "text"


def test_a_read_only_folder(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "m"))

    _, memory = learned()
    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(PermissionError, match="cannot save the memory.*Permission denied.*m"):
        memory.save_pretrained(tmp_path / "m")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _, memory = learned()
    with pytest.raises(FileExistsError, match="notes.txt"):
        memory.save_pretrained(tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_foreign_files_beside_a_memory_survive(folder):
    (folder / "notes.txt").write_text("mine")
    _, memory = learned()
    memory.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_saving_leaves_the_memory_alone(tmp_path):
    model, memory = learned()
    slots, logits = memory.slots.clone(), logits_of(model, IDS)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    assert torch.equal(memory.slots, slots) and torch.equal(logits_of(model, IDS), logits) and memory.version == 8


def test_no_pickle_in_the_file(saved):
    content = (saved[0] / MEMORY).read_bytes()
    assert content == save(load_file(saved[0] / MEMORY))


def test_a_file_system_without_hard_links(folder, saved, monkeypatch):
    def no_links(*arguments, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    _, memory = learned()
    memory.memorize(TEXT, **SETTINGS)
    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, "replace", 2)
        with pytest.raises(OSError):
            memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, saved[1])
    memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, memory.slots)
