"""memory.study: what is learned, what is guarded, what is kept on disk, what is refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_same_host, snapshot, tiny_opt
from support.study import CHAT, PAIRS, TEXT, answer_nats, study_host, study_tokenizer, studying

import locas_ext as locas
from locas_ext.learning.study import learner as learner_module
from locas_ext.learning.study import study as study_module
from locas_ext.learning.study.learner import Learner

SEED = random.randrange(1000)
# What a random host computes has no directions of its own, so that nothing would be left to learn with beside them.
FAST = dict(epochs=12, updates=1, batch=3, recalled=0.5, learning_rate=2e-2, raw=0.2, raw_first=0, new_tokens=4, keys="learned")


def settings(**changes):
    return locas.StudySettings(**{**FAST, **changes})


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_answers_become_likelier_without_the_passage(loss):
    tokenizer, memory = study_tokenizer(), studying(SEED)
    before = snapshot(memory.model)
    nats = answer_nats(memory.model, tokenizer)
    # a random host expects nothing of a passage, so by distance alone there would be nothing to learn
    chosen = settings(guard=0.0, gold=0.9)
    report = memory.study(TEXT, tokenizer, loss, PAIRS, progress=False, settings=chosen)
    assert report.questions == {"given": 4} and report.steps == report.planned == 12 * 4 // 3 == memory.version
    assert answer_nats(memory.model, tokenizer) < nats - 2
    assert report.loss < report.loss_before and report.guard is None and not report.returned
    assert [text.tokens for text in memory.texts] == [len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])]
    assert_same_host(memory.model, before)
    with memory.disabled():
        assert answer_nats(memory.model, tokenizer) == pytest.approx(nats)
    assert "4 questions" in str(report) and "16 of 16 updates" in str(report)


def test_a_two_layer_host_studies_too():
    tokenizer, host = study_tokenizer(), tiny_opt(4096, positions=256)
    memory = locas.attach(host, locas.LocasConfig(variant="mlp", rank=8, scale=2.0))
    nats = answer_nats(host, tokenizer)
    memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=settings(guard=0.1, most_kl=1e6))
    assert answer_nats(host, tokenizer) < nats - 1


def test_the_guard_keeps_the_host_as_it_is():
    tokenizer, distances, nats = study_tokenizer(), {}, {}
    for weight in (1e-9, 30.0):
        memory = studying(SEED)
        chosen = settings(guard=weight, most_kl=1e6)
        report = memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen)
        distances[weight], nats[weight] = report.guard, answer_nats(memory.model, tokenizer)
    assert distances[30.0] < 0.8 * distances[1e-9], SEED
    with memory.disabled():
        assert nats[30.0] < answer_nats(memory.model, tokenizer) - 0.5


def test_a_state_too_far_from_the_host_is_not_kept():
    """But something is learned: the rate falls until the guard holds."""
    tokenizer, memory = study_tokenizer(), studying(SEED)
    nats = answer_nats(memory.model, tokenizer)
    chosen = settings(guard=1e-6, most_kl=1e-2, learning_rate=0.5, updates=60)
    report = memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen)
    print(report, nats, answer_nats(memory.model, tokenizer))
    assert report.guard <= 1e-2 and answer_nats(memory.model, tokenizer) < nats


def test_the_gradient_is_that_of_the_rows_one_by_one(monkeypatch):
    """Against autograd over the memory's parameters, each row alone, the losses written out."""
    tokenizer, memory = study_tokenizer(), studying(SEED)
    learners = []

    def first(self, after_step):
        learners.append(self)
        return self.outcome

    monkeypatch.setattr(Learner, "run", first)
    chosen = settings(guard=0.7, raw=0.3, gold=0.4, batch=4)
    memory.study(TEXT, tokenizer, "kl", PAIRS, progress=False, settings=chosen)
    (learner,) = learners
    with torch.no_grad():  # a memory that says something, so that every plane has a gradient
        memory.slots.normal_(std=0.2, generator=torch.Generator().manual_seed(SEED))
    learner.gradient(0)
    found = learner.attachment.state.arenas[0].grad.clone()
    learner.attachment.state.zero_grad()

    def logs(row):
        return memory.model(input_ids=torch.tensor([row.ids])).logits[0, row.first - 1 : -1].log_softmax(-1)

    def nats(row):
        return F.nll_loss(logs(row), torch.tensor(row.ids[row.first :]), reduction="none")

    def kl(row):
        targets, mine = row.targets, logs(row)
        p, q = targets.log_probs.exp(), mine.gather(1, targets.indices).exp()
        rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
        return (p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()

    material = learner.material
    lessons, raw = learner._lessons(0), learner._drawn(material.raw, 1, 0)
    guard = learner._drawn(material.guard, 4, 0)
    nll = torch.cat([nats(row) for row in lessons])
    missed = torch.where(nll > 0.6931, nll, torch.zeros(())).mean()
    total = 0.6 * torch.cat([kl(row) for row in lessons]).mean() + 0.4 * missed
    read = torch.cat([nats(row) for row in raw])
    total = total + 0.3 * torch.where(read > 0.6931, read, torch.zeros(())).mean()
    total = total + 0.7 * torch.cat([kl(row) for row in guard]).mean()
    expected = torch.autograd.grad(total, memory.parameters())
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(found[index], gradient, rtol=2e-2, atol=2e-5 * gradient.abs().max().item() + 1e-7)


# ---- the host's own questions ----------------------------------------------------------------------------------
def test_a_host_without_a_chat_template_learns_from_sentences():
    tokenizer, memory = study_tokenizer(), studying(SEED)
    chosen = settings(epochs=1, questions=3, guard=0.0)
    report = memory.study([TEXT, TEXT[:200]], tokenizer, "ce", progress=False, settings=chosen)
    assert set(report.questions) >= {"blank", "about", "continued"} and report.passages > 1
    assert "asked" not in report.questions and report.asked <= 3 * report.passages
    assert memory.version == report.steps > 0 and len(memory.texts) == 2


def test_a_host_that_writes_nothing_usable_is_refused_with_the_counts():
    tokenizer, memory = study_tokenizer(CHAT), studying(SEED)
    before = memory.version
    chosen = settings(kinds=("asked", "asked-for"), questions=2)
    with pytest.raises(locas.LocasError, match=r"of \d+ questions none can be used \(\d+ are no question"):
        memory.study(TEXT, tokenizer, progress=False, settings=chosen)
    assert memory.version == before and not memory.texts


def test_how_long_it_takes_is_said_before_it_starts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    chosen = settings(kinds=("asked", "blank"), questions=2, epochs=1, guard=0.0, check=False)
    memory = studying(SEED)
    report = memory.study(TEXT, study_tokenizer(CHAT), "ce", settings=chosen)
    said = capsys.readouterr().err
    assert f"{report.asked} questions to write, about " in said and f"{report.planned} updates, about " in said
    assert said.index("to write") < said.index("asking") < said.index("updates, about") < said.index("studying")


# ---- ended and gone on -----------------------------------------------------------------------------------------
def test_an_ended_study_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    tokenizer = study_tokenizer()
    chosen = settings(guard=0.5, most_kl=1e6, epochs=4, keys="addressed")
    whole = studying(SEED)
    full = whole.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen)

    updates, update = [], Learner._update

    def ends(self):
        update(self)
        updates.append(None)
        if len(updates) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "_update", ends)
    monkeypatch.setattr(study_module, "_SAVE_AFTER", 0.0)
    cut = studying(SEED)
    with pytest.raises(KeyboardInterrupt):
        cut.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache")
    assert cut.version == 5
    again = studying(SEED)
    report = again.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache")
    assert report.steps == full.planned - 4  # the fifth was made, but not yet saved
    torch.testing.assert_close(again.gather_slots(), whole.gather_slots(), rtol=0, atol=0)
    assert again.version == whole.version
    done = studying(SEED)
    assert done.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache").steps == 0
    assert torch.equal(done.gather_slots(), whole.gather_slots())
    other = studying(SEED)  # one that begins otherwise learns from the start
    other.initialize(list(range(3, 40)))
    other.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache")
    assert other.version == whole.version and not torch.equal(other.gather_slots(), whole.gather_slots())


