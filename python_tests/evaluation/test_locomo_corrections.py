"""Corrections of LoCoMo's answers: what replaces what, what is counted, and entries that do not fit."""

import json
import random

import pytest
from support.helpers import save_host, tiny_model
from support.locomo_samples import KITES, long_dialogue

from locas_ext.cli import main
from locas_ext.errors import LocasError
from locas_ext.evaluation.locomo.corrections import correct, counts, read_corrections
from locas_ext.evaluation.locomo.data import read_dialogues
from locas_ext.evaluation.locomo.scoring import ANSWERABLE, UNDISPUTED, pool, summarize


def write(file, content):
    file.write_text(json.dumps(content))
    return file


def entry(dialogue, question, correct, error_type="HALLUCINATION", **changes):
    published = question.answer
    return {
        "dialogue": dialogue,
        "question": question.text,
        "category": question.category,
        "published": published,
        "correct": correct,
        "error_type": error_type,
    } | changes


@pytest.fixture
def dialogues(tmp_path):
    return read_dialogues([write(tmp_path / "7.json", KITES), write(tmp_path / "conv-8.json", long_dialogue(3))])


def answered(dialogue):
    return [question for question in dialogue.questions if question.category != 5]


def test_wrong_answers_are_replaced_and_right_ones_kept(dialogues, tmp_path):
    kites, long = dialogues
    first, second, *_ = answered(kites)
    entries = [
        entry(7, first, "a blue kite"),
        entry(7, second, "another wording", "WRONG_CITATION"),
        entry(8, answered(long)[0], "nobody", "AMBIGUOUS"),
        entry(99, first, "of a dialogue that is not asked about"),
    ]
    corrections = read_corrections(write(tmp_path / "corrections", entries))
    new_kites, new_long = correct(dialogues, corrections)
    changed = [(old, new) for old, new in zip(kites.questions, new_kites.questions, strict=True) if old != new]
    ((old, new),) = changed
    assert (old, new.answer, new.published) == (first, "a blue kite", first.answer)
    assert new_long.questions[long.questions.index(answered(long)[0])].answer == "nobody"
    assert counts([new_kites, new_long], corrections) == {"7": {"audited": 2, "wrong": 1}, "conv-8": {"audited": 1, "wrong": 1}}
    assert new_kites.digest() != kites.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "Who?"}, r"corrections\[0\]: dialogue 7 has no question 'Who\?' of category"),
        ({"published": "1999"}, r"corrections\[0\]: published is '1999', but the answer of dialogue 7 is "),
        ({"category": 5}, r"corrections\[0\]: category is 5; expected one with an answer, 1 to 4"),
        ({"correct": None}, r"corrections\[0\]: correct is None; expected str"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(dialogues, tmp_path, changes, message):
    file = write(tmp_path / "corrections", [entry(7, answered(dialogues[0])[0], "x") | changes])
    with pytest.raises(ValueError, match=message):
        correct(dialogues, read_corrections(file))


@pytest.mark.parametrize("types", [("HALLUCINATION", "WRONG_CITATION"), ("WRONG_CITATION", "HALLUCINATION")])
def test_a_second_entry_about_a_question_is_named(dialogues, tmp_path, types):
    question = answered(dialogues[0])[0]
    file = write(tmp_path / "corrections", [entry(7, question, "x", error_type) for error_type in types])
    with pytest.raises(
        ValueError, match=r"corrections\[1\]: .*corrections\[0\] is about the same question; expected one entry"
    ):
        correct(dialogues, read_corrections(file))


@pytest.mark.parametrize("key", ["dialogue", "question", "category", "published", "correct", "error_type"])
def test_a_missing_key_is_named(dialogues, tmp_path, key):
    content = entry(7, answered(dialogues[0])[0], "x")
    del content[key]
    with pytest.raises(ValueError, match=rf"corrections\[0\]: {key} is missing"):
        read_corrections(write(tmp_path / "corrections", [content]))


def test_a_file_that_is_no_list(tmp_path):
    with pytest.raises(ValueError, match="corrections is dict; expected a list"):
        read_corrections(write(tmp_path / "corrections", {}))
    (tmp_path / "half").write_text('[{"dialogue": 7')
    with pytest.raises(LocasError, match="half is damaged"):
        read_corrections(tmp_path / "half")


def test_the_score_without_corrected_questions(dialogues, tmp_path):
    wrong = random.sample(answered(dialogues[0]), 2)
    corrections = read_corrections(write(tmp_path / "c", [entry(7, question, "x y z") for question in wrong]))
    new = correct(dialogues, corrections)
    published = [[(question.answer or "").split(";")[0] for question in dialogue.questions] for dialogue in dialogues]
    summaries = [summarize(dialogue.questions, texts) for dialogue, texts in zip(new, published, strict=True)]
    assert UNDISPUTED not in summaries[1]
    both, total = pool(summaries), sum(len(answered(dialogue)) for dialogue in dialogues)
    assert both[UNDISPUTED] == {"count": total - 2, "f1": pytest.approx(1)}
    assert both[ANSWERABLE] == {"count": total, "f1": pytest.approx(1 - 2 / total)}


def test_results_say_that_corrections_were_used(dialogues, tokenizer, tmp_path, capsys):
    host = save_host(tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=300), tmp_path / "host")
    wrong = answered(dialogues[0])[0]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "7.json", KITES)
    corrections = write(folder / "audit.json", [entry(7, wrong, "corrected")])  # in the folder of the dialogues, but none
    out = tmp_path / "out"
    command = ["locomo", folder, "--model", host, "--out", out, "--methods", "no-context", "--max-new-tokens", "2"]
    assert main(list(map(str, [*command, "--device", "cpu", "--corrections", corrections]))) == 0
    captured = capsys.readouterr().out
    assert "LoCoMo, 1 dialogue, 1 answer corrected" in captured and "none corrected" in captured
    assert "audit.json replaced 1 published answers" in (out / "report.md").read_text()
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert settings["corrections"] == {"file": "audit.json", "dialogues": {"7": {"audited": 1, "wrong": 1}}}
    lines = [json.loads(line) for line in (out / "predictions-no-context.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "published" in line]
    assert (line["question"], line["gold"], line["published"]) == (wrong.text, "corrected", wrong.answer)
