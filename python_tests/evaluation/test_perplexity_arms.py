"""`locas perplexity`: arms that fail, what is counted, the ablations, bad arguments."""

import math
import sys

import pytest
import torch
from support.helpers import tiny_model
from support.perplexity import ALL, perplexity, results_of
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.config import INITS
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.methods import registry
from locas_ext.evaluation.methods.arm import METHODS
from locas_ext.evaluation.perplexity import jobs
from locas_ext.evaluation.perplexity.ablations import PRESETS
from locas_ext.evaluation.texts import read_text
from locas_ext.memory import Chunk


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


def test_a_fault_of_the_program_is_no_result(texts, tmp_path, monkeypatch, capsys):
    def faulty(*arguments, **options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(registry, "truncation", faulty)
    assert perplexity(texts[:1], tmp_path, "--methods", "truncation") == 1
    assert "this should not have happened (RuntimeError: shape mismatch)" in capsys.readouterr().err
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
        "sliding": {"sinks": 4},
        "long-context": {"context": 9},
        "temp-lora": dict(rank=64, alpha=None, learning_rate=5e-5, epochs=2, seed=1),
        "locas": registry.locas_settings(locas.LocasConfig(seed=1), {"learning_rate": 3e-3}, False, False, {}),
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
    paper = locas.attach(tiny_model("llama"), locas.LocasConfig.paper(rank=4)).scale
    ours = locas.attach(tiny_model("llama"), locas.LocasConfig(rank=4, scale=multiple)).scale
    torch.testing.assert_close(ours, float(multiple[:-1]) * paper)


# ---- bad arguments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--methods", "truncation,lora"], f"--methods is 'lora'; expected one of {', '.join(METHODS)}"),
        (["--methods", "locas,locas"], "names locas twice"),
        (["--methods", ","], "--methods is empty"),
        (["--ablate", "width"], "--ablate is 'width'; expected one of context, init, rank, learning-rate, scale"),
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
        (["--scale", "big"], "expected paper, a multiple of it such as 16x"),
        (["--scale", "0x"], "expected paper, a multiple of it such as 16x"),
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
