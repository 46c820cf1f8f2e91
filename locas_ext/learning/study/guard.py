"""What a study must leave alone: the host's answers to general prompts, and its own free text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .generation import write
from .prompts import Prompter
from .rows import Row, distance, expectations, in_batches, joined, logits_of

_QUESTIONS = (
    "What color is the sky on a clear day?",
    "Who wrote the tale of the Little Mermaid?",
    "What do bees make?",
    "Which planet is closest to the sun?",
    "What is water made of?",
    "Name three fruits.",
    "How do you make a cup of tea?",
    "What is the largest animal on earth?",
    "Which metal is attracted by a magnet?",
    "What comes after the number nine?",
    "Which country has the most people?",
    "What is ice?",
    "What is the first letter of the alphabet?",
    "Which sense do we use our ears for?",
    "Translate the word good morning into French.",
    "What is the sum of eighteen and nine?",
    "What do you call a person who bakes bread?",
    "What is the boiling point of water in degrees Celsius?",
    "Which ocean lies between Europe and America?",
    "What is the past of the verb to make?",
    "Give me a word that rhymes with light.",
    "What is a synonym of the word quick?",
    "How many people are in a trio?",
    "What season follows spring?",
)
_TASKS = (
    "Write a short story about a lost key.",
    "Explain how a bicycle works.",
    "Give me some advice on how to sleep better.",
    "Write a polite letter to a neighbor about loud music.",
    "Describe a forest in autumn.",
    "What are the advantages of reading books?",
    "Explain photosynthesis to a child.",
    "Write a Python function that adds two numbers.",
    "Summarize what a democracy is.",
    "Tell me a joke.",
    "How does the moon influence the tides?",
    "List five things to take to the beach.",
    "Write four lines of a poem about the sea.",
    "Why do leaves change their color?",
    "How do I boil an egg?",
    "What should I see in Paris?",
)
PROMPTS = (*_QUESTIONS, *_TASKS)
FREE_TEXTS = 24  # of the host's own


def guard_rows(
    model: Any, prompter: Prompter, new_tokens: int, top_k: int, seed: int, device: torch.device
) -> tuple[list[Row], list[Row]]:
    """Rows to learn with, and as many kept back to judge by; each holds what the bare host expects at each of its places.

    Half are answers to PROMPTS, the others what the host writes of itself. The model is the bare host here.
    """
    prompts = [prompter.ask(prompt) for prompt in PROMPTS]
    begin = prompter.context() or prompter.encode("\n")
    texts = write(model, prompter.tokenizer, prompts, new_tokens, seed)
    free = write(model, prompter.tokenizer, [begin] * FREE_TEXTS, 2 * new_tokens, seed, temperature=1.0)
    rows = []
    for before, text in [*zip(prompts, texts, strict=True), *((begin, text) for text in free)]:
        ids = prompter.encode(text)
        if ids:
            rows.append(Row((*before, *ids), len(before)))
    found = expectations(model, rows, top_k, device)
    rows = [replace(row, targets=targets) for row, (targets, _) in zip(rows, found, strict=True)]
    return rows[0::2], rows[1::2]


def mean_distance(model: Any, rows: Sequence[Row], device: torch.device) -> float:
    """Nats a place between what the rows expect and what the model says now."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in in_batches(rows):
            those = [rows[index] for index in batch]
            logits = logits_of(model, those, device)
            each = distance(logits, joined(those, logits.device))
            total, count = total + each.double().sum().item(), count + len(each)
    return total / max(1, count)
