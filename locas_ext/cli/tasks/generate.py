"""`locas generate`: text from a model with a memory attached."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from locas_ext import memory as locas
from locas_ext.errors import LocasError
from locas_ext.evaluation.inputs import load_host
from locas_ext.hosts.text_config import max_positions
from locas_ext.terminal import neutral


@dataclass(frozen=True, kw_only=True)
class GenerateTask:
    """The arguments of the command.

    memory: a memory folder; None: the host alone
    temperature: 0 takes the likeliest token each time
    """

    model: str
    memory: Path | None
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str | None
    device: str | None


_COLDEST = 1e-4  # below, the likeliest token is all that is drawn, and logits divided by less overflow


def sampling(temperature: float) -> dict[str, Any]:
    """How `generate` draws a token."""
    return {"do_sample": True, "temperature": temperature} if temperature >= _COLDEST else {"do_sample": False}


class Finite(LogitsProcessor):
    """LocasError for logits that hold no probabilities, which would be drawn from, or taken for the first token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.max() < math.inf:  # nor is NaN, which is the maximum of all that it is among
            raise LocasError("the model's logits are not finite: its weights, or the memory's slots, are too large or damaged")
        return scores


class Streamer(TextStreamer):
    """Shows what a model writes; a terminal does not obey it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(neutral(text), stream_end)


def run_generate(task: GenerateTask) -> str:
    """Prints the prompt and its continuation while it is made, and returns the continuation.

    Raises ValueError for an empty prompt or one that leaves no room, and what loading raises.
    """
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    inputs = tokenizer(task.prompt, return_tensors="pt", add_special_tokens=False).to(host.device)
    length, most = inputs["input_ids"].shape[1], max_positions(host)
    if length == 0:
        raise ValueError("--prompt is empty; expected some text to continue")
    if length + task.max_new_tokens > most:
        raise ValueError(
            f"--prompt is {length} tokens and --max-new-tokens {task.max_new_tokens}, but the model has {most} positions"
        )
    if task.memory is not None:
        locas.load(host, task.memory)
    torch.manual_seed(task.seed)
    with torch.inference_mode():
        output = host.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=task.max_new_tokens,
            streamer=Streamer(tokenizer, skip_special_tokens=True),
            logits_processor=LogitsProcessorList([Finite()]),
            **sampling(task.temperature),
        )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)