def test_what_the_host_wrote_is_kept_passage_by_passage(tmp_path, monkeypatch):
    tokenizer, asked = study_tokenizer(CHAT), []
    writes = study_module.Asker.ask

    def ends(asker, numbers, advance):
        asked.append(list(numbers))
        if len(asked) == 2:
            raise KeyboardInterrupt
        part = writes(asker, numbers, advance)
        part.pairs.append(study_module.Pair("asked", f"What about {numbers[0]}?", "red sails", numbers[0]))
        return part

    monkeypatch.setattr(study_module.Asker, "ask", ends)
    monkeypatch.setattr(study_module, "_AT_ONCE", 2)
    chosen = settings(chunk=32, questions=1, epochs=1, kinds=("asked", "blank"), check=False, guard=0.0)
    with pytest.raises(KeyboardInterrupt):
        studying(SEED).study(TEXT, tokenizer, "ce", progress=False, settings=chosen, cache=tmp_path)
    lines = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl").write_bytes(lines + b'{"kind": "asked", "question": "cut o')
    report = studying(SEED).study(TEXT, tokenizer, "ce", progress=False, settings=chosen, cache=tmp_path)
    passages = report.passages
    assert (tmp_path / "pairs.jsonl").read_bytes().startswith(lines)  # what was there before is kept too
    assert asked == [[0, 1], [2, 3], *([n for n in (k, k + 1) if n < passages] for k in range(2, passages, 2))]
    assert report.questions["asked"] == len(asked) - 1
    (tmp_path / "pairs.jsonl").write_bytes(lines.replace(b'"answer"', b'"reply"'))
    with pytest.raises(locas.LocasError, match=r"pairs.jsonl, line \d+ is damaged: answer is missing"):
        studying(SEED).study(TEXT, tokenizer, "ce", progress=False, settings=chosen, cache=tmp_path)


