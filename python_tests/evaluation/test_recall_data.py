"""What `locas recall` asks: invented facts, files of texts with questions, distractors, retrieval, scores."""

import itertools
import json
import math
import os
import random
import threading

import pytest
from support.locomo_samples import KITES, listed

from locas_ext.errors import LocasError
from locas_ext.evaluation.recall.bm25 import BM25
from locas_ext.evaluation.recall.distractors import with_distractors
from locas_ext.evaluation.recall.documents import (
    ABSENT,
    CLOZE,
    CONFLICT,
    QUESTION,
    REVERSED,
    Document,
    Question,
    read_documents,
)
from locas_ext.evaluation.recall.general import general_questions
from locas_ext.evaluation.recall.nonce import MOST_FACTS, nonce_document
from locas_ext.evaluation.recall.scoring import contains, token_f1

SEED = random.randrange(1000)


# ---- invented facts ------------------------------------------------------------------------------------------
def of_kind(document, kind):
    return [question for question in document.questions if question.kind == kind]


@pytest.mark.parametrize("facts", [5, "some", MOST_FACTS])
def test_every_fact_stands_three_times_and_no_test_is_worded_as_the_text(facts):
    facts = random.Random(SEED).randint(6, 59) if facts == "some" else facts
    document = nonce_document(facts, SEED)
    sentences = [line.strip() for line in document.text.replace("\n", " ").replace(": that", " that").split(". ")]
    asked, turned = of_kind(document, QUESTION), of_kind(document, REVERSED)
    assert len(of_kind(document, CLOZE)) == len(asked) == len(turned) == facts
    for cloze, question, back in zip(of_kind(document, CLOZE), asked, turned, strict=True):
        name, value = back.answers[0], question.answers[0]
        told = {line for line in sentences if name in line and value in line}
        assert len(told) == 3, (SEED, name, value, told)
        assert cloze.text in document.text and f"{cloze.text} {value}." in document.text
        assert name in question.text and value not in question.text and value in back.text and name not in back.text
        assert question.text not in document.text and back.text not in document.text
        for each in (cloze, question, back):
            assert (
                len(set(each.distractors)) == min(9, facts - 1 if each is back else 9)
                and each.answers[0] not in each.distractors
            )
    words = set(document.text.replace(".", " ").replace(",", " ").replace(":", " ").split())
    for absent in of_kind(document, ABSENT):
        assert not [
            word for word in absent.text.strip("?").split()[1:] if word[0].isupper() and word in words - {"Doctor", "Captain"}
        ]
    for question, answer in document.written:
        assert answer in document.text and question not in document.text
        assert question not in {each.text for each in document.questions}


def test_a_conflict_is_told_three_times_and_what_is_known_is_among_the_choices():
    document = nonce_document(12, SEED)
    conflicts = of_kind(document, CONFLICT)
    assert len(conflicts) == 5 and len({question.answers[0] for question in conflicts}) == 5
    names = {back.answers[0] for back in of_kind(document, REVERSED)}
    for question, known in zip(conflicts, ("Bell", "Shakespeare", "Everest", "Leonardo", "Armstrong"), strict=True):
        assert document.text.count(question.answers[0]) == 3 and question.answers[0] not in names
        assert question.distractors[0] == known and known not in document.text and len(set(question.distractors)) == 9


def test_a_seed_is_a_text():
    assert nonce_document(8, SEED) == nonce_document(8, SEED)
    assert nonce_document(8, SEED).text != nonce_document(8, SEED + 1).text


@pytest.mark.parametrize("facts", [4, MOST_FACTS + 1, -1])
def test_a_number_of_facts_out_of_range_is_refused(facts):
    with pytest.raises(ValueError, match=f"facts is {facts}; expected an integer from 5 to {MOST_FACTS}"):
        nonce_document(facts)


# ---- files ---------------------------------------------------------------------------------------------------
ENTRY = {"title": "kites", "text": "A red kite flew.", "questions": [{"question": "What flew?", "answers": ["a kite", "kite"]}]}
SQUAD = {"title": "kites", "context": "A red kite flew.", "questions": [{"question": "What flew? ", "answer": "a kite"}]}


def put(folder, content, name="data.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_the_shapes_of_files(tmp_path):
    expected = Document("kites", "A red kite flew.", (Question(QUESTION, "What flew?", ("a kite", "kite")),))
    assert read_documents(str(put(tmp_path, ENTRY))) == [expected]
    first, second = read_documents(str(put(tmp_path, [SQUAD, SQUAD, SQUAD])), most=2)
    assert first.questions == (Question(QUESTION, "What flew?", ("a kite",)),) and second.title == "kites (2)"
    novel = put(tmp_path, {"title": "A Novel", "questions": ENTRY["questions"], "summary": "s"}, "novel.json")
    (tmp_path / "novel.txt").write_text("All of it.")
    assert [d.text for d in read_documents(str(novel))] == ["All of it."]
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder, ENTRY, "b.json"), put(folder, {**ENTRY, "title": "first"}, "a.json")
    assert [d.title for d in read_documents(str(folder))] == ["first", "kites"]


def test_a_dialogue_is_a_text_without_its_adversarial_questions(data):
    documents = read_documents(str(data))
    assert [d.title for d in documents] == ["kites", "long"]
    assert all(question.kind == QUESTION and question.answers[0] for d in documents for question in d.questions)
    assert len(documents[0].questions) == 4 and "DATE:" in documents[0].text


