"""The built-in tasks of `locas capability`: log-probabilities against plain forwards, metrics, states, resumption."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ability import WORDS, sentence, write_tasks
from support.helpers import tiny_model
from support.hosts import tiny
from support.perplexity import perplexity

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.errors import LocasError
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.evaluation.capability.ability import suite
from locas_ext.evaluation.capability.ability.data import Question
from locas_ext.evaluation.capability.ability.requests import Request, encode
from locas_ext.evaluation.capability.ability.scoring import Budget, batches, groups, score_requests
from locas_ext.evaluation.capability.task_states import compared
from locas_ext.evaluation.methods.adapter_files import lora_digest, save_lora, saved_lora
from locas_ext.evaluation.methods.temp_lora import lora, temp_lora

LARGE = Budget(1 << 11, 1 << 14, 1 << 26, 1 << 20)


# ---- log-probabilities -----------------------------------------------------------------------------------------
def by_hand(model, request, choice):
    """(nats, greedy) by one plain forward over the whole sequence."""
    targets = list(request.targets[choice])
    ids = torch.tensor([[*request.ids.tolist(), targets[-1]]])
    with torch.no_grad():
        log_p = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(targets) :].double().log_softmax(-1)
    nats = sum(log_p[place, token].item() for place, token in enumerate(targets))
    return nats, log_p.argmax(-1).tolist() == targets


def random_request(number, vocabulary, beginning=(), low=1, high=30):
    """Some with one choice of several tokens, some with several of one."""
    own = [random.randrange(3, vocabulary) for _ in range(random.randint(low, high))]
    if random.random() < 0.5:
        targets = tuple((token,) for token in random.sample(range(3, vocabulary), random.randint(1, 4)))
        return Request(number, np.array([*beginning, *own], np.int32), tuple(range(len(targets))), targets)
    targets = tuple(random.randrange(3, vocabulary) for _ in range(random.randint(1, 6)))
    return Request(number, np.array([*beginning, *own, *targets[:-1]], np.int32), (0,), (targets,))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("tight", [False, True])
def test_scores_are_those_of_plain_forwards(family, tight):
    model = tiny(family, seed=random.randrange(100), initializer_range=0.25)
    beginning = [random.randrange(3, 61) for _ in range(90)]
    requests = [random_request(number, 61) for number in range(20)]
    requests += [random_request(20 + number, 61, beginning) for number in range(20)]
    random.shuffle(requests)
    budget = Budget(random.randint(1, 200), random.randint(1, 500), random.randint(1, 5000), 7) if tight else LARGE
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize([random.randrange(3, 61) for _ in range(60)], 32, 16, learning_rate=0.05, progress=False)
    done = []
    scores = score_requests(model, requests, budget, done.append)
    assert sum(done) == len(requests)
    for request, found in zip(requests, scores, strict=True):
        expected = [by_hand(model, request, choice) for choice in range(len(request.targets))]
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-3, abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_common_beginning_is_read_once():
    """What is fed to the model, counted."""
    model = tiny_model("llama", max_position_embeddings=200)
    beginning = [random.randrange(3, 61) for _ in range(100)]
    requests = [random_request(number, 61, beginning, high=10) for number in range(30)]
    fed = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape), with_kwargs=True)
    score_requests(model, requests, LARGE, lambda count: None)
    hook.remove()
    assert fed[0][0] == 1 and fed[0][1] >= 100
    assert sum(rows * tokens for rows, tokens in fed[1:]) <= 30 * 16
    ((members, shared),) = groups(requests)
    assert len(members) == 30 and 100 <= shared < min(len(r.ids) for r in requests)
    assert list(groups(requests[:5])) == [(list(range(5)), 0)]


def test_batches_fit_the_budget_and_hold_everything():
    requests = [random_request(number, 61) for number in range(60)]
    budget = Budget(random.randint(40, 200), random.randint(60, 400), random.randint(400, 4000), random.randint(1, 9))
    found = list(batches(requests, list(range(60)), 0, budget, 61))
    assert sorted(index for batch in found for index in batch) == list(range(60))
    for batch in found:
        lengths = [len(requests[index].ids) for index in batch]
        keep = max(max(lengths) - length + requests[i].scored for i, length in zip(batch, lengths, strict=True))
        assert len(batch) <= budget.rows
        if len(batch) > 1:
            assert len(batch) * max(lengths) <= min(budget.tokens, budget.cached) and len(batch) * keep * 61 <= budget.logits


# ---- tokens ----------------------------------------------------------------------------------------------------
def test_tokens_are_those_of_the_whole_text(tokenizer):
    def of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    contexts = [f"{sentence()}\n\nQuestion: {sentence()}?\nAnswer:" for _ in range(5)] + [sentence() for _ in range(5)]
    questions = [Question((context,) * 2, (f" {sentence()}", f" {random.choice(WORDS)}"), 0) for context in contexts]
    encoded = encode(tokenizer, questions, 10_000)
    seen = {(request.question, choice): request for request in encoded.requests for choice in request.choices}
    for number, question in enumerate(questions):
        for choice, continuation in enumerate(question.continuations):
            request = seen[number, choice]
            targets = request.targets[request.choices.index(choice)]
            assert [*request.ids, targets[-1]] == of(question.contexts[0] + continuation)
            assert list(targets) == of(question.contexts[0] + continuation)[len(of(question.contexts[0])) :]
    assert encoded.cut == 0


def test_letters_share_a_forward_and_long_contexts_lose_their_beginning(tokenizer):
    letters = (" A", " B", " C", " D")
    assert all(len(tokenizer(letter, add_special_tokens=False)["input_ids"]) == 1 for letter in letters)
    question = Question((" ".join(random.choices(WORDS, k=50)),) * 4, letters, 2)
    (request,) = encode(tokenizer, [question], 1000).requests
    assert request.choices == (0, 1, 2, 3)
    cut = encode(tokenizer, [question, Question(("The",), (" sea",), 0)], 20)
    assert cut.cut == 1 and cut.requests[0].ids.tolist() == request.ids[-20:].tolist()
    with pytest.raises(LocasError, match="the model has 3 positions, fewer than a choice of question 0 takes"):
        encode(tokenizer, [Question(("The",), (" " + sentence(9, 9),), 0)], 3)


# ---- metrics ---------------------------------------------------------------------------------------------------
def test_accuracy_accuracy_by_length_and_lambadas():
    questions = [
        Question(("Q",) * 2, (" ab", " abcdefghij"), 1),
        Question(("Q",) * 2, (" abcd", " xyzw"), 0),
        Question(("Q",) * 2, (" abcd", " xyzw"), 0),
    ]
    scores = [[(-3.0, True), (-5.0, False)], [(-1.0, True), (-2.0, False)], [(-2.0, True), (-1.0, False)]]
    plain, by_length = suite._figures("piqa", questions, scores)
    assert (plain["metric"], plain["per_question"], plain["value"]) == ("acc", [0, 1, 0], pytest.approx(1 / 3))
    assert (by_length["metric"], by_length["per_question"]) == ("acc_norm", [1, 1, 0])
    assert plain["stderr"] == pytest.approx(np.std([0, 1, 0], ddof=1) / math.sqrt(3))
    assert [figure["metric"] for figure in suite._figures("boolq", questions, scores)] == ["acc"]
    words = [Question(("Q",), (" a",), 0)] * 3
    exact, perplexity = suite._figures("lambada", words, [[(-2.0, True)], [(-4.0, False)], [(-1.5, True)]])
    assert exact["value"] == pytest.approx(2 / 3) and perplexity["value"] == pytest.approx(math.exp(2.5))


def test_differences_are_paired():
    count = random.randint(20, 80)
    host = [random.uniform(1, 6) for _ in range(count)]
    mine = [value + random.gauss(0.2, 0.05) for value in host]

    def record(values):
        value = math.exp(sum(values) / count)
        return {"metric": "perplexity", "value": value, "per_question": values, "questions": count, "responses_sha256": ""}

    found = compared(record(mine), record(host), seed=1)
    low, high = found["difference_interval"]
    assert found["difference"] == pytest.approx(record(mine)["value"] - record(host)["value"])
    assert low < found["difference"] < high and low > 0  # without the pairing the spread of 1 to 6 nats would hide it
    same = compared(record(host), record(host), seed=1)
    assert same["difference_interval"] == [0, 0] and same["same_bits_as_host"]


# ---- the command -----------------------------------------------------------------------------------------------
ASKED = "arc_easy,winogrande,lambada"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """-> a folder with a memory of the shipped model, an adapter of Temp-LoRA, tasks and a text."""
    folder = tmp_path_factory.mktemp("ability")
    (folder / "page.txt").write_text((ASSETS / "nostromo.txt").read_text()[1000:3000])
    (folder / "other.txt").write_text((ASSETS / "tono-bungay.txt").read_text()[2000:2600])
    write_tasks(folder / "data")
    methods = ["--methods", "locas,temp-lora", "--learning-rate", "0.05", "--temp-lora-lr", "0.01"]
    assert perplexity([folder / "page.txt"], folder / "study", *methods) == 0
    return folder


def run(capsys, files, *arguments):
    memory, adapter = (files / "study" / place for place in ("memories/page-locas", "adapters/page-temp-lora"))
    fixed = ["capability", "--model", MODEL, "--memory", memory, "--device", "cpu", "--window", "64"]
    fixed += ["--held-out", files / "other.txt", "--tasks", ASKED, "--ability-data", files / "data"]
    status = main([str(argument) for argument in [*fixed, "--temp-lora", adapter, *arguments]])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_state_answers_and_an_ended_run_goes_on(files, tmp_path, capsys, monkeypatch):
    out, calls, evaluate = tmp_path / "out", [], suite.Ability.evaluate

    def counted(self, model, tokenizer, state, part):
        calls.append((state, part))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(self, model, tokenizer, state, part)

    monkeypatch.setattr(suite.Ability, "evaluate", counted)
    status, _, err = run(capsys, files, "--merged", "--out", out)
    assert status == 130 and "are kept" in err
    status, printed, _ = run(capsys, files, "--merged", "--out", out)
    assert status == 0 and "after detach() every bit" in printed
    expected = [(s, t) for s in ("host", "attached", "merged", "detached", "temp-lora") for t in ASKED.split(",")]
    assert calls[:4] + calls[5:] == expected and calls[4] == calls[5]
    content = json.loads((out / "results.json").read_text())
    records = [record for record in content["records"] if "task" in record]
    assert {record["metric"] for record in records if record["task"] == "arc_easy"} == {"acc", "acc_norm"}
    assert {record["metric"] for record in records if record["task"] == "lambada"} == {"acc", "perplexity"}
    by_state = {r["state"]: r for r in records if (r["task"], r["metric"]) == ("lambada", "perplexity")}
    assert by_state["detached"]["value"] == by_state["host"]["value"] and by_state["detached"]["same_bits_as_host"]
    assert by_state["merged"]["value"] == pytest.approx(by_state["attached"]["value"], rel=1e-4)
    values = [by_state[state]["value"] for state in ("host", "attached", "temp-lora")]
    assert len(set(values)) == 3
    settings = content["settings"]
    assert settings["harness"] == "builtin" and set(settings["data_sha256"]) == set(ASKED.split(","))
    report = (out / "report.md").read_text()
    assert "arc\\_easy, acc\\_norm: 8 questions" in report and "answers to 18 questions" in report
    heads = [line for line in report.split("## All tasks")[1].splitlines() if line.startswith("|")]
    assert heads[0] == "| task | questions | host | attached | merged | detached | temp-lora |"
    rows = {row.split(" | ")[0]: row.split(" | ")[2:] for row in heads[2:7]}
    assert len(rows) == 5 and rows["| lambada, perplexity"][0] == f"{by_state['host']['value']:.2f}"
    assert rows["| lambada, perplexity"][1].replace("\\", "").startswith(f"{by_state['attached']['difference']:+.2f}")


def test_a_limit_and_other_data_are_other_runs(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, files, "--limit", "2", "--out", out)[0] == 0
    status, _, err = run(capsys, files, "--out", out)
    assert status == 2 and "limit was 2, is None" in err
    records = json.loads((out / "results.json").read_text())["records"]
    assert {record["questions"] for record in records if "task" in record} == {2}


@pytest.mark.parametrize(
    ("options", "status", "complaint"),
    [
        (["--harness", "lm-eval"], 2, "--ability-data is given, but --harness is lm-eval, which takes none"),
        (["--harness", "builtin", "--few-shot", "3"], 2, "--few-shot is given, but --harness is builtin, which takes none"),
        (["--harness", "builtin", "--tasks", "gsm8k"], 2, "'gsm8k'"),
        (["--ability-data", "/nowhere"], 2, "--ability-data: /nowhere is not a folder"),
        (["--temp-lora", "/nowhere"], 2, "No such file"),
    ],
)
def test_bad_arguments_are_one_line(files, capsys, options, status, complaint):
    found, _, err = run(capsys, files, *options)
    lines = [line for line in err.splitlines() if line.startswith("locas: ")]
    assert found == status and len(lines) == 1 and complaint in lines[0]


# ---- Temp-LoRA's adapter in a folder ---------------------------------------------------------------------------
def test_an_adapter_comes_back_and_peft_reads_it(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), torch.randint(3, 61, (1, 30))
    alone = model(input_ids=ids).logits.detach()
    with lora(model, 3, 6.0, seed=4) as parameters:
        temp_lora(model, parameters, torch.randint(3, 61, (60,)), 32, 16, learning_rate=0.05, progress=False)
        learned = model(input_ids=ids).logits.detach()
        save_lora(model, 3, 6.0, tmp_path / "adapter")
    assert not torch.equal(alone, learned)
    with saved_lora(model, tmp_path / "adapter"):
        assert torch.equal(model(input_ids=ids).logits, learned)
    assert torch.equal(model(input_ids=ids).logits, alone)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert torch.allclose(wrapped(input_ids=ids).logits, learned, rtol=1e-4, atol=1e-5)
    wrapped.unload()


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = tiny_model("llama")
    with lora(model, 2):
        save_lora(model, 2, 2, tmp_path)
    other = tiny_model("llama", hidden_size=64)
    with pytest.raises(LocasError, match="is an adapter of another model"), saved_lora(other, tmp_path):
        pass
    file, config, before = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json", lora_digest(tmp_path)
    kept = config.read_text()
    config.write_text(kept.replace('"r": 2', f'"r": {1 << 20}'))  # gigabytes, were they made before this is noticed
    assert lora_digest(tmp_path) != before
    with pytest.raises(LocasError, match="its tensors are not of rank 1048576"), saved_lora(model, tmp_path):
        pass
    config.write_text(kept)
    whole = load_file(file)
    save_file({name: tensor * float("nan") for name, tensor in whole.items()}, file)
    with pytest.raises(LocasError, match="holds numbers that are not finite"), saved_lora(model, tmp_path):
        pass
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(LocasError, match=r"adapter_model\.safetensors is damaged"), saved_lora(model, tmp_path):
        pass
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": true}')
    with pytest.raises(LocasError, match="use_rslora is True"), saved_lora(model, tmp_path):
        pass
