"""results.json: taken up again by the same run only."""

import json

import pytest

from locas_ext import LocasError
from locas_ext.evaluation import results

SETTINGS = {"window": 512, "methods": ("truncation", "locas"), "seed": 0}


def test_a_folder_is_taken_up_by_a_run_with_the_same_settings(tmp_path):
    folder = tmp_path / "a" / "out"
    assert results.open_folder(folder, SETTINGS) == []
    results.write(folder, SETTINGS, [{"method": "locas"}])
    assert results.open_folder(folder, SETTINGS) == [{"method": "locas"}]
    content = json.loads((folder / "results.json").read_text())
    assert content["settings"]["methods"] == ["truncation", "locas"]
    assert {"processor", "gpus", "threads", "torch"} <= content["machine"].keys()
    assert [file.name for file in folder.iterdir()] == ["results.json"]


def test_other_settings_are_refused_and_named(tmp_path):
    results.open_folder(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="window was 512, is 256, rank was None, is 8;"):
        results.open_folder(tmp_path, {**SETTINGS, "window": 256, "rank": 8})


def test_what_differs_within_a_setting_is_named():
    before = {"books": [{"name": "a", "tokens": 5}], "arms": [{"rank": 4}, {"rank": 4}], "seed": 0}
    wanted = {"books": [{"name": "a", "tokens": 7}], "arms": [{"rank": 4}], "seed": 0}
    assert results.differences(before, wanted) == "books[0].tokens was 5, is 7, arms was a list of 2, is a list of 1"
    assert results.differences(before, before) == ""


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        results.open_folder(tmp_path, SETTINGS)
    with pytest.raises(FileExistsError, match="is a file"):
        results.open_folder(tmp_path / "notes.txt", SETTINGS)


@pytest.mark.parametrize("content", ["{", "[1]", '{"settings": {}}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / results.NAME).write_text(content)
    with pytest.raises(LocasError, match="results.json"):
        results.read(tmp_path)
