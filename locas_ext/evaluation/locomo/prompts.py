"""What a model reads in LoCoMo: a dialogue, and a question about it.

As in the official evaluation, a date and a heading stand above each day's turns, temporal questions point to the
dates, and only adversarial ones name the way out. Unlike there, that way is no second option beside the trap: an answer
is free text in every category.
"""

from .data import ADVERSARIAL, Dialogue, Question, Session, Turn
from .scoring import REFUSAL

TEMPORAL = 2

PROMPTS = {
    "dialogue": "{a} and {b} talk to each other. Each of their conversations begins with its date.\n",
    "session": "\nDATE: {date}\nCONVERSATION:\n",
    "turn": "{speaker}: {text}",
    "turn with image": "{speaker}: {text} [shares {caption}]",
    "question": (
        "\nAnswer a question about the conversations of {a} and {b}: in a few words, taken from what they said where "
        "that is possible.\n\nQuestion: {question}\nShort answer:"
    ),
    "temporal hint": " Work out the date from the DATE of the CONVERSATION; it may be approximate.",
    "adversarial hint": f' If they never said so, answer "{REFUSAL}".',
}


def _turn_text(turn: Turn) -> str:
    name = "turn" if turn.caption is None else "turn with image"
    line = PROMPTS[name].format(speaker=turn.speaker, text=turn.text, caption=turn.caption)
    return " ".join(line.split()) + "\n"  # a turn is one line, whatever breaks it has


def _session_text(session: Session, skip: int) -> str:
    turns = session.turns[skip:]
    return PROMPTS["session"].format(date=session.date) + "".join(map(_turn_text, turns)) if turns else ""


def dialogue_text(dialogue: Dialogue, skip: int = 0) -> str:
    """The dialogue without its first `skip` turns; the date of the first turn left is kept."""
    a, b = dialogue.speakers
    parts = [PROMPTS["dialogue"].format(a=a, b=b)]
    for session in dialogue.sessions:
        parts.append(_session_text(session, skip))
        skip = max(0, skip - len(session.turns))
    return "".join(parts)


def question_text(dialogue: Dialogue, question: Question) -> str:
    """The prompt that the answer continues, with or without the dialogue before it."""
    hint = {TEMPORAL: PROMPTS["temporal hint"], ADVERSARIAL: PROMPTS["adversarial hint"]}.get(question.category, "")
    a, b = dialogue.speakers
    return PROMPTS["question"].format(a=a, b=b, question=question.text + hint)
