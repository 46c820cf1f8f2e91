"""Reports: the figures in the Markdown are those of the records, and runs merge."""

import json
import math
import random
import sys

import numpy as np
import pytest
from support.reports import METHODS, SETTINGS, mean, record, report, save, tables

from locas_ext import LocasError
from locas_ext.cli import main
from locas_ext.evaluation.report.build import merge_reports, write_report
from locas_ext.evaluation.report.tables import MISSING, ArmResults, collect_arms, geometric_mean, tokens_text


# ---- tables ----------------------------------------------------------------------------------------------------
def test_the_main_table_holds_the_geometric_means_and_each_books_table_its_own_figures(tmp_path):
    books = ["Nostromo", "Tono-Bungay", "The Way of All Flesh"]
    records = [record(method, book=book) for book in books for method in METHODS]
    for one in records:  # parameters are an arm's, not a book's
        one["extra_parameters"] = 1_234_567 * (1 + METHODS.index(one["method"]))
    found = tables(report(tmp_path, records))
    for row, method in zip(found["Perplexity"], METHODS, strict=True):
        mine = [one for one in records if one["method"] == method]
        assert row["arm"] == method
        assert row["50K"] == f"{mean(mine, 'milestones', '50000'):.2f}"
        assert row["54,321"] == f"{mean(mine, 'milestones', '54321'):.2f}"
        assert row["end"] == f"{mean(mine, 'perplexity'):.2f}"
        assert row["per word"] == f"{mean(mine, 'perplexity_per_word'):.2f}"
        assert row["per byte"] == f"{mean(mine, 'perplexity_per_byte'):.4f}"
        assert row["held out, before"] == "39.00"
        assert row["held out, after"] == f"{mean(mine, 'held_out_perplexity'):.2f}"
        assert row["extra parameters"] == f"{1.234567 * (1 + METHODS.index(method)):.1f}M"
        assert float(row["relative time"].removesuffix("x")) == pytest.approx(mean(mine, "relative_time"), abs=0.0051)
        assert row["peak memory"] == "2.00 GiB"
        assert "books" not in row
    for book in books:
        assert [row["arm"] for row in found[book]] == list(METHODS)
        for row, method in zip(found[book], METHODS, strict=False):
            one = next(one for one in records if (one["method"], one["book"]) == (method, book))
            assert (row["end"], row["50K"]) == (f"{one['perplexity']:.2f}", f"{one['milestones']['50000']:.2f}")
            assert (row["tokens"], row["seconds"]) == ("59,999", f"{one['seconds']:.1f}")


def test_a_mean_over_books_is_exp_of_the_mean_log_and_unknown_if_one_is():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, None]) is None
    assert geometric_mean([]) is None
    assert geometric_mean([2.0, math.inf]) == math.inf
    values = np.random.default_rng(random.randrange(2**32)).uniform(1, 1e3, 17)
    assert geometric_mean(list(values)) == pytest.approx(np.exp(np.log(values).mean()))


def test_settings_seed_and_machine_are_in_the_report(tmp_path):
    text = report(tmp_path, [record()], dtype="bfloat16")
    assert text.startswith("# Perplexity: some-host\n")
    assert "model models/some-host, window 2048, stride 512, dtype bfloat16, seed 3." in text
    assert "Machine: a processor; 2 x a GPU; torch 2.6.0." in text
    block = text.split("```json")[1].split("```")[0]
    assert json.loads(block) == {**SETTINGS, "dtype": "bfloat16"}


def test_null_and_missing_fields_leave_a_dash_and_a_column_of_dashes_is_left_out(tmp_path):
    bare = {"method": "locas", "arm": "locas", "book": "Nostromo", "perplexity": 12.5}
    (row,) = tables(report(tmp_path, [bare]))["Perplexity"]
    assert row == {"arm": "locas", "end": "12.50"}
    nulls = record("truncation", relative_time=None, peak_memory_bytes=None, held_out_perplexity_before=None)
    rows = tables(report(tmp_path, [nulls, {**bare, "relative_time": 1.5}]))["Perplexity"]
    assert [row["relative time"] for row in rows] == [MISSING, "1.50x"]
    assert [row["50K"] == MISSING for row in rows] == [False, True]
    assert "peak memory" not in rows[0] and "held out, before" not in rows[0]


def test_a_failed_arm_is_listed_with_its_error_and_not_averaged(tmp_path):
    error = "out of memory: | 80 GiB"
    failed = record("long-context", book="Nostromo", error=error, perplexity=1e9)
    whole, other = record("long-context", book="Tono-Bungay"), record("locas", book="Nostromo")
    found = tables(text := report(tmp_path, [failed, whole, other]))
    assert "## Failed\n\n- long-context, Nostromo: out of memory: \\| 80 GiB" in text
    rows = {row["arm"]: row for row in found["Perplexity"]}
    assert rows["long-context"]["end"] == f"{whole['perplexity']:.2f}"
    assert (rows["long-context"]["books"], rows["locas"]["books"]) == ("1", "1")
    assert "not comparable" in text
    nothing = report(tmp_path, [failed])
    assert "## Failed" in nothing and "|" not in nothing.replace("\\|", "")


