"""What several test files of the command line read."""

import pytest

from locas_ext.evaluation.assets import ASSETS


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "page.txt"
    file.write_text((ASSETS / "nostromo.txt").read_text()[:3000])
    return file
