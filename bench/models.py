"""The hosts of benchmarks that take a whole model: a checkpoint, or random weights in a known model's shape; also in 4 bit."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from locas_ext.evaluation.assets import MODEL


class Shape(NamedTuple):
    """A random Qwen3 host of a known model's shape, with that model's vocabulary."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512, True),  # of no model: to try a command on the CPU
    "135M": Shape(576, 1536, 30, 9, 3, 64, 49152, True),  # SmolLM2-135M
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, 151936, True),  # Qwen3
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128, 151936, True),
    "8B": Shape(4096, 12288, 36, 32, 8, 128, 151936, False),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--model, --shape and --load-in-4bit."""
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--shape", choices=SHAPES, help="a random Qwen3 host of this shape instead of --model")
    parser.add_argument("--load-in-4bit", action="store_true", help="linear layers but the LM head in NF4, by bitsandbytes")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the command where a host cannot be loaded as asked for."""
    if arguments.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--load-in-4bit needs the package bitsandbytes, which is not installed here")


def load(arguments: argparse.Namespace) -> Any:
    """A new copy of the host."""
    dtype = getattr(torch, arguments.dtype)
    in_4bit = getattr(arguments, "load_in_4bit", False)  # not every benchmark has the option
    if arguments.shape is not None:
        model = _random(SHAPES[arguments.shape], dtype, arguments.device)
        return _in_4bit(model) if in_4bit else model
    how = {}
    if in_4bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, local_files_only=True, **how)
    return model.to(arguments.device).eval()


def _random(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # an 8B host in float32 first would take twice the memory
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _in_4bit(model: Any) -> Any:
    """The same model with its linear layers but the LM head in 4 bit, one after another."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    for name, linear in linears:
        parent, _, own = name.rpartition(".")
        with torch.device("meta"):
            quantized = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, quant_type="nf4"
            )
        quantized.bias = linear.bias
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.weight = weight.to(linear.weight.device)
        setattr(model.get_submodule(parent), own, quantized)
        linear.weight = None
    return model
