"""Fixtures that several files of this folder use."""

import shutil

import pytest
from support.helpers import learned


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved memory with optimizer states, and its slots."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    _, memory = learned()
    memory.save_pretrained(folder, optimizer=True)
    return folder, memory.slots.clone()


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(saved[0], tmp_path / "m")
    return tmp_path / "m"
