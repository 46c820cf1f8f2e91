"""Files that anyone may have written: whatever the bytes, LocasError or FileNotFoundError comes out, or a memory that is whole.

A few examples, the same in every run. LOCAS_FUZZ_EXAMPLES=100000 tries so many other ones.
"""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from support.checkpoints import CONFIG, MEMORY

import locas_ext as locas
from locas_ext.learning.resume import saved_run
from locas_ext.storage import checkpoint, config_file

EXAMPLES = int(os.environ.get("LOCAS_FUZZ_EXAMPLES", 0))
FUZZ = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
FORMAT1 = Path(__file__).parents[1] / "data" / "format1"
SOURCES = ("format 2", "glu_stopped", "written_stopped")

numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 1e30, 1e308, -0.0, 0.5]),
    st.integers(-3, 100),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "cut", "insert", "repeat"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)
changes = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "add", "swap"]), st.integers(0, 10**6), values), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def sources(saved):
    """Per source the bytes of its two files."""
    folders = {"format 2": saved[0], **{name: FORMAT1 / name for name in SOURCES[1:]}}
    return {name: {file: (folder / file).read_bytes() for file in (CONFIG, MEMORY)} for name, folder in folders.items()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def damaged(content, damages):
    for kind, where, byte in damages:
        place = int(where * len(content))
        before, after = content[:place], content[place:]
        if kind == "cut":
            content = before
        elif kind == "insert":
            content = before + bytes([byte]) * (1 + byte % 9) + after
        elif kind == "repeat":
            content = before + after[: byte + 1] + after
        elif after:
            content = before + bytes([after[0] ^ (1 << byte % 8) if kind == "flip" else byte]) + after[1:]
    return content


def holders(value):
    """Every object and list within a value, itself too."""
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from holders(item)


def change(value, changes):
    """Puts other values in the place of some, anywhere inside."""
    for kind, draw, new in changes:
        inside = [holder for holder in holders(value) if holder]
        if not inside:
            return
        holder = inside[draw % len(inside)]
        keys = sorted(holder, key=str) if isinstance(holder, dict) else list(range(len(holder)))
        key, other = keys[draw // 7 % len(keys)], keys[draw // 11 % len(keys)]
        if kind == "put":
            holder[key] = new
        elif kind == "drop":
            del holder[key]
        elif kind == "swap":
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(holder, dict):
            holder[str(new)[:9]] = new
        else:
            holder.append(new)


def mended(record, memory):
    """The config's bytes with both checksums right, as whoever wants harm would write them."""
    record["memory_sha256"] = config_file.digest(memory)
    record.pop("config_sha256", None)
    return json.dumps({**record, "config_sha256": config_file._own_digest(record)}).encode()


def read(scratch, config, memory):
    """Reads the folder, and takes up the run that it may hold."""
    (scratch / CONFIG).write_bytes(config)
    (scratch / MEMORY).write_bytes(memory)
    for reader in (checkpoint.read, saved_run):
        try:
            reader(scratch)
        except (locas.LocasError, FileNotFoundError) as error:
            assert str(error).isprintable() and len(str(error)) < 1000
    try:
        saved = checkpoint.read(scratch)
    except locas.LocasError:
        return
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert saved.tensors["slots"].shape[0] == len(saved.config.layers) and saved.texts is not None


@pytest.mark.parametrize("source", SOURCES)
@FUZZ
@given(file=st.sampled_from([CONFIG, MEMORY]), damages=damages)
def test_bytes(sources, scratch, source, file, damages):
    content = dict(sources[source])
    content[file] = damaged(content[file], damages)
    read(scratch, content[CONFIG], content[MEMORY])


@pytest.mark.parametrize("source", SOURCES)
@FUZZ
@given(changes=changes)
def test_fields_with_right_checksums(sources, scratch, source, changes):
    record = json.loads(sources[source][CONFIG])
    change(record, changes)
    read(scratch, mended(record, sources[source][MEMORY]), sources[source][MEMORY])


@pytest.mark.parametrize("source", SOURCES)
@FUZZ
@given(changes=changes, damages=st.none() | damages, length=st.none() | st.integers(0, 2**64 - 1))
def test_headers_with_right_checksums(sources, scratch, source, changes, damages, length):
    memory = sources[source][MEMORY]
    size = struct.unpack("<Q", memory[:8])[0]
    header, data = json.loads(memory[8 : 8 + size]), memory[8 + size :]
    change(header, changes)
    text = json.dumps(header).encode()
    if damages is not None:
        text = damaged(text, damages)
    memory = struct.pack("<Q", len(text) if length is None else length) + text + data
    read(scratch, mended(json.loads(sources[source][CONFIG]), memory), memory)


@pytest.mark.parametrize("source", SOURCES)
@FUZZ
@given(
    name=st.sampled_from(["slots", "scale", "step", "exp_avg", "value_gram"]),
    bits=st.integers(0, 2**32 - 1),
    place=st.integers(0, 10**6),
)
def test_numbers_with_right_checksums(sources, scratch, source, name, bits, place):
    """Any bit pattern as a number in a tensor."""
    tensors = {name: tensor.clone() for name, tensor in load(sources[source][MEMORY]).items()}
    if name not in tensors:
        return
    flat = tensors[name].view(-1)
    flat.view(torch.int32)[place % flat.view(torch.int32).numel()] = struct.unpack("<i", struct.pack("<I", bits))[0]
    memory = save(tensors)
    read(scratch, mended(json.loads(sources[source][CONFIG]), memory), memory)
