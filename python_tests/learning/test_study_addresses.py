"""Slots that words fire, against least squares and hooks by hand; the schedule of a study, and what judges it."""

import random
from collections import Counter

import pytest
import torch
from support.study import PAIRS, TEXT, study_host, study_tokenizer

import locas_ext as locas
from locas_ext.evaluation.recall.general import general_questions
from locas_ext.learning.study.addresses import (
    Addresses,
    addressed_rows,
    addressed_words,
    enough,
    found_in,
    inner_positions,
    moments,
    spelled,
)
from locas_ext.learning.study.guard import PROMPTS, GuardRows
from locas_ext.learning.study.learner import Learner
from locas_ext.learning.study.passages import passages_of, words_of
from locas_ext.learning.study.prompts import Prompter
from locas_ext.learning.study.rows import Row
from locas_ext.learning.study.salience import Word

SEED = random.randrange(10_000)
CPU = torch.device("cpu")


def fresh(clip=True):
    return locas.attach(study_host(SEED, num_hidden_layers=2), locas.LocasConfig(rank=6, scale=2.0, clip=clip))


def test_a_word_is_found_at_its_last_token_wherever_it_stands():
    prompter = Prompter(study_tokenizer())
    words = ["Skolm", "honey", "Vomel"]
    ids = prompter.encode("Honey? The village of Skolm, Skolm's honey. The Vomel")
    found = found_in(ids, spelled(prompter, words))
    assert [words[number] for _, number in found] == ["honey", "Skolm", "Skolm", "honey"], "no row is read to its last token"
    for place, number in found:
        assert prompter.tokenizer.decode(ids[: place + 1]).lower().endswith(words[number].lower())


def test_words_that_general_text_has_get_slots_only_beside_names():
    prompter = Prompter(study_tokenizer())
    text = "It rained on the harbour and on the market. Captain Klau sold honey on the market. Nobody counted the lanterns."
    salient = lambda sentence: [
        Word(start, end, sentence[start:end], sentence[start:end], sentence[start] == "K")
        for start, end in words_of(sentence)
        if sentence[start:end] in ("harbour", "market", "Klau", "honey", "lanterns")
    ]
    general = [Row(tuple(prompter.encode("Bees make honey. The harbour, the market?")), 1)]
    words = addressed_words(passages_of(prompter, [text], 64), salient, prompter, general)
    assert words == ["Klau", "honey", "market", "lanterns"]


def test_rows_are_read_until_each_word_stood_in_enough_places_or_in_all_there_are():
    rng, words = random.Random(SEED), {(number,): number for number in range(9)}
    rows = [Row(tuple(rng.choices(range(12), weights=range(1, 13), k=rng.randint(2, 9))), 1) for _ in range(150)]
    chosen, places = enough(rows, words)
    assert places == [found_in(row.ids, words) for row in chosen] and 9 < len(chosen) < len(rows)
    count = lambda those: Counter(number for row in those for _, number in found_in(row.ids, words))
    assert all(count(chosen)[number] >= min(16, total) for number, total in count(rows).items())


def test_moments_are_those_of_the_places_alone_and_each_word_counts_alike():
    memory, rng = fresh(), random.Random(SEED)
    rows = [Row(tuple(rng.randrange(3, 4000) for _ in range(rng.randint(4, 20))), 1) for _ in range(6)]
    places = [[(place, rng.randrange(3)) for place in range(1, len(row.ids) - 1)] for row in rows]
    places[0][0], places[1][0], places[2][0] = (1, 0), (1, 1), (1, 2)
    seen = {0: [], 1: []}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, arguments, n=n: seen[n].append(arguments[0][0]))
        for n, layer in enumerate(memory.model.model.layers)
    ]
    with memory.disabled(), torch.no_grad():
        for row in rows:
            memory.model(input_ids=torch.tensor([row.ids[:-1]]))
    for hook in hooks:
        hook.remove()
    with memory.disabled():
        found = moments(memory._attachment, rows, places, 3, CPU)
    for layer, (second, means) in enumerate(found):
        x = [[] for _ in range(3)]
        for inputs, each in zip(seen[layer], places, strict=True):
            for place, number in each:
                x[number].append(inputs[place].double())
        x = [torch.stack(each) for each in x]
        torch.testing.assert_close(means, torch.stack([each.mean(0) for each in x]), rtol=1e-4, atol=1e-6)
        expected = sum(each.T @ each / len(each) for each in x) / 3
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-6)


