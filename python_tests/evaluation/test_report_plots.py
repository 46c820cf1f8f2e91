"""The plots of a report are pictures of its records."""

import math
import random
import struct

import numpy as np
import pytest
from matplotlib.image import imread
from support.reports import METHODS, record, report

from locas_ext.evaluation.report.frontier import Point
from locas_ext.evaluation.report.plots.curves import Curve, plot_curves, spread
from locas_ext.evaluation.report.plots.frontier import plot_frontier
from locas_ext.evaluation.report.plots.style import METHOD_COLORS, PAPER


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
    assert len(set(names)) == 9  # the frontier, and two of each book
    assert {path.name for path in tmp_path.iterdir()} == {*names, "report.md", "results.json"}
    for name in names:
        assert pixels(tmp_path / name).shape[1] == 1536
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert report(tmp_path, records) == text
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_labels_keep_their_order_and_their_distance_and_stay_near():
    numbers = np.random.default_rng(random.randrange(2**32))
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
