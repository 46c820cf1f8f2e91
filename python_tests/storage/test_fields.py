"""Every field of a memory's files has a type and a range: what is outside is refused by file and field."""

import copy
import json
import os
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save
from support.checkpoints import CONFIG, MEMORY, put, rewrite

import locas_ext as locas
from locas_ext.storage import checkpoint, config_file

HUGE, NESTED = 10**30, [[[[[]]]]]


def refused(folder, match):
    with pytest.raises(locas.LocasError, match=match) as caught:
        checkpoint.read(folder)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def places(value, place=""):
    """Every field of a record, of a list the first item."""
    if isinstance(value, dict):
        for name, field in value.items():
            yield from places(field, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        yield from places(value[0], f"{place}.0")
    yield place


@pytest.fixture(scope="module")
def record(saved):
    return json.loads((saved[0] / CONFIG).read_text())


def at(value, place):
    for part in place.split("."):
        value = value[int(part) if part.isdecimal() else part]
    return value


def test_every_field_is_checked_for_its_type(record):
    """A value of every other JSON type in every place: the message names it, or the value is as good as what was there."""
    kinds = (None, True, 7, 0.5, "text", [], {}, NESTED, {"a": 1})
    nullable = {"config.layers", "stream", "stream.settings.write", "stream.tail", "texts.0.title"}
    also = [("config.scale", 7), ("config.scale", 0.5), ("config.clip", 7), ("config.clip", 0.5), ("texts.0.title", "text")]
    for place in filter(None, places(record)):
        was = at(record, place)
        for value in kinds:
            changed = copy.deepcopy(record)
            put(place, value)(changed)
            same_kind = type(value) is type(was) or {type(value), type(was)} == {int, float}
            fits = same_kind or (place, value) in also or (value is None and place in nullable)
            name = [part for part in place.split(".") if not part.isdecimal()][-1]
            try:
                config_file.check(changed)
            except config_file.Wrong as error:
                assert fits or name in str(error), (place, value, str(error))
            else:
                assert fits, (place, value)


def test_every_field_is_needed_and_no_other_is_known(record):
    for place in filter(None, places(record)):
        *path, last = place.split(".")
        changed = copy.deepcopy(record)
        holder = changed
        for part in path:
            holder = holder[int(part) if part.isdecimal() else part]
        if isinstance(holder, list):
            continue
        holder["colour"] = 1
        with pytest.raises(config_file.Wrong, match="'colour' is unknown"):
            config_file.check(changed)
        del holder["colour"], holder[last]
        if place in {f"stream.settings.{name}" for name in ("dtype", "decay_after", "cautious")}:  # which not all runs have
            config_file.check(changed)
            continue
        with pytest.raises(config_file.Wrong, match=f"{last} is missing"):
            config_file.check(changed)


@pytest.mark.parametrize(
    "place, value, named",
    [
        ("slots_used", 65, "slots_used is 65"),
        ("slots_used", 3, "slots_used is 3; expected 0 or 4"),
        ("slots_used", 0, "initialized"),
        ("tokens_seen", -1, "tokens_seen is -1"),
        ("tokens_seen", 3, "tokens_seen 3"),
        ("memory_version", -1, "memory_version is -1"),
        ("initialized", False, "initialized is False"),
        ("layers", [1, 0], "layers"),
        ("layers", [0, 0], "layers"),
        ("layers", [0, 2], "layers"),
        ("layers", [], "layers"),
        ("layers", [0], "config.layers"),
        ("config.rank", HUGE, "config.rank is 1000000000"),
        ("config.rank", 0, "config.rank is 0"),
        ("config.rank", 4.0, "config.rank is 4.0"),
        ("config.scale", 1e30, "config.scale is 1e\\+30"),
        ("config.scale", "1e9x", "config.scale is '1e9x'"),
        ("config.scale", "..x", "scale"),
        ("config.scale", 0, "scale"),
        ("config.seed", HUGE, "config.seed"),
        ("config.layers", [0, -2], "layers"),
        ("host.hidden_size", -32, "host.hidden_size is -32"),
        ("host.samples", ["AAAA"], "host.samples"),
        ("host.samples", [], "host.samples has 0 entries"),
        ("stream.position", 10**9, "stream.position is 1000000000"),
        ("stream.settings.window", 1, "stream.settings.window is 1"),
        ("stream.settings.stride", 0, "stream.settings.stride is 0"),
        ("stream.settings.epochs", 0, "stream.settings.epochs is 0"),
        ("stream.settings.learning_rate", -1, "stream.settings.learning_rate is -1"),
        ("stream.settings.optimizer", "rmsprop", "stream.settings.optimizer is 'rmsprop'"),
        ("stream.settings.write", {"epsilon": 1}, "stream.settings.write.tokens is missing"),
        ("stream.chunks.1.start", 7, r"stream.chunks\[1\]"),
        ("stream.chunks.1.tokens", 9, r"stream.chunks\[1\]"),
        ("stream.chunks.0.tokens", 8, r"stream.chunks\[0\]"),
        ("stream.chunks", [], "tokens_seen"),
        ("stream.tail.0", -1, r"stream.tail\[0\] is -1"),
        ("stream.tail", [1] * 1000, "stream.tail has 1000 tokens"),
        ("texts.0.digest", "ab", r"texts\[0\].digest is 'ab'"),
        ("texts.0.tokens", -1, r"texts\[0\].tokens is -1"),
        ("texts.0.learned_at", "yesterday", r"texts\[0\].learned_at is 'yesterday'"),
        ("created_at", "2026-01-01", "created_at is '2026-01-01'"),
        ("memory_sha256", "A" * 64, "memory_sha256"),
    ],
)
def test_senseless_values_with_a_right_checksum(folder, place, value, named):
    rewrite(folder, put(place, value))
    refused(folder, f"{CONFIG} does not describe a memory: .*{named}")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("NaN", "NaN is not a number"),
        ("-Infinity", "-Infinity is not a number"),
        ("1e999", "does not describe|checksum"),
        ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "comes twice"),
        ("9" * 5000, "not valid JSON|checksum"),
        ('"\\ud800"', "checksum"),
    ],
    ids=["nan", "infinity", "overflow", "nesting", "twice", "digits", "surrogate"],
)
def test_json_that_python_would_take_or_choke_on(folder, text, problem):
    content = (folder / CONFIG).read_text()
    assert '"tokens_seen": 64' in content
    (folder / CONFIG).write_text(content.replace('"tokens_seen": 64', f'"tokens_seen": {text}'))
    refused(folder, f"{CONFIG}.*({problem})")


