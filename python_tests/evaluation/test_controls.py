"""The controls of `locas perplexity`: a memory of another text, and one that learns a text's chunks shuffled."""

import math
import random

import pytest
import torch
from support.helpers import chunk_bounds, tiny_model, truncated_nll
from support.perplexity import perplexity, results_of
from support.reports import record, report

import locas_ext as locas
from locas_ext.evaluation.methods.arm import METHODS
from locas_ext.evaluation.methods.controls import other_text, shuffled, shuffled_blocks
from locas_ext.evaluation.report.gain import running_ratio

LEARNING = {"learning_rate": 0.05, "on_divergence": "ignore"}


def draw(tokens):
    return torch.randint(3, 90, (tokens,))


@pytest.fixture
def sizes():
    window = random.randint(12, 30)
    return window, random.choice([1, random.randint(2, window)]), random.randint(40, 90)


def fresh():
    model = tiny_model("qwen3", vocab_size=100, seed=3)
    return model, locas.attach(model, locas.LocasConfig(rank=3, scale="host", init="gaussian"))


def plain_nll(model, ids, window, stride):
    """Of every chunk, by plain forwards; with a stride of 1 the first token alone is none."""
    bounds = [(start, end) for start, end in chunk_bounds(len(ids), stride) if end > 1]
    return [truncated_nll(model, ids, start, end, window).item() for start, end in bounds]


def nll_by_chunk(report):
    return [chunk.nll for chunk in report.chunks]


# ---- another text ----------------------------------------------------------------------------------------------
def test_a_memory_of_another_text_reads_this_one_without_learning(sizes):
    window, stride, tokens = sizes
    ids, other = draw(tokens), draw(tokens + 7)
    model, memory = fresh()
    read = other_text(memory, other, ids, window, stride, LEARNING, progress=False)
    slots = memory.slots.clone()
    twin, memory_twin = fresh()
    memory_twin.memorize(other, window, stride, progress=False, **LEARNING)
    assert torch.equal(memory_twin.slots, slots)
    expected = plain_nll(twin, ids, window, stride)
    assert nll_by_chunk(read) == pytest.approx(expected, rel=1e-4)
    memory_twin.detach()
    plain = plain_nll(twin, ids, window, stride)
    assert nll_by_chunk(read) != pytest.approx(plain, rel=1e-4)
    assert {chunk.memory_version for chunk in read.chunks} == {memory.version}


# ---- shuffled --------------------------------------------------------------------------------------------------
def test_shuffled_blocks_are_a_permutation_with_the_short_one_last():
    tokens, stride = random.randint(2, 200), random.randint(1, 20)
    blocks = shuffled_blocks(tokens, stride, random.randint(0, 99))
    assert sorted(blocks) == [(start, min(start + stride, tokens)) for start in range(0, tokens, stride)]
    assert all(end - start == stride for start, end in blocks[:-1])
    many = [(n * 5, n * 5 + 5) for n in range(40)]
    assert shuffled_blocks(200, 5, 1) not in (many, shuffled_blocks(200, 5, 2))


def test_shuffled_scores_the_windows_of_truncation(sizes):
    """A memory that learns at a rate of 0 is none."""
    window, stride, tokens = sizes
    ids = draw(tokens)
    model, memory = fresh()
    seen = []
    learning = LEARNING | {"learning_rate": 0.0}
    result = shuffled(memory, ids, window, stride, 5, learning, progress=False, callback=seen.append)
    expected = plain_nll(model, ids, window, stride)
    assert nll_by_chunk(result) == pytest.approx(expected, rel=1e-4)
    assert sorted(seen, key=lambda chunk: chunk.start) == result.chunks
    blocks = [block for block in shuffled_blocks(tokens, stride, 5) if block[1] > 1]
    assert [(chunk.start, chunk.end) for chunk in seen] == blocks
    assert [chunk.tokens for chunk in seen] == [end - max(start, 1) for start, end in blocks]


def test_shuffled_scores_each_chunk_before_it_is_learned(sizes):
    """As a user would do it: a fresh memory has learned the blocks before, then reads the next one."""
    window, tokens = sizes[0], sizes[2]
    stride = random.randint(5, window)
    ids = draw(tokens)
    _, memory = fresh()
    result = shuffled(memory, ids, window, stride, 2, LEARNING, progress=False)
    blocks = shuffled_blocks(tokens, stride, 2)
    place = random.randrange(1, len(blocks))
    model, twin = fresh()
    before = torch.cat([ids[start:end] for start, end in blocks[:place]])
    twin.memorize(before, window, stride, progress=False, **LEARNING)
    expected = truncated_nll(model, ids, *blocks[place], window).item()
    (chunk,) = [chunk for chunk in result.chunks if (chunk.start, chunk.end) == blocks[place]]
    assert chunk.nll == pytest.approx(expected, rel=1e-4)
    assert chunk.memory_version == twin.version
    assert memory.tokens_seen == tokens


