"""`locas memorize --on-divergence`."""

import pytest

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation.assets import ASSETS, MODEL, load_model

HARMFUL = [
    "--window",
    64,
    "--stride",
    16,
    "--rank",
    16,
    "--scale",
    "host",
    "--no-clip",
    "--learning-rate",
    1.0,
    "--device",
    "cpu",
]


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.txt"
    file.write_text((ASSETS / "nostromo.txt").read_text()[:1200])
    return file


def memorize(page, out, *options):
    return main([str(part) for part in ("memorize", page, "--model", MODEL, "--out", out, *options)])


@pytest.mark.parametrize("place", ["option", "file"])
def test_a_run_that_stops_says_so_and_keeps_the_best_state(place, page, tmp_path, capsys):
    out, config = tmp_path / "memory", tmp_path / "run.yaml"
    config.write_text("on_divergence: stop\n")
    how = ["--on-divergence", "stop"] if place == "option" else ["--config", config]
    with pytest.warns(locas.DivergenceWarning, match="the run ends here"):
        assert memorize(page, out, *HARMFUL, *how) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by the host alone; put back: the state of version 0; tokens learned in what is kept: 0" in said
    memory = locas.load(load_model(), out)
    assert memory.version == memory.tokens_seen == 0 and not memory.texts


def test_the_default_warns_and_ignore_says_nothing(page, tmp_path):
    with pytest.warns(locas.DivergenceWarning, match="the run continues"):
        assert memorize(page, tmp_path / "a", *HARMFUL) == 0
    assert memorize(page, tmp_path / "b", *HARMFUL, "--on-divergence", "ignore") == 0  # warnings are errors here
    assert locas.load(load_model(), tmp_path / "b").version > 10


def test_refused_in_one_line_before_anything_is_made(page, tmp_path, capsys):
    for options, complaint in (
        (["--on-divergence", "no"], "--on-divergence is 'no'; expected one of warn, stop, ignore"),
        (["--init", "activation", "--rank", 4, "--learning-rate", 1e-3], "init='activation' with scale='host' diverges"),
    ):
        assert memorize(page, tmp_path / "c", *options) == 2
        err = capsys.readouterr().err
        assert complaint in " ".join(err.split()) and "Traceback" not in err and not (tmp_path / "c").exists()
