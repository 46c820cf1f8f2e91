"""The benchmarks of whole models run to their end on hosts small enough for a test; what they say of time is not looked at."""

import json
import sys

import pytest
import torch

from bench import decode, models, stream, write


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """As before: the benchmarks turn them on and off."""
    monkeypatch.setenv("LOCAS_CUDA_GRAPH", "1")


def run(module, monkeypatch, tmp_path, *options):
    """-> the arms' records by name; of an arm that is measured twice the latest"""
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--rank", "4", "--out", str(tmp_path / "out.json")])
    module.main()
    return {record["arm"]: record for record in json.loads((tmp_path / "out.json").read_text())["records"]}


STREAM = ("--shape", "tiny", "--tokens", "64", "--window", "24")


@pytest.mark.parametrize("stride", ["8", "1"])
def test_stream(stride, monkeypatch, tmp_path):
    records = run(stream, monkeypatch, tmp_path, *STREAM, "--stride", stride)
    assert {"memorizing", "memorizing, context kept", "truncation, host kernels", "sliding", "host step"} < set(records)
    assert ("decoding" in records) == (stride == "1") and records["truncation"]["ratio_truncation"] == 1
    assert records["memorizing"]["ratio_truncation_host_kernels"] > 0


def test_one_host_serves_all_arms_of_a_stream(monkeypatch, tmp_path):
    """As on a GPU."""
    loaded, load = [], stream.load
    monkeypatch.setattr(stream, "load", lambda arguments: loaded.append(load(arguments)) or loaded[-1])
    monkeypatch.setattr(stream, "interleaved", stream.one_by_one)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)
    fails = lambda host: pytest.fail("unreachable") if len(loaded) != 1 else (_ for _ in ()).throw(ValueError("not this host"))
    builders = stream.builders
    monkeypatch.setattr(stream, "builders", lambda arguments: {**builders(arguments), "unfit": fails})
    records = run(stream, monkeypatch, tmp_path, *STREAM, "--stride", "8", "--contexts", "keep")
    assert len(loaded) == 1 and all(record["peak_gib"] == 1 for record in records.values())
    assert "unfit" not in records and "memorizing, context kept, eager" in records
    model = loaded[0]
    assert not any("lora" in name or "slots" in name for name, _ in model.named_parameters()) and not hasattr(
        model, "peft_config"
    )


def test_decode(monkeypatch, tmp_path):
    records = run(decode, monkeypatch, tmp_path, "--shape", "tiny", "--context", "20", "--learn", "16", "--rounds", "3")
    assert set(records) == {
        "host",
        "host with a memory",
        "host again",
        "learning a token, W = 16 not yet full",
        "learning a token, W = 16",
    }


def test_write(monkeypatch, tmp_path):
    sizes = ["--hidden-size", "32", "--layers", "1", "--tokens", "32", "--stride", "8", "--slots", "16", "--rounds", "1"]
    records = run(write, monkeypatch, tmp_path, *sizes)
    assert {"write", "write, drop oldest", "write, NL-SVD each chunk", "truncation again"} < set(records)


@pytest.mark.parametrize("module", [stream, decode])
def test_4_bit_without_bitsandbytes(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(module, monkeypatch, tmp_path, "--load-in-4bit")
    assert "--load-in-4bit needs the package bitsandbytes" in capsys.readouterr().err
