"""`locas locomo` from end to end on a tiny random host, against plain `generate` calls."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from support.helpers import assert_same_host, save_host, snapshot, tiny_model, tiny_opt
from support.locomo import plain_answer
from support.locomo_samples import KITES

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation import results
from locas_ext.evaluation.locomo import command, scoring
from locas_ext.evaluation.locomo.answers import answer, make_prompts
from locas_ext.evaluation.locomo.data import read_dialogues
from locas_ext.evaluation.locomo.prompts import dialogue_text
from locas_ext.evaluation.methods.temp_lora import lora, temp_lora
from locas_ext.evaluation.report import build

NEW_TOKENS = 8
OPTIONS = ["--window", "64", "--stride", "16", "--rank", "4", "--scale", "host", "--learning-rate", "0.05"]
OPTIONS += ["--temp-lora-rank", "2", "--temp-lora-lr", "0.03", "--temp-lora-epochs", "1"]
OPTIONS += ["--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"]


@pytest.fixture(scope="module")
def host_folder(tokenizer, tmp_path_factory):
    host = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=300, eos_token_id=0)
    return save_host(host, tmp_path_factory.mktemp("host"))


def run(capsys, data, host_folder, out, methods, *more):
    status = main(
        [
            "locomo",
            str(data),
            "--model",
            str(host_folder),
            "--out",
            str(out),
            "--methods",
            methods,
            *OPTIONS,
            *map(str, more),
        ]
    )
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def predictions(out, method):
    return [json.loads(line) for line in (out / f"predictions-{method}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(data, host_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    status = main(
        ["locomo", str(data), "--model", str(host_folder), "--out", str(out), "--methods", ",".join(command.METHODS), *OPTIONS]
    )
    assert status == 0
    return out


@contextmanager
def having_read(model, ids, memory_name):
    """The model with the memory of OPTIONS, through the calls that a user would make."""
    if memory_name == "locas":
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
        memory.memorize(ids, window=64, stride=16, learning_rate=0.05, progress=False)
        yield
        memory.detach()
    elif memory_name == "temp-lora":
        with lora(model, 2) as parameters:
            temp_lora(model, parameters, ids, 64, 16, learning_rate=0.03, epochs=1, progress=False)
            yield
    else:
        yield


@pytest.mark.parametrize("method", command.METHODS)
def test_every_method_answers_as_generate_does_after_the_same_reading(method, finished, data, host_folder, tokenizer):
    model, _ = command.load_host(str(host_folder), None, "cpu")
    context, _, memory_name = method.partition("+")
    lines = predictions(finished, method)
    at = 0
    for dialogue in read_dialogues([data]):
        prompts = make_prompts(tokenizer, dialogue, context == "full-context", 300, NEW_TOKENS)
        whole = torch.tensor(tokenizer(dialogue_text(dialogue), add_special_tokens=False)["input_ids"])
        with having_read(model, whole, memory_name):
            answers = [
                plain_answer(model, tokenizer, torch.cat([prompts.context, ids]), NEW_TOKENS) for ids in prompts.questions
            ]
        for index, (question, prediction) in enumerate(zip(dialogue.questions, answers, strict=False)):
            expected = {
                "dialogue": dialogue.name,
                "index": index,
                "category": question.category,
                "question": question.text,
                "gold": question.answer,
                "prediction": prediction,
                "cut_tokens": prompts.cut_tokens,
                "f1": scoring.official_score(question, prediction),
            }
            if question.category == 5:
                trap_f1 = scoring.trap_score(question, prediction)
                expected |= {"trap": question.trap, "trap_f1": trap_f1}
            assert lines[at] == expected
            at += 1
    assert at == len(lines) == 9


def test_memory_and_context_both_show_in_the_answers(finished):
    answers = {method: [line["prediction"] for line in predictions(finished, method)] for method in command.METHODS}
    assert len(set(map(tuple, answers.values()))) == len(answers)


def test_results_hold_settings_scores_cuts_and_the_control(finished):
    content = results.read(finished)
    settings = content["settings"]
    assert settings["command"] == "locomo" and settings["methods"] == list(command.METHODS)
    assert settings["window"] == 64 and settings["stride"] == 16 and settings["seed"] == 0
    assert "Short answer" in settings["prompts"]["question"]
    records = {(record["method"], record["dialogue"]): record for record in content["records"]}
    assert set(records) == {(m, d) for m in (*command.METHODS, "all-refuse") for d in ("kites", "long")}
    for (method, dialogue), record in records.items():
        lines = [line for line in predictions(finished, method) if line["dialogue"] == dialogue]
        assert record["questions"] == len(lines) == {"kites": 6, "long": 3}[dialogue]
        scores = record["scores"]
        assert scores["overall"]["f1"] == pytest.approx(sum(line["f1"] for line in lines) / len(lines))
        assert scores["overall without adversarial"]["count"] == sum(line["category"] != 5 for line in lines)
        cut = method.startswith("full-context") and dialogue == "long"
        assert (record["cut_tokens"] > 0) == cut and all(line["cut_tokens"] == record["cut_tokens"] for line in lines)
        assert (record["seconds"] > 0) == (method != "all-refuse")
    control = records["all-refuse", "kites"]["scores"]
    assert control["adversarial"] == {"count": 2, "f1": 1.0} and control["single-hop"]["f1"] == 0


def test_the_report_has_a_row_a_category_and_the_prompts(finished, tmp_path):
    text = (finished / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| category | n | " + " | ".join([*command.METHODS, "all-refuse"]) + " |"
    assert [row.split(" | ")[:2] for row in rows[2:8]] == [
        ["| 1 multi-hop", "2"],
        ["| 2 temporal", "1"],
        ["| 3 open-domain", "1"],
        ["| 4 single-hop", "2"],
        ["| 5 adversarial", "3"],
        ["| 5, minus trap F1", "3"],
    ]
    assert rows[6].endswith("| 100.0 |")
    cut = results.read(finished)["records"][-1]["cut_tokens"] or next(
        record["cut_tokens"] for record in results.read(finished)["records"] if record["cut_tokens"]
    )
    assert f"- full-context, dialogue long: {cut:,} tokens" in text and "Short answer:" in text
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    merged = build.merge_reports([finished, other], tmp_path / "merged").read_text()
    assert merged.count("| category | n |") == 2 and f"({other.name})" in merged


def test_the_table_fits_a_narrow_console(finished, capsys, data, host_folder):
    status, out, _ = run(capsys, data, host_folder, finished, ",".join(command.METHODS))
    assert status == 0
    assert "…" not in out and "5 adversarial" in out and max(map(len, out.splitlines()[:16])) <= 80


def test_an_ended_run_goes_on_behind_what_was_finished(finished, data, host_folder, tmp_path, capsys, monkeypatch):
    methods, out = ",".join(command.METHODS), tmp_path / "run"
    calls = []

    def ends_in_the_second_dialogue(*arguments):
        calls.append(arguments)
        if len(calls) == len(command.METHODS) + 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(command, "answer", ends_in_the_second_dialogue)
    status, _, err = run(capsys, data, host_folder, out, methods)
    count = len(command.METHODS)
    assert status == 130 and f"{count + 3} of {2 * (count + 1)} pairs" in err and "the same command continues" in err
    # as if it had been ended a moment earlier: predictions written, results not yet
    content = json.loads((out / "results.json").read_text())
    assert content["records"].pop()["dialogue"] == "long"
    (out / "results.json").write_text(json.dumps(content))

    status, _, err = run(capsys, data, host_folder, out, methods)
    assert status == 0, err
    assert len(calls) == count + 2 + count  # the second dialogue's once more: one unrecorded, one ended
    for method in (*command.METHODS, "all-refuse"):
        assert predictions(out, method) == predictions(finished, method)
    key = lambda record: (record["method"], record["dialogue"])
    strip = lambda folder: sorted(({**record, "seconds": 0} for record in results.read(folder)["records"]), key=key)
    assert strip(out) == strip(finished)


def test_a_memory_is_fresh_for_every_dialogue(finished, data, host_folder, tmp_path, capsys):
    """The second dialogue alone gives the answers it gave after the first."""
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps([json.loads(data.read_text())[1]]))
    memories = [method for method in command.METHODS if "+" in method]
    assert run(capsys, alone, host_folder, tmp_path / "run", ",".join(memories))[0] == 0
    for method in memories:
        assert predictions(tmp_path / "run", method) == [
            line for line in predictions(finished, method) if line["dialogue"] == "long"
        ]


def test_a_two_layer_host_answers_with_a_memory_of_its_kind(data, tokenizer, tmp_path, capsys):
    host = save_host(tiny_opt(len(tokenizer), positions=300), tmp_path / "opt")
    status, _, err = run(capsys, data, host, tmp_path / "run", "no-context+locas")
    assert status == 2 and "variant" in err and not (tmp_path / "run").exists()
    status, _, err = run(capsys, data, host, tmp_path / "run", "no-context+locas", "--variant", "mlp")
    assert status == 0, err
    assert len(predictions(tmp_path / "run", "no-context+locas")) == 9
    assert results.read(tmp_path / "run")["settings"]["memories"]["locas"]["variant"] == "mlp"


def test_a_memory_may_read_the_dialogues_over_a_kept_context(data, host_folder, tmp_path, capsys, monkeypatch):
    read = []
    memorize = locas.Memory.memorize

    def noting(memory, ids, *arguments, **options):
        read.append((options["context"], options["context_gradient"]))
        return memorize(memory, ids, *arguments, **options)

    monkeypatch.setattr(locas.Memory, "memorize", noting)
    kept = ["--context", "keep", "--sinks", "2", "--refresh-every", "3"]
    status, _, err = run(capsys, data, host_folder, tmp_path / "run", "no-context+locas", *kept)
    assert status == 0, err
    assert set(read) == {(locas.Keep(sinks=2, refresh_every=3), False)}
    assert results.read(tmp_path / "run")["settings"]["memories"]["locas"]["context"] == "keep"
    status, _, err = run(capsys, data, host_folder, tmp_path / "no", "no-context+locas", *kept, "--context-gradient")
    assert status == 2 and "context_gradient is True, but context is 'keep'" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("fail", [False, True])
def test_the_host_is_as_before_at_the_end(data, host_folder, tmp_path, capsys, monkeypatch, fail):
    model, tokenizer = command.load_host(str(host_folder), None, "cpu")
    before = snapshot(model)
    monkeypatch.setattr(command, "load_host", lambda *arguments: (model, tokenizer))
    memories = [method for method in command.METHODS if method.startswith("no-context+")]
    if fail:

        def broken(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "answer", broken)
    status, _, err = run(capsys, data, host_folder, tmp_path / "run", ",".join(memories))
    assert status == (130 if fail else 0), err
    assert_same_host(model, before)


@pytest.mark.parametrize(
    "methods, options, message",
    [
        ("no-context,context", [], "no-context, full-context+locas, no-context+locas, full-context+temp-lora"),
        ("", [], "--methods is empty; expected some of"),
        ("no-context", ["--max-new-tokens", 0], "--max-new-tokens is 0; expected an integer >= 1"),
        ("no-context", ["--batch-size", 0], "--batch-size is 0; expected an integer >= 1"),
        ("no-context", ["--max-new-tokens", 290], "300 positions"),
        ("full-context,no-context+locas", ["--window", 301], "window is 301; expected an integer from 2 to 300"),
        ("full-context,no-context+locas", ["--stride", 0], "--stride is 0; expected an integer >= 1"),
        ("full-context,no-context+locas", ["--rank", 41], "rank is 41"),
        ("full-context,no-context+locas", ["--learning-rate", -1], "--learning-rate is -1"),
        ("full-context,no-context+temp-lora", ["--temp-lora-rank", 0], "temp-lora-rank is 0"),
        ("full-context,no-context+temp-lora", ["--temp-lora-lr", -1], "temp-lora-lr is -1"),
        ("full-context,no-context+temp-lora", ["--temp-lora-epochs", 0], "temp-lora-epochs is 0"),
        ("full-context,no-context+temp-lora", ["--temp-lora-alpha", 0], "temp-lora-alpha is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(methods, options, message, data, host_folder, tmp_path, capsys):
    status, _, err = run(capsys, data, host_folder, tmp_path / "run", methods, *options)
    assert status == 2 and message in err, err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_or_other_data_is_refused(finished, data, host_folder, tmp_path, capsys):
    before = (finished / "results.json").read_bytes()
    status, _, err = run(capsys, data, host_folder, finished, ",".join(command.METHODS), "--rank", 3)
    assert status == 2 and "rank was 4, is 3" in err
    changed = tmp_path / "two.json"
    changed.write_text(data.read_text().replace("red kite", "blue kite"))
    status, _, err = run(capsys, changed, host_folder, finished, ",".join(command.METHODS))
    assert status == 2 and "dialogues.kites was" in err
    assert (finished / "results.json").read_bytes() == before


def test_data_with_a_missing_key_is_refused(host_folder, tmp_path, capsys):
    bad = {key: value for key, value in KITES.items() if key != "speaker_b"}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    status, _, err = run(capsys, tmp_path / "bad.json", host_folder, tmp_path / "run", "no-context")
    assert status == 2 and "bad.json: speaker_b is missing" in err