def test_rows_are_least_squares_from_inputs_to_the_slots_of_words():
    """torch's least squares over all inputs: each word's as the slot's 1, others' and general ones as 0, and the ridge."""
    d, rank, words, n = random.Random(SEED).randint(8, 20), 3, 5, 40
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    shift, centers, slots = 3 * draw(d), draw(words, d), torch.arange(words) % rank
    x = shift + centers[:, None] + 0.3 * draw(words, n, d)
    general = shift + draw(500, d)
    second = sum(each.T @ each / n for each in x) / words
    of_all = general.T @ general / 500, general.mean(0, keepdim=True)
    rows, level = addressed_rows(of_all, (second, x.mean(1)), slots, rank)

    both = second + of_all[0]
    ridge = (1e-3 * both.diagonal().mean()).sqrt() * torch.eye(d, dtype=torch.float64)
    weights = [torch.full((words * n, 1), (n * words) ** -0.5), torch.full((500, 1), 500**-0.5), torch.zeros(d, 1)]
    inputs = torch.cat([x.reshape(-1, d) * weights[0], general * weights[1], ridge])
    wanted = torch.zeros(len(inputs), rank, dtype=torch.float64)
    for word in range(words):
        wanted[word * n : (word + 1) * n, slots[word]] = (n * words) ** -0.5
    expected = torch.linalg.lstsq(inputs, wanted).solution.T
    for slot, row in enumerate(expected):
        torch.testing.assert_close(rows[slot], row / (x[slots == slot] @ row).mean(), rtol=1e-6, atol=1e-9)
    flat = torch.linalg.lstsq(inputs, torch.cat(weights).double()).solution[:, 0]
    answers = torch.cat([(x @ flat).mean()[None], (general @ flat).mean()[None]])
    torch.testing.assert_close(level, flat / answers.mean(), rtol=1e-6, atol=1e-9)


def test_a_slot_without_a_word_never_fires():
    eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    rows, _ = addressed_rows((eye, ones), (eye, ones), torch.tensor([1]), 3)
    assert rows[[0, 2]].abs().max() == 0 and rows[1].norm() > 0.1


def test_a_text_without_a_word_to_ask_for_is_refused_and_the_memory_stays_as_it_was():
    memory = fresh()
    settings = locas.StudySettings(epochs=1, updates=1, guard=0.0, new_tokens=4)
    with pytest.raises(locas.LocasError, match="^keys is 'addressed', but the text has no word .*keys='learned'$"):
        memory.study("a b c d e f g h", study_tokenizer(), "ce", [("What is a?", "b c")], progress=False, settings=settings)
    assert not memory._attachment.state.initialized


@pytest.mark.parametrize("clip", [False, True, 1.5])
def test_a_study_leaves_addresses_where_they_are_and_learns_values(clip, monkeypatch):
    """Of a fresh memory, whose gates get a threshold, and of one that knows something, to whose rows they are added."""
    of, made = Addresses.of, []

    def kept(*arguments):
        made.append(of(*arguments))
        return made[-1]

    monkeypatch.setattr(Addresses, "of", kept)
    memory, tokenizer = fresh(clip), study_tokenizer()
    settings = locas.StudySettings(epochs=1, updates=8, batch=4, learning_rate=0.2, guard=0.0, new_tokens=4)
    before = torch.zeros(2, 3, 6, 32)
    for _ in range(2):
        report = memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=settings)
        slots, (rows,), (levels,) = memory.gather_slots(), made[-1].rows, made[-1].levels
        assert report.words == made[-1].words > 6, "two words share a slot"
        threshold = 0.6 * levels if not before.any() else 0
        torch.testing.assert_close(slots[:, 0], before[:, 0] + 20 * (rows - threshold), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slots[:, 1], before[:, 1] + rows, rtol=1e-5, atol=1e-5)
        assert (slots[:, 2] - before[:, 2]).norm() > 0.1
        before = slots
    assert "words with slots" in str(report)
    ffns = [layer.mlp.down_proj.weight.norm(dim=0).mean().item() for layer in memory.model.model.layers]
    longest = {False: 1e6, True: 1.0}.get(clip) or torch.tensor([clip * length / 2.0 for length in ffns])[:, None]
    assert (before[:, 2].norm(dim=-1) <= longest * (1 + 1e-5)).all()
    assert clip is False or (before[:, 2].norm(dim=-1) >= longest * (1 - 1e-5)).any(), "the clip is to be felt"


@pytest.mark.parametrize(
    "depth, layers, addressed",
    [
        (30, range(30), range(8, 26)),
        (24, range(24), range(6, 20)),
        (4, range(4), (1, 2)),
        (4, (0, 3), (0, 3)),
        (1, (0,), (0,)),
        (30, (3, 12, 29), (12,)),
    ],
)
def test_the_layers_between_a_quarter_and_87_percent_of_the_depth_are_addressed(depth, layers, addressed):
    assert [layer for at, layer in enumerate(layers) if at in inner_positions(layers, depth)] == list(addressed)


def test_slots_of_the_outer_layers_stay_at_zero_in_a_study():
    memory = locas.attach(study_host(SEED, num_hidden_layers=4), locas.LocasConfig(rank=6, scale=2.0))
    settings = locas.StudySettings(epochs=1, updates=2, batch=4, guard=0.0, new_tokens=4)
    memory.study(TEXT, study_tokenizer(), "ce", PAIRS, progress=False, settings=settings)
    slots = memory.gather_slots()
    assert not slots[[0, 3]].any() and (slots[1:3].norm(dim=(2, 3)) > 1e-3).all()


