"""results.json from strangers: whatever stands in a field, a report is made or one error names file and field."""

import copy
import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.reports import MACHINE, SETTINGS, record

from locas_ext import LocasError
from locas_ext.evaluation import json_files, results
from locas_ext.evaluation.report.build import merge_reports, write_report
from locas_ext.evaluation.report.plots import style

FIGURES = {"perplexity_ratio": 1.1, "top1_agreement": 0.9, "kl": 0.01}
INTERVALS = {f"{name}_interval": [value * 0.9, value * 1.1] for name, value in FIGURES.items()}


def text_record(state, same=True):
    measured = {"tokens": 99, "windows": 3, "perplexity": 40.5, "seconds": 1.5, **FIGURES, **INTERVALS}
    bits = {"same_bits_as_host": same, "first_difference": None if same else [1, 33]}
    return {"state": state, "text": "a.txt", **measured, **bits, "per_window": [[33, 120.5, 0.1, 30, 0.02]] * 3}


def task_record(state):
    measured = {"value": 0.4, "stderr": 0.01, "questions": 4, "difference": 0.1, "difference_interval": [0.0, 0.2]}
    answers = {"same_bits_as_host": True, "per_question": [1.0, 0, 0, 1], "responses_sha256": "ab", "seconds": 2.0}
    return {"state": state, "task": "mmlu", "metric": "acc,none", **measured, **answers}


def locomo_record(method):
    scores = {"multi-hop": {"count": 2, "f1": 0.5}, "overall": {"count": 3, "f1": 0.25}}
    return {"method": method, "dialogue": "kites", "questions": 3, "cut_tokens": 7, "seconds": 2.5, "scores": scores}


def recall_record(method):
    answers = [
        {"kind": kind, "contained": True, "f1": 0.5, "calibrated": False, "gold_nats": -1.5} for kind in ("name", "absent")
    ]
    kept = {"kept_questions": 4, "kept": 0.75, "kept_interval": [0.5, 1.0], "kept_by_rounding": 0.9}
    kept |= {"kept_in_float32": 0.8, "kept_in_float32_interval": [0.6, 1.0]}
    measured = {"perplexity": 20.5, "other_kl": 0.01, "extra_parameters": 9, "notes": ["a note"], "answers": answers}
    return {"method": method, "document": "t0", "error": None, "seconds": 1.5, **kept, **measured}


LOCOMO = {"methods": ["no-context"], "dialogues": {"kites": "ab"}, "prompts": {"turn": "{a}"}, "model": "m"}
WHOLE = {
    "perplexity": (
        SETTINGS | {"arms": [{"arm": "locas"}], "books": [{"name": "Nostromo"}], "ablate": "rank"},
        [record(m, settings={"rank": 4, "learning_rate": 1e-3, "init": "topk"}) for m in ("truncation", "locas", "temp-lora")],
    ),
    "locomo": (LOCOMO, [locomo_record("all-refuse"), locomo_record("no-context")]),
    "recall": ({"model": "m", "methods": ["none", "locas"]}, [recall_record("none"), recall_record("locas")]),
    "capability": (
        {"model": "m", "window": 64},
        [
            text_record("host"),
            text_record("attached", False),
            text_record("detached"),
            task_record("host"),
            task_record("merged"),
        ],
    ),
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**18, -(10**30), 1e-300, 1e300, -1e308, 0.5]),
    st.text(max_size=3),
    st.sampled_from(
        [[], {}, [1], [[1]], [[1, 2]], [[1, None]], {"": []}, {"1": 1}, {"a": {"count": 1, "f1": 1}}, "0", "1000", "\x1b"]
    ),
)


def places(value, at=()):
    """The way to every part of a content."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if not isinstance(key, int) or key < 3:
            yield from places(child, (*at, key))


@st.composite
def mutated(draw, command):
    own, records = copy.deepcopy(WHOLE[command])
    content = {"settings": {**own, "command": command}, "machine": copy.deepcopy(MACHINE), "records": records}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places(content))[1:]))
        parent = content
        for key in way:
            parent = parent[key] if (isinstance(parent, list) and key < len(parent)) or key in parent else {last: None}
        if isinstance(parent, list) and last >= len(parent):
            continue
        if draw(st.booleans()):
            parent[last] = copy.deepcopy(draw(VALUES))
        elif last in parent or isinstance(parent, list):
            del parent[last]
    return content


def attempt(work):
    """Runs it; an error must be one of those that name file and field."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work()
    except ValueError as error:
        assert "results.json" in str(error) or "other settings" in str(error), repr(error)
        assert isinstance(error, LocasError) or "command is" in str(error) or "other settings" in str(error), repr(error)


@pytest.mark.parametrize("command", WHOLE)
def test_what_is_whole_is_reported(tmp_path, command):
    own, records = WHOLE[command]
    (tmp_path / "results.json").write_text(
        json.dumps({"settings": {**own, "command": command}, "machine": MACHINE, "records": records})
    )
    assert write_report(tmp_path).exists()


@pytest.mark.parametrize("command", WHOLE)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_field_may_hold_anything(tmp_path, command, data):
    content = data.draw(mutated(command))
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 8)
        (folder / "results.json").write_text(json.dumps(content))
        attempt(lambda: write_report(folder))
        attempt(lambda: merge_reports([folder], tmp_path / "b"))
        attempt(lambda: results.open_folder(folder, {"command": command}))


# ---- sizes, and numbers that JSON has not --------------------------------------------------------------------
def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files.read_json, "__defaults__", (1000,))
    (tmp_path / "results.json").write_bytes(b" " * 1001)
    with pytest.raises(LocasError, match=r"results.json is too large: 1,001 bytes; expected at most 1,000"):
        results.read(tmp_path)


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    results.open_folder(tmp_path, {"command": "perplexity"})
    wild = record("locas", perplexity=2.0, held_out_perplexity=float("inf"), curve=[[1, float("nan")], [2, 2.0]])
    results.write(tmp_path, {"command": "perplexity"}, [wild])
    (read,) = results.read(tmp_path)["records"]
    assert read["held_out_perplexity"] is None and read["curve"] == [[1, None], [2, 2.0]]
    assert write_report(tmp_path).exists()
