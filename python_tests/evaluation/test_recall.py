"""`locas recall` from end to end on a tiny random host."""

import json
from contextlib import contextmanager

import pytest
import torch
from support.helpers import assert_same_host, save_host, snapshot, tiny_model
from support.interrupting import ctrl_c_at

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.evaluation import results
from locas_ext.evaluation.recall import command, measuring
from locas_ext.evaluation.recall.nonce import nonce_document
from locas_ext.evaluation.report import build

METHODS = "none,window,retrieval,locas,temp-lora,locas+retrieval,study,study-given+retrieval"
OPTIONS = ["--window", "64", "--stride", "32", "--rank", "4", "--learning-rate", "0.02", "--device", "cpu", "--general", "0"]
OPTIONS += ["--temp-lora-rank", "2", "--facts", "5", "--max-new-tokens", "3"]
OPTIONS += ["--retrieval-chunks", "2", "--retrieval-tokens", "32"]
OPTIONS += ["--loss", "ce", "--study-epochs", "1", "--questions", "2", "--guard", "0", "--study-learning-rate", "0.02"]
OPTIONS += ["--updates", "6", "--keys", "learned"]


@pytest.fixture(scope="module")
def host_folder(tokenizer, tmp_path_factory):
    host = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=256, num_hidden_layers=1, eos_token_id=0)
    return save_host(host, tmp_path_factory.mktemp("host"))


