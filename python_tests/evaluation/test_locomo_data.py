"""LoCoMo's files: both shapes read alike, and nothing that is missing goes unnoticed."""

import copy
import json

import pytest
from support.locomo_samples import KITES, listed, long_dialogue

from locas_ext.evaluation.locomo.data import Question, Session, Turn, read_dialogues
from locas_ext.evaluation.locomo.prompts import dialogue_text, question_text


def write(file, content):
    file.write_text(json.dumps(content))
    return file


def test_the_flat_shape(tmp_path):
    (dialogue,) = read_dialogues([write(tmp_path / "kites.json", KITES)])
    assert dialogue.name == "kites" and dialogue.speakers == ("Ada", "Bo")
    assert [session.date for session in dialogue.sessions] == [
        "9:05 am on 1 May, 2020",
        "8:00 pm on 3 May, 2020",
        "7:00 am on 9 June, 2020",  # by number: 10 is after 2
    ]
    assert dialogue.sessions[1] == Session("8:00 pm on 3 May, 2020", (Turn("Bo", "Did it fly?", "an image"),))
    assert dialogue.sessions[0].turns[1].caption == "a photo of a {brown} dog"
    assert dialogue.questions[1] == Question("In which year did Ada buy the kite?", 2, "2020", None)
    assert dialogue.questions[4] == Question("What did Bo buy?", 5, None, "a red kite")
    assert dialogue.questions[5] == Question("Is the dog Ada's?", 5, "No", "Yes")


def test_both_shapes_give_the_same_dialogue(tmp_path):
    flat = read_dialogues([write(tmp_path / "kites.json", KITES)])
    assert read_dialogues([write(tmp_path / "list.json", [listed(KITES, "kites")])]) == flat
    assert read_dialogues([write(tmp_path / "single.json", listed(KITES, "kites"))]) == flat


def test_folders_and_files_together(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.json", long_dialogue(3))
    write(folder / "a.json", KITES)
    (folder / "notes.txt").write_text("none")
    other = write(tmp_path / "list.json", [listed(KITES, "x"), listed(long_dialogue(2), "y")])
    dialogues = read_dialogues([other, folder])
    assert [dialogue.name for dialogue in dialogues] == ["x", "y", "a", "b"]
    assert len({dialogue.digest() for dialogue in dialogues}) == 4


def test_a_digest_tells_contents_apart(tmp_path):
    changed = copy.deepcopy(KITES)
    changed["session_1"][0]["text"] += "!"
    before = read_dialogues([write(tmp_path / "kites.json", KITES)])[0]
    after = read_dialogues([write(tmp_path / "kites.json", changed)])[0]
    assert before.digest() != after.digest()


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def changed(value, *path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (without("speaker_a"), "speaker_a is missing"),
        (without("speaker_b"), "speaker_b is missing"),
        (without("session_2_date_time"), "session_2_date_time is missing"),
        (without("session_1", 1, "speaker"), r"session_1\[1\]: speaker is missing"),
        (without("session_10", 0, "text"), r"session_10\[0\]: text is missing"),
        (without("qa"), "qa is missing"),
        (without("qa", 2, "question"), r"qa\[2\]: question is missing"),
        (without("qa", 2, "answer"), r"qa\[2\]: answer is missing"),
        (without("qa", 3, "category"), r"qa\[3\]: category is missing"),
        (without("qa", 4, "adversarial_answer"), r"qa\[4\]: adversarial_answer is missing"),
        (without("qa", 5, "adversarial_answer"), r"qa\[5\]: adversarial_answer is missing"),
        (changed(6, "qa", 0, "category"), r"qa\[0\]: category is 6; expected 1 to 5"),
        (changed(True, "qa", 0, "category"), r"qa\[0\]: category is True; expected int"),
        (changed(None, "qa", 1, "answer"), r"qa\[1\]: answer is None"),
        (changed([], "qa"), "qa holds no questions"),
        (changed("hi", "session_1"), "session_1 is str; expected a list"),
        (changed("hi", "session_1", 0), r"session_1\[0\] is str; expected an object"),
        (changed(3, "session_1", 0, "text"), r"session_1\[0\]: text is 3; expected str"),
        (changed(["cat"], "session_1", 1, "blip_caption"), r"session_1\[1\]: blip_caption is a list of 1; expected str"),
    ],
)
@pytest.mark.parametrize("shape", ["flat", "list"])
def test_what_is_missing_or_wrong_is_named_with_its_file(tmp_path, change, message, shape):
    content = copy.deepcopy(KITES)
    change(content)
    if shape == "list":
        content = [listed(KITES, "fine"), {**listed({"qa": [], **content}, "bad")}]
        if message == "qa is missing":
            del content[1]["qa"]
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_dialogues([file])
    assert str(file) in str(error.value)
    if shape == "list":
        assert f"{file}[1]" in str(error.value)


