"""`locas perplexity` on the shipped model and pages of the shipped novel."""

import copy
import json
import math
import os
import shutil
import threading

import pytest
import torch
from support.helpers import chunk_bounds, tiny_opt, truncated_nll
from support.perplexity import ALL, perplexity, results_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.curve import running_perplexity
from locas_ext.evaluation.methods import registry
from locas_ext.evaluation.perplexity import jobs, parallel
from locas_ext.memory import Chunk

KEYS = {
    "method",
    "arm",
    "arm_settings",
    "book",
    "tokens",
    "nll",
    "perplexity",
    "perplexity_per_word",
    "perplexity_per_byte",
    "seconds",
    "relative_time",
    "extra_parameters",
    "curve",
    "milestones",
    "held_out_perplexity",
    "held_out_perplexity_before",
    "error",
    "peak_memory_bytes",
}


@pytest.fixture(scope="module")
def study(texts, tmp_path_factory):
    """The output folder of all methods on both books."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert perplexity(texts[:2], out, *ALL, "--held-out", texts[2]) == 0
    return out


def by_arm(folder, book):
    return {record["arm"]: record for record in results_of(folder)["records"] if record["book"] == book}


def host_and_ids(file, tokens=300):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model, torch.tensor(AutoTokenizer.from_pretrained(MODEL)(file.read_text())["input_ids"][:tokens])


def windowed_perplexity(model, ids, window):
    """Side by side windows, one plain forward each."""
    nll = sum(truncated_nll(model, ids, start, end, window).item() for start, end in chunk_bounds(len(ids), window))
    return math.exp(nll / (len(ids) - 1))


# ---- the numbers ---------------------------------------------------------------------------------------------
def test_the_records_hold_what_an_independent_computation_gives(study, texts):
    model, ids = host_and_ids(texts[0])
    _, other = host_and_ids(texts[2], None)
    records, plain = by_arm(study, "one"), copy.deepcopy(model).double()
    before = windowed_perplexity(plain, other, 64)
    for arm, window in (("truncation", 64), ("long-context", 128)):
        nll = sum(truncated_nll(plain, ids, start, end, window).item() for start, end in chunk_bounds(300, 32))
        assert records[arm]["nll"] == pytest.approx(nll, rel=1e-5)
        assert records[arm]["held_out_perplexity"] == pytest.approx(before, rel=1e-5)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    report = memory.memorize(ids, window=64, stride=32, progress=False)
    assert records["locas"]["nll"] == report.nll
    assert records["locas"]["extra_parameters"] == memory.slots.numel()
    after = windowed_perplexity(model, other, 64)
    assert records["locas"]["held_out_perplexity"] == pytest.approx(after, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-4)
    assert records["locas"]["curve"] == [list(point) for point in running_perplexity(report.chunks)]
    for record in records.values():
        assert record["held_out_perplexity_before"] == pytest.approx(before, rel=1e-5)
        assert record["tokens"] == 299 and record["error"] is None and record["peak_memory_bytes"] is None
        assert record["perplexity"] == pytest.approx(math.exp(record["nll"] / 299)) == record["curve"][-1][1]
        assert record["relative_time"] == pytest.approx(record["seconds"] / records["truncation"]["seconds"])
    assert records["temp-lora"]["held_out_perplexity"] != records["temp-lora"]["held_out_perplexity_before"]


def test_results_json_is_complete(study, texts):
    content = results_of(study)
    assert [(record["book"], record["arm"]) for record in content["records"]] == [
        (book, arm) for book in ("one", "two") for arm in ("truncation", "locas", "temp-lora", "long-context")
    ]
    for record in content["records"]:
        assert KEYS <= record.keys()
    settings = content["settings"]
    assert settings["window"] == 64 and settings["stride"] == 32 and settings["dtype"] == "float32"
    assert [book["tokens"] for book in settings["books"]] == [300, 300] and len(settings["books"][0]["sha256"]) == 64
    assert "device" not in settings
    locas_arm, lora_arm = content["records"][1], content["records"][2]
    assert locas_arm["arm_settings"] == {
        "variant": "glu",
        "rank": 4,
        "layers": None,
        "init": "topk",
        "scale": "host",
        "clip": True,
        "row_length": "unit",
        "backend": "auto",
        "learning_rate": 4e-3,
        "epochs": 1,
        "optimizer": "adamw",
        "gate_learning_rate": None,
        "value_learning_rate": None,
        "decay_after": None,
        "cautious": False,
        "seed": 0,
        "rehome": False,
        "context_gradient": False,
    }
    assert lora_arm["arm_settings"] == {"rank": 2, "alpha": 2, "learning_rate": 1e-3, "epochs": 2, "seed": 0}


def test_the_report_is_written_beside_them(study):
    report = (study / "report.md").read_text()
    for record in results_of(study)["records"]:
        assert record["arm"] in report and f"{record['perplexity']:.2f}" in report
    assert list(study.glob("*.png"))


def test_a_two_layer_host_has_the_same_methods(texts, tmp_path):
    folder = tmp_path / "opt"
    tiny_opt(vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    options = [
        "--model",
        folder,
        "--window",
        "32",
        "--stride",
        "16",
        "--variant",
        "mlp",
        "--max-tokens",
        "128",
        *ALL,
        "--long-context",
        "64",
    ]
    assert perplexity(texts[:1], tmp_path / "out", *options) == 0
    records = results_of(tmp_path / "out")["records"]
    assert len({record["nll"] for record in records}) == len(records) == 4
    assert records[1]["arm_settings"]["variant"] == "mlp"
    assert records[1]["extra_parameters"] == 2 * 2 * 4 * 32  # layers x planes x rank x hidden size


def test_the_chunks_and_the_memory_are_kept(study, texts):
    model, ids = host_and_ids(texts[0])
    for record in results_of(study)["records"]:
        file = study / "chunks" / f"{record['book']}-{record['arm']}.jsonl"
        chunks = [Chunk(**json.loads(line)) for line in file.read_text().splitlines()]
        assert [(chunk.start, chunk.end) for chunk in chunks] == chunk_bounds(300, 32)
        assert math.fsum(chunk.nll for chunk in chunks) == pytest.approx(record["nll"], rel=1e-12)
    assert sorted(path.name for path in (study / "memories").iterdir()) == ["one-locas", "two-locas"]
    assert sorted(path.name for path in (study / "adapters").iterdir()) == ["one-temp-lora", "two-temp-lora"]
    memory = locas.load(model, study / "memories" / "one-locas")
    assert memory.version == len(chunk_bounds(300, 32))


# ---- going on ------------------------------------------------------------------------------------------------
def test_a_finished_study_is_not_run_again_and_other_settings_are_refused(study, texts, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    monkeypatch.setattr(jobs, "measure", None)
    assert perplexity(texts[:2], study, *ALL, "--held-out", texts[2]) == 0
    assert {path: path.read_bytes() for path in before} == before
    capsys.readouterr()
    assert perplexity(texts[:2], study, *ALL, "--held-out", texts[2], "--stride", 16) == 2
    assert "stride was 32, is 16" in capsys.readouterr().err


def test_ctrl_c_keeps_the_finished_records_and_the_same_command_goes_on(texts, tmp_path, monkeypatch, capsys):
    truncation, calls = registry.truncation, []

    def interrupted(*arguments, callback, **options):
        calls.append(len(calls))
        if len(calls) == 2:
            callback(Chunk(0, 32, 31, 1.0, 0))
            raise KeyboardInterrupt
        return truncation(*arguments, callback=callback, **options)

    monkeypatch.setattr(registry, "truncation", interrupted)
    options = ["--methods", "truncation"]
    assert perplexity(texts[:2], tmp_path, *options) == 130
    assert "1 of 2 records are kept" in capsys.readouterr().err
    assert [record["book"] for record in results_of(tmp_path)["records"]] == ["one"]
    assert perplexity(texts[:2], tmp_path, *options) == 0
    assert len(calls) == 3  # the second book twice
    assert [record["book"] for record in results_of(tmp_path)["records"]] == ["one", "two"]
    assert len((tmp_path / "chunks" / "two-truncation.jsonl").read_text().splitlines()) == 10


def test_more_processes_give_the_same_numbers(study, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--methods", "truncation,locas", "--held-out", texts[2], "--processes", 2]
    assert perplexity(texts[:2], tmp_path, *options) == 0
    alone = {(record["book"], record["arm"]): record for record in results_of(study)["records"]}
    records = results_of(tmp_path)["records"]
    assert len(records) == 4
    for record in records:
        for key in ("nll", "curve", "held_out_perplexity", "extra_parameters"):
            assert record[key] == alone[record["book"], record["arm"]][key], key
        assert record["processes"] == 2


def test_a_job_another_process_works_on_is_left_to_it(texts, tmp_path, capsys):
    out, options = tmp_path / "out", ["--methods", "truncation,locas"]
    assert perplexity(texts[:1], out, *options) == 0
    (out / "records" / "one-locas.json").unlink()
    log = out / "chunks" / "one-locas.jsonl"
    with parallel.claimed(log) as other:
        other.write("not yours\n")
        capsys.readouterr()
        assert perplexity(texts[:1], out, *options) == 0
        assert capsys.readouterr().out == "" and log.read_text().endswith("not yours\n")
        assert not (out / "records" / "one-locas.json").exists()
    assert perplexity(texts[:1], out, *options) == 0
    assert "not yours" not in log.read_text() and len(results_of(out)["records"]) == 2


def test_another_text_from_a_pipe_is_noticed(texts, tmp_path, capsys):
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)

    def run(content):
        feeding = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
        feeding.start()
        status = perplexity([pipe], out, "--methods", "truncation")
        feeding.join(10)
        return status

    contents = [text.read_bytes() for text in texts[:2]]
    assert run(contents[0]) == 0
    first = results_of(out)["records"]
    assert run(contents[1]) == 2
    assert "books[0].sha256 was" in capsys.readouterr().err and results_of(out)["records"] == first
    assert run(contents[0]) == 0
    assert perplexity([pipe], tmp_path / "two", "--processes", 2) == 2
    assert "can be read once only" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_noticed(texts, tmp_path, capsys):
    model = shutil.copytree(MODEL, tmp_path / "model")
    options = ["--methods", "truncation", "--model", model]
    assert perplexity(texts[:1], tmp_path / "out", *options) == 0
    host = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        host.model.norm.weight.mul_(1.5)
    host.save_pretrained(model)
    assert perplexity(texts[:1], tmp_path / "out", *options) == 2
    assert "weights_sha256 was" in capsys.readouterr().err


def test_ranks_of_a_launcher_share_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [parallel.device_for(None, index) for index in range(6)] == [f"cuda:{i}" for i in (0, 1, 2, 3, 0, 1)]
    assert parallel.device_for("cuda", 2) == "cuda:2"
    assert parallel.device_for("cuda:1", 2) == "cuda:1" and parallel.device_for("cpu", 2) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parallel.device_for(None, 3) is None
