"""Reports beside the paper's figures: presets, and learning against forgetting."""

import random

import numpy as np
import pytest
from support.reports import METHODS, mean, record, report, tables

from locas_ext.evaluation.report import paper_figures
from locas_ext.evaluation.report.frontier import Point, pareto_front
from locas_ext.evaluation.report.tables import MISSING

# ---- presets and the paper -------------------------------------------------------------------------------------
INITS = ("none", "gaussian", "activation", "random", "bottomk", "topk")


def init_run(book="Nostromo"):
    """In an order that is not the paper's, with activations at two learning rates."""
    arms = [
        record("locas", f"locas init={init}", book, {"init": init, "rank": 64, "learning_rate": 4e-3})
        for init in reversed(INITS[1:])
    ]
    slow = record(
        "locas", "locas init=activation learning_rate=1e-06", book, {"init": "activation", "rank": 64, "learning_rate": 1e-6}
    )
    return [*arms, slow, record("truncation", book=book)]


def test_the_init_table_has_the_papers_rows_and_its_figures_for_the_same_host_only(tmp_path):
    records = init_run() + init_run("Typhoon")
    rows = tables(report(tmp_path, records, ablate="init", model="Qwen/Qwen3-1.7B-Base"))["Initialization"]
    assert [row["init"] for row in rows] == ["none", "gaussian", *["activation"] * 2, "random", "bottomk", "topk"]
    topk = [one for one in records if one["arm_settings"].get("init") == "topk"]
    assert rows[-1]["50K"] == f"{mean(topk, 'milestones', '50000'):.2f}"
    assert rows[-1]["end"] == f"{mean(topk, 'perplexity'):.2f}"
    theirs = [tuple(row[f"paper {n}"] for n in ("50K", "100K", "200K")) for row in rows]
    assert theirs == [
        ("20.60", "20.38", "20.50"),
        ("20.44", "20.09", "19.90"),
        (MISSING,) * 3,
        ("20.58", "20.17", "19.93"),
        ("20.02", "19.51", "19.06"),
        ("20.04", "19.53", "19.08"),
        ("20.00", "19.49", "19.04"),
    ]
    assert [row["learning rate"] for row in rows[2:4]] == ["0.004", "1e-06"]
    for model in ("Qwen/Qwen3-1.7B", "models/tiny-glu"):
        assert "paper" not in tables(text := report(tmp_path, records, ablate="init", model=model))["Initialization"][0]
        assert not any("paper" in title for title in tables(text)["Initialization"][0])


def test_the_rank_table_has_both_methods_with_their_parameters_and_the_papers(tmp_path):
    records = [record("truncation")] + [
        record(method, f"{method} rank={rank}", settings={"rank": rank, **init}, extra_parameters=rank * size)
        for method, size, init in (("temp-lora", 1_146_880, {}), ("locas", 172_032, {"init": "topk"}))
        for rank in (128, 16, 64, 32)
    ]
    rows = tables(report(tmp_path, records, ablate="rank", model="/models/Qwen3-1.7B-Base/"))["Rank"]
    assert [(row["method"], row["rank"]) for row in rows] == [
        (method, str(rank)) for method in ("locas", "temp-lora") for rank in (16, 32, 64, 128)
    ]
    for row in rows:
        one = next(one for one in records if one["arm"] == f"{row['method']} rank={row['rank']}")
        assert row["end"] == f"{one['perplexity']:.2f}"
        assert row["extra parameters"] == f"{one['extra_parameters'] / 1e6:.1f}M"
    assert [row["paper 200K"] for row in rows] == ["19.14", "19.10", "19.04", "19.02", "19.39", MISSING, "19.13", "19.10"]
    assert [row["paper parameters"] for row in rows][3:6] == ["22.0M", "18.4M", MISSING]


def test_the_learning_rate_table_ascends(tmp_path):
    records = [
        record(method, f"{method} {rate}", settings={"learning_rate": rate})
        for method in ("temp-lora", "locas")
        for rate in (1e-2, 5e-5, 4e-3)
    ]
    rows = tables(report(tmp_path, records, ablate="learning-rate"))["Learning rate"]
    assert [row["learning rate"] for row in rows] == ["5e-05", "0.004", "0.01"] * 2
    assert rows[0]["end"] == f"{next(r for r in records if r['arm'] == 'locas 5e-05')['perplexity']:.2f}"


