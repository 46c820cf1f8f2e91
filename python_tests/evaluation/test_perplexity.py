"""`locas perplexity` on the shipped model and pages of the shipped novel."""

import copy
import json
import math
import sys

import pytest
import torch
from support.helpers import chunk_bounds, tiny_model, tiny_opt, truncated_nll
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.config import INITS
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.evaluation.curve import running_perplexity
from locas_ext.evaluation.inputs import read_text
from locas_ext.evaluation.methods import registry
from locas_ext.evaluation.methods.arm import METHODS
from locas_ext.evaluation.perplexity import jobs, parallel
from locas_ext.evaluation.perplexity.ablations import PRESETS
from locas_ext.memory import Chunk

OPTIONS = [
    "--model",
    str(MODEL),
    "--window",
    "64",
    "--stride",
    "32",
    "--rank",
    "4",
    "--scale",
    "host",
    "--device",
    "cpu",
    "--temp-lora-rank",
    "2",
    "--temp-lora-lr",
    "1e-3",
    "--max-tokens",
    "300",
]
ALL = ["--methods", "truncation,locas,temp-lora,long-context", "--long-context", "128"]
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
def texts(tmp_path_factory):
    """Two books and a held-out text."""
    folder, novel = tmp_path_factory.mktemp("texts"), (ASSETS / "nostromo.txt").read_text()
    files = [folder / name for name in ("one.txt", "two.txt", "other.txt")]
    files[0].write_text(novel[3000:6000])
    files[1].write_text(novel[40_000:43_000])
    files[2].write_text((ASSETS / "tono-bungay.txt").read_text()[:900])
    return files


