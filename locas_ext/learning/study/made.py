"""Questions that need no writing: a passage's own sentences, asked word by word."""

import random
from collections.abc import Callable, Sequence

from .pairs import Pair
from .passages import Passage, sentences_of
from .salience import Salience, Word
from .settings import ABOUT, BEGUN, BLANK, CONTINUED, LINKED, TURNED

_BLANKS = (
    'Which word is missing? "{}"',
    'Fill in the blank: "{}"',
    'Complete this: "{}" What belongs in the gap?',
)
_ABOUTS = (
    "What do you know about {}?",
    "Tell me something about {}.",
    "What is said about {}?",
    "Where does {} come up, and what is said of it?",
)
_LINKS = (
    "What is {} connected with?",
    "Which word belongs to {}?",
    "What has to do with {}?",
    "Who or what goes with {}?",
    "What comes to mind when you hear of {}?",
    "{}: what is said to go with it?",
    "I am thinking of {}. What is it?",
    "What do you remember about {}?",
    "Which one is it that has to do with {}?",
    "What about {}?",
    "{}?",
    "In one word: what do you associate with {}?",
)
_ASKING = ("what", "which", "who", "where", "what is it that", "which one", "how")
_GAP = "____"
# How a short answer begins: as itself, or in a sentence of which only the rest is learned, so that the host's manner stays.
_BEGINNINGS = ("", "", "The answer is", "It is")
_OF_NAMES = (TURNED, LINKED, BEGUN)  # kinds whose questions leave words out: without a name in them they could mean anything
_KEPT = (1.0, 0.7, 0.4)  # the share of a statement's words that its question keeps
Question = tuple[str, str, str]  # with the answer and its beginning
_Maker = Callable[[str, list[Word], random.Random], list[Question]]


def made_pairs(passages: Sequence[Passage], kinds: Sequence[str], salient: Salience, seed: int) -> list[Pair]:
    """Pairs of every sentence, in the passage where it first stands.

    salient: finds the words of a sentence that are worth asking for
    """
    result: list[Pair] = []
    seen: set[str] = set()
    for number, passage in enumerate(passages):
        rng = random.Random(f"{seed} {number}")
        sentences = [each for each in dict.fromkeys(sentences_of(passage.text)) if each not in seen]
        seen.update(sentences)
        for sentence in sentences:
            words = salient(sentence)
            named = any(word.name for word in words)
            for kind in (each for each in _MAKERS if each in kinds and (named or each not in _OF_NAMES)):
                made = _MAKERS[kind](sentence, words, rng)
                result += [Pair(kind, question, answer, number, begin) for question, answer, begin in made]
    return result


def _short(word: Word, rng: random.Random) -> tuple[str, str]:
    """-> a word as an answer, and how the answer begins; of a name of several words sometimes the last one alone."""
    text = word.text.split()[-1] if word.name and rng.random() < 0.4 else word.text
    begin = rng.choice(_BEGINNINGS)
    return (text if begin else text[0].upper() + text[1:]) + ".", begin


def _blanks(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    """Each salient word left out in turn, so that a fact is asked in both directions."""
    result = []
    for word in words:
        gap = f"{sentence[: word.start]}{_GAP}{sentence[word.end :]}"
        result.append((rng.choice(_BLANKS).format(gap), *_short(word, rng)))
    return result


def _turned(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    """The statement as a question for each salient word: the whole of it, and with words left out."""
    result = []
    for word in words:
        for share in _KEPT:
            result.append((_question(sentence, word, words, share, rng), *_short(word, rng)))
    return result


def _question(sentence: str, word: Word, words: list[Word], share: float, rng: random.Random) -> str:
    """The statement with a word asked for; with a share below 1 words are left out, but no name, and not all that tell."""
    begin, asking = word.start, rng.choice(_ASKING)
    if word.category and rng.random() < 0.5:
        begin, asking = word.end - len(word.phrase), f"which {word.category}"
    if share == 1.0:
        return f"{sentence[:begin]}{asking}{sentence[word.end :]}".rstrip(".! ") + "?"
    others = [other for other in words if other is not word]
    held = [other for other in others if other.name] + (rng.sample(others, 1) if others else [])
    kept, place = [], 0
    for part in sentence.split(" "):
        start, place = place, place + len(part) + 1
        tells = any(start < other.end and other.start < place for other in held)
        if not (start < word.end and begin < place) and (tells or rng.random() < share):
            kept.append(part.strip(".,;:!?\"'"))
    return f"{asking.capitalize()} {' '.join(kept)}?"


def _cues(word: Word, words: list[Word], rng: random.Random) -> str | None:
    """One to three other salient words of the sentence, at least one name if there is one."""
    others = [other for other in words if other is not word]
    if not others:
        return None
    names = [other for other in others if other.name]
    first = rng.choice(names or others)
    rest = rng.sample([other for other in others if other is not first], k=min(len(others) - 1, rng.choice((0, 1, 1, 2))))
    cues = [(other.phrase if rng.random() < 0.6 else other.text) for other in rng.sample([first, *rest], 1 + len(rest))]
    return cues[0] if len(cues) == 1 else f"{', '.join(cues[:-1])} and {cues[-1]}"


def _linked(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    """Each salient word from others of its sentence, twice."""
    result = []
    for word in [*words, *words]:
        cues = _cues(word, words, rng)
        if cues is not None:
            result.append((rng.choice(_LINKS).format(cues), *_short(word, rng)))
    return result


def _begun(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    """Each salient word where the answer is the sentence itself and has come that far."""
    result = []
    for word in words:
        cues = _cues(word, words, rng)
        if cues is not None and sentence[: word.start].endswith(" "):
            asked = rng.choice((*_LINKS, *_ABOUTS)).format(cues), _question(sentence, word, words, 0.5, rng)
            result.append((rng.choice(asked), word.text, sentence[: word.start].rstrip()))
    return result


def _abouts(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    names = [word for word in words if word.name] or words
    return [(rng.choice(_ABOUTS).format(word.phrase), sentence, "") for word in names[:1]]


def _continued(sentence: str, words: list[Word], rng: random.Random) -> list[Question]:
    """A sentence cut somewhere in its second half."""
    parts = sentence.split()
    cut = rng.randint(len(parts) // 2, len(parts) - 1)
    return [(" ".join(parts[:cut]), " ".join(parts[cut:]), "")]


_MAKERS: dict[str, _Maker] = {
    TURNED: _turned,
    LINKED: _linked,
    BEGUN: _begun,
    BLANK: _blanks,
    ABOUT: _abouts,
    CONTINUED: _continued,
}
