"""One folder, several savers and readers at once: it is one whole memory at every moment, and the lock says who holds it."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import saving

from locas_ext.errors import LocasError
from locas_ext.storage import folder as memory_folder
from locas_ext.storage import lock
from locas_ext.storage.folder import CONFIG_NAME, MEMORY_NAME

ROOT = Path(__file__).parents[2]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, saving.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    saving.save(tmp_path / "m", 1)
    return tmp_path / "m"


def test_processes_that_save_and_load_in_tight_loops(folder):
    out, _ = start("loops", folder, 20, "save", "save", "load", "load").communicate()
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 4 and all(count and not wrong for count, wrong in results), results
    assert saving.load(folder) and names(folder) == [CONFIG_NAME, MEMORY_NAME]


def test_threads_that_save_and_load(folder):
    wrong = []

    def run(verb):
        try:
            for _ in range(20):
                verb()
        except Exception as error:
            wrong.append(error)

    verbs = [lambda: saving.save(folder, 2), lambda: saving.save(folder, 50), lambda: saving.load(folder)]
    threads = [threading.Thread(target=run, args=(verb,)) for verb in verbs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert names(folder) == [CONFIG_NAME, MEMORY_NAME]


def test_first_saves_of_several_threads(tmp_path):
    """No folder yet, and what another saver has there so far is nobody's foreign file."""
    for round_ in range(8):
        folder, wrong = tmp_path / str(round_), []

        def run(rows, folder=folder, wrong=wrong):
            try:
                saving.save(folder, rows)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=run, args=(rows,)) for rows in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and saving.load(folder) in (1, 2, 3)


def test_the_lock_says_who_holds_it_and_dies_with_its_holder(folder, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.2)
    process = start("hold", folder, 60)
    assert process.stdout.readline() == "locked\n"
    assert names(folder) == [CONFIG_NAME, MEMORY_NAME], "the lock is no file"
    with pytest.raises(LocasError, match=f"being saved into by process {process.pid} on {socket.gethostname()}; waited 0.2 s"):
        saving.save(folder, 2)
    assert saving.load(folder) == 1, "readers need no lock"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saving.save(folder, 2)
    assert saving.load(folder) == 2


def test_a_saver_waits_its_turn(folder):
    locked, order = threading.Event(), []

    def hold():
        with lock.folder_lock(folder):
            locked.set()
            time.sleep(0.3)
            order.append("held")

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    saving.save(folder, 2)
    order.append("saved")
    thread.join()
    assert order == ["held", "saved"] and saving.load(folder) == 2


def test_a_thread_may_take_the_lock_again_and_another_may_not(folder):
    with lock.folder_lock(folder), lock.folder_lock(folder):
        saving.save(folder, 2)
        caught = []

        def other():
            try:
                with lock.folder_lock(folder, wait=0):
                    pass
            except LocasError as error:
                caught.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(caught) == 1 and f"process {os.getpid()} (this one, another thread)" in caught[0]
    with lock.folder_lock(folder, wait=0):
        pass


def test_a_process_forked_while_the_lock_is_held_does_not_keep_it(folder):
    reading, writing = os.pipe()
    with lock.folder_lock(folder):
        child = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(30)"], {})
        fork = subprocess.Popen(["sleep", "30"], close_fds=False, stdout=writing)
    try:
        with lock.folder_lock(folder, wait=0):
            pass
    finally:
        for pid in (child, fork.pid):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(child, 0)
        fork.wait()
        os.close(reading)
        os.close(writing)


def refuse(number):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_said_once_and_saved_into(folder, monkeypatch, number):
    monkeypatch.setattr(lock.fcntl, "flock", refuse(number))
    with pytest.warns(UserWarning, match="saved into without a lock: its file system has no locks") as caught:
        saving.save(folder, 2)
    assert caught[0].filename == saving.__file__, "the line that saves"
    assert saving.load(folder) == 2


def test_a_platform_without_flock(folder, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(UserWarning, match="this platform has no flock"):
        saving.save(folder, 2)
    assert saving.load(folder) == 2


def test_what_a_killed_saver_left_behind_goes_with_the_next_save(folder):
    for name in (CONFIG_NAME, MEMORY_NAME):
        (folder / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    saving.save(folder, 2)
    assert names(folder) == [CONFIG_NAME, MEMORY_NAME]


@pytest.mark.parametrize("saves", [0, 1, 3])
def test_a_reader_reads_again_when_a_saver_came_between(folder, monkeypatch, saves):
    """Whole saves, each of another size, right after the reader has opened the config."""
    real, sizes = memory_folder.open_regular, iter(range(2, 2 + saves))

    @contextmanager
    def open_regular(path):
        with real(path) as opened:
            if path.name == CONFIG_NAME and (size := next(sizes, None)):
                with monkeypatch.context() as patched:
                    patched.setattr(memory_folder, "open_regular", real)
                    saving.save(folder, size)
            yield opened

    monkeypatch.setattr(memory_folder, "open_regular", open_regular)
    assert saving.load(folder) == 1 + saves


def test_a_reader_between_the_renames_of_a_saver_finds_the_old_memory(folder, monkeypatch):
    real, loaded = os.replace, []

    def replace(source, target):
        loaded.append(saving.load(folder))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    saving.save(folder, 2)
    assert loaded == [1, 1] and saving.load(folder) == 2


def test_a_reader_gives_up_on_a_folder_that_never_rests(folder, monkeypatch):
    monkeypatch.setattr(memory_folder, "_MOST_READS", 4)
    monkeypatch.setattr(memory_folder, "_is_still", lambda *arguments: False)
    (folder / MEMORY_NAME).write_bytes(b"another memory's")
    with pytest.raises(LocasError, match="saved into all the time: read 4 times"):
        saving.load(folder)
