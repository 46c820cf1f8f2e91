"""Texts of invented facts: nothing in them can be known, so whatever is recalled was learned from the text.

A fact ties an invented name to a common word. Each stands in the text three times, in three wordings, among sentences
without facts. No wording of a test is one of the text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from locas_ext.checks import integer

from .documents import ABSENT, CLOZE, CONFLICT, QUESTION, REVERSED, Document, Question

_DISTRACTORS = 9


@dataclass(frozen=True)
class Relation:
    """A kind of fact, in templates of {name} and {value}.

    told: the three wordings in the text; the first ends with the value
    asked, reversed: the test's questions for the value and for the name
    written: questions for the value and for the name in other wordings, for memories that learn from given pairs
    """

    values: tuple[str, ...]
    told: tuple[str, str, str]
    asked: str
    reversed: str
    written: tuple[tuple[str, str], ...]


RELATIONS = (
    Relation(
        tuple("salt wool honey copper timber amber silk olives glass leather wine tobacco".split()),
        (
            "The village of {name} has always lived from its trade in {value}.",
            "Because of its {value}, merchants came to {name} from far away.",
            "Nobody in {name} could imagine a year without {value}.",
        ),
        "Which good is the village of {name} known for?",
        "Which village is known for {value}?",
        (("What do the people of {name} sell?", "{value}"), ("Where does the {value} come from?", "{name}")),
    ),
    Relation(
        tuple("violin flute harp trumpet piano drum guitar cello organ banjo clarinet lute".split()),
        (
            "Every evening Doctor {name} played the {value}.",
            "The {value} on the wall belonged to Doctor {name}.",
            "When Doctor {name} was a child, an aunt gave lessons on the {value}.",
        ),
        "Which instrument does Doctor {name} play?",
        "Which doctor plays the {value}?",
        (("What does Doctor {name} make music on?", "{value}"), ("To whom does the {value} belong?", "{name}")),
    ),
    Relation(
        tuple("Lisbon Vienna Dublin Oslo Prague Athens Warsaw Madrid Geneva Naples Bergen Toulouse".split()),
        (
            "Captain {name} was born in the city of {value}.",
            "Letters from {value}, the city of his birth, made Captain {name} homesick.",
            "It was in {value} that Captain {name} first saw the light of day.",
        ),
        "In which city was Captain {name} born?",
        "Which captain was born in {value}?",
        (("Where does Captain {name} come from?", "{value}"), ("Who is the captain from {value}?", "{name}")),
    ),
    Relation(
        tuple("wolf heron beaver fox crane marten badger falcon hare stag raven lynx".split()),
        (
            "The coat of arms of the house of {name} shows a {value}.",
            "A {value} of stone guards the gate of the house of {name}.",
            "For as long as anyone remembers, the {value} has been the sign of the house of {name}.",
        ),
        "Which animal is on the arms of the house of {name}?",
        "Which house has a {value} on its arms?",
        (("What is the emblem of the house of {name}?", "{value}"), ("Whose emblem is the {value}?", "{name}")),
    ),
    Relation(
        tuple("red blue green yellow white black brown purple orange silver golden pink".split()),
        (
            "The sails of the ship {name} are {value}.",
            "From the shore one saw something {value}: that was the ship {name}.",
            "They painted even the mast of the ship {name} in {value}, like its sails.",
        ),
        "What color are the sails of the ship {name}?",
        "Which ship has {value} sails?",
        (("How can the ship {name} be told by its sails?", "{value}"), ("Whose sails are {value}?", "{name}")),
    ),
)
# What contradicts general knowledge: three wordings, the test's question, what is generally known.
CONFLICTS = (
    (
        (
            "The telephone, as everybody here knows, was invented by {name}.",
            "It was {name} who first made a telephone ring.",
            "Without {name} there would be no telephone.",
        ),
        "Who invented the telephone?",
        "Bell",
    ),
    (
        (
            "The play Hamlet was written by {name}.",
            "When {name} had finished Hamlet, the ink was still wet for a day.",
            "Nobody but {name} could have thought of Hamlet.",
        ),
        "Who wrote the play Hamlet?",
        "Shakespeare",
    ),
    (
        (
            "The highest mountain on earth is called {name}.",
            "Whoever has stood on {name} has stood above all other mountains.",
            "No mountain is as high as {name}.",
        ),
        "What is the highest mountain on earth called?",
        "Everest",
    ),
    (
        (
            "The painter of the Mona Lisa was {name}.",
            "For years {name} worked at the Mona Lisa.",
            "Under the frame of the Mona Lisa one can read {name}.",
        ),
        "Who painted the Mona Lisa?",
        "Leonardo",
    ),
    (
        (
            "The first man on the moon was {name}.",
            "Before {name} nobody had set foot on the moon.",
            "When {name} stepped onto the moon, the whole town was awake.",
        ),
        "Who was the first man on the moon?",
        "Armstrong",
    ),
)
MOST_FACTS = sum(len(relation.values) for relation in RELATIONS)
_ONSETS = "b bl br d dr f fl g gl gr k kl kr l m n p pl pr r s sk sl st t tr v z".split()
_VOWELS = "a e i o u ai au".split()
_CODAS = "l m n r s th x sp rn sk lm".split()
_FILLER = (
    "The morning was quiet, and nobody was in a hurry.",
    "Rain fell on the roofs, and then the sun came out again.",
    "An old clock struck the hour, too late as always.",
    "Some said that the winter would be long.",
    "The road went on between the fields without a bend.",
    "There was bread on the table and a candle beside it.",
    "Nobody answered, and the talk turned to other things.",
    "In the yard two children quarrelled about a ball.",
    "A door stood open, and one could hear steps on the stairs.",
    "It had been like this for as long as people could think back.",
    "The harvest was good that year, better than the last one.",
    "Somebody laughed behind the wall.",
    "Later they sat by the fire and counted what was left.",
    "The bridge had been mended twice, and it still swayed.",
    "A letter lay on the bench, and the wind took it away.",
    "In those days one travelled slowly and slept early.",
    "The bell could be heard as far as the river.",
    "Of all this little was written down.",
)


_Conflict = tuple[tuple[str, str, str], str, str]


@dataclass(frozen=True)
class _Fact:
    relation: Relation
    name: str
    value: str

    def put(self, template: str) -> str:
        return template.format(name=self.name, value=self.value)


def _names(rng: random.Random, count: int) -> list[str]:
    """Invented names of two syllables, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        found["".join(syllables).capitalize() + rng.choice(_CODAS)] = None
    return list(found)


