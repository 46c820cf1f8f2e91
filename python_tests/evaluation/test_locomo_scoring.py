"""LoCoMo's scores against values worked out by hand from its rules."""

import sys

import pytest

from locas_ext import LocasError
from locas_ext.evaluation.locomo import scoring as scoring
from locas_ext.evaluation.locomo.data import Question


def question(category, answer=None, trap=None):
    return Question("?", category, answer, trap)


@pytest.mark.parametrize(
    "prediction, gold, expected",
    [
        ("red kite", "red kite", 1),
        ("Running", "runs", 1),  # one stem
        ("she was running and runs", "the runs", 2 * 1 / (4 + 1)),  # she wa run run, run
        ("red red kite", "red kite kite", 2 * 2 / (3 + 3)),  # red and kite once each
        ("red red red", "red red kite", 2 * 2 / (3 + 3)),  # red twice
        ("The cat, and A dog!", "cat dog", 1),
        ("anthem", "them", 0),  # an is dropped as a word only
        ("don't", "dont", 1),
        ("1,000 miles", "1000", 2 * 1 / (2 + 1)),
        ("in 2022", "2022", 2 * 1 / (2 + 1)),
        ("blue", "red", 0),
        ("", "red", 0),
        ("the", "a", 0),  # nothing is left of either
        ("  red \t kite ", "RED kite", 1),
    ],
)
def test_token_f1(prediction, gold, expected):
    assert scoring.token_f1(prediction, gold) == pytest.approx(expected)
    assert scoring.token_f1(gold, prediction) == pytest.approx(expected)


@pytest.mark.parametrize("category", [2, 4])
def test_temporal_and_single_hop_are_one_f1(category):
    assert scoring.official_score(question(category, "kite, red ball"), "a red ball, swimming") == pytest.approx(2 / 3)
    assert scoring.official_score(question(category, "yes; it rained"), "Yes") == pytest.approx(2 / (1 + 3))


@pytest.mark.parametrize(
    "prediction, gold, expected",
    [
        ("a red ball, swimming", "kite, red ball", (0 + 1) / 2),
        ("red kite", "kite, red ball", (2 * 1 / (2 + 1) + 2 * 1 / (2 + 2)) / 2),
        ("kite", "kite", 1),
        ("kite, kite", "kite, ball, doll", 1 / 3),
        ("kite", "kite,", 1 / 2),  # the empty part is a part
    ],
)
def test_multi_hop_is_the_mean_of_the_best_over_the_gold_parts(prediction, gold, expected):
    assert scoring.official_score(question(1, gold), prediction) == pytest.approx(expected)


def test_open_domain_gold_ends_at_the_first_semicolon():
    assert scoring.official_score(question(3, "Yes; it rained; a lot"), "yes") == 1
    assert scoring.official_score(question(3, "Yes; it rained; a lot"), "it rained") == 0


@pytest.mark.parametrize(
    "prediction, official, trap",
    [
        ("No information available.", 1, 0),
        ("It is NOT MENTIONED here", 1, 0),
        ("There is no information", 0, 0),
        ("a red kite", 0, -2 / (2 + 1)),
        ("kite", 0, -1),
        ("", 0, 0),
    ],
)
def test_adversarial(prediction, official, trap):
    item = question(5, None, "the kite")
    assert scoring.official_score(item, prediction) == official
    assert scoring.trap_score(item, prediction) == pytest.approx(trap)
    assert str(scoring.trap_score(item, "")) == "0.0"  # not -0.0


def test_summaries_count_and_pool_by_question():
    questions = (question(4, "red"), question(4, "blue"), question(1, "a, b"), question(5, None, "red"))
    one = scoring.summarize(questions, ["red", "red", "b", "red"])
    assert one == {
        "multi-hop": {"count": 1, "f1": pytest.approx(1 / 2)},  # "a" is an article
        "single-hop": {"count": 2, "f1": pytest.approx(1 / 2)},
        "adversarial": {"count": 1, "f1": 0},
        scoring.TRAP: {"count": 1, "f1": pytest.approx(-1)},
        scoring.OVERALL: {"count": 4, "f1": pytest.approx(1.5 / 4)},
        scoring.ANSWERABLE: {"count": 3, "f1": pytest.approx(1.5 / 3)},
    }
    other = scoring.summarize((question(4, "red"), question(2, "2020")), ["red", "2020"])
    pooled = scoring.pool([one, other])
    assert pooled["single-hop"] == {"count": 3, "f1": pytest.approx(2 / 3)}
    assert pooled["temporal"] == {"count": 1, "f1": 1}
    assert pooled[scoring.OVERALL] == {"count": 6, "f1": pytest.approx(3.5 / 6)}
    assert pooled[scoring.ANSWERABLE] == {"count": 5, "f1": pytest.approx(3.5 / 5)}
    assert "open-domain" not in pooled


def test_without_nltk_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    scoring._stemmer.cache_clear()
    with pytest.raises(LocasError, match=r"locas_ext\[eval\]"):
        scoring.check_installed()
