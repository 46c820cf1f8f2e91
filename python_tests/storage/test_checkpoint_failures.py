"""Memory files: never half a memory, whatever moment writing fails."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save
from support.checkpoints import CONFIG, IDS, MEMORY, files
from support.helpers import SETTINGS, TEXT, learned, logits_of, tiny_model

import locas_ext as locas


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nth_call_fails(monkeypatch, module, name, n, error=full_disk):
    """Lets module.name work n - 1 times and then fail once."""
    real, calls = getattr(module, name), []

    def function(*arguments, **options):
        calls.append(1)
        return error() if len(calls) == n else real(*arguments, **options)

    monkeypatch.setattr(module, name, function)


def killed():
    raise KeyboardInterrupt


FAILURES = [("replace", 1), ("replace", 2), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4)]


@pytest.mark.parametrize("error, raised", [(full_disk, OSError), (killed, KeyboardInterrupt)], ids=["full", "killed"])
@pytest.mark.parametrize("name, n", FAILURES)
def test_whatever_moment_a_save_fails_a_whole_memory_stays(folder, saved, monkeypatch, name, n, error, raised):
    _, memory = learned()
    memory.memorize(TEXT, **SETTINGS)
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, name, n, error)
        with pytest.raises(raised):
            memory.save_pretrained(folder)
    loaded = locas.load(tiny_model(), folder)
    assert torch.equal(loaded.slots, saved[1]) or torch.equal(loaded.slots, memory.slots)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, memory.slots)
    assert sorted(files(folder)) == [CONFIG, MEMORY]


@pytest.mark.parametrize("first", FAILURES)
@pytest.mark.parametrize("second", FAILURES)
def test_a_second_failed_save_does_not_finish_what_the_first_began(folder, saved, monkeypatch, first, second):
    """The disk stays full: every further attempt must leave the old memory as it is, too."""
    _, memory = learned()
    candidates = [saved[1]]
    for name, n in (first, second):
        memory.memorize(TEXT, **SETTINGS)
        candidates.append(memory.slots.clone())
        with monkeypatch.context() as patched:
            nth_call_fails(patched, os, name, n)
            with pytest.raises(OSError):
                memory.save_pretrained(folder)
    loaded = locas.load(tiny_model(), folder)
    assert any(torch.equal(loaded.slots, slots) for slots in candidates)


@pytest.mark.parametrize("name, n", FAILURES)
def test_a_failed_first_save_is_no_memory_and_can_be_repeated(tmp_path, monkeypatch, name, n):
    _, memory = learned()
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, name, n)
        with pytest.raises(OSError, match=r"cannot save the memory: No space left on device: .*/m(/locas_[a-z_.]+)?'"):
            memory.save_pretrained(tmp_path / "m")
    try:
        assert torch.equal(locas.load(tiny_model(), tmp_path / "m").slots, memory.slots)
    except FileNotFoundError:
        pass
    memory.save_pretrained(tmp_path / "m")
    assert torch.equal(locas.load(tiny_model(), tmp_path / "m").slots, memory.slots)


def test_a_folder_that_cannot_be_written(tmp_path):
    """Below a regular file nothing can be made, even as root."""
    (tmp_path / "file").write_text("text")
    _, memory = learned()
    for path in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(OSError, match="file"):
            memory.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "text"


def test_a_read_only_folder(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "m"))

    _, memory = learned()
    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(PermissionError, match="cannot save the memory.*Permission denied.*m"):
        memory.save_pretrained(tmp_path / "m")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _, memory = learned()
    with pytest.raises(FileExistsError, match="notes.txt"):
        memory.save_pretrained(tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_foreign_files_beside_a_memory_survive(folder):
    (folder / "notes.txt").write_text("mine")
    _, memory = learned()
    memory.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_saving_leaves_the_memory_alone(tmp_path):
    model, memory = learned()
    slots, logits = memory.slots.clone(), logits_of(model, IDS)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    assert torch.equal(memory.slots, slots) and torch.equal(logits_of(model, IDS), logits) and memory.version == 8


def test_no_pickle_in_the_file(saved):
    content = (saved[0] / MEMORY).read_bytes()
    assert content == save(load_file(saved[0] / MEMORY))


def test_a_file_system_without_hard_links(folder, saved, monkeypatch):
    def no_links(*arguments, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    _, memory = learned()
    memory.memorize(TEXT, **SETTINGS)
    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patched:
        nth_call_fails(patched, os, "replace", 2)
        with pytest.raises(OSError):
            memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, saved[1])
    memory.save_pretrained(folder)
    assert torch.equal(locas.load(tiny_model(), folder).slots, memory.slots)
