"""What a study must leave alone: the host's answers to general prompts, and its own free text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .generation import write
from .passages import sentences_of
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
_TOPICS = {
    "What is {}?": "gravity, a verb, an island, bronze, a bakery, the Internet, a thermometer, democracy, a volcano, yeast, an "
    "orchestra, a desert, oxygen, a triangle, a novel, the equator, a passport, rust, a lighthouse, inflation",
    "Who was {}?": "Isaac Newton, Cleopatra, Wolfgang Amadeus Mozart, Marie Curie, Julius Caesar, Charles Darwin, Vincent van "
    "Gogh, Mahatma Gandhi, Aristotle, Christopher Columbus",
    "Where is {}?": "the Eiffel Tower, Mount Fuji, the Amazon rainforest, the Great Wall, Big Ben, the Sahara, Venice, the "
    "Statue of Liberty, the Nile, Hawaii",
    "What is {} used for?": "a hammer, a compass, a telescope, a needle, salt, a calendar, a bridge, a microscope, soap, "
    "a ladder",
    "What color is {}?": "grass, snow, a ripe banana, blood, coal, an emerald, the sun, a carrot",
    "Name {}.": "a river in Asia, a famous painter, a musical instrument, a vegetable, a religion, a sport with a ball, a kind "
    "of tree, a planet, a currency, a chess piece",
    "What do you call {}?": "a place where books are lent, the father of your father, a person who flies a plane, a house made "
    "of ice, a doctor for teeth, the meal in the morning, frozen rain, a baby's bed",
    "Which is larger, {}?": "the moon or the earth, a mouse or a horse, a lake or a pond, Russia or Spain",
    "Is it true that {}?": "fish can breathe under water, the sun rises in the west, a spider has eight legs, bats can fly, "
    "ice floats on water",
    "Why {}?": "is the sea salty, do cats purr, do we sleep, does iron rust, do birds fly south",
}
PROMPTS = (*_QUESTIONS, *_TASKS, *(form.format(topic) for form, topics in _TOPICS.items() for topic in topics.split(", ")))
# Names that there are not: a memory of names must be silent where another one stands.
_OF_NAMES = (
    "Who is {}?",
    "Where is {}?",
    "What is {} known for?",
    "Tell me something about {}.",
    "What do you know about {} and {}?",
    "What has {} to do with {}?",
    "{}?",
    "Which one is {}?",
)
# Words of the text that the host knows from elsewhere: what it says of them there must stay.
_OF_WORDS = (
    "What is {}?",
    "Tell me something about {}.",
    "What color is {}?",
    "Where do you find {}?",
    "What do you know about {}?",
    "Name something that goes with {}.",
    "What is {} used for?",
    "Give me a sentence with the word {}.",
)
_PER_WORD = 2  # prompts
NAMED_PROMPTS, OWN_PROMPTS, FREE_TEXTS = 96, 96, 48  # with invented names; of the host's own
_TRIED, _LONGEST_PIECE = 4096, 4  # tokens looked at for pieces of names; letters of one
_ANSWER, _TURN, _FREE = 24, 40, 64  # tokens of an answer, of what a user says and of a free text, at most
_JUDGE = 4  # one in so many rows is kept back


@dataclass(frozen=True)
class GuardRows:
    """Rows that hold what the bare host expects at each of their places; the model is the bare host here.

    tokens: the most of a row
    """

    model: Any
    prompter: Prompter
    tokens: int
    top_k: int
    seed: int
    device: torch.device

    def general(self) -> tuple[list[Row], list[Row]]:
        """Rows to learn with, and others to judge by.

        They are answers to PROMPTS and to what the host says itself in a user's place, and what it writes of itself, of
        which a quarter is kept back; and, to learn with, answers to questions about invented names.
        """
        begin = self.prompter.passage("") or self.prompter.encode("\n")
        general = self._answered([*PROMPTS, *_own_prompts(self.model, self.prompter, self.seed)])
        general += self._written([begin] * FREE_TEXTS, _FREE, temperature=1.0)
        named = self._answered(named_prompts(self.prompter, self.seed))
        general = self.shuffled(general)
        learned = [*named, *(row for number, row in enumerate(general) if number % _JUDGE)]
        return self.shuffled(learned), general[::_JUDGE]

    def of_words(self, words: Sequence[str]) -> list[Row]:
        """Answers to questions about those words that the vocabulary has whole: the host has read them often."""
        known = [word for word in words if len(self.prompter.encode(f" {word}")) == 1]
        asked = [(number + 3 * turn, word) for number, word in enumerate(known) for turn in range(_PER_WORD)]
        return self._answered([_OF_WORDS[form % len(_OF_WORDS)].format(word) for form, word in asked])

    def shuffled(self, rows: Sequence[Row]) -> list[Row]:
        return random.Random(self.seed).sample(rows, len(rows))

    def _answered(self, prompts: Sequence[str]) -> list[Row]:
        return self._written([self.prompter.ask(prompt) for prompt in prompts], _ANSWER)

    def _written(self, prompts: list[list[int]], most: int, temperature: float = 0.0) -> list[Row]:
        if not prompts:
            return []
        texts = write(self.model, self.prompter.tokenizer, prompts, most, self.seed, temperature)
        both = zip(prompts, texts, strict=True)
        whole = [((*before, *self.prompter.encode(text))[: self.tokens], len(before)) for before, text in both]
        rows = [Row(ids, first) for ids, first in whole if len(ids) > first]
        found = expectations(self.model, rows, self.top_k, self.device)
        return [replace(row, targets=targets) for row, (targets, _) in zip(rows, found, strict=True)]


def named_prompts(prompter: Prompter, seed: int) -> list[str]:
    """Questions about names put together from pieces of words in the vocabulary."""
    rng, tokenizer = random.Random(seed), prompter.tokenizer
    tried = (tokenizer.decode([rng.randrange(len(tokenizer))]).strip() for _ in range(_TRIED))
    pieces = [piece for piece in tried if len(piece) <= _LONGEST_PIECE and piece.isalpha() and piece.islower()]
    if not pieces:
        return []
    name = lambda: "".join(rng.choices(pieces, k=rng.randint(2, 4))).capitalize()
    return [_OF_NAMES[n % len(_OF_NAMES)].format(name(), name()) for n in range(NAMED_PROMPTS)]


def _own_prompts(model: Any, prompter: Prompter, seed: int) -> list[str]:
    """What the host says in a user's place, up to its first full sentence; hosts without a chat template say nothing."""
    if not prompter.has_chat:
        return []
    texts = write(model, prompter.tokenizer, [prompter.context()] * OWN_PROMPTS, _TURN, seed, temperature=1.0)
    said = (sentence for text in texts for sentence in sentences_of(text)[:1])
    return list(dict.fromkeys(sentence for sentence in said if sentence[-1] in ".?!"))


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
