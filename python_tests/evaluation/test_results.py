"""results.json: taken up again by the same run only."""

import dataclasses
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from locas_ext import LocasError
from locas_ext.evaluation import results
from locas_ext.evaluation.capability.command import CapabilityTask, HarnessTasks
from locas_ext.evaluation.locomo.command import LocomoTask
from locas_ext.evaluation.perplexity.parallel import claimed
from locas_ext.evaluation.perplexity.study import PerplexityTask

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


# ---- several runs on one folder ------------------------------------------------------------------------------
def hold(folder, ready, done):
    with results.only_run(folder):
        ready.set()
        done.wait(60)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(LocasError, match=rf"{tmp_path}.* process {other.pid}"), results.only_run(tmp_path):
        pass
    done.set()
    other.join()
    with results.only_run(tmp_path):  # and it is free again
        assert results.open_folder(tmp_path, SETTINGS) == []


def test_planted_links_are_neither_followed_nor_written_through(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    folder.mkdir()
    with results.only_run(folder):
        results.open_folder(folder, SETTINGS)
        (folder / "results.json").unlink()
        (folder / "results.json").symlink_to(victim)
        results.write(folder, SETTINGS, [])
    (folder / "log.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="log.jsonl"), claimed(folder / "log.jsonl"):
        pass
    assert victim.read_text() == "mine" and not (folder / "results.json").is_symlink()


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        results.open_folder(tmp_path, SETTINGS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "results.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("task", [PerplexityTask, LocomoTask, CapabilityTask, HarnessTasks])
def test_tasks_are_made_by_keywords_only(task):
    with pytest.raises(TypeError, match="positional"):
        task(*[None] * len(dataclasses.fields(task)))


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    results.open_folder(tmp_path, SETTINGS)
    before = (tmp_path / "results.json").read_bytes()
    for settings, records in (({"seed": 2**60}, []), (SETTINGS, [{"title": "\udcff"}])):
        with pytest.raises(LocasError, match=r"what was to be written into .*results\.json is damaged: "):
            results.write(tmp_path, settings, records)
    assert (tmp_path / "results.json").read_bytes() == before


def test_paths_that_are_not_utf8_are_kept_as_text(tmp_path):
    settings = {"memory": Path(os.fsdecode(b"t\xe9"))}
    assert results.open_folder(tmp_path, settings) == results.open_folder(tmp_path, settings) == []
    assert results.read(tmp_path)["settings"]["memory"] == "t\\udce9"