@pytest.fixture(scope="module")
def study(texts, tmp_path_factory):
    """The output folder of all methods on both books."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert perplexity(texts[:2], out, *ALL, "--held-out", texts[2]) == 0
    return out


def perplexity(books, out, *options):
    return main([str(argument) for argument in ("perplexity", *books, *OPTIONS, "--out", out, *options)])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


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
        "init": "topk",
        "scale": "host",
        "clip": True,
        "learning_rate": 4e-3,
        "epochs": 1,
        "seed": 0,
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
    assert perplexity(texts[:2], tmp_path, *ALL, "--held-out", texts[2], "--processes", 2) == 0
    for one, two in zip(results_of(study)["records"], results_of(tmp_path)["records"], strict=False):
        for key in ("book", "arm", "nll", "curve", "held_out_perplexity", "extra_parameters"):
            assert one[key] == two[key], key
        assert two["processes"] == 2


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


def test_ranks_of_a_launcher_share_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [parallel.device_for(None, index) for index in range(6)] == [f"cuda:{i}" for i in (0, 1, 2, 3, 0, 1)]
    assert parallel.device_for("cuda", 2) == "cuda:2"
    assert parallel.device_for("cuda:1", 2) == "cuda:1" and parallel.device_for("cpu", 2) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parallel.device_for(None, 3) is None


# ---- arms that fail ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (locas.LocasError("the loss is nan at chunk 2"), "the loss is nan at chunk 2"),
    ],
)
def test_an_arm_that_fails_is_a_record_and_the_others_go_on(error, said, texts, tmp_path, monkeypatch):
    def failing(*arguments, callback, **options):
        callback(Chunk(0, 32, 31, 62.0, 0))
        raise error

    monkeypatch.setattr(registry, "long_context", failing)
    assert perplexity(texts[:1], tmp_path, "--methods", "long-context,truncation") == 0
    failed, whole = results_of(tmp_path)["records"]
    assert failed["error"] == said and failed["tokens"] == 31 and failed["curve"] == [[32, math.exp(2)]]
    for key in ("nll", "perplexity", "perplexity_per_word", "perplexity_per_byte", "held_out_perplexity"):
        assert failed[key] is None
    assert whole["error"] is None and whole["tokens"] == 299


def test_a_fault_of_the_program_is_no_result(texts, tmp_path, monkeypatch):
    def faulty(*arguments, **options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(registry, "truncation", faulty)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        perplexity(texts[:1], tmp_path, "--methods", "truncation")
    assert results_of(tmp_path)["records"] == []


# ---- counting ------------------------------------------------------------------------------------------------
def test_words_and_bytes_are_those_of_the_scored_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    file = tmp_path / "text.txt"
    file.write_text("Señor Mitchell,  don Pépé\nand «Nostromo» walked down to the harbour — slowly.\n")
    text = file.read_text()
    ids = tokenizer(text)["input_ids"]
    first = tokenizer.decode(ids[:1])
    assert text.startswith(first)
    whole = read_text(file, tokenizer, None)
    assert whole.ids.tolist() == ids and whole.name == "text"
    assert whole.bytes == len(text[len(first) :].encode()) and whole.words == len(text[len(first) :].split())
    some = read_text(file, tokenizer, len(ids) - 4)
    scored = tokenizer.decode(ids[1:-4])
    assert text[len(first) :].startswith(scored)
    assert some.bytes == len(scored.encode()) and some.words == len(scored.split())
    assert some.fingerprint["tokens"] == len(ids) - 4 and some.sha256 == whole.sha256


def test_milestones_are_of_all_chunks_up_to_them():
    curve = [(position, float(position)) for position in range(300, 100_100, 300)]
    assert curve[-1][0] == 99_900
    assert jobs.milestones(curve) == {"50000": 49_800.0}
    assert jobs.milestones([*curve, (100_000, 7.0)]) == {"50000": 49_800.0, "100000": 7.0}
    assert jobs.milestones(curve[:10]) == {} == jobs.milestones([])


# ---- ablations -----------------------------------------------------------------------------------------------
def _preset(name):
    base = {
        "truncation": {},
        "long-context": {"context": 9},
        "temp-lora": dict(rank=64, alpha=None, learning_rate=5e-5, epochs=2, seed=1),
        "locas": dict(variant="glu", rank=64, init="topk", scale="paper", clip=True, learning_rate=3e-3, epochs=1, seed=1),
    }
    return PRESETS[name](base)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_arms_of_their_own(name):
    arms = _preset(name)
    assert arms[0].label == arms[0].method == "truncation"
    assert len({arm.label for arm in arms}) == len({arm.slug for arm in arms}) == len(arms) <= 40
    assert len({(arm.method, *map(str, arm.settings.items())) for arm in arms}) == len(arms)
    for arm in arms:
        if arm.method == "locas":
            registry.locas_config(arm.settings)  # settings that exist
        if arm.method == "temp-lora":
            assert arm.settings["alpha"] == arm.settings["rank"]


def test_presets_vary_what_they_are_named_after():
    assert {arm.settings["init"] for arm in _preset("init")[1:]} == set(INITS)
    for method in ("locas", "temp-lora"):
        assert [arm.settings["rank"] for arm in _preset("rank") if arm.method == method] == [16, 32, 64, 128]
        rates = [arm.settings["learning_rate"] for arm in _preset("learning-rate") if arm.method == method]
        assert len(rates) >= 5 and rates == sorted(set(rates))
    locas_arms = [arm.settings for arm in _preset("scale") if arm.method == "locas"]
    assert {arm["scale"] for arm in locas_arms} == {"paper", "2x", "4x", "8x", "16x", "32x", "host"}
    assert {arm["epochs"] for arm in locas_arms} == {1, 2, 3} and {arm["clip"] for arm in locas_arms} == {True, False}
    assert len({arm["rank"] for arm in locas_arms}) > 2
    assert len({arm.settings["rank"] for arm in _preset("scale") if arm.method == "temp-lora"}) > 2


def test_an_ablation_runs_its_arms(texts, tmp_path):
    assert perplexity(texts[:1], tmp_path, "--ablate", "init", "--methods", "locas,truncation", "--max-tokens", 96) == 0
    records = results_of(tmp_path)["records"]
    assert [record["arm"] for record in records][:3] == ["truncation", "locas init=activation", "locas init=gaussian"]
    assert len({record["nll"] for record in records}) == len(records)


@pytest.mark.parametrize("multiple", ["2x", "0.5x", "16x"])
def test_a_scale_may_be_a_multiple_of_the_papers(multiple):
    paper = locas.attach(tiny_model("llama"), locas.LocasConfig(rank=4)).scale
    ours = locas.attach(tiny_model("llama"), locas.LocasConfig(rank=4, scale=multiple)).scale
    torch.testing.assert_close(ours, float(multiple[:-1]) * paper)


# ---- bad arguments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--methods", "truncation,lora"], f"--methods is 'lora'; expected {', '.join(METHODS)}"),
        (["--methods", "locas,locas"], "names locas twice"),
        (["--methods", ","], "--methods is empty"),
        (["--ablate", "width"], "--ablate is 'width'; expected init, rank, learning-rate, scale"),
        (["--ablate", "scale"], "needs --held-out"),
        (["--ablate", "init", "--methods", "temp-lora"], "has no arm with the methods temp-lora"),
        (["--window", "9999"], "--window is 9999; expected an integer from 2 to 2048"),
        (["--stride", "65"], "--stride is 65; expected an integer from 1 to 64"),
        (["--stride", "64", "--bos"], "--stride is 64; expected an integer from 1 to 63"),
        (["--max-tokens", "63"], "63 tokens to read are fewer than the window, 64"),
        (["--max-tokens", "1"], "--max-tokens is 1"),
        (["--held-out", "{missing}"], "missing.txt"),
        (["--held-out-tokens", "0"], "--held-out-tokens is 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--rank", "0"], "--rank is 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--init", "best"], "init is 'best'"),
        (["--init", "activation", "--rank", "33"], "use a --stride of at least the rank"),
        (["--variant", "moe"], "variant is 'moe'"),
        (["--scale", "big"], "expected paper, a multiple such as 16x"),
        (["--scale", "0x"], "expected paper, a multiple such as 16x"),
        (["--temp-lora-rank", "0"], "--temp-lora-rank is 0"),
        (["--temp-lora-lr", "nan"], "--temp-lora-lr is nan"),
        (["--temp-lora-alpha", "0"], "--temp-lora-alpha is 0"),
        (["--temp-lora-epochs", "0"], "--temp-lora-epochs is 0"),
        (["--methods", "long-context", "--long-context", "9999"], "--long-context is 9999"),
        (["--methods", "long-context", "--long-context", "31"], "--long-context is 31; expected an integer from 32"),
        (["--processes", "0"], "--processes is 0"),
        (["--out", "{text}"], "is a file; expected a folder"),
        (["--dtype", "int3"], "dtype is 'int3'"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(options, complaint, texts, tmp_path, capsys):
    places = dict(missing=tmp_path / "missing.txt", text=texts[0])
    out = tmp_path / "new"
    assert perplexity(texts[:1], out, *[option.format(**places) for option in options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locas: ")]
    assert len(lines) == 1 and complaint in lines[0]
    assert not out.exists()


def test_two_books_of_one_name_are_refused(texts, tmp_path, capsys):
    same = tmp_path / "one.md"
    same.write_text(texts[0].read_text())
    assert perplexity([texts[0], same], tmp_path / "new") == 2
    assert "two books of one name" in capsys.readouterr().err


def test_without_peft_the_extra_is_named_before_anything_runs(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert perplexity(texts[:1], tmp_path / "new", *ALL) == 1
    assert "locas_ext[eval]" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_damaged_record_is_named(texts, tmp_path, capsys):
    options = ["--methods", "truncation", "--max-tokens", "64"]
    assert perplexity(texts[:1], tmp_path, *options) == 0
    (tmp_path / "records" / "one-truncation.json").write_text("{")
    capsys.readouterr()
    assert perplexity(texts[:1], tmp_path, *options) == 1
    assert "one-truncation.json is damaged" in capsys.readouterr().err
