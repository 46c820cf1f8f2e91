"""Atomic writes: no link is followed, the umask holds, and a file system without fsync is no reason to fail."""

import errno
import os
import stat

import pytest

from locas_ext.errors import LocasError
from locas_ext.storage import files
from locas_ext.storage.files import follow_umask, open_regular, remove_temporaries, write_atomically


@pytest.fixture
def umask():
    """Sets the umask; afterwards it is as before."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_permissions_follow_the_umask(tmp_path, umask, mask):
    umask(mask)
    (tmp_path / "old").touch(mode=0o600)
    for name in ("new", "old"):
        write_atomically(tmp_path / name, b"content")
        assert mode(tmp_path / name) == 0o666 & ~mask


def test_files_of_other_libraries_are_made_to_follow_it(tmp_path, umask):
    umask(0o027)
    secret = tmp_path / "elsewhere"
    secret.touch(mode=0o600)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model").touch(mode=0o600)
    (folder / "below").mkdir(mode=0o700)
    (folder / "link").symlink_to(secret)
    follow_umask(folder)
    assert mode(folder / "model") == 0o640 and mode(folder / "below") == 0o700 and mode(secret) == 0o600
    assert sorted(entry.name for entry in folder.iterdir()) == ["below", "link", "model"]


def test_a_link_in_the_files_place_is_replaced(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    write_atomically(tmp_path / "file", b"content")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "other").read_bytes() == b"other"


@pytest.mark.parametrize("planted", ["link", "dangling link", "file", "pipe"])
def test_what_is_planted_in_the_temporary_files_place_is_neither_followed_nor_removed(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0123456789abcdef")
    temporary, other = tmp_path / ".file.0123456789abcdef.tmp", tmp_path / "other"
    if planted != "dangling link":
        other.write_bytes(b"other")
    if "link" in planted:
        temporary.symlink_to(other)
    elif planted == "file":
        temporary.write_bytes(b"mine")
    else:
        os.mkfifo(temporary)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"content")
    assert os.path.lexists(temporary) and not (tmp_path / "file").exists()
    assert not other.exists() if planted == "dangling link" else other.read_bytes() == b"other"


def fsync_fails(monkeypatch, on_folders, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == on_folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number):
    fsync_fails(monkeypatch, True, number)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch, number):
    real = os.open

    def denied(path, flags, *mode):
        if path == tmp_path:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", denied)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, number):
    fsync_fails(monkeypatch, False, number)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("on_folders", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_or_broken_is_an_error(tmp_path, monkeypatch, on_folders, number):
    (tmp_path / "file").write_bytes(b"old")
    fsync_fails(monkeypatch, on_folders, number)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "file", b"content")
    assert caught.value.errno == number
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == (b"content" if on_folders else b"old")


def test_only_its_own_temporary_files_are_removed(tmp_path):
    left, kept = (
        ".file.0123456789abcdef.tmp",
        [".file.tmp", ".file.0123456789abcdeg.tmp", "file.0123456789abcdef.tmp", "notes.tmp"],
    )
    for name in (left, *kept):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path / "file")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "file" if kind != "device" else "/dev/zero"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(LocasError, match="not a regular file"), open_regular(path):
        pass
