"""Wrong answers for questions that bring none: other answers of the same text, of about the same length."""

import random
from dataclasses import replace

from .documents import ABSENT, Document, Question
from .scoring import plain_words

COUNT = 9


def with_distractors(documents: list[Document], seed: int) -> list[Document]:
    """The documents with up to nine distractors for every question that can have some.

    They are gold answers of the same kind of question in the same text, where it has too few also of other texts: of the
    nearest in number of words, drawn by the seed among equals. None says the same as a right answer.
    """
    result = []
    for place, document in enumerate(documents):
        others = [q for other in documents[:place] + documents[place + 1 :] for q in other.questions]
        rng = random.Random(f"{seed} {document.title}")
        asked = tuple(_completed(question, document.questions, others, rng) for question in document.questions)
        result.append(replace(document, questions=asked))
    return result


def _completed(question: Question, own: tuple[Question, ...], others: list[Question], rng: random.Random) -> Question:
    if question.distractors or question.kind == ABSENT:
        return question
    right = {tuple(plain_words(answer)) for answer in question.answers}
    length = len(question.answers[0].split())
    chosen: dict[tuple[str, ...], str] = {}
    for pool in (own, others):
        golds = [each.answers[0] for each in pool if each.kind == question.kind]
        rng.shuffle(golds)
        for answer in sorted(golds, key=lambda answer: abs(len(answer.split()) - length)):
            key = tuple(plain_words(answer))
            if key and key not in right and len(chosen) < COUNT:
                chosen.setdefault(key, answer)
    return replace(question, distractors=tuple(chosen.values()))
