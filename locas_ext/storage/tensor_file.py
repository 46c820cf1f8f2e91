"""locas_memory.safetensors: the table of what it holds; its header is compared with the record before a tensor is read."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from locas_ext.checks import MOST_FLOAT32
from locas_ext.config import MOST_SCALE, MOST_SLOT
from locas_ext.errors import LocasError
from locas_ext.state.kept_rows import row_counts
from locas_ext.state.planes import PLANES

from .config_file import digest, strict_json
from .schema import Wrong, integer, list_of, record, short, text

_MOST_HEADER_BYTES = 2**16
_ENTRY = record({"dtype": text, "shape": list_of(integer(0, 2**53)), "data_offsets": list_of(integer(0, 2**63))})
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass(frozen=True)
class _Tensor:
    # "slot": [L, planes, r, d]; "length": [L, planes, r, 1]; "pair": [L, r, r]; "layer": [L]; "memory": [];
    # "row": [heads, rows, size] kept
    per: str
    low: float
    high: float
    dtype: torch.dtype | None = torch.float32  # None: any of floating point


_TENSORS = {
    "slots": _Tensor("slot", -MOST_SLOT, MOST_SLOT),  # rows are of length 1 or less when clipped
    "scale": _Tensor("layer", -MOST_SCALE, MOST_SCALE),
    "step": _Tensor("memory", 0, 2**53, torch.int64),
    "exp_avg": _Tensor("slot", -MOST_FLOAT32, MOST_FLOAT32),
    "exp_avg_sq": _Tensor("slot", 0, MOST_FLOAT32),
    "momentum_buffer": _Tensor("slot", -MOST_FLOAT32, MOST_FLOAT32),
    "value_gram": _Tensor("pair", -MOST_FLOAT32, MOST_FLOAT32),
    "lengths": _Tensor("length", 0, MOST_FLOAT32),  # where a study has made rows longer than the clip
}
OF_MEMORY = tuple(_TENSORS)
_REQUIRED = ("slots", "scale")
_ROWS = _Tensor("row", -torch.finfo(torch.float64).max, torch.finfo(torch.float64).max, None)


def _rows_in(fields: dict) -> dict[str, tuple[int, int]]:
    """The tensors of a kept context that a record describes, and their rows (`row_counts`)."""
    kept = (fields.get("stream") or {}).get("kept")
    return row_counts(kept) if kept else {}


def slots_shape(fields: dict) -> tuple[int, int, int, int]:
    """[L, planes, r, d] of the slots that a record describes."""
    config, used = fields["config"], fields["slots_used"]
    rows = used if config["variant"] == "mlp" and used else config["rank"]
    return len(fields["layers"]), PLANES[config["variant"]], rows, fields["host"]["hidden_size"]


# ---- what is in it ---------------------------------------------------------------------------------------------
def _check_names(names: Sequence[str], fields: dict) -> None:
    rows = _rows_in(fields)
    if missing := [name for name in (*_REQUIRED, *rows) if name not in names]:
        raise Wrong(f"it lacks {', '.join(missing)}")
    unknown = [name for name in names if name not in _TENSORS and name not in rows]
    if extra := [name if name.isidentifier() else short(name) for name in unknown]:
        raise Wrong(f"it holds unknown tensors: {', '.join(extra)}")


def _check_form(name: str, dtype: torch.dtype | str, shape: Sequence[int], fields: dict) -> None:
    if name not in _TENSORS:
        rows, floats = sum(_rows_in(fields)[name]), [dtype for dtype in _DTYPES.values() if dtype.is_floating_point]
        if dtype not in floats or len(shape) != 3 or shape[1] != rows or 0 in shape:
            raise Wrong(f"{name} is {dtype} {short(list(shape))}; expected floating point [heads, {rows}, size]")
        return
    known, (layers, planes, rows, d) = _TENSORS[name], slots_shape(fields)
    shapes = {
        "slot": [layers, planes, rows, d],
        "length": [layers, planes, rows, 1],
        "pair": [layers, rows, rows],
        "layer": [layers],
        "memory": [],
    }
    expected = shapes[known.per]
    if dtype != known.dtype or list(shape) != expected:
        raise Wrong(f"{name} is {dtype} {short(list(shape))}; expected {known.dtype} {expected}")


def check_values(tensors: dict[str, Tensor], layers: Sequence[int]) -> None:
    """Wrong for the first number that is not finite or out of its tensor's range; it names tensor and layer."""
    for name, tensor in tensors.items():
        known = _TENSORS.get(name, _ROWS)
        whole = known.per in ("memory", "row")
        per_layer = [tensor] if whole else tensor
        for index, part in enumerate(per_layer):
            low, high = (bound.item() for bound in part.aminmax())
            if known.low <= low and high <= known.high:  # false for NaN, which aminmax hands on
                continue
            where = "" if whole else f", in layer {layers[index]}"
            if not (math.isfinite(low) and math.isfinite(high)):
                raise Wrong(f"{name} holds numbers that are not finite{where}")
            worst = low if low < known.low else high
            raise Wrong(f"{name} holds {worst:g}{where}; expected {known.low:g} to {known.high:g}")


def serialize(tensors: dict[str, Tensor], fields: dict) -> bytes:
    """The file's bytes. Wrong if `read` would not take them with this record."""
    _check_names(list(tensors), fields)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        _check_form(name, tensor.dtype, tensor.shape, fields)
    check_values(plain, fields["layers"])
    return serialize_tensors(plain)


# ---- reading ---------------------------------------------------------------------------------------------------
def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and how many bytes of data are behind it."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        raise Wrong(f"it has {size} bytes and no header of a memory")
    try:
        header = strict_json(file.read(length))
    except ValueError as error:
        raise Wrong(f"its header is not valid JSON ({error})") from None
    if type(header) is not dict:
        raise Wrong("its header is not an object")
    return header, size - 8 - length


def _check_header(header: dict[str, Any], data: int, fields: dict) -> None:
    """Every tensor has its dtype and shape, and together they are the file, byte by byte."""
    _check_names(list(header), fields)
    for name in sorted(header, key=[*_TENSORS, *_rows_in(fields)].index):  # the slots first
        entry = header[name]
        _ENTRY(entry, name)
        _check_form(name, _DTYPES.get(entry["dtype"], short(entry["dtype"])), entry["shape"], fields)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
        if entry["data_offsets"] != [end, end + size]:
            raise Wrong(f"{name}.data_offsets is {short(entry['data_offsets'])}; expected [{end}, {end + size}]")
        end += size
    if end != data:
        raise Wrong(f"its tensors take {end} bytes, but it holds {data}")


def read(path: Path, file: BinaryIO, status: os.stat_result, fields: dict) -> dict[str, Tensor]:
    """The tensors in an opened file that belong to a record; LocasError, which names `path`, if they do not."""
    try:
        header, data = _read_header(file, status.st_size)
        _check_header(header, data, fields)
        file.seek(0)
        content = file.read(status.st_size)
        if digest(content) != fields["memory_sha256"]:
            raise Wrong("its checksum is not the one in the config it was written with")
        tensors = parse_tensors(content)
        check_values(tensors, fields["layers"])
        return tensors
    except (Wrong, SafetensorError) as error:
        raise LocasError(f"{path} is damaged: {error}") from None
