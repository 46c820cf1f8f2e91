"""The options of a memory in `locas perplexity` and `locas locomo` are those of `locas memorize`, and take effect."""

import pytest
import torch
from support.perplexity import perplexity, results_of

import locas_ext as locas
import locas_ext.evaluation.locomo.command
import locas_ext.evaluation.perplexity.command
from locas_ext.cli import main
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.methods.registry import locas_settings
from locas_ext.hosts.tiny import tiny_host

ONLY_LOCAS = ["--methods", "locas"]
TOKENS = 130
# Of each option: as it is typed, as it stands in a file, and what it is in Python.
CHANGED = {
    "layers": (["--layers", "-1,0"], "layers: [-1, 0]", {"config": {"layers": [-1, 0]}}),
    "backend": (["--backend", "reference"], "backend: reference", {"config": {"backend": "reference"}}),
    "rehome": (["--rehome"], "rehome: true", {"rehome": True}),
    "optimizer": (
        ["--optimizer", "shampoo", "--learning-rate", "0.01", "--cautious"],
        "optimizer: shampoo\nlearning-rate: 0.01\ncautious: true",
        {"learning": {"optimizer": "shampoo", "learning_rate": 0.01, "cautious": True}},
    ),
    "context_gradient": (["--context-gradient"], "context_gradient: true", {"context_gradient": True}),
    "context": (
        ["--context", "keep", "--sinks", "3", "--refresh-every", "2"],
        "context: keep\nsinks: 3\nrefresh-every: 2",
        {"context": locas.Keep(sinks=3, refresh_every=2)},
    ),
}


def by_the_library(text, config=None, learning=None, rehome=False, context_gradient=False, context="recompute"):
    """The summed loss of a text's first tokens, memorized in Python with the settings of support.perplexity and these."""
    host, tokenizer = load_host(str(MODEL), None, "cpu")
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][:TOKENS])
    memory = locas.attach(host, locas.LocasConfig(rank=4, scale="host", **(config or {})), rehome=rehome)
    update = locas.Backprop(**(learning or {}))
    how = dict(window=64, stride=32, update=update, context_gradient=context_gradient, context=context, progress=False)
    report = memory.memorize(ids, **how)
    return report.nll, memory.num_parameters


@pytest.fixture(scope="module")
def default_nll(texts):
    return by_the_library(texts[0])[0]


@pytest.mark.parametrize("name", CHANGED)
def test_an_option_does_what_it_does_in_python(name, texts, default_nll, tmp_path):
    typed, _, in_python = CHANGED[name]
    assert perplexity(texts[:1], tmp_path / "out", *ONLY_LOCAS, "--max-tokens", TOKENS, *typed) == 0
    (record,) = results_of(tmp_path / "out")["records"]
    nll, parameters = by_the_library(texts[0], **in_python)
    assert record["nll"] == pytest.approx(nll, rel=1e-6) and record["extra_parameters"] == parameters
    if name in ("layers", "optimizer", "context_gradient", "context"):  # the others change what computes, not what comes out
        assert record["nll"] != pytest.approx(default_nll, rel=1e-6)


def test_a_config_file_says_the_same(tmp_path, monkeypatch):
    tasks = []
    monkeypatch.setattr(locas_ext.evaluation.perplexity.command, "run_perplexity", lambda task, _: tasks.append(task))
    monkeypatch.setattr(locas_ext.evaluation.locomo.command, "run_locomo", lambda task, _: tasks.append(task))
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(in_a_file for _, in_a_file, _ in CHANGED.values()))
    options = [option for typed, _, _ in CHANGED.values() for option in typed]
    for command in ("perplexity", "locomo"):
        call = [command, "text", "--model", "m", "--out", str(tmp_path / "out")]
        assert main([*call, "--config", str(file)]) == 0 and main([*call, *options]) == 0
    from_file, *others = [task.locas for task in tasks]
    config = locas.LocasConfig(layers=[-1, 0], backend="reference")
    kept = {"context": "keep", "sinks": 3, "refresh_every": 2}
    assert from_file == locas_settings(config, CHANGED["optimizer"][2]["learning"], True, True, kept)
    assert others == [from_file] * 3


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--layers", "0,99"], "layers holds 99, but the host has 8 layers; expected indices from -8 to 7"),
        (["--layers", "0,0"], "layers names layer 0 twice"),
        (["--layers", "first"], "--layers is 'first'; expected layer indices"),
        (["--backend", "tpu"], "--backend is 'tpu'; expected one of auto, fused, matmul, reference"),
        (["--optimizer", "lion"], "--optimizer is 'lion'; expected one of adamw, sgd, shampoo"),
        (["--optimizer", "sgd", "--cautious"], "cautious is True, but optimizer is 'sgd'"),
        (["--rehome", "--backend", "reference"], "rehome is True, but the backend is 'reference'"),
        (["--sinks", "3"], "--sinks is given, but --context is recompute; expected --context keep"),
        (["--context", "keep", "--context-gradient"], "context_gradient is True, but context is 'keep'"),
    ],
)
@pytest.mark.parametrize("command", ["perplexity", "memorize"])
def test_what_does_not_fit_is_refused_in_the_words_of_memorize(command, options, complaint, texts, tmp_path, capsys):
    options = [*options, "--model", str(MODEL), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([command, str(texts[0]), *(ONLY_LOCAS if command == "perplexity" else []), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"locas: {complaint}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{}, {"learning_rate": 0.5}, {"optimizer": "sgd"}])
def test_what_no_option_says_is_as_in_memorize(given):
    """Of the settings that a run records, as the default rate depends on how the memory starts."""
    for config in (locas.LocasConfig(rank=4), locas.LocasConfig(rank=4, init="activation", scale="host")):
        memory = locas.attach(tiny_host(), config)
        memory.memorize(list(range(3, 35)), window=16, stride=8, **given, progress=False, on_divergence="ignore")
        run, settings = memory._attachment.stream.settings, locas_settings(config, given, False, False, {})
        for name in ("learning_rate", "epochs", "optimizer"):
            assert run[name] == settings[name]