def test_a_cache_of_another_study_is_refused(tmp_path):
    tokenizer, chosen = study_tokenizer(), settings(epochs=1, guard=0.0)
    studying().study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache")
    for changed in (dict(loss="kl"), dict(seed=1), dict(pairs=PAIRS[:2]), dict(settings=settings(epochs=2, guard=0.0))):
        arguments = dict(loss="ce", pairs=PAIRS, settings=chosen) | changed
        with pytest.raises(ValueError, match=r"is of another study \(different: (loss|seed|pairs|settings)\)"):
            studying().study(TEXT, tokenizer, progress=False, cache=tmp_path / "cache", **arguments)
    memory = studying()
    memory.model.double()
    with pytest.raises(ValueError, match=r"different: dtype\b"):
        memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        studying().study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=chosen, cache=tmp_path / "other")


# ---- bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(texts=7), TypeError, "texts is int; expected a string"),
        (dict(texts=[]), ValueError, "texts is empty"),
        (dict(texts=[TEXT, 3]), TypeError, r"texts\[1\] is int"),
        (dict(texts=[TEXT, "few"]), ValueError, r"texts\[1\] holds \d tokens; expected at least 8"),
        (dict(tokenizer=None), TypeError, "tokenizer is NoneType; expected the host's tokenizer"),
        (dict(loss="mse"), ValueError, "loss is 'mse'; expected one of kl, ce"),
        (dict(seed=-1), ValueError, "seed is -1"),
        (dict(progress=1), TypeError, "progress is 1"),
        (dict(pairs=[]), ValueError, "pairs is empty"),
        (dict(pairs="what"), TypeError, "pairs is str"),
        (dict(pairs=[("q", "a"), ("q",)]), TypeError, r"pairs\[1\] is \('q',\); expected \(question, answer\)"),
        (dict(pairs=[("q", " ")]), ValueError, r"pairs\[0\] is .*; expected two texts that are not empty"),
        (dict(settings={"epochs": 1}), TypeError, "settings is dict; expected locas.StudySettings"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(arguments, error, message):
    memory = studying()
    with pytest.raises(error, match=message):
        memory.study(**{"texts": TEXT, "tokenizer": study_tokenizer(), "progress": False, **arguments})
    assert memory.version == 0 and not memory.state.initialized


def test_a_tokenizer_of_another_host_is_refused():
    memory = locas.attach(study_host(vocab_size=100), locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match="expected ids below 100, the host's vocabulary"):
        memory.study(TEXT, study_tokenizer(), progress=False)


def test_a_detached_or_disabled_memory_does_not_study():
    memory = studying()
    with memory.disabled(), pytest.raises(ValueError, match="study: the memory is disabled here"):
        memory.study(TEXT, study_tokenizer(), progress=False)
    memory.detach()
    with pytest.raises(ValueError, match="study: this memory is no longer attached"):
        memory.study(TEXT, study_tokenizer(), progress=False)


def test_a_loss_that_is_not_finite_ends_it_with_the_memory_of_before(monkeypatch):
    memory, calls = studying(), []
    measured = learner_module.token_nll

    def breaks(*arguments):
        calls.append(None)
        return measured(*arguments) * (float("nan") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(learner_module, "token_nll", breaks)
    with pytest.raises(locas.LocasError, match="the loss is nan at update 3 of the study; the memory stays at version 3"):
        memory.study(TEXT, study_tokenizer(), "ce", PAIRS, progress=False, settings=settings(guard=0.0))
    assert memory.version == 3 and memory.slots.isfinite().all()


def test_a_run_over_a_text_ends_with_a_study():
    tokenizer, memory = study_tokenizer(), studying()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    memory.memorize(ids, window=32, stride=16, progress=False)
    version = memory.version
    memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=settings(epochs=1, guard=0.0))
    assert memory.version > version and len(memory.texts) == 2
    with pytest.raises(ValueError, match="there is no run to continue"):
        memory.feed(ids, progress=False)
