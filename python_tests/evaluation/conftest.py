"""Fixtures that several files of this folder use."""

import json

import pytest
from support.locomo_samples import KITES, listed, long_dialogue
from transformers import AutoTokenizer

from locas_ext.evaluation.assets import ASSETS, MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "two.json"
    file.write_text(json.dumps([listed(KITES, "kites"), listed(long_dialogue(20), "long")]))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two books and a held-out text."""
    folder, novel = tmp_path_factory.mktemp("texts"), (ASSETS / "nostromo.txt").read_text()
    files = [folder / name for name in ("one.txt", "two.txt", "other.txt")]
    files[0].write_text(novel[3000:6000])
    files[1].write_text(novel[40_000:43_000])
    files[2].write_text((ASSETS / "tono-bungay.txt").read_text()[:900])
    return files