def test_an_arm_that_made_its_book_harder_is_named(tmp_path):
    settings = {"scale": "host"}
    records = [record("truncation", perplexity=37.9), record("locas", "locas scale=host", settings=settings, perplexity=179.0)]
    records += [record("long-context", perplexity=38.0), record("temp-lora", perplexity=37.8)]
    text = report(tmp_path, records)
    listed = text.split("## Harder than without learning")[1].split("##")[0]
    assert [line for line in listed.splitlines() if line.startswith("-")] == [
        "- locas scale=host, Nostromo: 179.00, without learning 37.90"
    ]
    for others in (records[1:], [records[0], *records[2:]], [{**records[0], "tokens": 9}, records[1]]):
        assert "Harder than" not in report(tmp_path, others)


def test_a_run_that_goes_on_says_how_much_is_there(tmp_path):
    expected = {"arms": [{"arm": "locas"}, {"arm": "truncation"}], "books": [{"name": "Nostromo"}, {"name": "Typhoon"}]}
    assert "Not finished: 1 of 4 records." in report(tmp_path, [record()], **expected)
    assert "Not finished: 0 of 4 records." in report(tmp_path, [], **expected)
    whole = [record(method, book=book) for method in METHODS[:2] for book in ("Nostromo", "Typhoon")]
    assert "Not finished" not in report(tmp_path, whole, **expected)
    assert "Not finished" not in report(tmp_path, [])


def test_names_cannot_break_a_table(tmp_path):
    arm, book = "locas |x| *y* `z` <b>", "A $\\frac{ | [book](x)\n# heading"
    text = report(tmp_path, [record(arm=arm, book=book), record("truncation", book=book)])
    assert len(tables(text)["Perplexity"]) == 2
    assert "\n# heading" not in text and "<b>" not in text.split("</details>")[1].replace("\\<b>", "")


def test_labels_of_token_counts():
    assert [tokens_text(n) for n in (50_000, 200_000, 512, 54_321)] == ["50K", "200K", "512", "54,321"]


# ---- several runs ----------------------------------------------------------------------------------------------
def test_runs_are_merged_with_their_settings_and_machines(tmp_path):
    a = save(tmp_path / "a", [record("truncation"), record("locas", perplexity=20.0)], dtype="float32")
    b = save(tmp_path / "b", [record("locas", perplexity=30.0), record("temp-lora")], dtype="bfloat16", seed=4)
    text = merge_reports([a, b], tmp_path / "c").read_text()
    content = json.loads((tmp_path / "c" / "results.json").read_text())
    assert [(one["run"], one["arm"]) for one in content["records"]] == [
        ("a", "truncation"),
        ("a", "a: locas"),
        ("b", "b: locas"),
        ("b", "temp-lora"),
    ]
    for name, folder in (("a", a), ("b", b)):
        original = json.loads((folder / "results.json").read_text())
        assert content["settings"]["runs"][name] == original["settings"]
        assert content["machine"]["runs"][name] == original["machine"]
    assert content["settings"]["window"] == 2048 and not {"dtype", "seed"} & content["settings"].keys()
    rows = {row["arm"]: row["end"] for row in tables(text)["Perplexity"]}
    assert (rows["a: locas"], rows["b: locas"]) == ("20.00", "30.00")
    assert text.count("Machine of") == 2
    assert "The runs differ in seed, dtype." in text
    assert (tmp_path / "c" / "perplexity-nostromo.png").exists() and (tmp_path / "c" / "frontier.png").exists()
    assert merge_reports([a, b], tmp_path / "c").read_text() == text  # its own output may be replaced
    assert write_report(tmp_path / "c").read_text() == text  # and is a folder like any other


def test_runs_that_differ_in_their_books_only_are_averaged(tmp_path):
    a = save(tmp_path / "a", [record(book="Nostromo", perplexity=20.0)], arms=["locas"], books=["Nostromo"])
    b = save(tmp_path / "b", [record(book="Typhoon", perplexity=30.0)], arms=["locas"], books=["Typhoon", "Chance"])
    text = merge_reports([a, b], tmp_path / "c").read_text()
    (row,) = tables(text)["Perplexity"]
    assert (row["arm"], row["end"]) == ("locas", f"{math.sqrt(20 * 30):.2f}")
    assert "Not finished: 2 of 3 records." in text


def test_runs_on_different_hosts_have_no_common_frontier(tmp_path):
    a = save(tmp_path / "a", [record("locas")], held_out=["x"])
    b = save(tmp_path / "b", [record("temp-lora")], held_out=["x"], model="another")
    text = merge_reports([a, b], tmp_path / "c").read_text()
    assert "The runs differ in model: their arms are not comparable." in text
    assert "The runs differ in model: arms of one run are not comparable with another's." in text
    assert text.startswith("# Perplexity: several models\n")
    assert not (tmp_path / "c" / "frontier.png").exists()
    save(b, [record("temp-lora")], held_out=["x"])
    assert "On the Pareto front" in merge_reports([a, b], tmp_path / "c").read_text()


