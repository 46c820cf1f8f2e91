"""Memory files: never a wrong memory without an error, and an error changes nothing."""

import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from support.checkpoints import CONFIG, IDS, MEMORY, rewrite
from support.helpers import SETTINGS, TEXT, attached, logits_of, random_ids, tiny_model

import locas_ext as locas


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


@pytest.mark.parametrize(
    "family, settings, difference",
    [
        ("llama", dict(seed=1), "other weights"),
        ("mistral", {}, "model_type 'llama' there, 'mistral' here"),
        ("llama", dict(num_hidden_layers=3), "num_hidden_layers 2 there, 3 here"),
        ("llama", dict(intermediate_size=48), "intermediate_size 40 there, 48 here"),
        ("llama", dict(hidden_size=64, num_attention_heads=8), "hidden_size 32 there, 64 here"),
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