def run(host_folder, out, *more, methods=METHODS, data="nonce"):
    arguments = ["recall", data, "--model", host_folder, "--out", out, "--methods", methods, *OPTIONS, *more]
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(host_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert run(host_folder, out) == 0
    return out


def test_results_hold_every_answer_and_what_it_is_summed_up_to(finished):
    content = results.read(finished)
    assert content["settings"]["command"] == "recall" and content["settings"]["documents"].keys() == {"nonce-0"}
    records = {record["method"]: record for record in content["records"]}
    assert list(records) == METHODS.split(",")
    assert "does not fit" in records.pop("window")["error"]  # about 470 tokens into 256 positions
    document = nonce_document(5, 0)
    for _method, record in records.items():
        assert record["error"] is None and record["other_kl"] >= -1e-9
        assert [a["question"] for a in record["answers"]] == [q.text for q in document.questions]
        for kind, figures in record["kinds"].items():
            answers = [a for a in record["answers"] if a["kind"] == kind]
            assert figures["count"] == len(answers) == 5
            assert figures["contained"] == pytest.approx(sum(a["contained"] for a in answers) / 5)
            known = [a["calibrated"] for a in answers if a.get("calibrated") is not None]
            assert figures["calibrated"] == (pytest.approx(sum(known) / len(known)) if known else None)
            if kind != "absent":
                assert figures["gold_nats_interval"][0] <= figures["gold_nats"] <= figures["gold_nats_interval"][1] < 0
    assert records["none"]["other_kl"] == pytest.approx(0, abs=1e-9) == records["retrieval"]["other_kl"]
    assert records["locas"]["other_kl"] == records["locas+retrieval"]["other_kl"] > 1e-5 < records["temp-lora"]["other_kl"]
    assert records["locas"]["perplexity"] < records["none"]["perplexity"]
    assert "questions about" in records["study"]["notes"][0] and "10 given" not in records["study"]["notes"][0]
    assert "10 questions about" in records["study-given+retrieval"]["notes"][0] and records["locas"]["notes"] == []
    assert records["study"]["other_kl"] > 1e-6 and records["study"]["extra_parameters"] == 3 * 4 * 32
    assert (finished / "studies" / "study" / "nonce-0" / "progress.json").exists()
    assert records["locas"]["extra_parameters"] == 3 * 4 * 32 and records["none"]["extra_parameters"] == 0


def test_a_memory_answers_as_one_that_read_the_text_by_itself(finished, host_folder, tokenizer):
    model, _ = command.load_host(str(host_folder), None, "cpu")
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    ids = tokenizer(nonce_document(5, 0).text, add_special_tokens=False)["input_ids"]
    memory.memorize(ids, window=64, stride=32, learning_rate=0.02, progress=False, on_divergence="ignore")
    asked = measuring.View()
    prompter = command.Prompter(tokenizer)
    document = nonce_document(5, 0)
    entries = measuring.ask_all(model, prompter, document, asked, measuring.Asking(max_new_tokens=3), lambda n: None)
    (record,) = [record for record in results.read(finished)["records"] if record["method"] == "locas"]
    for here, there in zip(entries, record["answers"], strict=True):
        assert here["prediction"] == there["prediction"] and here.get("calibrated") == there.get("calibrated")
        assert here.get("gold_nats") == pytest.approx(there.get("gold_nats"))


def test_the_report_has_intervals_a_plot_and_what_was_not_measured(finished, tmp_path):
    text = (finished / "report.md").read_text()
    assert "| locas+retrieval |" in text and "- window, nonce-0: does not fit" in text
    assert "What learning says:" in text and "- study, nonce-0: " in text
    assert (finished / "recall.png").stat().st_size > 10_000 and "95% bootstrap intervals over questions" in text
    merged = build.merge_reports([finished], tmp_path / "merged").read_text()
    assert f"{finished.name}: locas+retrieval" in merged


def test_an_ended_run_goes_on_with_what_is_missing(finished, host_folder, tmp_path, capsys, monkeypatch):
    measured = ctrl_c_at(monkeypatch, command, "ask_all", 3)
    out = tmp_path / "run"
    assert run(host_folder, out) == 130 and "3 of 8 pairs of method and text are finished" in capsys.readouterr().err
    assert run(host_folder, out) == 0 and len(measured) == 3 + 5
    told = ("seconds", "seconds_asking", "notes")  # how long it took
    timeless = lambda folder: [{k: v for k, v in r.items() if k not in told} for r in results.read(folder)["records"]]
    assert timeless(out) == timeless(finished)
    before = (out / "results.json").read_bytes()
    assert run(host_folder, out, "--passes", 2) == 2 and "passes was 1, is 2" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_several_texts_from_a_file_and_what_is_kept(host_folder, tmp_path, monkeypatch):
    """A host that writes nothing right keeps nothing; one that is said to be right keeps what it then says."""
    questions = [{"question": f"What is {n}?", "answers": [f"word{n}"]} for n in range(3)]
    texts = [{"title": f"t{n}", "text": f"word{n} is it. " * 9, "questions": questions} for n in range(6)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    always = lambda model, prompter, asked, view, asking, advance: [n % 2 == 0 for n in range(len(asked))]
    monkeypatch.setattr(measuring, "right_general", always)
    out = tmp_path / "run"
    more = ["--general", "10", "--documents", "5"]
    assert run(host_folder, out, *more, methods="none", data=tmp_path / "texts.json") == 0
    records = results.read(out)["records"]
    assert [record["document"] for record in records] == ["t0", "t1", "t2", "t3", "t4"]
    assert all(record["kept"] == 0.5 and record["kept_questions"] == 10 for record in records)
    assert all(answer["options"] == 3 for answer in records[0]["answers"])
    report = (out / "report.md").read_text()
    assert "intervals over texts" in report and "kept of 10" in report


@pytest.mark.parametrize("why", ["too large", "quantized"])
def test_a_host_that_float32_does_not_suit_is_asked_in_its_own_precision(why, host_folder, monkeypatch):
    @contextmanager
    def full(model):
        assert why == "too large"
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        yield

    monkeypatch.setattr(measuring, "in_float32", full)
    monkeypatch.setattr(measuring, "rounds_whole_texts", lambda model: why == "quantized")
    monkeypatch.setattr(measuring, "right_general", lambda model, prompter, asked, *more: [True] * len(asked))
    model, tokenizer = command.load_host(str(host_folder), "bfloat16", "cpu")
    prompter, asking = command.Prompter(tokenizer), measuring.Asking(general=3)
    alone = measuring.host_alone(model, prompter, asking)
    assert len(alone.right) == 3 and alone.right_in_float32 == [] and alone.rounding is None
    rest = measuring.everything_else(model, prompter, measuring.View(), alone, asking, 0, lambda count: None)
    assert rest["kept"] == 1 and rest["kept_in_float32"] is None


def test_the_bare_host_is_asked_each_general_question_once_a_precision(host_folder, monkeypatch):
    asked = {torch.bfloat16: [], torch.float32: []}

    def every(step):  # which questions are answered right
        return {question for n, question in enumerate(measuring.general_questions()) if n % step == 0}

    right = {torch.bfloat16: every(4), torch.float32: every(2)}

    def answers(model, prompter, questions, *more):
        asked[model.dtype] += questions
        return [question in right[model.dtype] for question in questions]

    monkeypatch.setattr(measuring, "right_general", answers)
    monkeypatch.setattr(measuring, "_AT_ONCE", 10)
    model, tokenizer = command.load_host(str(host_folder), "bfloat16", "cpu")
    alone = measuring.host_alone(model, command.Prompter(tokenizer), measuring.Asking(general=12))
    assert len(alone.right) == len(alone.right_in_float32) == 12 and alone.rounding == 1
    for questions in asked.values():
        assert len(questions) == len(set(questions))
    assert set(alone.right) <= set(asked[torch.float32]) and len(asked[torch.float32]) < len(asked[torch.bfloat16]) == 50
    right[torch.float32] = every(8)
    assert measuring.host_alone(model, command.Prompter(tokenizer), measuring.Asking(general=12)).rounding == 0.5


def test_what_is_retained_after_further_texts(host_folder, tokenizer, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(host_folder, out, "--further", 1, methods="none,locas,study") == 0
    records = {record["method"]: record for record in results.read(out)["records"]}
    assert "after" not in records["none"] and len(records["study"]["notes"]) == 2
    assert "question gen, 1 texts later" in (out / "report.md").read_text()
    model, _ = command.load_host(str(host_folder), None, "cpu")
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    for seed in (0, 1_000_000):
        ids = tokenizer(nonce_document(5, seed).text, add_special_tokens=False)["input_ids"]
        memory.memorize(ids, window=64, stride=32, learning_rate=0.02, progress=False, on_divergence="ignore")
    first = tokenizer(nonce_document(5, 0).text, add_special_tokens=False)["input_ids"]
    expected = measuring.truncation(model, first, 64, 32, progress=False).perplexity
    assert records["locas"]["after"]["perplexity"] == pytest.approx(expected) != records["locas"]["perplexity"]
    (tmp_path / "one.json").write_text(
        json.dumps({"title": "t", "text": "w " * 9, "questions": [{"question": "q?", "answer": "w"}]})
    )
    assert run(host_folder, tmp_path / "other", "--further", 1, methods="locas", data=tmp_path / "one.json") == 2
    assert "--further is 1, but there are 1 texts" in capsys.readouterr().err


def test_a_study_has_nothing_given_where_the_data_brings_nothing(host_folder, tmp_path):
    questions = [{"question": "What is it?", "answers": ["a word"]}]
    (tmp_path / "texts.json").write_text(json.dumps({"title": "t", "text": "It is a word. " * 9, "questions": questions}))
    assert run(host_folder, tmp_path / "run", methods="study-given", data=tmp_path / "texts.json") == 0
    (record,) = results.read(tmp_path / "run")["records"]
    assert "there are no given pairs" in record["error"]


def test_the_host_is_as_before(host_folder, tmp_path, monkeypatch):
    model, tokenizer = command.load_host(str(host_folder), None, "cpu")
    before = snapshot(model)
    monkeypatch.setattr(command, "load_host", lambda *arguments: (model, tokenizer))
    assert run(host_folder, tmp_path / "run", methods="locas,temp-lora,study") == 0
    assert_same_host(model, before)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "locas,remembering"], "--methods is 'remembering'; expected one of none, window"),
        (["--facts", 4], "--facts is 4; expected an integer >= 5"),
        (["--facts", 61], "facts is 61; expected an integer from 5 to 60"),
        (["--passes", 0], "--passes is 0"),
        (["--gold", 2], "gold is 2"),
        (["--study-passes", -1], "--study-passes is -1"),
        (["--kinds", "asked,talk"], "--kinds is 'asked,talk'; expected names of asked, asked-for"),
        (["--retrieval-chunks", 0], "--retrieval-chunks is 0"),
        (["--window", 300], "window is 300; expected an integer from 2 to 256"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, message, host_folder, tmp_path, capsys):
    assert run(host_folder, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_named_with_what_could_be(host_folder, tmp_path, capsys):
    assert run(host_folder, tmp_path / "run", data="tales.json") == 2
    assert "tales.json is not there; expected nonce, fairytaleqa, a file or a folder" in capsys.readouterr().err
