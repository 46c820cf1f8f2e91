"""Text that a host writes, many prompts at once."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_TRIED = 16  # prompts that are written after to see how long it takes
_TOGETHER = 1 << 16  # tokens of prompts that are answered together, what is written included


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    seed: int,
    temperature: float = 0.0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What the model goes on with after each prompt, up to its end of text or `new_tokens` tokens.

    temperature: 0: the likeliest token each time; else drawn among the likeliest that make up 0.95
    seed: of the draws; those of anybody else are not disturbed
    advance: told how many more prompts are answered
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    result, start = [""] * len(prompts), 0
    while start < len(order):
        size = _fitting([len(prompts[index]) for index in order[start:]], new_tokens)
        batch = order[start : start + size]
        texts = _batch(model, tokenizer, [prompts[index] for index in batch], new_tokens, seed + start, temperature)
        for index, text in zip(batch, texts, strict=True):
            result[index] = text
        advance(len(batch))
        start += size
    return result


def ends_of(model: Any, tokenizer: Any) -> list[int] | None:
    """The tokens that end an answer: the model's own and the tokenizer's; None if neither names one."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ends if token is not None)) or None


def seconds_to_write(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int) -> float:
    """About how long `write` takes for these prompts, from a few tokens after some of them."""
    if not prompts:
        return 0.0
    some = sorted(prompts, key=len)[len(prompts) // 2 :][:_TRIED] or list(prompts[:_TRIED])
    times = []
    for count in (1, 1, 5):  # the first one warms up
        started = time.perf_counter()
        write(model, tokenizer, some, count, seed, temperature=1.0)
        times.append(time.perf_counter() - started)
    token = max(0.0, times[2] - times[1]) / 4
    batches = max(1.0, sum(len(prompt) + new_tokens for prompt in prompts) / _TOGETHER)
    # reading costs by the prompt, writing by the batch where a device is not yet busy, by the prompt where it is
    reading = (times[1] - token) * len(prompts) / len(some)
    busy = len(prompts) / len(some) if model.device.type == "cpu" else batches
    return reading + token * new_tokens * busy


def _fitting(lengths: list[int], new_tokens: int) -> int:
    """How many prompts, from the shortest on, fit together."""
    count = 1
    while count < len(lengths) and (count + 1) * (lengths[count] + new_tokens) <= _TOGETHER:
        count += 1
    return count


def _batch(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], new_tokens: int, seed: int, temperature: float
) -> list[str]:
    width = max(map(len, prompts))
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            pad_token_id=padding,
            eos_token_id=ends_of(model, tokenizer),
            **sampling,
        )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output[:, width:].tolist()]