# ---- the command -----------------------------------------------------------------------------------------------
def test_the_command_has_both(texts, tmp_path):
    methods = "truncation,locas,locas-other-text,locas-shuffled"
    assert perplexity(texts[:1], tmp_path / "out", "--methods", methods, "--control-text", texts[1]) == 0
    content = results_of(tmp_path / "out")
    records = {entry["method"]: entry for entry in content["records"]}
    assert [arm.get("other_text", {}).get("name") for arm in content["settings"]["arms"]] == [None, None, "two", None]
    assert {entry["tokens"] for entry in records.values()} == {299}
    order = records["locas-shuffled"]["reading_order"]
    assert sorted(order) == list(range(10)) != order
    assert all(entry["reading_order"] is None for method, entry in records.items() if method != "locas-shuffled")
    assert len({entry["nll"] for entry in records.values()}) == 4
    for kind in ("locas-other-text", "locas-shuffled"):
        assert (tmp_path / "out" / "memories" / f"one-{kind}" / "locas_config.json").exists()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Gain over truncation" in text and (tmp_path / "out" / "gain-one.png").exists()
    assert "`locas-shuffled` learns this text's chunks in random order" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "locas-other-text"], "--methods names locas-other-text, which needs --control-text TEXT"),
        (["--control-text", "TWO"], "--control-text is given, but --methods does not name locas-other-text"),
        (["--methods", "locas-shuffled", "--context", "keep"], "locas-shuffled scores windows that are read anew"),
        (["--methods", "locas-other-text", "--control-text", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_what_does_not_go_together(texts, tmp_path, capsys, options, message):
    options = [texts[1] if option == "TWO" else option for option in options]
    assert perplexity(texts[:1], tmp_path / "out", *options) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_methods_are_named():
    assert METHODS[-2:] == ("locas-other-text", "locas-shuffled")


# ---- the gain by tokens read -----------------------------------------------------------------------------------
def curve_of(ends, nats):
    total = torch.tensor(nats, dtype=torch.float64).cumsum(0)
    return [[end, math.exp(value / (end - 1))] for end, value in zip(ends, total.tolist(), strict=True)]


def test_the_running_gain_follows_the_order_of_reading():
    stride, count = random.randint(2, 50), random.randint(3, 30)
    ends = [stride * (n + 1) for n in range(count)]
    ends[-1] -= random.randrange(stride - 1)
    mine, theirs = ([random.uniform(1, 5) * stride for _ in ends] for _ in range(2))
    for order in (None, random.sample(range(count), count)):
        result = running_ratio({"curve": curve_of(ends, mine), "reading_order": order}, {"curve": curve_of(ends, theirs)})
        read = scored = 0
        total = 0.0
        for place, (tokens, ratio) in zip(order or range(count), result, strict=True):
            read += ends[place] - place * stride
            scored += ends[place] - place * stride - (place == 0)
            total += mine[place] - theirs[place]
            assert tokens == read and ratio == pytest.approx(math.exp(total / scored), rel=1e-6)
    assert running_ratio({"curve": curve_of(ends, mine)}, {"curve": curve_of(ends[:-1], theirs[:-1])}) == []
    assert running_ratio({"curve": curve_of(ends, mine), "reading_order": [0] * count}, {"curve": curve_of(ends, theirs)}) == []
    assert running_ratio({"curve": [[2, None]]}, {"curve": [[2, 3.0]]}) == []


def test_the_report_shows_the_gain_at_points_and_at_the_end(tmp_path):
    books = ("Nostromo", "Middlemarch")
    records = [record(method, book=book) for book in books for method in ("truncation", "locas")]
    text = report(tmp_path / "run", records)
    (row,) = [line for line in text.split("## Gain")[1].split("##")[0].splitlines() if line.startswith("| locas")]
    ratios = [
        next(r["perplexity"] for r in records if r["book"] == book and r["method"] == "locas")
        / next(r["perplexity"] for r in records if r["book"] == book and r["method"] == "truncation")
        for book in books
    ]  # the two curves are of one shape, so that the gain is the same everywhere
    expected = 100 * (1 - math.exp(sum(map(math.log, ratios)) / 2))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert len(cells) == 6 and all(abs(float(cell.rstrip("%")) - expected) < 2 for cell in cells)
    assert all((tmp_path / "run" / f"gain-{book.lower()}.png").exists() for book in books)


def test_without_truncation_there_is_no_gain(tmp_path):
    assert "## Gain" not in report(tmp_path / "run", [record("locas"), record("temp-lora")])
