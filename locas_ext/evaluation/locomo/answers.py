"""Greedy answers to many questions that share a context, which is read only once."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from locas_ext.hosts.cache_names import cache_argument, returned_cache

from .data import Dialogue
from .prompts import dialogue_text, question_text


@dataclass(frozen=True)
class Prompts:
    """A dialogue's prompts as token ids.

    context: [n], what all questions continue; n may be 0
    questions: one [m] each
    cut_tokens: by how much the context is shorter than with the whole dialogue
    """

    context: Tensor
    questions: list[Tensor]
    cut_tokens: int


def token_ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer itself begins a text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def make_prompts(tokenizer, dialogue: Dialogue, with_context: bool, positions: int, max_new_tokens: int) -> Prompts:
    """The dialogue (or nothing) as context, and its questions, each encoded apart so that they share it token by token.

    A context that does not fit into the model's `positions` with the longest question and answer loses its earliest
    turns. ValueError if not even the question fits.
    """
    start = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    questions = [token_ids(tokenizer, question_text(dialogue, question)) for question in dialogue.questions]
    room = positions - max_new_tokens - max(map(len, questions)) - len(start)
    if room < 0:
        raise ValueError(
            f"the model has {positions} positions, but the longest question of dialogue {dialogue.name} and an answer "
            f"take {positions - room}; choose a smaller --max-new-tokens (now {max_new_tokens}) or another model"
        )
    whole = token_ids(tokenizer, dialogue_text(dialogue)) if with_context else torch.tensor([], dtype=torch.long)
    context = whole if len(whole) <= room else _latest_turns(tokenizer, dialogue, room)
    return Prompts(torch.cat([torch.tensor(start, dtype=torch.long), context]), questions, len(whole) - len(context))


def _latest_turns(tokenizer, dialogue: Dialogue, room: int) -> Tensor:
    """As many of the last turns as fit into `room` tokens, by bisection; nothing if even their heading does not."""
    low, high = 0, sum(len(session.turns) for session in dialogue.sessions)
    best = token_ids(tokenizer, dialogue_text(dialogue, skip=high))
    if len(best) > room:
        return best[:0]
    while high - low > 1:  # `low` skipped turns are too few, `high` are enough
        middle = (low + high) // 2
        ids = token_ids(tokenizer, dialogue_text(dialogue, skip=middle))
        low, high, best = (middle, high, best) if len(ids) > room else (low, middle, ids)
    return best


@torch.inference_mode()
def answer(
    model, tokenizer, prompts: Prompts, max_new_tokens: int, batch_size: int, callback: Callable[[int, int], None]
) -> list[str]:
    """The likeliest continuation of each question, token by token, up to the end of its first line that is not blank.

    The context's KV cache is made here, so with a memory attached it is that of the memory as it is now. Questions of
    one length run together, `batch_size` at a time, each on a copy of the cache: without padding, so that nothing but
    a batch's rounding sets them apart from one at a time.

    callback: called after each batch with the number of questions and of tokens written
    """
    cache = None
    if len(prompts.context):
        inputs = prompts.context[None].to(model.device)
        cache = returned_cache(model(input_ids=inputs, use_cache=True, logits_to_keep=1))
    answers = [""] * len(prompts.questions)
    for batch in _batches(prompts.questions, batch_size):
        inputs = torch.stack([prompts.questions[index] for index in batch]).to(model.device)
        lines = _continue(model, tokenizer, inputs, copies(cache, len(batch)), max_new_tokens)
        for index, (line, _) in zip(batch, lines, strict=True):
            answers[index] = line
        callback(len(batch), sum(tokens for _, tokens in lines))
    return answers


def _batches(questions: list[Tensor], size: int) -> list[list[int]]:
    """Indices of questions of one length, at most `size` together."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(questions):
        by_length.setdefault(len(ids), []).append(index)
    return [group[i : i + size] for _, group in sorted(by_length.items()) for i in range(0, len(group), size)]


def copies(cache, count: int):
    """A copy of a KV cache of one text for `count` of them."""
    if cache is None:
        return None
    copied = copy.deepcopy(cache)
    if count > 1:
        copied.batch_repeat_interleave(count)
    return copied


def _continue(model, tokenizer, inputs: Tensor, cache, max_new_tokens: int) -> list[tuple[str, int]]:
    """For each of inputs [b, m]: its line, and the number of tokens written until that ended."""
    ends = _end_tokens(model, tokenizer)
    written: list[list[int]] = [[] for _ in range(len(inputs))]
    running = set(range(len(inputs)))
    for _ in range(max_new_tokens):
        output = model(input_ids=inputs, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        cache, inputs = returned_cache(output), output.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in enumerate(inputs[:, 0].tolist()):
            if row in running:
                written[row].append(token)
                if token in ends or "\n" in _text(tokenizer, written[row]).lstrip():
                    running.discard(row)
        if not running:
            break
    return [(_first_line(_text(tokenizer, tokens)), len(tokens)) for tokens in written]


def _end_tokens(model, tokenizer) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _text(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
