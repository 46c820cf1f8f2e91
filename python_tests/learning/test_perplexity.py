"""A loss so large that no float holds its perplexity is infinite wherever a perplexity is told, and never an error."""

import math
from random import Random

import pytest
from support.helpers import SETTINGS, TEXT, learned

from locas_ext.cli.tasks import host_alone
from locas_ext.evaluation.capability.command import _summary
from locas_ext.evaluation.curve import local_gain, running_perplexity
from locas_ext.evaluation.report.capability import _text_row
from locas_ext.evaluation.report.tables import geometric_mean
from locas_ext.learning.perplexity import perplexity
from locas_ext.learning.progress import StreamProgress
from locas_ext.memory import Chunk, MemorizeReport

HUGE = [Chunk(0, 9, 8, 8.0, 0), Chunk(9, 13, 4, 1e6, 1)]


def test_it_is_the_exponential_of_the_mean():
    draw = Random(3)
    for _ in range(20):
        tokens, mean = draw.randint(1, 10**6), draw.uniform(0, 700)
        assert perplexity(mean * tokens, tokens) == pytest.approx(math.exp(mean), rel=1e-12)


@pytest.mark.parametrize("nll, tokens, expected", [(710.0, 1, math.inf), (math.inf, 3, math.inf), (1e308, 1, math.inf)])
def test_it_is_infinite_where_no_float_holds_it(nll, tokens, expected):
    assert perplexity(nll, tokens) == expected


def test_it_is_unknown_without_tokens_and_of_an_unknown_loss():
    assert math.isnan(perplexity(0.0, 0)) and math.isnan(perplexity(math.nan, 2))


def test_a_report_and_its_progress_bar():
    report = MemorizeReport(list(HUGE))
    assert report.perplexity == math.inf and "perplexity inf" in str(report)
    with StreamProgress(13, 0, report) as bar:
        bar.advance(13)
    assert bar.progress.tasks[0].fields["perplexity"] == math.inf


def test_a_curve_and_a_gain():
    assert running_perplexity(HUGE) == [(9, math.exp(1)), (13, math.inf)]
    ((_, percent),) = local_gain([Chunk(0, 9, 8, 8.0, 0)], [Chunk(0, 9, 8, 1e6, 0)], 1)
    assert percent == -math.inf


def test_a_mean_over_books():
    largest = math.nextafter(math.inf, 0)
    assert geometric_mean([largest] * 3) > 1e307 and geometric_mean([2.0, math.inf]) == math.inf
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_host_alone(monkeypatch):
    _, memory = learned()
    report = memory.memorize(TEXT, **{**SETTINGS, "stride": 2, "window": 8})
    monkeypatch.setattr(host_alone, "_loss", lambda *_: 1e9)
    monkeypatch.setattr(host_alone, "_sample", lambda chunks: chunks[:2])
    assert host_alone.compare(memory, TEXT, report, 8, None).host == math.inf


def test_a_capability_record_has_null_and_its_row_a_dash():
    windows = [[10, 1e5, 9e4, 3, 0.5], [10, 2e5, 1.9e5, 4, 0.5]]
    record = _summary("attached", "a text", windows, seed=0)
    assert record["perplexity"] is None is record["perplexity_interval"] and record["perplexity_ratio"] is None
    assert record["kl"] == pytest.approx(0.05) and record["kl_interval"] is not None
    assert _text_row(record)[1] == _text_row(record)[2] == "–"