def test_runs_of_one_folder_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    a, b = save(tmp_path / "x" / "run", [record()]), save(tmp_path / "y" / "run", [record()])
    merge_reports([a, b], tmp_path / "c")
    content = json.loads((tmp_path / "c" / "results.json").read_text())
    assert {one["arm"] for one in content["records"]} == {f"{a}: locas", f"{b}: locas"}


# ---- the command and bad input ---------------------------------------------------------------------------------
def complaint(capsys, *arguments):
    """-> exit status, the one line on stderr."""
    status = main(["report", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("locas: ")
    return status, lines[0]


def test_the_command_rebuilds_and_merges(tmp_path, capsys):
    a, b = save(tmp_path / "a", [record()]), save(tmp_path / "b", [record("truncation")])
    assert main(["report", str(a)]) == 0
    assert capsys.readouterr().out == f"report: {a / 'report.md'}\n"
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "c")]) == 0
    assert len(tables((tmp_path / "c" / "report.md").read_text())["Perplexity"]) == 2


def test_bad_folders_and_arguments_are_one_line_and_a_status(tmp_path, capsys):
    a, _b = save(tmp_path / "a", [record()]), save(tmp_path / "b", [record()], command="locomo")
    empty, new = tmp_path / "empty", tmp_path / "new"
    empty.mkdir()
    status, line = complaint(capsys, empty)
    assert status == 2 and f"{empty} holds no results.json" in line
    assert complaint(capsys, tmp_path / "missing")[0] == 2
    status, line = complaint(capsys, a, a.parent / "b")
    assert status == 2 and "--out is missing" in line
    status, line = complaint(capsys, a, a, "--out", new)
    assert status == 2 and "given twice" in line
    status, line = complaint(capsys, a, "--out", a)
    assert status == 2 and "something else than merged runs" in line
    (empty / "notes.txt").write_text("mine")
    status, line = complaint(capsys, a, "--out", empty)
    assert status == 2 and "something else than merged runs" in line
    status, line = complaint(capsys, a, "--out", empty / "notes.txt")
    assert status == 2 and "is a file" in line
    c = tmp_path / "c"
    merge_reports([a], c)
    status, line = complaint(capsys, c, "--out", new)
    assert status == 2 and "holds merged runs already" in line
    assert not new.exists() and [path.name for path in empty.iterdir()] == ["notes.txt"]


def test_runs_of_different_commands_are_not_merged(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules["locas_ext.evaluation.report.build"].SECTIONS, "other", lambda results, folder: ["other"])
    a, b = save(tmp_path / "a", [record()]), save(tmp_path / "b", [{"x": 1}], command="other")
    status, line = complaint(capsys, a, b, "--out", tmp_path / "c")
    assert status == 2 and "a is of perplexity, b is of other" in line and not (tmp_path / "c").exists()
    assert write_report(b).read_text().endswith("\nother\n")


WHOLE = '{{"arm": "locas", "method": "locas", "book": "b", "perplexity": {}}}'


def perplexity(record):
    return f'{{"settings": {{"command": "perplexity"}}, "machine": {{}}, "records": [{record}]}}'


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is damaged: not valid JSON"),
        ('{"settings": {}}', "machine is missing"),
        ('{"settings": [], "machine": {}, "records": []}', "settings is []; expected an object"),
        (perplexity("1"), "records[0] is 1; expected an object"),
        (perplexity('{"arm": "locas"}'), "records[0].method is missing"),
        (perplexity(WHOLE.format('"high"')), "records[0].perplexity is 'high'; expected a number"),
        (perplexity(WHOLE.format("0")), "records[0].perplexity is 0; expected a number"),
        (perplexity(WHOLE.format("NaN")), "NaN is not a number"),
        (perplexity(WHOLE.format("1e999")), "not valid JSON"),
        (perplexity(WHOLE.format('2, "curve": [[1]]')), "records[0].curve[0] is [1]; expected a list of 2"),
        (perplexity(WHOLE.format('2, "book": "c"')), "comes twice"),
        (perplexity(WHOLE.format('2, "run": "\\ud800"')), "not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, capsys, content, words):
    (tmp_path / "results.json").write_text(content)
    status, line = complaint(capsys, tmp_path)
    assert status == 1 and "results.json" in line and words in line
    assert not (tmp_path / "report.md").exists()
    with pytest.raises(LocasError):
        write_report(tmp_path)


def test_an_unknown_command_lists_those_with_a_report(tmp_path, capsys):
    status, line = complaint(capsys, save(tmp_path, [], command="poetry"))
    assert status == 2 and "'poetry'; expected one of" in line and "perplexity" in line


def test_arms_without_any_result_are_no_rows():
    records = [record(), record("long-context", error="out of memory"), record(book="Typhoon")]
    (arm,) = collect_arms(records)
    assert isinstance(arm, ArmResults) and arm.books == {"Nostromo", "Typhoon"}
    assert len(arm.on({"Typhoon"}).records) == 1
