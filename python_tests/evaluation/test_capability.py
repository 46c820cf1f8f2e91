"""`locas capability` as a command: its files, its exit status, lm-eval's tasks, its report."""

import json
import math

import numpy as np
import pytest
import torch
from support.helpers import learned, logits_of

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.evaluation.capability import command, held_out
from locas_ext.evaluation.report.capability import capability_sections
from locas_ext.memory import Memory


# ---- the command -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """-> a folder with a memory of the shipped model, a memory of another host and some texts."""
    folder = tmp_path_factory.mktemp("capability")
    (folder / "page.txt").write_text((ASSETS / "nostromo.txt").read_text()[1000:3000])
    (folder / "a.txt").write_text((ASSETS / "tono-bungay.txt").read_text()[2000:3000])
    (folder / "b.txt").write_text((ASSETS / "tono-bungay.txt").read_text()[5000:5600])
    (folder / "letter.txt").write_text("a")
    arguments = ["--window", "64", "--stride", "32", "--rank", "4", "--device", "cpu", "--scale", "1"]
    page, out = str(folder / "page.txt"), str(folder / "memory")
    assert main(["memorize", page, "--model", str(MODEL), "--out", out, *arguments]) == 0
    _, foreign = learned()
    foreign.save_pretrained(folder / "foreign")
    return folder


def run(capsys, files, *arguments, memory="memory"):
    fixed = ["capability", "--model", MODEL, "--memory", files / memory, "--device", "cpu", "--window", 64]
    status = main([str(argument) for argument in [*fixed, *arguments]])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_results_and_report_and_takes_up_where_it_was(files, tmp_path, capsys, monkeypatch):
    texts = ["--held-out", files / "a.txt", "--held-out", files / "b.txt"]
    out = tmp_path / "out"
    measure = command.measure

    def interrupted(model, folder, ids, window, merged):
        if (out / "results.json").exists() and json.loads((out / "results.json").read_text())["records"]:
            raise KeyboardInterrupt
        return measure(model, folder, ids, window, merged)

    monkeypatch.setattr(command, "measure", interrupted)
    status, _, err = run(capsys, files, *texts, "--out", out)
    assert status == 130 and "4 records are kept" in err
    first = json.loads((out / "results.json").read_text())["records"]

    monkeypatch.setattr(command, "measure", measure)
    status, printed, _ = run(capsys, files, *texts, "--out", out)
    assert status == 0 and "after detach() every bit of the logits is the host's" in printed
    results = json.loads((out / "results.json").read_text())
    records = results["records"]
    assert records[:4] == first
    assert [(r["text"], r["state"]) for r in records] == [
        (text, state) for text in ("a.txt", "b.txt", "all texts") for state in ("host", "attached", "merged", "detached")
    ]
    assert results["settings"]["command"] == "capability" and results["settings"]["memory_version"] > 0
    for state in range(4):
        a, b, both = records[state], records[4 + state], records[8 + state]
        assert both["tokens"] == a["tokens"] + b["tokens"]
        logs = [r["tokens"] * math.log(r["perplexity"]) for r in (a, b, both)]
        assert logs[2] == pytest.approx(logs[0] + logs[1])
    attached = records[9]
    assert attached["kl_interval"][0] < attached["kl"] < attached["kl_interval"][1]
    report = (out / "report.md").read_text()
    assert "# Capability: tiny-glu" in report and "all texts" in report and f"{attached['perplexity']:.3f}" in report

    monkeypatch.setattr(command, "measure", None)  # all is there already
    assert run(capsys, files, *texts, "--out", out)[0] == 0
    status, _, err = run(capsys, files, *texts, "--out", out, "--seed", 1)
    assert status == 2 and "seed was 0, is 1" in err


def test_the_memory_learned_more_of_its_own_page_than_of_another_text(files, capsys, tmp_path):
    texts = ["--held-out", files / "page.txt", "--held-out", files / "a.txt"]
    status, _, _ = run(capsys, files, *texts, "--no-merged", "--out", tmp_path / "out")
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    ratios = {r["text"]: r["perplexity_ratio"] for r in records if r["state"] == "attached"}
    assert status == 0 and ratios["page.txt"] < 0.99 and ratios["page.txt"] < ratios["a.txt"]
    assert not any(r["state"] == "merged" for r in records)


def test_a_broken_detach_is_exit_status_1(files, capsys, monkeypatch):
    detach = Memory.detach

    def broken(memory):
        detach(memory)
        with torch.no_grad():
            memory.model.model.norm.weight[0] *= 1.001

    monkeypatch.setattr(Memory, "detach", broken)
    status, printed, err = run(capsys, files, "--held-out", files / "b.txt", "--no-merged")
    assert status == 1 and "tokens 1 to 64 of b.txt" in err.splitlines()[-1] and "detached" in printed


