"""Folders that commands make: whole or not at all, nobody else's touched."""

import os
import signal
import stat
from pathlib import Path

import pytest

from locas_ext.cli.folders import made, whole_or_not_at_all
from locas_ext.errors import LocasError


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(folder):
    (folder / "model").write_text("weights")
    (folder / "deeper").mkdir()
    private = os.open(folder / "deeper" / "private", os.O_CREAT | os.O_WRONLY, 0o600)  # as some libraries write
    os.close(private)


@pytest.mark.parametrize("place", ["new", "a/b/new", "empty"])
def test_it_is_there_whole_and_follows_the_umask(place, tmp_path, umask):
    (tmp_path / "empty").mkdir()
    with whole_or_not_at_all(tmp_path / place) as folder:
        write(folder)
        assert not (tmp_path / place / "model").exists()
    assert tree(tmp_path / place) == ["deeper", "deeper/private", "model"]
    modes = [stat.S_IMODE((tmp_path / place / name).stat().st_mode) for name in ("", "deeper", "deeper/private", "model")]
    assert modes == [0o750, 0o750, 0o640, 0o640]
    assert not [entry for entry in (tmp_path / place).parent.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("io\n StorageFull"), Exception("x")])
def test_a_failure_leaves_nothing_and_is_one_error(error, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(LocasError, match=r"new could not be written: .*; nothing was kept") as raised:
        with whole_or_not_at_all(tmp_path / "a" / "b" / "new") as folder:
            write(folder)
            raise error
    assert tree(tmp_path) == before and "\n" not in str(raised.value)


def test_ctrl_c_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_or_not_at_all(tmp_path / "new") as folder:
        write(folder)
        raise KeyboardInterrupt
    assert tree(tmp_path) == []


def test_ctrl_c_while_it_is_put_in_place_waits_until_all_is_there(tmp_path, monkeypatch):
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (os.kill(os.getpid(), signal.SIGINT), rename(path, to)))
    with pytest.raises(KeyboardInterrupt), whole_or_not_at_all(tmp_path / "new") as folder:
        write(folder)
    assert tree(tmp_path) == ["new", "new/deeper", "new/deeper/private", "new/model"]


def test_an_empty_folder_stays_the_same_folder(tmp_path, monkeypatch):
    """It may be a mounted disk, or the shell's own folder: neither can be replaced, and a new one would not be seen there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".").st_ino
    with whole_or_not_at_all(Path(".")) as folder:
        write(folder)
        (folder / "config.json").write_text("{}")
    assert os.stat(".").st_ino == before == os.stat(tmp_path / "here").st_ino
    assert tree(Path(".")) == ["config.json", "deeper", "deeper/private", "model"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(**options):
        raise PermissionError(13, "Permission denied", "/tmp/x1y2z3")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(PermissionError, match="cannot write into it: Permission denied") as raised, made(tmp_path / "a"):
        pass
    assert raised.value.filename == str(tmp_path / "a") and tree(tmp_path) == []


def test_neighbours_stay_whatever_they_are_called(tmp_path):
    for name in ("new.unfinished", "new.tmp", ".locas-", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(LocasError), whole_or_not_at_all(tmp_path / "new") as folder:
        raise OSError(28, "No space left on device")
    assert tree(tmp_path) == before
    with whole_or_not_at_all(tmp_path / "new") as folder:
        write(folder)
    assert [name for name in tree(tmp_path) if not name.startswith("new/") and name != "new"] == before


def test_what_is_there_is_refused_and_stays(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link", "dangling"):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"), whole_or_not_at_all(tmp_path / name):
            raise AssertionError("not reached")
    assert tree(tmp_path) == ["dangling", "file", "full", "full/thesis.tex", "link", "target"]


def test_what_came_there_meanwhile_stays(tmp_path):
    with pytest.raises(LocasError, match="holds something already"), whole_or_not_at_all(tmp_path / "new") as folder:
        write(folder)
        (tmp_path / "new" / "letter").write_text("dear reader")
    assert tree(tmp_path) == ["new", "new/letter"]


def test_made_removes_only_what_it_made_and_is_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    with made(tmp_path / "mine"), made(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert tree(tmp_path) == ["mine"]
    with made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
    assert tree(tmp_path) == ["a", "a/kept", "mine"]