def test_the_papers_figures_stand_beside_the_methods_on_the_same_host(tmp_path):
    settings = {"locas": {"rank": 64, "init": "topk"}, "temp-lora": {"rank": 64}}
    records = [record(method, settings=settings.get(method)) for method in METHODS]
    rows = tables(text := report(tmp_path, records, model="Qwen/Qwen3-0.6B-Base"))["Perplexity"]
    theirs = [(row["paper 200K"], row["paper parameters"], row["paper time"]) for row in rows]
    assert theirs == [(MISSING,) * 3, ("25.00", "5.5M", "1.4x"), ("25.22", "36.7M", "4.3x"), ("24.57", MISSING, "13.9x")]
    assert f"Paper: {paper_figures.SOURCE}, host Qwen3-0.6B-Base." in text
    assert "Paper:" not in report(tmp_path, [record(arm="locas scale=paper")], model="Qwen/Qwen3-0.6B-Base")
    records[1]["arm_settings"]["rank"] = 32
    rows = tables(report(tmp_path, records, model="Qwen/Qwen3-0.6B-Base"))["Perplexity"]
    assert rows[1]["paper 200K"] == MISSING


@pytest.mark.parametrize(
    "model, host",
    [
        ("Qwen/Qwen3-1.7B-Base", "Qwen3-1.7B-Base"),
        ("/a/models--Qwen--Qwen3-1.7B/snapshots/ab12", "Qwen3-1.7B"),
        ("C:\\models\\qwen3-0.6b-base", "Qwen3-0.6B-Base"),
        ("Qwen/Qwen3-1.7B-Base-v2", None),
        ("tiny-glu", None),
        (None, None),
    ],
)
def test_a_host_is_the_papers_only_by_its_whole_name(model, host):
    assert paper_figures.same_host(model) == host


# ---- learning against forgetting -------------------------------------------------------------------------------
def test_the_front_is_what_nothing_dominates():
    numbers = np.random.default_rng(random.randrange(2**32))
    values = numbers.integers(0, 12, (60, 2))  # few values, so that ties are among them
    points = [Point(f"{i}", "locas", float(x), float(y)) for i, (x, y) in enumerate(values)]
    expected = [f"{i}" for i, (x, y) in enumerate(values) if not any(a <= x and b <= y and (a < x or b < y) for a, b in values)]
    assert [point.label for point in pareto_front(points)] == expected


def frontier_run(points):
    """points: {arm: (on the book, held out)}; the method is the arm's first word."""
    return [
        record(arm.split()[0], arm, book, perplexity=x * factor, held_out_perplexity=y / factor)
        for book, factor in (("Nostromo", 0.8), ("Typhoon", 1.25))
        for arm, (x, y) in points.items()
    ]


def test_the_frontier_says_who_dominates_whom(tmp_path):
    points = {
        "truncation": (46, 40),
        "temp-lora a": (38, 52),
        "temp-lora b": (42, 44),
        "temp-lora c": (45, 43),
        "locas a": (37.5, 48),
        "locas b": (41, 45),
        "locas c": (44, 42),
    }
    text = report(tmp_path, frontier_run(points))
    rows = tables(text)["Learning against forgetting"]
    assert [(row["arm"], row["on the book"], row["held out, after"]) for row in rows] == [
        (arm, f"{x:.2f}", f"{y:.2f}") for arm, (x, y) in sorted(points.items(), key=lambda item: item[1][0])[:-1]
    ]
    numbers = {row["no."]: row["arm"] for row in rows}
    by = {row["arm"]: [numbers.get(n, n) for n in row["dominated by"].split(", ")] for row in rows}
    assert by == {
        "temp-lora a": ["locas a"],
        "temp-lora b": ["on the front"],
        "temp-lora c": ["locas c"],
        "locas a": ["on the front"],
        "locas b": ["on the front"],
        "locas c": ["on the front"],
    }
    assert "On the Pareto front: locas a (37.50, 48.00), locas b (41.00, 45.00), temp-lora b (42.00, 44.00), " in text
    assert "temp-lora a (38.00, 52.00), is dominated by 1 locas arm: locas a (37.50, 48.00)." in text
    assert "Of 3 temp-lora arms, 2 are dominated by some locas arm." in text
    assert "locas a (37.50, 48.00), is dominated by no temp-lora arm." in text
    assert "Of 3 locas arms, 0 are dominated by some temp-lora arm." in text


def test_the_frontier_compares_over_the_books_that_all_have_finished(tmp_path):
    records = frontier_run({"temp-lora a": (38, 52), "locas a": (40, 41), "locas b": (41, 43)})[:-2]
    text = report(tmp_path, records)
    rows = tables(text)["Learning against forgetting"]
    assert [row["on the book"] for row in rows] == [f"{x * 0.8:.2f}" for x in (38, 40, 41)]
    assert "over one book that all these arms read" in text
    records[1]["held_out_perplexity"] = None
    assert [row["arm"] for row in tables(report(tmp_path, records))["Learning against forgetting"]] == [
        "temp-lora a",
        "locas b",
    ]
