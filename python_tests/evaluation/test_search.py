"""bench.search: what a grid stands for, and that a search goes on where it stopped."""

import json

import pytest
import torch
from support.helpers import tiny_model

from bench.search import Search, expanded, read_grid, table
from locas_ext.evaluation.texts import Text


def text(name, tokens):
    return Text(name=name, sha256="0" * 64, ids=torch.randint(3, 61, (tokens,)), words=1, bytes=1)


def test_each_stands_for_the_product_and_keeps_the_order():
    entry = {"scale": "host", "each": {"learning_rate": [1, 2], "rank": [4, 8]}}
    rows = [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert list(expanded(entry)) == [{"scale": "host", "learning_rate": a, "rank": b} for a, b in rows]
    assert list(expanded({"rank": 4})) == [{"rank": 4}]


@pytest.mark.parametrize(
    "wrong", [{"learning_rates": 1}, {"rank": 0}, {"method": "temp-lora", "scale": "host"}, {"method": "x"}]
)
def test_a_wrong_entry_is_named(tmp_path, wrong):
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps([{}, wrong]))
    with pytest.raises(SystemExit, match="entry 1: "):
        read_grid(grid)


def test_results_are_written_at_once_and_not_computed_twice(tmp_path):
    grid, out = tmp_path / "grid.json", tmp_path / "out.jsonl"
    grid.write_text(
        json.dumps(
            [
                {"method": "truncation"},
                {"rank": 4, "decay_after": 3},
                {"rank": 4, "stride": 4},
                {"rank": 4, "learning_rate": 1e6},
            ]
        )
    )
    settings, book, other = read_grid(grid), text("book", 40), text("other", 20)
    host = tiny_model()

    def search():
        return Search(host, [other], 16, 8, out)

    first = [search().run(setting, book) for setting in settings]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == json.loads(json.dumps(first)) and [line["stride"] for line in lines] == [8, 8, 4, 8]
    assert [line["method"] for line in lines] == ["truncation", "locas", "locas", "locas"]
    assert lines[0]["perplexity"] > 0 and set(lines[1]["others"]) == {"other"} and lines[1]["parameters"] == 2 * 3 * 4 * 32
    with out.open("a") as file:
        file.write('{"method": "loc')  # a run that was ended while it wrote
    again = search()
    assert [again.found(setting, book) for setting in settings] == lines
    assert again.found(settings[1], text("another", 40)) is None
    again.run(settings[0], text("a third", 30))
    assert len(search().results) == 5
    assert table(again.results, [other]).row_count == 1 + sum(not line.get("error") for line in lines)
