"""Reports: the figures in the Markdown are those of the records, the plots are pictures of them, runs merge."""

import json
import math
import random
import struct
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from locas_ext import LocasError
from locas_ext.cli import main
from locas_ext.evaluation.report import paper_figures
from locas_ext.evaluation.report.build import merge_reports, write_report
from locas_ext.evaluation.report.frontier import Point, pareto_front
from locas_ext.evaluation.report.plots.curves import Curve, plot_curves, spread
from locas_ext.evaluation.report.plots.frontier import plot_frontier
from locas_ext.evaluation.report.plots.style import METHOD_COLORS, PAPER
from locas_ext.evaluation.report.tables import MISSING, ArmResults, collect_arms, escape, geometric_mean, tokens_text

MACHINE = {"processor": "a processor", "gpus": ["a GPU", "a GPU"], "threads": 2, "torch": "2.6.0"}
SETTINGS = {
    "command": "perplexity",
    "model": "models/some-host",
    "window": 2048,
    "stride": 512,
    "ablate": None,
    "seed": 3,
}
METHODS = ("truncation", "locas", "temp-lora", "long-context")


def record(method="locas", arm=None, book="Nostromo", settings=None, perplexity=None, **fields):
    """One of a run's records, with figures of its own for every (method, arm, book)."""
    numbers = random.Random(f"{method} {arm} {book}")
    perplexity = perplexity or numbers.uniform(15, 60)
    curve = [[n * 2000, perplexity * (1 + 3 / n)] for n in range(1, 31)]
    return {
        "method": method,
        "arm": arm or method,
        "arm_settings": settings or {},
        "book": book,
        "tokens": 59_999,
        "nll": 59_999 * math.log(perplexity),
        "perplexity": perplexity,
        "perplexity_per_word": perplexity**1.3,
        "perplexity_per_byte": perplexity**0.25,
        "seconds": numbers.uniform(10, 90),
        "relative_time": numbers.uniform(1, 5),
        "extra_parameters": numbers.randrange(10**6, 10**8),
        "curve": curve,
        "milestones": {"50000": perplexity * 1.1, "54321": perplexity * 1.05},
        "held_out_perplexity": numbers.uniform(40, 50),
        "held_out_perplexity_before": 39.0,
        "error": None,
        "peak_memory_bytes": 2**31,
        **fields,
    }


def save(folder, records, **settings):
    folder.mkdir(exist_ok=True)
    content = {"settings": {**SETTINGS, **settings}, "machine": MACHINE, "records": records}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def report(folder, records, **settings):
    return write_report(save(folder, records, **settings)).read_text()


def tables(markdown):
    """{the heading above: [row as {title: cell}, ...]} of the first table under each heading."""
    found, heading, titles = {}, None, None
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading, titles = line.strip("# "), None
        elif not line.startswith("|"):
            titles = None
        else:
            cells = [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
            if titles is None:
                titles = cells
                assert heading not in found, f"two tables under {heading}"
                found[heading] = []
            elif set(line) - set("|:- "):
                assert len(cells) == len(titles)
                found[heading].append(dict(zip(titles, cells, strict=False)))
    return found


def mean(records, *path):
    """exp of the mean log, written once more."""
    values = []
    for value in records:
        for name in path:
            value = value[name]
        values.append(value)
    return math.prod(values) ** (1 / len(values))


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
    values = np.random.default_rng().uniform(1, 1e3, 17)
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
    assert escape("a|b\nc_d") == "a\\|b c\\_d"


def test_labels_of_token_counts():
    assert [tokens_text(n) for n in (50_000, 200_000, 512, 54_321)] == ["50K", "200K", "512", "54,321"]


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
    numbers = np.random.default_rng()
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
    records[1]["held_out_perplexity"] = math.nan
    assert [row["arm"] for row in tables(report(tmp_path, records))["Learning against forgetting"]] == [
        "temp-lora a",
        "locas b",
    ]


# ---- plots -----------------------------------------------------------------------------------------------------
def pixels(path):
    """[height, width, 3] uint8. A PNG by its own header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    width, height = struct.unpack(">II", content[16:24])
    image = (imread(path)[..., :3] * 255).round().astype(np.uint8)
    assert image.shape == (height, width, 3)
    return image


def count(image, color):
    """Pixels of exactly this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(-1).sum())


