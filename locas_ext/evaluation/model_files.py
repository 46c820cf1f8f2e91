"""What a model's files must be before transformers is asked to load them: no code of its own, sizes that can be true."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from locas_ext.errors import LocasError
from locas_ext.storage.schema import Wrong, either, integer, list_of, nullable

from .display import one_line
from .hub import CONFIG, hub_file
from .json_files import read_json
from .schemas import json_object

_MOST_BYTES = 1 << 25
_LAYERS = nullable(integer(0, 1000))
_WIDTH = nullable(either(list_of(integer(0, 1 << 20)), integer(0, 1 << 20)))
_COUNT = nullable(integer(0, 1 << 24))
# By the names that the model families give their sizes, wherever in config.json they stand.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), _LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "head_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), _WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _WIDTH),
    "vocab_size": _COUNT,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), nullable(integer(0, 1 << 40))),
}
_WEIGHTS = ("*.safetensors", "*.bin")


def check_config_files(model: str, from_cache: bool) -> None:
    """Reads config.json and tokenizer_config.json of a folder or a model on the hub.

    Raises FileNotFoundError where there is no config.json, LocasError, naming the file, for one that is damaged, has
    sizes that no model has or wants to run code of its own.
    """
    for name in (CONFIG, "tokenizer_config.json"):
        file = Path(model) / name if Path(model).is_dir() else hub_file(model, name, from_cache)
        if file is None or not file.exists():
            if name == CONFIG:
                raise FileNotFoundError(f"--model: {model} holds no {CONFIG}; {_instead(Path(model))}")
            continue
        content = read_json(file, json_object, _MOST_BYTES)
        _refuse_code(file, content)
        try:
            _check_sizes(content, "")
        except Wrong as wrong:
            raise LocasError(f"{file}: {wrong}") from None


def _instead(folder: Path) -> str:
    """What a folder is that is not a model's."""
    if (folder / "locas_config.json").exists():
        return "it is a memory, which goes to --memory: expected the folder of its host"
    if (folder / "adapter_config.json").exists():
        return "it is an adapter: merge it into its base model, and give the merged model's folder"
    return "expected a model's folder as save_pretrained writes it"


def _refuse_code(file: Path, content: dict) -> None:
    """Many models of a family that transformers has by now still name code of their own: theirs is not needed."""
    wanted = content.get("auto_map")
    if wanted and not (_known_model(content) if file.name == CONFIG else _known_tokenizer(content)):
        classes = wanted.values() if isinstance(wanted, dict) else [wanted]
        names = ", ".join(one_line(name) for name in classes)
        raise LocasError(
            f"{file} asks to run Python code that comes with the model ({names}, named by auto_map), which is never done here: "
            "read that code, load the model in Python with trust_remote_code=True and attach a memory there"
        )


def _known_model(config: dict) -> bool:
    return config.get("model_type") in CONFIG_MAPPING_NAMES


def _known_tokenizer(config: dict) -> bool:
    name = config.get("tokenizer_class")
    return isinstance(name, str) and tokenizer_class_from_name(name) is not None


def _check_sizes(content: dict[str, Any], place: str) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _check_sizes(value, f"{place}{name}.")
        elif name in _SIZES:
            _SIZES[name](value, f"{place}{name}")


def check_weight_files(folder: Path, config) -> None:
    """LocasError if a folder's weights are missing, or so few that the sizes in its config.json cannot be theirs.

    transformers would make the missing ones up, and take the memory for them, before it says so.
    """
    held = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not held:
        raise LocasError(f"--model: {folder} holds no weights; expected model.safetensors or its parts")
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    per_byte = 16 if getattr(config, "quantization_config", None) else 2  # at most so many numbers
    if needed > per_byte * held:
        raise LocasError(
            f"--model: {folder / CONFIG} describes a model of {needed:,} parameters, but the weights beside it are "
            f"{held:,} bytes: they are not of one model"
        )
