"""`bench.paper_tables`: which command each table is, and what is kept of its results."""

import argparse
import json
import sys

import pytest
from support.ability import write_tasks

import bench.paper_tables as paper_tables
from locas_ext.evaluation.assets import ASSETS, MODEL


def options(**given):
    names = ("books", "held_out", "control_text", "study", "book", "data", "corrections", "name")
    return argparse.Namespace(**dict.fromkeys(names), **{"model": "m", "out": "o", "tokens": 7, "more": []} | given)


@pytest.mark.parametrize("table", paper_tables.TABLES)
def test_a_table_names_what_it_lacks(table):
    with pytest.raises(SystemExit, match=f"{table} needs --"):
        paper_tables.command(table, options())


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper_tables", *map(str, arguments)])
    paper_tables.main()


def test_results_are_kept_without_what_is_large_and_reported_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper_tables, "TASKS", ("winogrande", "lambada"))
    text = tmp_path / "page.txt"
    text.write_text((ASSETS / "nostromo.txt").read_text()[1000:3000])
    data = write_tasks(tmp_path / "data")
    host = ["--model", MODEL, "--name", "tiny"]
    short = ["--", "--window", "64", "--stride", "32", "--rank", "4", "--device", "cpu", "--temp-lora-rank", "2"]
    run(monkeypatch, "methods", *host, "--books", text, "--tokens", "200", "--out", tmp_path / "study", *short)
    ability = ["--study", tmp_path / "study", "--book", "page", "--out", tmp_path / "ability"]
    more = ["--", "--ability-data", data, "--device", "cpu", "--held-out", text, "--held-out-tokens", "40"]
    run(monkeypatch, "ability", *host, *ability, *more)
    assert "locas capability --memory" in capsys.readouterr().out
    kept = json.loads((tmp_path / "results" / "ability-tiny.json").read_text())
    assert str(tmp_path) not in json.dumps(kept) and kept["settings"]["memory"] == "page-locas"
    assert all(record.get("per_question") is None for record in kept["records"])
    whole = json.loads((tmp_path / "ability" / "results.json").read_text())["records"]
    assert [r["value"] for r in whole if "value" in r] == [r["value"] for r in kept["records"] if "value" in r]
    run(monkeypatch, "report", tmp_path / "again")
    for name in ("methods-tiny", "ability-tiny"):
        table = (tmp_path / "again" / name / "report.md").read_text()
        assert "page" in table or "winogrande" in table
    assert (tmp_path / "again" / "methods-tiny" / "gain-page.png").exists()
