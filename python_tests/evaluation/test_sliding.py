"""The baseline `sliding`, and `locas perplexity` and `locas memorize` with a kept context."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import attached, random_ids, save_host, tiny_model, tiny_opt
from support.kept import plain_keep
from support.perplexity import perplexity, results_of
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation.assets import ASSETS, MODEL, load_model
from locas_ext.evaluation.methods.sliding import sliding
from locas_ext.evaluation.methods.truncation import truncation

IDS = random_ids(90, seed=2)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "page.txt"
    file.write_text((ASSETS / "nostromo.txt").read_text()[:2500])
    return file


@pytest.fixture(scope="module")
def opt_host(tmp_path_factory):
    return save_host(tiny_opt(len(AutoTokenizer.from_pretrained(MODEL)), positions=128), tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(
    "run", [{}, dict(sinks=0), dict(sinks=2, window=17, stride=5), dict(bos=True), dict(window=60)], ids=str
)
def test_sliding_is_the_kept_context_of_a_host_that_learns_nothing(run):
    settings = {"window": 24, "stride": 8, **run}
    report = sliding(tiny_model("qwen3"), IDS, **settings, progress=False)
    model = tiny_model("qwen3").double()
    with torch.no_grad():
        expected = plain_keep(model, IDS, **{**settings, "bos": 1 if run.get("bos") else None})
    assert [chunk.nll for chunk in report.chunks] == pytest.approx(expected, rel=1e-5)
    assert {chunk.memory_version for chunk in report.chunks} == {0} and report.tokens == 89
    keep = locas.Keep(sinks=settings.pop("sinks", 4))
    learned = attached("qwen3")[1].memorize(
        IDS, **settings, learning_rate=0.0, context=keep, progress=False, on_divergence="ignore"
    )
    assert [chunk.nll for chunk in report.chunks] == pytest.approx([chunk.nll for chunk in learned.chunks], rel=1e-5)


def test_before_the_window_moves_it_is_truncation():
    model = tiny_model()
    reports = [method(model, IDS[:60], 60, 7, progress=False) for method in (sliding, truncation)]
    assert [chunk.nll for chunk in reports[0].chunks] == pytest.approx([chunk.nll for chunk in reports[1].chunks], rel=1e-5)


def test_sliding_leaves_the_host_as_it_was():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    sliding(model, IDS, 24, 8, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "make, window, stride, problem",
    [
        (tiny_opt, 24, 8, "context is 'keep', but OPTForCausalLM"),
        (tiny_model, 24, 20, "sinks is 4, but before a chunk of 20"),
        (tiny_model, 65, 8, "window is 65"),
    ],
)
def test_what_sliding_refuses(make, window, stride, problem):
    with pytest.raises(ValueError, match=problem):
        sliding(make(), IDS, window, stride, progress=False)


# ---- locas perplexity -----------------------------------------------------------------------------------------
def test_the_methods_beside_a_kept_context(page, tmp_path):
    assert perplexity([page], tmp_path, "--context", "keep", "--sinks", 3, "--refresh-every", 4) == 0
    results = results_of(tmp_path)
    assert [record["method"] for record in results["records"]] == ["truncation", "sliding", "locas"]
    ids = AutoTokenizer.from_pretrained(MODEL)(page.read_text())["input_ids"][:300]
    expected = sliding(load_model(), ids, 64, 32, sinks=3, progress=False)
    assert results["records"][1]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    memory = locas.attach(load_model(), locas.LocasConfig(rank=4, scale="host"))
    keep = locas.Keep(sinks=3, refresh_every=4)
    expected = memory.memorize(ids, window=64, stride=32, context=keep, progress=False)
    assert results["records"][2]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    arms = results["settings"]["arms"]
    assert arms[1]["sinks"] == 3 and (arms[2]["context"], arms[2]["sinks"], arms[2]["refresh_every"]) == ("keep", 3, 4)


def test_sliding_beside_a_memory_that_recomputes(page, tmp_path):
    assert perplexity([page], tmp_path, "--methods", "sliding,locas", "--sinks", 2, "--max-tokens", 128) == 0
    arms = results_of(tmp_path)["settings"]["arms"]
    assert arms[0]["sinks"] == 2 and "context" not in arms[1]


def test_the_ablation_of_contexts(page, tmp_path):
    assert perplexity([page], tmp_path, "--ablate", "context", "--max-tokens", 160, "--methods", "sliding,locas") == 0
    arms = [record["arm"] for record in results_of(tmp_path)["records"]]
    kept = [f"locas context=keep refresh_every={every}" for every in (4, 16)]
    assert arms == ["sliding", "locas context=recompute", "locas context=keep", *kept]


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--sinks", "3"], "--sinks is given, but --context is recompute; expected --context keep"),
        (["--methods", "sliding", "--refresh-every", "3"], "--refresh-every is given, but --context is recompute"),
        (["--context", "keep", "--refresh-every", "0"], "--refresh-every is 0; expected an integer >= 1"),
        (["--context", "kept"], "--context is 'kept'; expected one of recompute, keep"),
        (["--context", "keep", "--stride", "60"], "sinks is 4, but before a chunk of 60 tokens a window of 64"),
        (["--methods", "sliding", "--sinks", "31"], None),
        (["--methods", "sliding", "--sinks", "32"], "sinks is 32"),
    ],
)
def test_options_that_do_not_fit(page, tmp_path, capsys, options, problem):
    status = perplexity([page], tmp_path / "out", *options, "--max-tokens", 96)
    if problem is None:
        assert status == 0
        return
    assert status == 2 and problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_host_with_learned_positions_is_refused_before_anything_runs(page, opt_host, tmp_path, capsys):
    options = ["--model", opt_host, "--variant", "mlp", "--window", 64, "--stride", 32, "--device", "cpu", "--max-tokens", 96]
    command = ["perplexity", page, *options, "--methods", "truncation,sliding", "--out", tmp_path / "out"]
    assert main([str(part) for part in command]) == 2
    assert "learned ones end with their table" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- locas memorize -------------------------------------------------------------------------------------------
def test_memorize_keeps_a_context_and_resumes(page, tmp_path, capsys):
    options = ["--window", 64, "--stride", 32, "--rank", 4, "--device", "cpu", "--context", "keep", "--sinks", 3]
    command = ["memorize", page, "--model", MODEL, "--out", tmp_path / "m", *options]
    whole = ["memorize", page, "--model", MODEL, "--out", tmp_path / "whole", *options]
    assert main([str(part) for part in (*command, "--max-tokens", 320)]) == 0
    assert main([str(part) for part in (*command, "--max-tokens", 640, "--resume")]) == 0
    assert main([str(part) for part in (*whole, "--max-tokens", 640)]) == 0
    resumed, expected = (load_file(tmp_path / name / "locas_memory.safetensors") for name in ("m", "whole"))
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in expected)
    record = json.loads((tmp_path / "m" / "locas_config.json").read_text())
    assert record["stream"]["settings"]["context"] == {"sinks": 3, "refresh_every": None}
    capsys.readouterr()
    other = [str(part) for part in (*command, "--max-tokens", 640, "--resume")]
    other[other.index("--sinks") + 1] = "4"
    assert main(other) == 1 and "context was {'sinks': 3" in capsys.readouterr().err
    assert main([str(part) for part in (*command, "--context-gradient", "--resume")]) == 2
    assert "context_gradient is True, but context is 'keep'" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_a_reading():
    """It would be kept as a perplexity of nothing, in a log that no reader of JSON takes."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(locas.LocasError, match="truncation: the loss is nan at tokens 0 to 7"):
        truncation(model, random_ids(40), 16, 8, progress=False)
