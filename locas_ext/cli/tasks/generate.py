"""`locas generate`: text from a model with a memory attached."""

from pathlib import Path

import torch
from transformers import TextStreamer, set_seed

from locas_ext import memory as locas
from locas_ext.evaluation.arguments import at_least
from locas_ext.evaluation.inputs import load_host
from locas_ext.hosts.text_config import max_positions


def run_generate(
    model: str,
    memory: Path | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    device: str | None,
) -> str:
    """Prints the continuation of `prompt` while it is made, and returns it.

    memory: a memory folder; None: the host alone. temperature: 0 takes the likeliest token each time.
    Raises ValueError for an empty prompt or numbers out of range, and what loading raises.
    """
    at_least(1, max_new_tokens=max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature is {temperature}; expected a number >= 0")
    host, tokenizer = load_host(model, dtype, device)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(host.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("--prompt is empty; expected some text to go on from")
    length, most = inputs["input_ids"].shape[1], max_positions(host)
    if length + max_new_tokens > most:
        raise ValueError(
            f"--prompt is {length} tokens and --max-new-tokens {max_new_tokens}, but the model has {most} positions"
        )
    if memory is not None:
        locas.load(host, memory)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        output = host.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
