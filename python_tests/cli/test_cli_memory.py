"""`locas memorize`, `generate` and `merge` on the shipped model and a page of the shipped novel."""

import os
import random
import re
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import WINDOW, exit_with_status, run
from support.forked import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation.assets import MODEL, load_model
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.storage.lock import folder_lock


@pytest.fixture(scope="module")
def memory_folder(page, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "memory"
    assert main(["memorize", str(page), "--model", str(MODEL), "--out", str(out), *WINDOW]) == 0
    return out


def test_memorize_equals_the_python_call(page, memory_folder):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(MODEL)(page.read_text())["input_ids"]
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.memorize(ids, window=64, stride=32, progress=False)
    assert torch.equal(load_file(memory_folder / "locas_memory.safetensors")["slots"], memory.slots)


def test_what_came_of_it_and_what_to_type_next(page, tmp_path, capsys):
    out = tmp_path / "a memory"
    command = ["memorize", page, "--model", MODEL, "--out", out, *WINDOW, "--rehome", "--max-tokens", 150]
    status, said, _ = run(capsys, *command)
    assert status == 0
    alone = re.search(r"on (\d) of its (\d) chunks: ([\d.]+) while reading, ([\d.]+) by the host alone\n", said)
    assert alone[1] == alone[2] == "5"  # a run this short is compared as a whole
    model, ids = load_model(), torch.tensor(AutoTokenizer.from_pretrained(MODEL)(page.read_text())["input_ids"][:150])
    assert alone[4] == f"{truncation(model, ids, 64, 32, progress=False).perplexity:.2f}"
    assert f"perplexity {alone[3]} while reading" in said
    assert f"locas generate --model {MODEL} --memory '{out}'" in said and f"locas info '{out}'" in said
    assert re.search(r"24,576 parameters, 5 updates, [\d.]+ kB", said)

    status, said, _ = run(capsys, "info", out)
    assert status == 0
    for words in ("qwen3, 8 layers", "rank 4", "page: 150 tokens, learned 20", "5 updates", "yes, after token 150", "format 2"):
        assert words in said
    status, _, err = run(capsys, "report", out)
    assert status == 2 and "is a memory" in err and "locas info" in err


def test_an_existing_memory_is_not_overwritten(page, memory_folder, capsys):
    before = (memory_folder / "locas_memory.safetensors").read_bytes()
    status, _, err = run(capsys, "memorize", page, "--model", MODEL, "--out", memory_folder, *WINDOW)
    assert status == 2 and "--resume" in err
    assert (memory_folder / "locas_memory.safetensors").read_bytes() == before


def test_a_second_run_into_a_folder_is_refused_and_told_of_the_first(page, memory_folder, capsys):
    before, held, done = (memory_folder / "locas_config.json").read_bytes(), threading.Event(), threading.Event()

    def first_run():
        with folder_lock(memory_folder):
            held.set()
            done.wait(120)

    thread = threading.Thread(target=first_run)
    thread.start()
    held.wait()
    try:
        status, _, err = run(capsys, "memorize", page, "--model", MODEL, "--out", memory_folder, "--resume", *WINDOW)
    finally:
        done.set()
        thread.join()
    assert status == 1 and f"is being saved into by process {os.getpid()}" in " ".join(err.split())
    assert (memory_folder / "locas_config.json").read_bytes() == before


def test_resume_refuses_other_settings_and_says_which(page, memory_folder, capsys):
    status, _, err = run(
        capsys, "memorize", page, "--model", MODEL, "--out", memory_folder, "--resume", "--window", 64, "--stride", 16
    )
    assert status == 1 and "rank was 4, is 64" in err
    status, _, err = run(
        capsys,
        "memorize",
        page,
        "--model",
        MODEL,
        "--out",
        memory_folder,
        "--resume",
        "--window",
        64,
        "--stride",
        16,
        "--rank",
        4,
    )
    assert status == 1 and "stride was 32, is 16" in err
    status, _, err = run(
        capsys, "memorize", page, "--model", MODEL, "--out", memory_folder, "--resume", "--rank", 4, "--no-clip"
    )
    assert status == 1 and "clip was True, is False" in err


def test_a_killed_run_resumes_to_the_bit(page, memory_folder, tmp_path):
    out = tmp_path / "memory"
    command = ["memorize", str(page), "--model", str(MODEL), "--out", str(out), *WINDOW, "--save-every", "1"]
    draw = random.Random(0)
    for kill in (True, True, False):
        resume = ["--resume"] if (out / "locas_config.json").exists() else []
        process = forked(exit_with_status, [*command, *resume])
        process.start()
        if kill:
            first = (out / "locas_config.json").stat().st_mtime_ns if resume else 0
            # Let it learn a chunk or more, then pull the plug at whatever moment this is.
            while process.is_alive():
                file = out / "locas_config.json"
                if file.exists() and file.stat().st_mtime_ns != first:
                    break
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
        process.join()
    assert process.exitcode == 0
    for name, expected in load_file(memory_folder / "locas_memory.safetensors").items():
        assert torch.equal(load_file(out / "locas_memory.safetensors")[name], expected), name


def test_generate_continues_the_prompt_with_and_without_memory(memory_folder, capsys):
    arguments = ["--model", MODEL, "--prompt", "In the time of Spanish rule", "--max-new-tokens", 8]
    status, alone, _ = run(capsys, "generate", *arguments)
    assert status == 0 and alone.startswith("In the time of Spanish rule")
    status, remembered, _ = run(capsys, "generate", *arguments, "--memory", memory_folder)
    assert status == 0 and remembered.startswith("In the time of Spanish rule")


def test_merge_writes_a_plain_checkpoint(page, memory_folder, tmp_path, capsys):
    status, out, _ = run(capsys, "merge", "--model", MODEL, "--memory", memory_folder, "--out", tmp_path / "merged")
    assert status == 0 and "768 -> 1024" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    locas.load(model, memory_folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "merged")(page.read_text())["input_ids"][:40])[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    status, _, err = run(capsys, "merge", "--model", MODEL, "--memory", memory_folder, "--out", tmp_path / "merged")
    assert status == 2 and "holds something already" in err


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["memorize", "{missing}.txt", "--model", "{model}", "--out", "{new}"], "No such file"),
        (["memorize", "{empty}", "--model", "{model}", "--out", "{new}"], "holds no text"),
        (["memorize", "{binary}", "--model", "{model}", "--out", "{new}"], "not UTF-8"),
        (["memorize", "{letter}", "--model", "{model}", "--out", "{new}"], "{letter} holds 1 token; expected at least"),
        (["memorize", "{foreign}", "--model", "{model}", "--out", "{new}"], "{foreign}: Is a directory"),
        (["memorize", "{page}", "--model", "{missing}", "--out", "{new}"], "is not a folder"),
        (
            ["memorize", "{page}", "--model", "{page}", "--out", "{new}"],
            "a folder, a hub name or a GGUF file",
        ),
        (["memorize", "{page}", "--model", "{model}", "--out", "{page}"], "is a file; expected a folder"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{page}/m"], "Not a directory"),
        (["memorize", "{page}", "--model", "{model}"], "Missing option '--out'"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--optimizer", "lion"], "optimizer is 'lion'"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--init", "best"], "init is 'best'"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{foreign}"], "holds something else"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--resume"], "holds no memory to resume"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--rank", "0"], "rank is 0"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--save-every", "0"], "--save-every is 0"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--dtype", "int3"], "dtype is 'int3'"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["memorize", "{page}", "--model", "{model}", "--out", "{new}", "--window", "9999"], "window is 9999"),
        (["generate", "--model", "{model}", "--prompt", ""], "--prompt is empty"),
        (["generate", "--model", "{model}", "--prompt", "x", "--memory", "{missing}"], "is not a folder"),
        (["generate", "--model", "{model}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "--model", "{model}", "--prompt", "x", "--max-new-tokens", "9999"], "positions"),
        (["generate", "--model", "{model}", "--prompt", "x", "--temperature", "-1"], "--temperature is -1"),
        (
            ["merge", "--model", "{model}", "--memory", "{foreign}", "--out", "{page}"],
            "{page} is a file; expected a new",
        ),
        (["merge", "--model", "{model}", "--memory", "{foreign}", "--out", "{foreign}"], "holds something already"),
        (["merge", "--model", "{model}", "--memory", "{foreign}", "--out", "{new}"], "holds no memory"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, complaint, page, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("missing", "empty", "letter", "binary", "foreign", "new")}
    places["empty"].write_text("")
    places["letter"].write_text("a")
    places["binary"].write_bytes(b"\xff\xfe\x00")
    places["foreign"].mkdir()
    (places["foreign"] / "thesis.tex").write_text("years of work")
    status, _, err = run(capsys, *[a.format(model=MODEL, page=page, **places) for a in arguments])
    line = [text for text in err.splitlines() if text.startswith("locas: ")]
    assert status == 2 and len(line) == 1 and complaint.format(page=page, **places) in line[0]
    assert not places["new"].exists()
    assert [file.name for file in places["foreign"].iterdir()] == ["thesis.tex"]