@pytest.mark.parametrize("clip", [True, 2.0])
def test_a_run_behind_a_study_leaves_rows_as_long_as_the_study_made_them(clip, tmp_path):
    memory, run = fresh(clip), dict(window=16, stride=8, progress=False)
    settings = locas.StudySettings(epochs=1, updates=4, batch=4, guard=0.0, new_tokens=4)
    memory.study(TEXT, study_tokenizer(), "ce", PAIRS, progress=False, settings=settings)
    studied, kept, ids = memory.gather_slots(), memory.snapshot(), torch.arange(3, 60)
    lengths = studied.norm(dim=-1)
    assert (lengths[:, 0] > 8).any(), "gates are steep"
    memory.memorize(ids, **run, learning_rate=0.0)
    torch.testing.assert_close(memory.gather_slots(), studied)

    memory.restore(kept)
    memory.save_pretrained(tmp_path / "plain")
    memory.save_pretrained(tmp_path / "studied", optimizer=True)
    loaded = locas.load(study_host(SEED, num_hidden_layers=2), tmp_path / "plain")
    loaded.memorize(ids, **run, learning_rate=0.0)
    torch.testing.assert_close(loaded.gather_slots(), studied)
    loaded.load(tmp_path / "studied")
    for each in (memory, memory.fork(), loaded):
        each.memorize(ids, **run, learning_rate=0.0)
        torch.testing.assert_close(each.gather_slots(), studied)
        each.memorize(ids, **run, learning_rate=0.05)
        now = each.gather_slots()
        longest = torch.tensor(1.0) if clip is True else each.state.arenas[0].longest[..., None]
        bounds = torch.maximum(longest, lengths * torch.tensor([1.0, 1.0, 0.0])[:, None])
        assert (now.norm(dim=-1) <= bounds * (1 + 1e-5)).all() and (now[:, :2] - studied[:, :2]).norm() > 0.1
        assert torch.equal(now, memory.gather_slots())
    memory.reset()
    memory.memorize(ids, **run, learning_rate=0.5)  # whose first update moves rows by more than their length
    assert (memory.gather_slots().norm(dim=-1) <= longest * (1 + 1e-5)).all(), "what was studied is forgotten"


# ---- the schedule and what is judged by ------------------------------------------------------------------------
def test_the_text_itself_comes_first(monkeypatch):
    memory, learners = fresh(), []
    monkeypatch.setattr(Learner, "run", lambda self, after_step: learners.append(self) or self.outcome)
    settings = locas.StudySettings(
        epochs=1, updates=20, batch=4, guard=0.0, raw=0.5, raw_first=0.25, keys="learned", new_tokens=4
    )
    memory.study(TEXT, study_tokenizer(), "ce", PAIRS, progress=False, settings=settings)
    (learner,) = learners
    assert [len(learner._lessons(step)) for step in (0, 4, 5, 19)] == [1, 1, 4, 4]
    assert [learner._raw(step)[1] for step in (0, 4, 5, 19)] == [2.0, 2.0, 0.5, 0.5]


def test_what_the_guard_learns_with_is_not_what_is_asked_to_judge():
    """No general question of the evaluation is a prompt of the guard, nor one with another thing put in."""
    words = lambda text: "".join(c for c in text.lower() if c.isalnum() or c == " ").split()
    asked = [words(question.text) for question in general_questions()]
    for prompt in PROMPTS:
        mine = words(prompt)
        for other in asked:
            assert mine != other
            same = sum(a == b for a, b in zip(mine, other, strict=False))
            assert same < 5 or same < max(len(mine), len(other)) - 1, (prompt, " ".join(other))


def test_the_guard_asks_the_host_about_words_that_it_knows():
    """Two questions per word that is one token of the vocabulary; the answers' targets are the bare host's own."""
    prompter, model = Prompter(study_tokenizer()), study_host(SEED)
    known = [word for word in ("harbour", "market", "water", "house", "honey") if len(prompter.encode(f" {word}")) == 1]
    assert known, "the test's words are all unknown to the tokenizer"
    guard = GuardRows(model, prompter, tokens=48, top_k=5, seed=SEED, device=CPU)
    rows = guard.of_words([*known, "Skolmvorn"])
    prompts = [prompter.tokenizer.decode(row.ids[: row.first]) for row in rows]
    assert 0 < len(rows) <= 2 * len(known) and not any("Skolmvorn" in prompt for prompt in prompts)
    assert {word for word in known for prompt in prompts if word in prompt} == set(known)
    for row in rows:
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row.ids])).logits[0, row.first - 1 : -1].log_softmax(-1).topk(5).values
        torch.testing.assert_close(row.targets.log_probs, expected, rtol=1e-3, atol=1e-3)
