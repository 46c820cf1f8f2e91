"""`locas study`: from texts to a memory folder, interrupted and gone on, and what is refused."""

import json
from pathlib import Path

import pytest
from support.command_line import run
from support.helpers import save_host
from support.study import PAIRS, TEXT, study_host

import locas_ext as locas
from locas_ext.evaluation.inputs import load_host
from locas_ext.learning.study.learner import Learner

OPTIONS = ["--loss", "ce", "--epochs", 3, "--updates", 1, "--batch", 2, "--guard", 0, "--keys", "learned", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    save_host(study_host(), folder / "host")
    (folder / "text.txt").write_text(TEXT)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n\n" for q, a in PAIRS))
    return folder


def study(capsys, files, out, *more, text="text.txt"):
    if "--memory" not in more:
        more = ("--rank", 4, *more)
    return run(capsys, "study", files / text, "--model", files / "host", "--out", out, *OPTIONS, *more)


def test_given_pairs_become_a_memory(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "memory"
    status, printed, err = study(capsys, files, out, "--pairs", files / "pairs.jsonl")
    assert status == 0, err
    assert "4 questions about 1 passages (4 given)" in printed and "6 of 6 updates" in printed
    assert f"memory: {out}" in printed and "locas generate" in printed and "updates, about" in err
    model, tokenizer = load_host(str(files / "host"), None, "cpu")
    memory = locas.load(model, out)
    assert memory.version == 6 and memory.config.scale == "host" and len(memory.texts) == 1
    assert (tmp_path / "memory.study" / "progress.json").exists()
    status, _, err = study(capsys, files, out, "--pairs", files / "pairs.jsonl")
    assert status == 2 and "holds something already" in err
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    monkeypatch.chdir("here")  # the study of a folder without a name lies beside it all the same
    assert study(capsys, files, ".", "--pairs", files / "pairs.jsonl")[0] == 0
    assert (tmp_path / "here.study" / "progress.json").exists()
    further = tmp_path / "further"
    status, _, err = study(capsys, files, further, "--memory", out)
    assert status == 0, err
    memory.detach()
    assert locas.load(model, further).version > 6


def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(files, tmp_path, capsys, monkeypatch):
    update, made = Learner._update, []

    def ends(self):
        update(self)
        made.append(None)
        if len(made) == 4:
            raise KeyboardInterrupt

    pairs = ["--pairs", files / "pairs.jsonl"]
    assert study(capsys, files, tmp_path / "whole", *pairs)[0] == 0
    monkeypatch.setattr(Learner, "_update", ends)
    status, _, err = study(capsys, files, tmp_path / "cut", *pairs, "--cache", tmp_path / "kept")
    assert status == 130 and "4 updates" in err and "the same command continues" in err and not (tmp_path / "cut").exists()
    assert study(capsys, files, tmp_path / "cut", *pairs, "--cache", tmp_path / "kept")[0] == 0
    one, other = (tmp_path / name / "locas_memory.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "holds no questions; expected lines of"),
        ('{"question": "q"}\n', "pairs.jsonl, line 1 is damaged: answer is missing"),
        ('{"question": "q", "answer": "a"}\n[1]\n', "line 2 is damaged"),
        ('{"question": "q", "answer": 3}\n', "answer is 3; expected a text"),
        ('{"question": "q", "answer": " "}\n', "the answer of pair 1 is empty"),
        ("question\n", "line 1 is damaged: not valid JSON"),
    ],
)
def test_pairs_of_another_shape_are_refused_by_line(files, tmp_path, capsys, lines, message):
    (tmp_path / "pairs.jsonl").write_text(lines)
    status, _, err = study(capsys, files, tmp_path / "out", "--pairs", tmp_path / "pairs.jsonl")
    assert status == 1 and message in err and not (tmp_path / "out").exists()


def test_bad_arguments_leave_nothing_behind(files, tmp_path, capsys):
    (files / "short.txt").write_text("Few words.")
    (files / "bytes.txt").write_bytes(b"\xff\xfe")
    for options, text, message in (
        (["--gold", 2], "text.txt", "gold is 2"),
        (["--memory", files], "text.txt", "holds no memory"),
        (["--memory", files, "--scale", "paper"], "text.txt", "--scale is paper, but --memory says"),
        ([], "short.txt", "expected at least 8, to ask about"),
        ([], "bytes.txt", "is not UTF-8 text"),
        ([], "absent.txt", "absent.txt"),
    ):
        status, _, err = study(capsys, files, tmp_path / "out", *options, text=text)
        assert status in (1, 2) and message in err, (options, err)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.study").exists(), options