def test_no_session_is_an_error(tmp_path):
    content = {key: value for key, value in KITES.items() if not key.startswith("session")}
    with pytest.raises(ValueError, match="bad.json: session_1 is missing"):
        read_dialogues([write(tmp_path / "bad.json", content)])


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "empty list"), ("3", "is int; expected an object")])
def test_a_file_of_something_else(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dialogues([tmp_path / "bad.json"])


def test_paths_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_dialogues([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="holds no"):
        read_dialogues([tmp_path])
    file = write(tmp_path / "kites.json", KITES)
    with pytest.raises(ValueError, match="dialogue kites is in .* and again in"):
        read_dialogues([file, tmp_path])
    with pytest.raises(ValueError, match=r"list.json\[0\]: sample_id is missing"):
        item = listed(KITES, "x")
        del item["sample_id"]
        read_dialogues([write(tmp_path / "list.json", [item])])


# ---- as the model reads it -------------------------------------------------------------------------------------
DAYS = [
    "\nDATE: 9:05 am on 1 May, 2020\nCONVERSATION:\n",
    "\nDATE: 8:00 pm on 3 May, 2020\nCONVERSATION:\n",
    "\nDATE: 7:00 am on 9 June, 2020\nCONVERSATION:\n",
]
TURNS = [
    "Ada: I bought a red kite yesterday.\n",
    "Bo: Here is my dog. [shares a photo of a {brown} dog]\n",
    "Bo: Did it fly? [shares an image]\n",
    "Ada: High above the lake.\n",
]


def test_the_text_of_a_dialogue(tmp_path):
    (dialogue,) = read_dialogues([write(tmp_path / "kites.json", KITES)])
    whole = dialogue_text(dialogue)
    head, body = whole.split("\n", 1)
    assert "Ada" in head and "Bo" in head
    head += "\n"
    assert body == "".join([DAYS[0], *TURNS[:2], DAYS[1], TURNS[2], DAYS[2], TURNS[3]])
    assert dialogue_text(dialogue, 1) == "".join([head, DAYS[0], TURNS[1], DAYS[1], TURNS[2], DAYS[2], TURNS[3]])
    assert dialogue_text(dialogue, 2) == "".join([head, DAYS[1], TURNS[2], DAYS[2], TURNS[3]])
    assert dialogue_text(dialogue, 3) == "".join([head, DAYS[2], TURNS[3]])
    assert dialogue_text(dialogue, 4) == head


def test_the_text_of_a_question(tmp_path):
    (dialogue,) = read_dialogues([write(tmp_path / "kites.json", KITES)])
    texts = [question_text(dialogue, question) for question in dialogue.questions]
    for question, text in zip(dialogue.questions, texts, strict=False):
        assert f"Question: {question.text}" in text and text.endswith("\nShort answer:")
        assert "Ada and Bo" in text
    assert ["DATE" in text for text in texts] == [False, True, False, False, False, False]
    assert ["No information available" in text for text in texts] == [False, False, False, False, True, True]