# ---- the tensor file ------------------------------------------------------------------------------------------
def tensors_of(folder):
    content = (folder / MEMORY).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / MEMORY).write_bytes(struct.pack("<Q", len(text)) + text + data)
    digest = config_file.digest((folder / MEMORY).read_bytes())
    rewrite(folder, lambda record: record.update(memory_sha256=digest))


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("slots", "shape", [2, 3, 4, HUGE]),
        ("slots", "shape", [2, 3, 4, -32]),
        ("slots", "shape", [2, 3, 4, 32, 1]),
        ("slots", "shape", "all"),
        ("slots", "shape", NESTED),
        ("slots", "dtype", "F16"),
        ("slots", "dtype", "F99"),
        ("slots", "dtype", ["F32"]),
        ("slots", "data_offsets", [0, 4]),
        ("slots", "data_offsets", []),
        ("slots", "data_offsets", [HUGE, HUGE]),
        ("slots", "data_offsets", [0.0, 4.0]),
        ("scale", "colour", 1),
    ],
)
def test_a_header_that_says_something_else(folder, name, key, value):
    header, data = tensors_of(folder)
    header[name][key] = value
    write_tensors(folder, header, data)
    refused(folder, f"{MEMORY} is damaged: ")


def test_tensors_that_overlap_or_leave_gaps(folder):
    header, data = tensors_of(folder)
    for name in ("exp_avg", "exp_avg_sq"):
        header[name]["data_offsets"] = header["exp_avg"]["data_offsets"]
    write_tensors(folder, header, data)
    refused(folder, "data_offsets is")
    header, data = tensors_of(folder)


@pytest.mark.parametrize("length", [0, 7, 2**16 + 1, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be(folder, length):
    content = (folder / MEMORY).read_bytes()
    (folder / MEMORY).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, f"{MEMORY} is damaged")


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff", b"{}", b"[" * 30000, b'{"slots": 3}', b'{"slots": {}, "slots": {}}'])
def test_a_header_that_is_none(folder, header):
    _, data = tensors_of(folder)
    write_tensors(folder, header, data)
    refused(folder, f"{MEMORY} is damaged")


@pytest.mark.parametrize("rank", [5, 10**6, 2**31 - 1])
def test_a_rank_is_compared_with_the_header_before_anything_is_made_of_it(folder, rank):
    rewrite(folder, lambda record: record["config"].update(rank=rank) or record.update(slots_used=rank))
    tracemalloc.start()
    refused(folder, f"slots is .*; expected .*{rank}")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("name", [CONFIG, MEMORY])
def test_files_of_a_terabyte_are_not_read(folder, name):
    os.truncate(folder / name, 2**40)  # sparse: it takes no room
    refused(folder, f"{name} is damaged: .*1099511627776|{name} is damaged: .*holds 10995116")


@pytest.mark.parametrize("name", [CONFIG, MEMORY])
def test_pipes_and_folders_in_the_files_place(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is damaged: it is not a regular file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} is damaged: it is not a regular file")


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("scale", 1e30, "scale holds 1e\\+30, in layer 1; expected"),
        ("slots", -1e30, "slots holds -1e\\+30, in layer 0"),
        ("exp_avg_sq", -1.0, "exp_avg_sq holds -1, in layer 0; expected 0"),
        ("exp_avg", float("nan"), "exp_avg holds numbers that are not finite, in layer 0"),
        ("step", -5, "step holds -5; expected 0"),
        ("step", 2**62, "step holds"),
    ],
)
def test_numbers_out_of_range(folder, name, value, problem):
    def change(tensors):
        tensors[name].view(-1)[1 if name != "step" else 0] = value

    rewrite(folder, change_tensors=change)
    refused(folder, f"{MEMORY} is damaged: {problem}")


def test_metadata_is_no_tensor_of_ours(folder):
    header, data = tensors_of(folder)
    write_tensors(folder, {"__metadata__": {"a": "b"}, **header}, data)
    refused(folder, "unknown tensors: __metadata__")


def test_a_growing_memory_may_not_ask_for_far_more_than_it_holds(folder):
    """Its rank is room that the file does not hold; a little of it is fine."""
    tensors = {"slots": torch.zeros(2, 2, 4, 32), "scale": torch.ones(2)}
    (folder / MEMORY).write_bytes(save(tensors))
    digest = config_file.digest((folder / MEMORY).read_bytes())
    for rank, fine in ((1000, True), (2**30, False)):
        rewrite(
            folder,
            lambda record, rank=rank: (
                record["config"].update(variant="mlp", rank=rank, init="gaussian") or record.update(memory_sha256=digest)
            ),
        )
        saved = checkpoint.read(folder)
        if fine:
            saved.check_room()
            continue
        with pytest.raises(locas.LocasError, match="rank is 1073741824, which takes 512.0 GiB for 4 slots in use"):
            saved.check_room()
