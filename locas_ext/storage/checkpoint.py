"""Saving and loading: locas_config.json and locas_memory.safetensors in one folder.

The config holds the SHA-256 of the tensor file, so neither can be damaged or mixed up unnoticed. A save replaces the two
files one after the other; between the two renames the previous tensor file is kept as locas_memory.safetensors.previous,
so that whatever moment a save is cut off at, the folder holds one complete memory, and `load` finds it.
"""

import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.hosts.fingerprint import fingerprint
from locas_ext.hosts.registry import Host
from locas_ext.state.arena import OPTIMIZER_STATES
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.stream import Stream, TextRecord
from locas_ext.version import __version__

from .files import write_atomically

FORMAT_VERSION = 1
CONFIG_NAME = "locas_config.json"
MEMORY_NAME = "locas_memory.safetensors"
PREVIOUS_NAME = MEMORY_NAME + ".previous"
_RECORD = {
    "format_version": int,
    "locas_ext_version": str,
    "config": dict,
    "layers": list,
    "host": dict,
    "memory_version": int,
    "initialized": bool,
    "slots_used": int,
    "tokens_seen": int,
    "stream": dict | None,
    "memory_sha256": str,
    "config_sha256": str,
}


# ---- which host ------------------------------------------------------------------------------------------------


# ---- writing ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """FileExistsError if `folder` holds something else than a memory; it need not exist."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder to save the memory in")
    ours = (folder / CONFIG_NAME).exists() or (folder / MEMORY_NAME).exists()
    foreign = next((entry.name for entry in folder.iterdir()), None)
    if foreign and not ours:
        raise FileExistsError(f"{folder} holds something else ({foreign}) and no memory; expected an empty or new folder")


def _keep_previous(folder: Path) -> None:
    """Keeps the tensor file that the config in the folder describes, until a new config is in place."""
    memory_file, previous = folder / MEMORY_NAME, folder / PREVIOUS_NAME
    if previous.exists():  # an earlier save was cut off; what it kept may be the only whole memory
        try:
            if _digest(previous.read_bytes()) == _read_record(folder)["memory_sha256"]:
                return
        except (FileNotFoundError, LocasError):
            pass
        previous.unlink()
    if memory_file.exists():
        try:
            os.link(memory_file, previous)
        except OSError:  # a file system without hard links
            shutil.copyfile(memory_file, previous)


def save(
    state: MemoryState,
    config: LocasConfig,
    host: Host,
    stream: Stream | None,
    texts: list[TextRecord],
    path: str | Path,
    optimizer: bool,
) -> None:
    """See `Memory.save_pretrained`."""
    folder = Path(path)
    state.sync()
    tensors = state.tensors(optimizer)
    content = serialize_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    record = {
        "format_version": FORMAT_VERSION,
        "locas_ext_version": __version__,
        "config": config.to_dict(),
        "layers": list(state.layers),
        "host": fingerprint(host),
        "memory_version": state.version,
        "initialized": state.initialized,
        "slots_used": state.used,
        "tokens_seen": stream.position if stream else 0,
        "stream": stream.to_dict() if stream and optimizer else None,
        "texts": [text.to_dict() for text in texts],
        "memory_sha256": _digest(content),
    }
    record["config_sha256"] = _record_digest(record)
    try:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _keep_previous(folder)
        write_atomically(folder / MEMORY_NAME, content)
        write_atomically(folder / CONFIG_NAME, json.dumps(record, indent=1).encode())
        (folder / PREVIOUS_NAME).unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # ours, and says it all
            raise
        place = str(error.filename or folder)  # a write to a full disk names no file
        raise type(error)(error.errno, f"cannot save the memory: {error.strerror}", place) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _record_digest(record: dict) -> str:
    checked = {name: value for name, value in record.items() if name != "config_sha256"}
    return _digest(json.dumps(checked, sort_keys=True).encode())


# ---- reading ---------------------------------------------------------------------------------------------------
def _read_record(path: str | Path) -> dict:
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with {CONFIG_NAME} and {MEMORY_NAME}")
    file = folder / CONFIG_NAME
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no memory: {CONFIG_NAME} is missing")
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise LocasError(f"{file} is damaged: not valid JSON ({error})") from None
    if not isinstance(record, dict) or "format_version" not in record:
        raise LocasError(f"{file} is damaged: it has no format_version")
    if record["format_version"] != FORMAT_VERSION:
        raise LocasError(
            f"{file} has format version {record['format_version']!r}; this version of locas_ext reads {FORMAT_VERSION}"
        )
    if record.get("config_sha256") != _record_digest(record):
        raise LocasError(f"{file} is damaged: its checksum does not match its content")
    if problem := _problem(record):
        raise LocasError(f"{file} does not describe a memory: {problem}")
    return record