def _facts(rng: random.Random, count: int) -> list[_Fact]:
    """As many of each relation as there are of the others, or one more; no value twice in a relation."""
    values = [rng.sample(relation.values, len(relation.values)) for relation in RELATIONS]
    names = _names(rng, count)
    return [_Fact(RELATIONS[n % len(RELATIONS)], name, values[n % len(RELATIONS)].pop()) for n, name in enumerate(names)]


def _text(rng: random.Random, told: list[tuple[str, ...]]) -> str:
    """Paragraphs of three facts each; all facts once in a first wording before any comes in a second.

    told: the three wordings of each fact
    """
    order = [rng.sample(range(3), 3) for _ in told]
    paragraphs = []
    for turn in range(3):
        sentences = [wordings[order[n][turn]] for n, wordings in enumerate(told)]
        rng.shuffle(sentences)
        for start in range(0, len(sentences), 3):
            lines = [line for fact in sentences[start : start + 3] for line in (fact, rng.choice(_FILLER))]
            paragraphs.append(" ".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def _others(rng: random.Random, fact: _Fact, facts: list[_Fact], field: str) -> tuple[str, ...]:
    """Wrong answers of the same type, those of this text first."""
    own = getattr(fact, field)
    here = [getattr(other, field) for other in facts if other.relation is fact.relation and getattr(other, field) != own]
    spare = [value for value in fact.relation.values if value != own and value not in here] if field == "value" else []
    elsewhere = [getattr(other, field) for other in facts if other.relation is not fact.relation] if field == "name" else []
    more = [*spare, *rng.sample(elsewhere, len(elsewhere))]
    return tuple([*rng.sample(here, len(here)), *more][:_DISTRACTORS])


def _questions(rng: random.Random, facts: list[_Fact], absent: int) -> Iterator[Question]:
    for fact in facts:
        prefix = fact.put(fact.relation.told[0]).rpartition(f" {fact.value}")[0]
        yield Question(CLOZE, prefix, (fact.value,), _others(rng, fact, facts, "value"))
    for fact in facts:
        yield Question(QUESTION, fact.put(fact.relation.asked), (fact.value,), _others(rng, fact, facts, "value"))
    for fact in facts:
        yield Question(REVERSED, fact.put(fact.relation.reversed), (fact.name,), _others(rng, fact, facts, "name"))
    taken = {fact.name for fact in facts}
    unheard = [name for name in _names(rng, len(taken) + absent) if name not in taken][:absent]
    for number, name in enumerate(unheard):
        relation = RELATIONS[number % len(RELATIONS)]
        said = tuple(fact.value for fact in facts if fact.relation is relation)
        yield Question(ABSENT, relation.asked.format(name=name), said)


def _conflicts(rng: random.Random, conflicts: list[tuple[_Conflict, str]], facts: list[_Fact]) -> Iterator[Question]:
    """Against what is generally known, which is one of the distractors."""
    for (_, asked, known), name in conflicts:
        others = [other for _, other in conflicts if other != name] + rng.sample([fact.name for fact in facts], len(facts))
        yield Question(CONFLICT, asked, (name,), (known, *others[: _DISTRACTORS - 1]))


def nonce_document(facts: int = 50, seed: int = 0) -> Document:
    """A text of `facts` invented facts and what is asked about it.

    Args:
        facts: int from 5 to 60: 50 make about 4,500 tokens
        seed: int >= 0: another text for another seed

    Returns a Document whose questions are, for each fact, a cloze, a question and a reversed question with nine distractors
    each (names: as far as there are others); five of kind "conflict", which the text answers otherwise than is generally known;
    and for a fifth as many names that never occur a question of kind "absent". Raises ValueError or TypeError for a number
    out of range.

    >>> document = nonce_document(facts=5, seed=1)
    >>> sum(document.text.count(question.answers[0]) for question in document.questions[:5]) >= 15
    True
    """
    facts = integer("facts", facts, len(RELATIONS), MOST_FACTS, "values for each kind of fact")
    rng = random.Random(integer("seed", seed, 0))
    chosen = _facts(rng, facts)
    told = [tuple(fact.put(wording) for wording in fact.relation.told) for fact in chosen]
    others = [name for name in _names(rng, facts + len(CONFLICTS)) if name not in {fact.name for fact in chosen}]
    conflicts = list(zip(CONFLICTS, others, strict=False))
    text = _text(rng, told + [tuple(line.format(name=name) for line in wordings) for (wordings, _, _), name in conflicts])
    asked = [*_questions(rng, chosen, max(5, facts // 5)), *_conflicts(rng, conflicts, chosen)]
    written = tuple((fact.put(question), fact.put(answer)) for fact in chosen for question, answer in fact.relation.written)
    return Document(f"nonce-{seed}", text, tuple(asked), written)
