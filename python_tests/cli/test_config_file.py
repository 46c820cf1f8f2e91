"""--config FILE.yaml: the same settings as the options, the command line wins, what is wrong is named."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import locas_ext.cli.tasks.generate
from locas_ext import checks
from locas_ext.cli import main
from locas_ext.cli.yaml_file import read_mapping


@pytest.fixture
def write(tmp_path):
    def file(content: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


@pytest.fixture
def tasks(monkeypatch):
    """The tasks that `locas generate` would have run."""
    seen = []
    monkeypatch.setattr(locas_ext.cli.tasks.generate, "run_generate", seen.append)
    return seen


def test_a_file_stands_for_options(write, tasks):
    file = write("prompt: Once\nmodel: m\nmax-new-tokens: 7\ntemperature: 4e-3\nmemory: some/dir\nseed: 3\ndtype: bfloat16\n")
    assert main(["generate", "--config", str(file)]) == 0
    (task,) = tasks
    assert (task.prompt, task.model, task.max_new_tokens, task.temperature) == ("Once", "m", 7, 4e-3)
    assert (task.memory, task.seed, task.dtype, task.device) == (Path("some/dir"), 3, "bfloat16", None)


def test_the_command_line_wins_in_any_order(write, tasks):
    file = write("prompt: Once\nmodel: m\nseed: 3\nmax_new_tokens: 7\n")
    for arguments in (["--seed", "5", "--config", str(file)], ["--config", str(file), "--seed", "5"]):
        assert main(["generate", *arguments]) == 0
        assert (tasks[-1].seed, tasks[-1].max_new_tokens) == (5, 7)


def test_numbers_are_those_of_yaml_1_2(write, tasks):
    """Of YAML 1.1 a leading zero means eight, a colon sixty; and a name that begins as a number is none."""
    file = write("prompt: 1e5th floor\nmodel: 3.5-turbo\nmemory: 5e-3_rank64\nseed: 010\nmax_new_tokens: +7\ntemperature: .5\n")
    assert main(["generate", "--config", str(file)]) == 0
    (task,) = tasks
    assert (task.prompt, task.model, task.memory) == ("1e5th floor", "3.5-turbo", Path("5e-3_rank64"))
    assert (task.seed, task.max_new_tokens, task.temperature) == (10, 7, 0.5)


def test_null_means_the_default_where_there_is_none(write, tasks, capsys):
    assert main(["generate", "--config", str(write("prompt: a\nmodel: m\nmemory: null\n"))]) == 0
    assert tasks[-1].memory is None
    assert main(["generate", "--config", str(write("prompt: a\nmodel: m\nseed:\n"))]) == 2
    assert "seed is null; expected an integer >= 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, words",
    [
        ("rnak: 3", ["unknown key 'rnak'", "did you mean rank?", "learning_rate", "context_gradient"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("rank: many", ["rank is 'many'; expected an integer >= 1"]),
        ("rank: '64'", ["rank is '64'; expected an integer >= 1"]),
        ("rank: true", ["rank is true; expected an integer >= 1"]),
        ("rank: 2.5", ["rank is 2.5; expected an integer >= 1"]),
        ("rank: [1, 2]", ["rank is [1, 2]; expected an integer >= 1"]),
        ("rank: 1:30", ["rank is '1:30'; expected an integer >= 1"]),
        ("rank: 0x10", ["rank is '0x10'; expected an integer >= 1"]),
        ("rank: 0", ["rank is 0; expected an integer >= 1"]),
        ("rank: " + "9" * 4000, ["rank is 999", "expected an integer from 1 to 9007199254740992"]),
        ("rank: " + "9" * 5000, ["cannot be read", "digits"]),
        ("learning-rate: .nan", ["learning-rate is nan; expected a number >= 0 and <= 1e+30"]),
        ("learning_rate: -1", ["learning_rate is -1; expected a number >= 0 and <= 1e+30"]),
        ("learning_rate: fast", ["learning_rate is 'fast'; expected a number >= 0 and <= 1e+30"]),
        ("init: best", ["init is 'best'; expected one of topk, bottomk, random, gaussian, activation"]),
        ("init: 3", ["init is 3; expected one of"]),
        ("clip: maybe", ["clip is 'maybe'; expected true or false"]),
        ("clip: 1", ["clip is 1; expected true or false"]),
        ("resume: null", ["resume is null; expected true or false"]),
        ("scale: big", ["scale is 'big'; expected paper"]),
        ("layers: [0, a]", ["layers is [0, 'a']; expected layer indices"]),
        ("texts: {a: b}", ["texts is {'a': 'b'}; expected a path"]),
        ("tokens: 2", ["tokens is 2; expected all, top-loss:N"]),
        ("title: 1984", ["title is 1984; expected text"]),
        ("rank: 3\nrank: 4", ["'rank'", "twice", "line 1"]),
        ("learning-rate: 1\nlearning_rate: 1", ["learning-rate and learning_rate are one setting"]),
        ("- rank", ["a list; expected a mapping"]),
        ("rank", ["text; expected a mapping"]),
        ("3: 4", ["the key 3 is not text"]),
        ("rank: !!python/object/apply:os.system [ls]", ["tags (!)", "line 1"]),
        ("rank: !!int 3", ["tags (!)"]),
        ("a: &x 3\nb: *x", ["anchors (&)"]),
        ("rank: [", ["not a YAML file of settings"]),
        ("rank: 1\n---\nrank: 2", ["not a YAML file of settings"]),
        ("a: " + "[" * 5000, ["too deeply nested"]),
        ("# " + "x" * 70_000, ["larger than 64 KiB"]),
        (b"\xff\xfe", ["not UTF-8 text (byte 0)"]),
        (b"a: \x00", ["not a YAML file of settings"]),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(content, words, write, capsys):
    file = write(content)
    assert main(["memorize", "x.txt", "--model", "m", "--out", "o", "--config", str(file)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert not captured.out and line.startswith(f"locas: {file}")
    for word in words:
        assert word in line


@pytest.mark.parametrize("place", ["missing.yaml", "", "/dev/zero"])
def test_a_file_that_cannot_be_read(place, tmp_path, capsys):
    assert main(["info", "--help"]) == 0
    capsys.readouterr()
    assert main(["generate", "--config", str(tmp_path / place), "--prompt", "a", "--model", "m"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("locas: ") and str(tmp_path / place) in line


@pytest.mark.parametrize("name", ["max_new_tokens", "--max-new-tokens"])
def test_what_only_the_host_can_refuse_names_the_file_too(name, write, capsys, monkeypatch):
    monkeypatch.setattr(
        locas_ext.cli.tasks.generate, "run_generate", lambda task: checks.integer(name, task.max_new_tokens, 0, 5)
    )
    command = ["generate", "--config", str(file := write("prompt: a\nmodel: m\nmax-new-tokens: 9\n"))]
    complaint = f"{name} is 9; expected an integer from 0 to 5\n"
    assert main(command) == 2
    assert capsys.readouterr().err == f"locas: {file}: {complaint}"
    # where the command line has the last word, the file is not to blame
    assert main([*command, "--max-new-tokens", "9"]) == 2
    assert capsys.readouterr().err == f"locas: {complaint}"


SCRAPS = st.sampled_from(
    ["a", ": ", "\n", "- ", "[", "]", "{", "}", "!", "&", "*", "'", '"', "<<", "? ", "|", ">", "1", "#", "\t", "%", "\x85"]
)


@given(st.binary(max_size=40) | st.lists(SCRAPS, max_size=20).map(lambda parts: "".join(parts).encode()))
@example(b"? [a]\n: 1")
@example(b"<<: {a: 1}")
@example(b"a: 2026-13-45")
def test_any_bytes_are_a_mapping_or_one_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        mapping = read_mapping(file)
    except ValueError as error:
        assert str(error).startswith(str(file))
        return
    assert all(isinstance(key, str) for key in mapping)
