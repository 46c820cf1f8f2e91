"""locas_config.json: the table of what it holds, read strictly and written.

Whatever the bytes are, `parse` returns a record that the table describes or raises LocasError.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from locas_ext.checks import MOST_COUNT, MOST_SIZE
from locas_ext.config import BACKENDS, INITS, MOST_CLIP, MOST_SCALE, ROW_LENGTHS, VARIANTS, LocasConfig
from locas_ext.errors import LocasError
from locas_ext.state.stream import Stream

from .schema import Wrong, boolean, either, integer, list_of, matching, nullable, number, one_of, record, short, text

FORMAT_VERSION = 2
MOST_BYTES = 2**28  # the chunks of some two million; more is not one of ours

# ---- the table -------------------------------------------------------------------------------------------------
_SIZE = integer(1, MOST_SIZE)
_COUNT = integer(0, MOST_COUNT)
_SHA256 = matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")
_TIME = matching(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "a time in UTC such as 2026-01-31T12:00:00+00:00")
_SAMPLES = matching("[A-Za-z0-9+/]{342}==", "64 float32 numbers in base64")
_FLOAT = number(-sys.float_info.max, sys.float_info.max)

_CONFIG = {
    "variant": one_of(*VARIANTS),
    "rank": _SIZE,
    "layers": nullable(list_of(integer(-(2**31), MOST_SIZE))),
    "init": one_of(*INITS),
    "scale": either(matching(r"paper|host|[0-9.]{1,100}x", "'paper', '16x', 'host'"), number(-MOST_SCALE, MOST_SCALE)),
    "clip": either(boolean, number(0, MOST_CLIP)),
    "backend": one_of(*BACKENDS),
    "seed": integer(-(2**63), 2**64 - 1),
}
_CONFIG_LATER = {"row_length": one_of(*ROW_LENGTHS)}  # where it is not the paper's
_SIZES = {"model_type": text, "hidden_size": _SIZE, "intermediate_size": _SIZE, "num_hidden_layers": _SIZE}
_WRITE = {
    "epsilon": number(0, 3.5e38),
    "tokens": either(
        one_of("all"),
        _SIZE,  # format 1's top_loss
        _FLOAT,  # format 1's loss_above
        record({"loss_above": _FLOAT}),
        record({"top_loss": _SIZE}),
    ),
    "capacity": nullable(_SIZE),
    "when_full": one_of("error", "drop_oldest", "compress"),
    "compress_to": nullable(_SIZE),
}
_SETTINGS = {
    "window": integer(2, MOST_SIZE),
    "stride": _SIZE,
    "learning_rate": number(0, sys.float_info.max),
    "epochs": integer(1, MOST_COUNT),
    "optimizer": one_of("adamw", "sgd", "shampoo"),
    "update": one_of("backprop", "write"),
    "context_gradient": boolean,
    "bos": boolean,
    "write": nullable(record(_WRITE)),
}
_RATE = number(0, sys.float_info.max)
_BACKPROP = {  # where they are not the paper's
    "gate_learning_rate": _RATE,
    "value_learning_rate": _RATE,
    "decay_after": integer(1, MOST_COUNT),
    "cautious": boolean,
}
_TEXTS = {"texts": integer(2, MOST_SIZE)}  # where several are learned at once only
_DTYPE = {"dtype": matching("[a-z0-9_]{1,32}", "a dtype such as bfloat16")}  # the host's; earlier versions do not say it
_CONTEXT = {
    "context": record({"sinks": _COUNT, "refresh_every": nullable(integer(1, MOST_COUNT))})
}  # beside a kept context only
_ROOM = {"first": integer(0, MOST_SIZE), "latest": integer(0, MOST_SIZE)}
_KEPT = {
    "kept": record(
        {"seen": _COUNT, "held": _COUNT, "head": list_of(integer(0, 2**63 - 1)), "rooms": list_of(record(_ROOM))},
    )
}
_CHUNK = {"start": _COUNT, "end": _COUNT, "tokens": _COUNT, "nll": _FLOAT, "memory_version": _COUNT}
_STREAM = {"settings": record(_SETTINGS), "position": _COUNT, "text_digest": _SHA256, "chunks": list_of(record(_CHUNK))}
_TAIL = nullable(list_of(integer(0, 2**63 - 1)))
_TEXT = {"title": nullable(text), "digest": _SHA256, "tokens": _COUNT, "learned_at": _TIME}
_FILE = {
    "format_version": one_of(1, 2),
    "locas_ext_version": text,
    "config": record(_CONFIG, _CONFIG_LATER),
    "layers": list_of(integer(0, MOST_SIZE)),
    "memory_version": _COUNT,
    "initialized": boolean,
    "slots_used": integer(0, MOST_SIZE),
    "tokens_seen": _COUNT,
    "memory_sha256": _SHA256,
    "config_sha256": _SHA256,
}
_SETTINGS2 = record(_SETTINGS, {**_CONTEXT, **_TEXTS, **_BACKPROP, **_DTYPE})
_STREAM2 = record({**_STREAM, "settings": _SETTINGS2, "tail": _TAIL}, _KEPT)
_FORMATS = {
    1: record(
        {
            **_FILE,
            "host": record({**_SIZES, "vocab_size": _SIZE, "weights_sha256": _SHA256}),
            "stream": nullable(record(_STREAM)),
        }
    ),
    2: record(
        {
            **_FILE,
            "host": record({**_SIZES, "samples": list_of(_SAMPLES)}),
            "stream": nullable(_STREAM2),
            "texts": list_of(record(_TEXT)),
            "created_at": _TIME,
        },
        {"other_streams": list_of(_STREAM2)},
    ),
}


# ---- what no single field can say ------------------------------------------------------------------------------
def _check_slots(fields: dict) -> None:
    config, layers, count = fields["config"], fields["layers"], fields["host"]["num_hidden_layers"]
    if not layers or layers != sorted(set(layers)) or layers[-1] >= count:
        raise Wrong(f"layers is {short(layers)}; expected ascending indices of the host's {count} layers")
    named = config["layers"]
    samples = fields["host"].get("samples")
    if samples is not None and not len(layers) <= len(samples) <= count:
        raise Wrong(f"host.samples has {len(samples)} entries; expected one for each of {count} layers that has an FFN")
    if named is None:  # every layer that has an FFN
        everywhere = len(layers) == (count if samples is None else len(samples))
    else:
        everywhere = sorted(index % count for index in named) == layers
    if not everywhere:
        raise Wrong(f"layers is {short(layers)}; expected those that config.layers names")
    used, rank = fields["slots_used"], config["rank"]
    if config["variant"] == "glu" and used not in (0, rank):
        raise Wrong(f"slots_used is {used}; expected 0 or {rank}, the rank")
    if fields["initialized"] != (used > 0):
        raise Wrong(f"initialized is {fields['initialized']}, but slots_used is {used}")


def _check_streams(fields: dict) -> None:
    first, others = fields["stream"], fields.get("other_streams", [])
    if first is None:
        if others:
            raise Wrong("other_streams is there without stream; expected both or neither")
        return
    _check_stream(first, fields["tokens_seen"])
    if len(others) + 1 != first["settings"].get("texts", 1):
        raise Wrong(f"other_streams has {len(others)} entries; expected one for each text but the first")
    if others and "context" in first["settings"]:
        raise Wrong("other_streams is there with stream.settings.context; expected one text where a context is kept")
    for stream in others:
        if stream["settings"] != first["settings"]:
            raise Wrong("other_streams has settings of another run; expected those of stream")
        _check_stream(stream, stream["position"])


def _check_stream(stream: dict, seen: int) -> None:
    end = min(1, stream["chunks"][0]["start"] if stream["chunks"] else 0)  # a first chunk of one token scores nothing
    for index, chunk in enumerate(stream["chunks"]):
        start, end_before, end = chunk["start"], end, chunk["end"]
        if start != end_before or end <= start or chunk["tokens"] != end - max(start, 1):
            raise Wrong(f"stream.chunks[{index}] does not begin where the one before it ends, or counts its tokens wrongly")
    if not stream["position"] == end == seen:
        raise Wrong(f"stream.position is {stream['position']}, but the chunks end at {end}, tokens_seen {seen}")
    if len(stream.get("tail") or ()) > stream["position"]:
        raise Wrong(f"stream.tail has {len(stream['tail'])} tokens; expected at most {stream['position']}, those read")
    _check_kept(stream)


def _check_kept(stream: dict) -> None:
    settings, kept = stream["settings"], stream.get("kept")
    if (kept is None) != ("context" not in settings):
        raise Wrong("stream.kept is there without settings.context, or this without it; expected both or neither")
    if kept is None:
        return
    seen = stream["position"] - 1 + settings["bos"]
    if kept["seen"] != seen or kept["held"] > seen:
        raise Wrong(f"stream.kept is of {kept['seen']} inputs and holds {kept['held']}; expected {seen} and at most so many")
    first = max((room["first"] for room in kept["rooms"]), default=0)
    if not kept["rooms"] or first > settings["context"]["sinks"] or len(kept["head"]) != min(first, seen):
        raise Wrong(
            f"stream.kept has a head of {len(kept['head'])} tokens; expected one for each of the text's first inputs kept"
        )


def check(fields: Any) -> None:
    """Wrong if this is not a memory's record."""
    version = fields.get("format_version")
    _FORMATS[version if type(version) is int and version in _FORMATS else FORMAT_VERSION](fields, "")
    _check_slots(fields)
    _check_streams(fields)
    try:
        config_of(fields)
    except (TypeError, ValueError) as error:
        raise Wrong(f"config: {error}") from None