def has_ink_at_the_border(image):
    border = np.concatenate(
        [image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3), image[:, :4].reshape(-1, 3), image[:, -4:].reshape(-1, 3)]
    )
    return bool((border != border[0]).any())


def curves(number, label="locas rank={}", method="locas"):
    return [Curve(label.format(i), method, [(n * 500, 20 + i / 4 + 10 / n) for n in range(1, 80)]) for i in range(number)]


TRUNCATION = Curve("truncation", "truncation", [(n * 500, 32 + 10 / n) for n in range(1, 80)])


@pytest.mark.parametrize("number", [1, 4, 12, 40])
def test_the_curves_are_drawn_in_their_colours_and_nothing_is_cut_off(tmp_path, number):
    lines = curves(number, "locas scale=host learning_rate=0.01 epochs={}")
    plot_curves(tmp_path / "a.png", "Nostromo" * 40, "a subtitle", [TRUNCATION, *lines])
    image = pixels(tmp_path / "a.png")
    assert image.shape[1] == 1536 and 840 <= image.shape[0] <= 1600
    assert count(image, PAPER) > image.shape[0] * image.shape[1] / 2
    assert count(image, METHOD_COLORS["truncation"]) > 1000
    if number == 1:
        assert count(image, METHOD_COLORS["locas"]) > 2000
    assert not has_ink_at_the_border(image)


def test_curves_go_where_their_numbers_are(tmp_path):
    """Of two flat lines the one with the larger perplexity is higher, at the right share of the axis."""
    flat = {"truncation": 30.0, "locas": 20.0}
    plot_curves(tmp_path / "a.png", "t", "s", [Curve(m, m, [(n, y) for n in range(1, 100)]) for m, y in flat.items()])
    image = pixels(tmp_path / "a.png")[140:, 200:900]  # under the heading, between the labels at both sides
    rows = {
        m: np.median(np.nonzero((image == [int(METHOD_COLORS[m][i : i + 2], 16) for i in (1, 3, 5)]).all(-1))[0]) for m in flat
    }
    # Margins of 8% above and below: the lines are 1 / 1.16 of the axes' 3.9 inches apart.
    assert rows["locas"] - rows["truncation"] == pytest.approx(3.9 * 160 / 1.16, abs=3)


def test_an_arm_that_went_astray_does_not_squeeze_the_others(tmp_path):
    def rows_between(*extra):
        plot_curves(tmp_path / "a.png", "t", "s", [*curves(3), *extra])
        image = pixels(tmp_path / "a.png")
        wanted = [int(METHOD_COLORS["locas"][i : i + 2], 16) for i in (1, 3, 5)]
        rows = np.nonzero((image[140:, 200:900] == wanted).all(-1))[0]
        return rows.max() - rows.min()

    alone = rows_between()
    astray = Curve("astray", "temp-lora", [(n * 500, 20.0 + n**3) for n in range(1, 80)])
    broken = Curve("broken", "temp-lora", [(n * 500, math.nan if n > 5 else math.inf) for n in range(1, 80)])
    assert rows_between(broken) > 0.9 * alone
    assert rows_between(astray) > 0.04 * alone


