"""`python -m bench.census`: its verdicts on known hosts, on broken memories, and what it does with processes that die."""

import dataclasses
import itertools
import json
import os
import sys
import time
import types

import pytest

import locas_ext as locas
from bench import census, host_checks


@pytest.mark.parametrize(
    ("name", "verdict", "standing", "merge"),
    [
        ("Qwen3ForCausalLM", "works", "whole", "works"),
        ("OPTForCausalLM", "works", "between", "works"),
        ("MixtralForCausalLM", "works", "beside", "refused"),
        ("JambaForCausalLM", "works", "whole in some layers", "refused"),
        ("MuseSparkForConditionalGeneration", "works", "beside", "refused"),  # a Locas-MLP beside a block of another formula
        ("MambaForCausalLM", "refused", None, None),
        ("BlipForConditionalGeneration", "not built", None, None),
    ],
)
def test_the_verdict_on_a_known_host(name, verdict, standing, merge):
    found = host_checks.examine(name)
    assert (found["verdict"], found.get("merge")) == (verdict, merge)
    assert standing is None or census.standing(found) == standing


def broken_memorize(change):
    """memorize, with another report or other settings."""
    memorize = locas.Memory.memorize

    def broken(self, ids, **settings):
        return change(lambda **others: memorize(self, ids, **settings | others))

    return broken


def scored_otherwise(run):
    report = run()
    return dataclasses.replace(report, chunks=[dataclasses.replace(chunk, nll=chunk.nll * 1.01) for chunk in report.chunks])


@pytest.mark.parametrize(
    ("method", "replacement", "verdict"),
    [
        ("detach", lambda self: None, "not bitwise"),
        ("memorize", broken_memorize(scored_otherwise), "wrong context"),
        ("memorize", broken_memorize(lambda run: run(learning_rate=0.0)), "no learning"),
    ],
)
def test_a_broken_memory_is_found(monkeypatch, method, replacement, verdict):
    monkeypatch.setattr(locas.Memory, method, replacement)
    assert host_checks.examine("Qwen3ForCausalLM")["verdict"] == verdict


def test_a_host_that_sees_later_tokens_is_found():
    model = host_checks.small_host(host_checks.transformers.PaliGemmaForConditionalGeneration)
    assert not host_checks.is_causal(model, host_checks.logits(model, host_checks.TEXT[: host_checks.WINDOW]))


def fake(name):
    """Stands for examine: what a class does is in its name."""
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    if name == "raises":
        raise SystemExit("stopped")
    return {"verdict": "refused", "why": "no FFN was found"}


def test_a_process_that_dies_or_hangs_costs_one_class(monkeypatch):
    monkeypatch.setattr(census, "examine", fake)
    monkeypatch.setattr(census, "time", types.SimpleNamespace(monotonic=lambda: now))
    now, examined = 0.0, census.examined(["dies", "hangs", "raises", "answers"], jobs=4, seconds=2)
    results = dict(itertools.islice(examined, 3))
    now = 3.0
    results |= dict(examined)
    assert {name: result["verdict"] for name, result in results.items()} == {
        "dies": "error",
        "hangs": "error",
        "raises": "error",
        "answers": "refused",
    }
    assert "exit code 3" in results["dies"]["why"] and "no answer" in results["hangs"]["why"]


def test_classes_in_the_file_are_not_run_again(monkeypatch, tmp_path, capsys):
    file, ran = tmp_path / "census.json", []

    def examined(names, jobs, seconds):
        ran.extend(names)
        yield from ((name, {**fake(name), "seconds": 0.0}) for name in names)

    monkeypatch.setattr(census, "examined", examined)
    monkeypatch.setattr(census, "language_models", lambda: dict.fromkeys(["A", "B", "C"], "causal"))
    monkeypatch.setattr(sys, "argv", ["census", "--out", str(file), "--only", "A"])
    census.main()
    monkeypatch.setattr(sys, "argv", ["census", "--out", str(file), "--expect", "1"])
    with pytest.raises(SystemExit, match="1"):
        census.main()
    assert ran == ["A", "B", "C"] and sorted(json.loads(file.read_text())["classes"]) == ["A", "B", "C"]
    assert "| refused | 3 | 0 | 3 |" in capsys.readouterr().out
