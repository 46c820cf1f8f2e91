"""What Temp-LoRA learned, in a folder: peft's two files, adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from locas_ext.errors import LocasError
from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.schemas import fields
from locas_ext.storage.files import write_atomically
from locas_ext.storage.schema import integer, number, one_of

from .temp_lora import lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of peft's names
_CONFIG = fields(
    {"peft_type": one_of("LORA"), "r": integer(1, 1 << 20), "lora_alpha": number(1e-9, 1e9)},
    {"use_rslora": one_of(False, None), "use_dora": one_of(False, None)},
)


def _learned(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's parameters by peft's names in files; the model is inside a `lora` block."""
    return {
        _PREFIX + name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def save_lora(model: Any, rank: int, alpha: float, folder: Path) -> None:
    """Keeps what a model inside a `lora` block has learned; peft's `PeftModel.from_pretrained` reads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": "all-linear",
    }
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in _learned(model).items()}
    write_atomically(folder / TENSORS, save(tensors))
    write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())


def lora_digest(folder: Path) -> str:
    """SHA-256 over both files of a saved adapter."""
    return hashlib.sha256((folder / CONFIG).read_bytes() + (folder / TENSORS).read_bytes()).hexdigest()


@contextmanager
def saved_lora(model: Any, folder: Path) -> Iterator[None]:
    """Inside the block the model has a saved adapter; afterwards it is as before.

    Raises OSError for files that are not there, LocasError for others than `save_lora` wrote of such a model.
    """
    config = read_json(folder / CONFIG, _CONFIG)
    try:
        tensors = load((folder / TENSORS).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise LocasError(f"{folder / TENSORS} is damaged: {error}") from None
    # before room is made for such a rank
    if not tensors or any(config["r"] not in tensor.shape for tensor in tensors.values()):
        raise LocasError(f"{folder} is damaged: its tensors are not of rank {config['r']}, which {CONFIG} says")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise LocasError(f"{folder / TENSORS} is damaged: it holds numbers that are not finite")
    with lora(model, config["r"], config["lora_alpha"]):
        learned = _learned(model)
        if {name: list(t.shape) for name, t in tensors.items()} != {name: list(t.shape) for name, t in learned.items()}:
            raise LocasError(f"{folder} is an adapter of another model: its tensors are not those of rank {config['r']} here")
        for name, parameter in learned.items():
            parameter.copy_(tensors[name])
        yield