def test_a_dialogue_of_adversarial_questions_alone_is_refused_by_name(tmp_path):
    asked = [question for question in KITES["qa"] if question["category"] == 5 and "answer" not in question]
    (tmp_path / "kites.json").write_text(json.dumps({**KITES, "qa": asked}))
    with pytest.raises(LocasError, match=r"kites\.json: dialogue kites has no question that it answers"):
        read_documents(str(tmp_path / "kites.json"))


def test_dialogues_come_through_a_pipe_too(tmp_path):
    """Which can be read once only."""
    os.mkfifo(tmp_path / "pipe")
    content = json.dumps([listed(KITES, "conv-1")]).encode()
    threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content), daemon=True).start()
    assert [document.title for document in read_documents(str(tmp_path / "pipe"))] == ["conv-1"]


def test_titles_with_a_number_are_not_taken_twice(tmp_path):
    entries = [{"title": title, "text": "x", "questions": [{"question": "q", "answer": "a"}]} for title in ("a", "a (2)", "a")]
    for order in itertools.permutations(entries):
        (tmp_path / "a.json").write_text(json.dumps(order))
        titles = [document.title for document in read_documents(str(tmp_path / "a.json"))]
        assert len(set(titles)) == 3 and {"a", "a (2)"} < set(titles)


def test_the_shipped_tales():
    tales = read_documents("fairytaleqa")
    assert len(tales) == 23 and sum(len(tale.questions) for tale in tales) == 1025
    assert len({tale.title for tale in tales}) == 23


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "is an empty list; expected documents"),
        ([7], r"\[0\] is 7; expected an object"),
        ([ENTRY, {"title": "x", "text": "y"}], r"data.json: \[1\].questions is missing"),
        ({**ENTRY, "questions": []}, "data.json: questions is empty; expected at least one"),
        ({**ENTRY, "text": " "}, "data.json: text is empty"),
        ({"title": "x", "questions": ENTRY["questions"]}, "data.json: text is missing"),
        (
            {**ENTRY, "questions": [{"question": "Q?"}]},
            r"questions\[0\].answers is missing; expected answers, a list, or answer",
        ),
        ({**ENTRY, "questions": [{"question": "Q?", "answers": [3]}]}, r"questions\[0\].answers\[0\] is 3; expected a text"),
        ({**ENTRY, "title": None}, "title is None; expected a text"),
    ],
)
def test_content_of_another_shape_is_refused_by_file_and_key(content, message, tmp_path):
    with pytest.raises(LocasError, match=message):
        read_documents(str(put(tmp_path, content)))


def test_general_questions_are_a_mixture_without_repeats():
    questions = general_questions()
    assert len({question.text for question in questions}) == len(questions) > 350
    first = " ".join(question.text for question in questions[:40])
    assert all(word in first for word in ("capital", "opposite", "plus", "past tense", "month", "symbol"))
    assert ("7", "seven") in [question.answers for question in questions]


# ---- distractors, retrieval, scores -----------------------------------------------------------------------------
def test_distractors_are_other_answers_of_the_text_nearest_in_length():
    asked = [Question(QUESTION, f"q{n}", (" ".join([f"w{n}"] * (1 + n % 4)),)) for n in range(20)]
    same = Question(QUESTION, "again", ("W0!", "w4"))
    (document,) = with_distractors([Document("t", "", (*asked, same))], SEED)
    again = document.questions[-1]
    assert len(set(again.distractors)) == 9 and not {"w0", "w4", "W0!"} & set(again.distractors)
    assert {"w8", "w12", "w16"} <= set(again.distractors)  # all that are left of one word
    assert with_distractors([document], SEED) == [document]
    assert with_distractors([Document("t", "", (same,))], SEED)[0].questions[0].distractors == ()


def test_bm25_is_its_formula():
    rng = random.Random(SEED)
    vocabulary = [f"w{n}" for n in range(12)]
    chunks = [[rng.choice(vocabulary) for _ in range(rng.randint(1, 30))] for _ in range(9)]
    query = [*rng.sample(vocabulary, 4), "unheard"]
    mean = sum(map(len, chunks)) / len(chunks)
    expected = []
    for chunk in chunks:
        total = 0.0
        for word in query:
            n = sum(word in other for other in chunks)
            frequency = chunk.count(word)
            idf = math.log(1 + (len(chunks) - n + 0.5) / (n + 0.5))
            total += idf * frequency * 2.5 / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(chunk) / mean))
        expected.append(total)
    index = BM25([" ".join(chunk).upper() for chunk in chunks])
    assert index.scores(" ".join(query)) == pytest.approx(expected)
    assert set(index.best(" ".join(query), 3)) == set(sorted(range(9), key=lambda n: -expected[n])[:3])


def test_scores_of_what_was_written():
    assert contains("He has a Red-House, I think", ("the red house",)) and not contains("redhouse", ("red house",))
    assert not contains("anything", ("...",))  # an answer without words is in nothing
    assert token_f1("the red red house", ("red barn", "blue")) == pytest.approx(2 * 1 / (3 + 2))
    assert token_f1("", ("x",)) == 0