def _problem(record: dict) -> str | None:
    """What is wrong with a record whose checksum is right, or None."""
    for name, kind in _RECORD.items():
        if name not in record:
            return f"{name} is missing"
        # `kind` may be a union; a bool is no int here
        if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):
            return f"{name} is {record[name]!r}"
    if not isinstance(record.get("texts", []), list):
        return f"texts is {record['texts']!r}"
    if extra := record.keys() - _RECORD.keys() - {"texts"}:
        return f"unknown keys {', '.join(sorted(extra))}"
    for name in ("memory_version", "slots_used"):
        if record[name] < 0:
            return f"{name} is {record[name]}"
    if missing := {field.name for field in fields(LocasConfig)} - record["config"].keys():
        return f"config lacks {', '.join(sorted(missing))}"
    try:
        _config(record)
        _stream(record)
        _texts(record)
    except (KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _config(record: dict) -> LocasConfig:
    return LocasConfig(**{**record["config"], "layers": record["layers"]})


def read_config(path: str | Path) -> LocasConfig:
    """The LocasConfig of a saved memory, with its layers spelled out."""
    return _config(_read_record(path))


def read_stream(path: str | Path) -> Stream | None:
    """The saved place in a text, or None."""
    return _stream(_read_record(path))


def _stream(record: dict) -> Stream | None:
    return Stream.from_dict(record["stream"]) if record["stream"] else None


def _texts(record: dict) -> list[TextRecord]:
    return [TextRecord(**text) for text in record.get("texts", [])]  # files before it was added have none


def _read_tensors(folder: Path, record: dict) -> dict[str, torch.Tensor]:
    expected = record["memory_sha256"]
    for name in (MEMORY_NAME, PREVIOUS_NAME):
        file = folder / name
        if not file.exists():
            continue
        content = file.read_bytes()
        if _digest(content) == expected:
            try:
                return parse_tensors(content)
            except SafetensorError as error:
                raise LocasError(f"{file} is damaged: {error}") from None
    if not (folder / MEMORY_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no memory: {MEMORY_NAME} is missing")
    raise LocasError(
        f"{folder / MEMORY_NAME} is damaged or not the one {CONFIG_NAME} was written with: its checksum does not match"
    )


def _short(value) -> str:
    """For a message: a hash needs no more than its beginning."""
    return repr(value[:12] + "..." if isinstance(value, str) and len(value) > 40 else value)


def load(state: MemoryState, config: LocasConfig, host: Host, path: str | Path) -> tuple[Stream | None, list[TextRecord]]:
    """See `Memory.load`. Everything is checked before the first change.

    Returns the saved place in a text, if any, and the texts that the memory has learned.
    """
    folder = Path(path)
    record = _read_record(folder)
    tensors = _read_tensors(folder, record)
    saved_host, attached_host = record["host"], fingerprint(host)
    different = [name for name in attached_host if saved_host.get(name) != attached_host[name]]
    if different:
        details = ", ".join(
            f"{name} {_short(saved_host.get(name))} there, {_short(attached_host[name])} here" for name in different
        )
        raise LocasError(f"{folder} is a memory of another host: {details}")
    if record["layers"] != list(state.layers):
        raise LocasError(f"{folder} has slots in layers {record['layers']}; attached are {list(state.layers)}")
    for name in ("variant", "rank"):
        mine = getattr(config, name)
        if record["config"][name] != mine:
            raise LocasError(f"{folder} has {name} {record['config'][name]!r}; attached is {mine!r}")
    allowed = {"slots", "scale", "step", *OPTIMIZER_STATES}
    if missing := {"slots", "scale"} - set(tensors):
        raise LocasError(f"{folder / MEMORY_NAME} lacks {', '.join(sorted(missing))}")
    if extra := set(tensors) - allowed:
        raise LocasError(f"{folder / MEMORY_NAME} holds unknown tensors: {', '.join(sorted(extra))}")
    rows = record["slots_used"] if state.grows and record["slots_used"] else state.rank
    slots_shape = torch.Size((len(state.layers), state.planes, rows, state.hidden_size))
    for name, tensor in tensors.items():
        shape = {"scale": slots_shape[:1], "step": torch.Size()}.get(name, slots_shape)
        dtype = torch.int64 if name == "step" else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype:
            raise LocasError(
                f"{folder / MEMORY_NAME}: {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise LocasError(f"{folder / MEMORY_NAME}: {name} holds numbers that are not finite")
    stream, texts = _stream(record), _texts(record)

    state.load(tensors, record["memory_version"], record["slots_used"])
    return stream, texts
