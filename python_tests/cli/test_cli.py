"""The command line as a user meets it: a real process, its output and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import locas_ext
from locas_ext.cli import main
from locas_ext.cli.tasks import demo as demo_task
from locas_ext.cli.tasks.selftest import self_test
from locas_ext.evaluation.assets import load_model, read_book
from locas_ext.evaluation.curve import local_gain, running_perplexity
from locas_ext.evaluation.methods.truncation import truncation

LOCAS = Path(sys.executable).with_name("locas")


def run(*arguments, **options):
    return subprocess.run([LOCAS, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def assert_one_line(stderr, *words):
    """The last line is ours, the only one of ours, and names what was wrong (imports may have warned before)."""
    lines = stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("locas: ")] == lines[-1:], stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[-1]


# ---- demo ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("demo", "--max-tokens", 700, cwd=folder)


def test_demo_leaves_a_table_a_plot_and_a_memory(demo):
    folder, result = demo
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["locas-demo-memory", "locas-demo.png"]
    assert (folder / "locas-demo.png").read_bytes().startswith(b"\x89PNG")
    for words in ("first 700 tokens", "tokens/s", "393,216", "unchanged", "same bits"):
        assert words in result.stdout
    assert "CHANGED" not in result.stdout
    assert "700/700 tokens" in result.stderr  # the progress bars


def test_demo_reports_what_was_measured(demo):
    folder, result = demo
    model, ids = load_model(), read_book("Nostromo", "nostromo.txt", 700).ids
    alone = truncation(model, ids, 512, 128, progress=False).perplexity
    assert re.search(rf"first 700 tokens +{alone:.2f} ", result.stdout)
    memory = locas_ext.load(model, folder / "locas-demo-memory")
    assert memory.version == 6  # one update for each chunk of 128 tokens
    assert memory.config.scale == "host"  # the default
    assert truncation(model, ids[:384], 512, 512, progress=False).perplexity < alone


def test_demo_takes_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_task, "UNRELATED", 256)
    settings = ["--max-tokens", "256", "--rank", "5", "--scale", "0.3", "--epochs", "2", "--learning-rate", "1e-3"]
    assert main(["demo", *settings, "--out", str(tmp_path / "new" / "folder")]) == 0
    record = json.loads((tmp_path / "new" / "folder" / "locas-demo-memory" / "locas_config.json").read_text())
    assert record["config"]["rank"] == 5 and record["config"]["scale"] == 0.3
    assert record["memory_version"] == 4


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------
def test_interrupt_keeps_what_was_learned(tmp_path):
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen(
            [LOCAS, "demo", "--out", tmp_path],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "200"},
        )
        deadline = time.monotonic() + 240
        # The bar is redrawn on a forced terminal, so it shows when the first chunks are learned.
        while not re.search(r"\b[1-9][\d,]*/50,000 tokens", _plain(tmp_path / "stderr")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
    last = _plain(tmp_path / "stderr").strip().splitlines()[-1]
    kept = re.search(r"locas: interrupted: .*first ([\d,]+) tokens is kept in (.+)", last)
    assert kept, last
    assert Path(kept[2]) == tmp_path / "locas-demo-memory"
    assert "Traceback" not in _plain(tmp_path / "stderr")
    tokens = int(kept[1].replace(",", ""))
    memory = locas_ext.load(load_model(), kept[2])
    assert memory.version == tokens // 128 > 0
    assert not (tmp_path / "locas-demo.png").exists()

    # and it can be taken up where it ended
    ids = read_book("Nostromo", "nostromo.txt", tokens + 128).ids
    report = memory.memorize(ids, window=512, stride=128, resume=kept[2], progress=False)
    assert report.chunks[-1].end == tokens + 128 and memory.version == tokens // 128 + 1


def _plain(path):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", path.read_text())


# ---- bad arguments ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["memorise"], ["memorise"]),
        (["demo", "--ranks", "3"], ["--ranks"]),
        (["demo", "--rank", "0"], ["rank is 0"]),
        (["demo", "--rank", "many"], ["--rank", "integer"]),
        (["demo", "--rank", "769"], ["rank is 769", "768"]),
        (["demo", "--scale", "big"], ["--scale", "big", "paper"]),
        (["demo", "--max-tokens", "1"], ["--max-tokens"]),
        (["demo", "--learning-rate", "-1"], ["--learning-rate is -1"]),
        (["demo", "--learning-rate", "nan"], ["--learning-rate is nan"]),
        (["demo", "--epochs", "0"], ["epochs is 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert_one_line(capsys.readouterr().err, str(tmp_path / "file"))


def test_a_memory_folder_with_other_things_in_it_is_left_alone(tmp_path, capsys):
    letter = tmp_path / "locas-demo-memory" / "letter"
    letter.parent.mkdir()
    letter.write_text("dear reader")
    assert main(["demo", "--out", str(tmp_path)]) == 2  # before the work
    assert_one_line(capsys.readouterr().err, "locas-demo-memory", "letter")
    assert letter.read_text() == "dear reader"


def test_the_process_has_the_same_status():
    command = [sys.executable, "-m", "locas_ext", "demo", "--scale", "big"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert_one_line(result.stderr, "--scale")


def test_help_names_the_commands(capsys):
    for arguments in (["--help"], ["-h"]):
        assert main(arguments) == 0
        help_text = capsys.readouterr().out
        assert "demo" in help_text and "info" in help_text


# ---- info ------------------------------------------------------------------------------------------------------
def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    operations = ("glu_ffn", "sideway_mlp", "update_slots_", "write_slots_")
    for words in (locas_ext.__version__, torch.__version__, "safetensors", "qwen3", *operations):
        assert words in out
    assert re.search(r"^self-test: all \d+ checks passed$", out, re.M)
    assert "FAILED" not in out and "\x1b" not in out


def test_self_test_sees_a_wrong_kernel(monkeypatch, capsys):
    good = locas_ext.ops.sideway_glu
    monkeypatch.setattr(locas_ext.ops, "sideway_glu", lambda x, slots, scale: good(x, slots, scale) * 1.001)
    failed = {(check.op, check.dtype) for check in self_test(torch.device("cpu")) if not check.passed}
    assert failed == {("sideway_glu", "float32")}
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out and re.search(r"self-test: \d+ of \d+ checks failed", captured.out)
    assert_one_line(captured.err, "self-test failed")


# ---- the baseline ----------------------------------------------------------------------------------------------
def test_truncation_scores_the_windows_of_memorize():
    model, ids = load_model(), read_book("Nostromo", "nostromo.txt", 300).ids
    for window, stride in ((128, 32), (64, 64), (300, 77)):
        alone = truncation(model, ids, window, stride, progress=False)
        memory = locas_ext.attach(model)
        learned = memory.memorize(ids, window=window, stride=stride, learning_rate=0.0, progress=False)
        memory.detach()
        spans = [[(chunk.start, chunk.end, chunk.tokens) for chunk in report.chunks] for report in (alone, learned)]
        assert spans[0] == spans[1]
        torch.testing.assert_close(
            torch.tensor([c.nll for c in alone.chunks]),
            torch.tensor([c.nll for c in learned.chunks]),
            rtol=1e-5,
            atol=0,
        )


@pytest.mark.parametrize("ids, window, stride", [([1], 8, 4), ([[1], [2]], 8, 4), ([1, 2, 3], 4, 8), ([1, 2, 3], 1, 1)])
def test_truncation_refuses(ids, window, stride):
    with pytest.raises(ValueError, match="expected"):
        truncation(load_model(), ids, window, stride)


def test_curves():
    chunk = locas_ext.Chunk
    before = [chunk(0, 4, 3, 6.0, 0), chunk(4, 8, 4, 8.0, 0)]
    after = [chunk(0, 4, 3, 6.0, 0), chunk(4, 8, 4, 4.0, 1)]
    e = torch.e
    assert running_perplexity(after) == [(4, pytest.approx(e**2)), (8, pytest.approx(e ** (10 / 7)))]
    assert local_gain(before, after, 1) == [(2.0, pytest.approx(0.0)), (6.0, pytest.approx(100 * (1 - 1 / e)))]