# ---- bytes -----------------------------------------------------------------------------------------------------
def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_digest(fields: dict) -> str:
    checked = {name: value for name, value in fields.items() if name != "config_sha256"}
    return digest(json.dumps(checked, sort_keys=True).encode())


def _object(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def strict_json(content: bytes) -> Any:
    """Parsed JSON; ValueError for anything else, for keys that come twice, NaN, Infinity and senseless nesting."""
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse(content: bytes, file: Path) -> dict:
    """The record in the bytes of `file`, which is for messages. LocasError for anything that is none."""
    try:
        fields = strict_json(content)
    except ValueError as error:
        raise LocasError(f"{file} is damaged: not valid JSON ({error})") from None
    if type(fields) is not dict or "format_version" not in fields:
        raise LocasError(f"{file} is damaged: it has no format_version")
    version = fields["format_version"]
    if type(version) is not int or version not in _FORMATS:
        raise LocasError(f"{file} has format version {short(version)}; this version of locas_ext reads 1 and {FORMAT_VERSION}")
    try:
        if fields.get("config_sha256") != _own_digest(fields):
            raise LocasError(f"{file} is damaged: its checksum does not match its content")
        check(fields)
    except Wrong as error:
        raise LocasError(f"{file} does not describe a memory: {error}") from None
    except RecursionError:
        raise LocasError(f"{file} is damaged: it is nested too deeply") from None
    return fields


def serialize(fields: dict) -> bytes:
    """The file's bytes, for a record without its own checksum. Wrong if `parse` would not take them."""
    try:
        fields = {**fields, "config_sha256": _own_digest(fields)}
    except TypeError as error:  # what JSON has no form for
        raise Wrong(str(error)) from None
    check(fields)
    content = json.dumps(fields, indent=1).encode()
    if len(content) > MOST_BYTES:
        raise Wrong(f"its description takes {len(content)} bytes; expected at most {MOST_BYTES}")
    return content


# ---- what is in a record ---------------------------------------------------------------------------------------
def config_record(config: LocasConfig) -> dict:
    """A config as a file holds it: without what an earlier version does not know where that is as it was then."""
    fields, absent = config.to_dict(), LocasConfig.paper()
    return {name: value for name, value in fields.items() if name in _CONFIG or value != getattr(absent, name)}


def config_of(fields: dict) -> LocasConfig:
    """With its layers spelled out."""
    return LocasConfig.paper(**{**fields["config"], "layers": fields["layers"]})


def stream_of(fields: dict, tensors: Mapping[str, Tensor]) -> Stream | None:
    """The first one, which knows the others. tensors: those of the file beside, which hold what a run keeps of its context"""
    if not fields["stream"]:
        return None
    stream, *others = [Stream.from_dict(each, tensors) for each in (fields["stream"], *fields.get("other_streams", []))]
    if others:
        stream.ranks = [replace(stream), *others]
    return stream