@pytest.mark.parametrize(
    "arguments, memory, status, complaint",
    [
        ([], "foreign", 1, "is a memory of another host"),
        ([], "nowhere", 2, "is not a folder"),
        (["--held-out", "{files}/letter.txt"], "memory", 2, "letter.txt holds 1 token; expected at least 2"),
        (["--held-out", "{files}/none.txt"], "memory", 2, "No such file"),
        (["--window", "1"], "memory", 2, "--window is 1; expected an integer >= 2"),
        (["--window", "99999"], "memory", 2, "window is 99999; expected an integer from 2 to"),
        (["--out", "{files}/a.txt"], "memory", 2, "is a file"),
        (["--out", "{files}"], "memory", 2, "holds something else"),
        (["--held-out-tokens", "1"], "memory", 2, "--held-out-tokens is 1"),
        (["--limit", "3"], "memory", 2, "--tasks is empty"),
        (["--tasks", ","], "memory", 2, "--tasks is empty"),
        (["--harness", "builtin"], "memory", 2, "--tasks is empty"),
        (["--batch-size", "4"], "memory", 2, "--tasks is empty"),
        (["--tasks", "mmlu", "--limit", "0"], "memory", 2, "--limit is 0"),
        (["--tasks", "mmlu", "--few-shot", "-1"], "memory", 2, "--few-shot is -1"),
        (["--tasks", "mmlu", "--batch-size", "0"], "memory", 2, "--batch-size is 0"),
        (["--tasks", "mmlu", "--include-path", "{files}/none"], "memory", 2, "is not a folder"),
    ],
)
def test_bad_arguments_are_one_line(files, capsys, arguments, memory, status, complaint):
    found, _, err = run(capsys, files, *[argument.format(files=files) for argument in arguments], memory=memory)
    lines = [line for line in err.splitlines() if line.startswith("locas: ")]
    assert found == status and len(lines) == 1 and complaint in lines[0]


def test_without_lm_eval_the_error_says_what_to_install(files, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    status, _, err = run(capsys, files, "--tasks", "mmlu", "--harness", "lm-eval")
    assert status == 1 and "pip install 'locas_ext[eval]'" in err.splitlines()[-1]


# ---- lm-eval ---------------------------------------------------------------------------------------------------
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
GROUP = """group: locas_things
task:
  - locas_hills
  - locas_rivers
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1
"""


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    generator = np.random.default_rng(0)
    words = ["red", "green", "blue", "silver", "white", "gold"]
    for name, count in (("locas_hills", 9), ("locas_rivers", 5)):
        questions = [
            {
                "question": f"Number {index} of the {name[6:]} was",
                "answer": int(generator.integers(3)),
                "choices": [str(word) for word in generator.choice(words, 3, replace=False)],
            }
            for index in range(count)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(question) for question in questions))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
    (folder / "group.yaml").write_text(GROUP)
    return folder


def accuracy_by_hand(model, tokenizer, folder):
    """Whether the answer's continuation is the likeliest of the choices, question by question."""
    right = []
    for name in ("locas_hills", "locas_rivers"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            question = json.loads(line)
            scores = []
            for choice in question["choices"]:
                prompt = tokenizer(question["question"])["input_ids"]
                ids = torch.tensor(tokenizer(f"{question['question']} {choice}")["input_ids"])
                log_p = logits_of(model, ids[:-1]).double().log_softmax(-1)
                scores.append(log_p.gather(1, ids[1:, None])[len(prompt) - 1 :].sum().item())
            right.append(float(int(np.argmax(scores)) == question["answer"]))
    return right


def test_lm_evals_tasks_are_answered_by_every_state(files, local_tasks, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    asked = ["--tasks", "locas_things", "--include-path", local_tasks, "--merged"]
    status, printed, err = run(capsys, files, "--held-out", files / "b.txt", *asked, "--out", out)
    assert status == 0, err
    assert "and so are the answers to 14 questions" in printed
    records = [r for r in json.loads((out / "results.json").read_text())["records"] if "task" in r]
    assert [(r["state"], r["task"], r["metric"]) for r in records] == [
        (state, "locas_things", "acc,none") for state in ("host", "attached", "merged", "detached")
    ]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    host = accuracy_by_hand(model, tokenizer, local_tasks)
    locas.load(model, files / "memory")
    attached = accuracy_by_hand(model, tokenizer, local_tasks)
    for record, expected in zip(records, (host, attached, attached, host), strict=False):
        assert sorted(record["per_question"]) == sorted(expected)
        assert record["value"] == pytest.approx(np.mean(expected))
        assert record["difference"] == pytest.approx(np.mean(expected) - np.mean(host))
    assert [r["same_bits_as_host"] for r in records] == [True, False, False, True]

    status, _, err = run(capsys, files, "--tasks", "locas_things,nonsense", "--include-path", local_tasks)
    assert status == 2 and "lm-eval has no nonsense" in err.splitlines()[-1]


# ---- the report ------------------------------------------------------------------------------------------------
def test_the_report_of_several_runs_says_which_run_each_table_is_of():
    def record(state, run, same):
        windows = [[8, 20.0, 1.0, 7, 0.5], [8, 18.0, -0.5, 8, 0.25]]
        scores = held_out.StateScores(state, windows, None if same else (8, 16))
        return command._text_record("a.txt", scores, seed=0) | {"run": run}

    records = [record("host", "one", True), record("detached", "one", True), record("detached", "two", False)]
    lines = "\n".join(capability_sections({"settings": {}, "records": records}, None))
    assert "(one)" in lines and "(two)" in lines
    assert "Detached (one): after detach() every bit" in lines
    assert "Detached (two): after detach() the logits differ from the host's, first at tokens 8 to 16 of a.txt" in lines