@pytest.mark.parametrize("number", [2, 12, 40])
def test_the_frontier_is_drawn_with_both_families_and_nothing_is_cut_off(tmp_path, number):
    numbers = random.Random(number)
    points = [
        Point(f"{method} scale=host learning_rate={i / 1000} epochs=2", method, numbers.uniform(38, 45), held_out)
        for i in range(number // 2)
        for method, held_out in (("locas", 47 + i / 9), ("temp-lora", 52 - i / 9))
    ]
    plot_frontier(tmp_path / "a.png", "Learning", "a subtitle", points, Point("truncation", "truncation", 46, 46.9))
    image = pixels(tmp_path / "a.png")
    assert image.shape[1] == 1536 and 900 <= image.shape[0] <= 1600
    axes = image[:, : int(0.70 * 1536)]  # without the key
    assert count(axes, METHOD_COLORS["truncation"]) > 300
    if number <= 12:  # each has a marker with its number in it
        for method in ("locas", "temp-lora"):
            assert count(axes, METHOD_COLORS[method]) > 200 * (number // 2)
    else:  # the front, here all Locas, has them; the others are small and let the ground shine through
        assert count(axes, METHOD_COLORS["locas"]) > 200 and count(axes, METHOD_COLORS["temp-lora"]) == 0
    assert not has_ink_at_the_border(image)


def test_names_are_never_read_as_formulas(tmp_path):
    name = r"$\frac{ $"  # an even number of dollars: else nothing would be tried
    plot_curves(tmp_path / "a.png", name, name, [Curve(name, "locas", [(1, 20.0), (2, 19.0)])])
    points = [Point(name, "locas", 20, 40), Point("b", "temp-lora", 21, 40)]
    plot_frontier(tmp_path / "b.png", name, name, points, None)
    assert pixels(tmp_path / "a.png").std() > 0 and pixels(tmp_path / "b.png").std() > 0


def test_every_plot_of_a_report_is_there_and_is_embedded(tmp_path):
    books = ["Nostromo", "NOSTROMO!", "???", "Book " * 40]
    records = [record(method, book=book) for book in books for method in METHODS]
    text = report(tmp_path, records)
    names = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"frontier.png", "perplexity-nostromo.png", "perplexity-nostromo-2.png", "perplexity-book.png"} < set(names)
    assert len(set(names)) == 5
    assert {path.name for path in tmp_path.iterdir()} == {*names, "report.md", "results.json"}
    for name in names:
        assert pixels(tmp_path / name).shape[1] == 1536
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert report(tmp_path, records) == text
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_labels_keep_their_order_and_their_distance_and_stay_near():
    numbers = np.random.default_rng()
    for _ in range(50):
        n = int(numbers.integers(1, 12))
        wanted, heights = numbers.uniform(0, 10, n), numbers.uniform(0.1, 0.8, n)
        centres = np.array(spread(list(wanted), list(heights), 0, 10))
        order = np.argsort(wanted, kind="stable")
        gaps = np.diff(centres[order]) - (heights[order][:-1] + heights[order][1:]) / 2
        assert (gaps > -1e-9).all()
        assert (centres - heights / 2 > -1e-9).all() and (centres + heights / 2 < 10 + 1e-9).all()
    assert spread([1.0, 5.0], [0.5, 0.5], 0, 10) == pytest.approx([1.0, 5.0])
    assert spread([5.0, 5.0], [1.0, 1.0], 0, 10) == pytest.approx([4.5, 5.5])


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


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is damaged"),
        ('{"settings": {}}', "lacks machine, records"),
        ('{"settings": [], "machine": {}, "records": []}', "settings or machine"),
        ('{"settings": {"command": "perplexity"}, "machine": {}, "records": [1]}', "records is no list of objects"),
        ('{"settings": {"command": "perplexity"}, "machine": {}, "records": [{"arm": "locas"}]}', "'method'"),
        (
            '{"settings": {"command": "perplexity"}, "machine": {}, "records": [{"arm": "locas", "method": "locas", '
            '"book": "b", "perplexity": "high"}]}',
            "cannot be read",
        ),
        (
            '{"settings": {"command": "perplexity"}, "machine": {}, "records": [{"arm": "locas", "method": "locas", '
            '"book": "b", "perplexity": 2, "curve": [[1, null]]}]}',
            "cannot be read",
        ),
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
