"""Hosts from GGUF files, the format of llama.cpp: their weights dequantized, so that they are plain transformers models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from locas_ext.errors import LocasError

_MAGIC = b"GGUF"
# What says how large a model is, under its architecture's name, and the most that any has.
_SIZES = {"block_count": 1000, "embedding_length": 1 << 20, "feed_forward_length": 1 << 20, "expert_count": 1 << 16}


def is_gguf(model: str) -> bool:
    """Whether a model's name is a GGUF file's: by its first bytes, or else by its suffix."""
    file = Path(model)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC or file.suffix.lower() == ".gguf"


def load_gguf(model: str, dtype: torch.dtype) -> tuple[Any, Any, dict]:
    """A GGUF file's model on the CPU, its tokenizer, and what transformers says of the tensors it found, those of
    other shapes than the file states too.

    LocasError for a file that is damaged, or whose architecture transformers does not read.
    """
    file = Path(model)
    head_size = _check(file)
    place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    settings = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **place}
    if head_size is not None:  # which transformers leaves at its default for some architectures
        config = AutoConfig.from_pretrained(file.parent, **place)
        if hasattr(config, "head_dim"):
            config.head_dim = head_size
        settings["config"] = config
    with _no_bar():
        host, found = AutoModelForCausalLM.from_pretrained(file.parent, **settings)
    # What transformers notes of a file it has dequantized would keep the model from being saved.
    del host.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        host.__dict__.pop(name, None)
    return host, tokenizer, found


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar that transformers shows whatever its own switch says."""
    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


def _reader(file: Path) -> Any:
    with file.open("rb") as opened:
        if (begins := opened.read(len(_MAGIC))) != _MAGIC:
            raise LocasError(f"--model: {file} is no GGUF file: it begins with {begins!r}, not {_MAGIC!r}")
    try:
        from gguf import GGUFReader  # takes a second to import
    except ImportError:
        needs = "which needs the gguf package: pip install 'locas_ext[gguf]'"
        raise LocasError(f"--model: {file} is a GGUF file, {needs}") from None
    return GGUFReader(file)


def _check(file: Path) -> int | None:
    """The size of a head, where the file says it; LocasError for a file that no model can be loaded from."""
    try:
        reader = _reader(file)
        architecture = _value(reader, "general.architecture")
        sizes = {name: _value(reader, f"{architecture}.{name}") for name in _SIZES}
        head_size = _value(reader, f"{architecture}.attention.key_length")
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    except LocasError:
        raise
    except Exception as error:  # whatever the reader makes of a stranger's bytes
        words = " ".join(str(error).split())
        raise LocasError(f"--model: {file} is damaged or cut short: {type(error).__name__}: {words[:200]}") from None
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = f"which transformers does not read; expected one of {', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}"
        raise LocasError(f"--model: {file} is of the architecture {architecture!r}, {known}")
    for name, value in sizes.items():
        if not all(0 <= number <= _SIZES[name] for number in _numbers(value)):
            raise LocasError(f"--model: {file}: {architecture}.{name} is {value}; expected at most {_SIZES[name]}")
    if (size := file.stat().st_size) < end:
        raise LocasError(f"--model: {file} is cut short: it has {size} bytes, and its tensors end at byte {end}")
    return head_size


def _value(reader: Any, name: str) -> Any:
    """A setting of the file; None where it has none of this name."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _numbers(value: Any) -> list[int]:
    """One number, one per layer, or none."""
    return [] if value is None else [int(number) for number in value] if isinstance(value, list) else [int(value)]
