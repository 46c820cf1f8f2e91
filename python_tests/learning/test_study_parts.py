"""The parts of a study: rows and their losses, passages, questions, what a host writes."""

import random

import pytest
import torch
from support.hosts import tiny
from support.study import CHAT, PAIRS, TEXT, study_host, study_tokenizer

import locas_ext as locas
from locas_ext.learning.study import asking, generation
from locas_ext.learning.study.asking import Asker, question_in
from locas_ext.learning.study.made import made_pairs
from locas_ext.learning.study.pairs import given_pairs, parts_of
from locas_ext.learning.study.passages import passages_of, sentences_of, words_of
from locas_ext.learning.study.prompts import Prompter
from locas_ext.learning.study.rows import Row, distance, expectations, in_batches, likeliest, logits_of
from locas_ext.learning.study.salience import Salience
from locas_ext.learning.study.settings import (
    ABOUT,
    ASKED,
    ASKED_FOR,
    BEGUN,
    BLANK,
    CONTINUED,
    KINDS,
    LINKED,
    TURNED,
    StudySettings,
)
from locas_ext.learning.study.teacher import lessons_of, surprises_of

SEED = random.randrange(10_000)
CPU = torch.device("cpu")


# ---- rows ----------------------------------------------------------------------------------------------------
def random_rows(count, vocab=61):
    rng = random.Random(SEED)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, vocab) for _ in range(rng.randint(2, 20))]
        rows.append(Row(tuple(ids), rng.randint(1, len(ids) - 1)))
    return rows


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("learned", [False, True])
def test_logits_of_rows_together_are_those_of_each_alone(family, learned):
    """Families that scale or cap their logits behind the head among them."""
    model, rows = tiny(family, SEED).double(), random_rows(7)
    if learned:
        config = locas.LocasConfig(rank=4, scale=0.5, variant="mlp" if family == "gpt2" else "glu")
        memory = locas.attach(model, config)
        memory.initialize(list(range(3, 20)))
        memory.slots.normal_(generator=torch.Generator().manual_seed(SEED))
    hooks = dict(model.get_output_embeddings()._forward_pre_hooks)
    with torch.no_grad():
        together = logits_of(model, rows, CPU)
        alone = [model(input_ids=torch.tensor([row.ids])).logits[0, row.first - 1 : -1] for row in rows]
    # some families compute softmax in float32 whatever the dtype
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=5e-6)
    assert dict(model.get_output_embeddings()._forward_pre_hooks) == hooks


def test_batches_hold_every_row_once_within_their_size():
    rows = random_rows(40)
    batches = list(in_batches(rows, together=64))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    assert all(len(batch) * max(len(rows[index].ids) for index in batch) <= 64 for batch in batches)


@pytest.mark.parametrize("k", [1, 5, 61])
def test_the_distance_is_kl_with_the_other_tokens_as_one(k):
    generator = torch.Generator().manual_seed(SEED)
    theirs, mine = (torch.randn(6, 61, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    found = distance(mine.float(), likeliest(theirs.float(), k))
    p, q = theirs.softmax(-1), mine.softmax(-1)
    top = p.topk(k).indices
    expected = []
    for row in range(6):
        chosen = set(top[row].tolist())
        parts = [(p[row, i], q[row, i]) for i in chosen]
        if k < 61:
            others = [i for i in range(61) if i not in chosen]
            parts.append((p[row, others].sum(), q[row, others].sum()))
        expected.append(sum((a * (a / b).log()).item() for a, b in parts))
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    whole = (p * (p / q).log()).sum(-1)
    assert (found.double() <= whole + 1e-5).all()
    same = distance(theirs.float(), likeliest(theirs.float(), k))
    assert same.abs().max() < 1e-5


def test_expectations_are_each_rows_own():
    model, rows = tiny("llama", SEED), random_rows(9)
    found = expectations(model, rows, 4, CPU)
    for row, (targets, hits) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.first - 1 : -1].log_softmax(-1)
        values, indices = logits.topk(4)
        torch.testing.assert_close(targets.log_probs, values, rtol=1e-4, atol=1e-5)
        assert (targets.indices == indices).float().mean() > 0.9  # ties may fall either way
        right = (logits.argmax(-1) == torch.tensor(row.ids[row.first :])).float().mean().item()
        assert hits == pytest.approx(right)


# ---- passages and questions ------------------------------------------------------------------------------------
def test_passages_are_the_text_and_end_with_sentences():
    prompter = Prompter(study_tokenizer())
    text = " ".join([TEXT] * 4)
    passages = passages_of(prompter, [text, "No end here " * 40], 48)
    assert [id for p in passages if p.of == 0 for id in p.ids] == prompter.encode(text)
    assert all(len(passage.ids) <= 48 for passage in passages)
    own = [passage for passage in passages if passage.of == 0]
    assert len(own) > 4 and all(passage.text.endswith(".") for passage in own)
    assert max(len(passage.ids) for passage in passages if passage.of == 1) == 48


def test_a_fact_is_asked_from_both_ends():
    prompter = Prompter(study_tokenizer())
    passages = passages_of(prompter, [TEXT], 256)
    sentence = "The village of Skolm lives from its trade in honey."
    assert sentence in sentences_of(TEXT)
    words = [sentence[a:b] for a, b in words_of(sentence)]
    surprises = {sentence: [9.0 if word in ("Skolm", "honey") else 0.1 for word in words]}
    pairs = made_pairs(passages, KINDS, Salience(surprises, most=2), SEED)
    mine = [pair for pair in pairs if any(word in f"{pair.question} {pair.begin} {pair.answer}" for word in ("Skolm", "honey"))]
    for kind in (BLANK, TURNED, LINKED, BEGUN):
        both = {pair.answer.strip(".").lower(): pair for pair in mine if pair.kind == kind}
        assert set(both) == {"skolm", "honey"}, kind
        for answer, other in (("skolm", "honey"), ("honey", "skolm")):
            assert other in both[answer].question.lower() and answer not in both[answer].question.lower()
    assert {f"{pair.begin} {pair.answer}" for pair in mine if pair.kind == BEGUN} == {
        "The village of Skolm",
        "The village of Skolm lives from its trade in honey",
    }
    assert {pair.answer for pair in mine if pair.kind == ABOUT} == {sentence}
    (cut,) = [pair for pair in mine if pair.kind == CONTINUED]
    assert f"{cut.question} {cut.answer}" == sentence
    assert made_pairs(passages, (BLANK,), Salience(surprises, most=2), SEED) != []
    twice = passages_of(prompter, [TEXT, TEXT], 256)
    assert made_pairs(twice, KINDS, Salience(surprises, most=2), SEED) == pairs  # a sentence that comes again is asked once


def test_the_first_word_of_a_sentence_is_asked_for_only_if_it_is_a_name():
    sentences = ["Every evening Anna played the violin.", "Anna sold it in Rome.", "Nobody knew the time."]
    salient = Salience({s: [float(len(s) - a) for a, _ in words_of(s)] for s in sentences}, most=2)
    found = [[word.text for word in salient(sentence)] for sentence in sentences]
    assert found == [["evening", "Anna"], ["Anna", "Rome"], ["knew", "time"]]


def test_a_word_of_many_sentences_is_not_asked_for():
    """Of more than three; a name of any number, and with the title before it also where the sentence begins with that."""
    cities = ["Rome", "Oslo", "Bern", "Vienna"]
    sentences = [f"Captain Bell was born in {city}, said someone of {city}." for city in cities]
    sentences += ["Later Captain Bell sold a lamp.", "There was nobody in the yard."]
    salient = Salience({s: [1.0] * len(words_of(s)) for s in sentences}, most=9)
    found = [[word.text for word in salient(sentence)] for sentence in sentences]
    assert found[:4] == [["Captain Bell", city, city] for city in cities]
    assert found[4:] == [["Captain Bell", "sold", "lamp"], ["nobody", "yard"]]
    fewer = Salience({s: [1.0] * len(words_of(s)) for s in sentences[1:]}, most=9)
    assert [word.text for word in fewer(sentences[1])] == ["Captain Bell", "born", "Oslo", "said", "someone", "Oslo"]


def test_a_sentence_without_a_name_is_only_asked_whole():
    text = "The ship Vomel has red sails. There was bread on the old table. A crew feared the ship Vomel."
    passages = passages_of(Prompter(study_tokenizer()), [text], 256)
    sentences = sentences_of(passages[0].text)
    pairs = made_pairs(passages, KINDS, Salience({s: [1.0] * len(words_of(s)) for s in sentences}), SEED)
    bread = [pair for pair in pairs if any(word in f"{pair.question} {pair.answer}" for word in ("bread", "table"))]
    assert {pair.kind for pair in bread} == {BLANK, ABOUT, CONTINUED}
    assert {pair.kind for pair in pairs if "Vomel" in pair.question} >= {BLANK, ABOUT, TURNED, LINKED, BEGUN}
    of_the_ship = [
        pair.question
        for seed in range(20)
        for pair in made_pairs(passages, (TURNED,), Salience({s: [1.0] * 9 for s in sentences}), seed)
        if pair.answer == "Vomel."
    ]
    assert any("which ship" in question.lower() for question in of_the_ship)
    assert not any("Vomel" in question for question in of_the_ship)


def test_a_name_is_asked_about_with_what_it_is_of():
    sentences = [
        "The sails of the ship Vomel are red.",
        "Merchants came to the old house of Brann.",
        "He went to Skolm in May.",
    ]
    salient = Salience({sentence: [1.0] * 20 for sentence in sentences}, most=9)
    phrases = [[word.phrase for word in salient(sentence) if word.name] for sentence in sentences]
    assert phrases == [["the ship Vomel"], ["Brann"], ["Skolm", "May"]]


def test_the_words_that_a_host_would_not_have_guessed():
    tokenizer, model = study_tokenizer(), study_host(SEED)
    prompter = Prompter(tokenizer)
    passages = passages_of(prompter, [TEXT], 256)
    found = surprises_of(model, prompter, passages, CPU)
    assert set(found) == set(sentences_of(passages[0].text))
    for sentence, nats in found.items():
        encoded = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)
        begin = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([begin + encoded["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, len(begin) - 1 : -1].log_softmax(-1)
        losses = [-logs[i, token].item() for i, token in enumerate(encoded["input_ids"])]
        for (start, end), value in zip(words_of(sentence), nats, strict=True):
            inside = [loss for (a, b), loss in zip(encoded["offset_mapping"], losses, strict=True) if b > start and a < end]
            assert value == pytest.approx(sum(inside), rel=1e-3)


def test_given_pairs_find_their_passage():
    prompter = Prompter(study_tokenizer())
    passages = passages_of(prompter, [TEXT], 32)
    for pair in given_pairs(PAIRS, passages):
        assert pair.answer in passages[pair.passage].text, pair


@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_lesson_is_learned_without_the_passage_and_expected_with_it(chat):
    tokenizer, model = study_tokenizer(chat), study_host(SEED)
    prompter = Prompter(tokenizer)
    passages = passages_of(prompter, [TEXT], 64)
    pairs = [*given_pairs(PAIRS, passages), *made_pairs(passages, (CONTINUED,), Salience({}), SEED)]
    for lesson in lessons_of(model, prompter, passages, pairs, 8, 256, CPU, lambda count: None):
        shown, answer = parts_of(prompter, lesson.pair, passages[lesson.pair.passage].text)
        assert passages[lesson.pair.passage].text in tokenizer.decode(shown)
        assert passages[lesson.pair.passage].text not in tokenizer.decode(lesson.row.ids)
        assert list(lesson.row.ids[lesson.row.first :]) == answer
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([shown + answer])).logits[0, len(shown) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(lesson.row.targets.log_probs, logits.topk(8).values, rtol=1e-4, atol=1e-5)
    none = lessons_of(model, prompter, passages, pairs, 8, 20, CPU, lambda count: None)
    assert none == []  # nothing fits into 20 positions


# ---- what a host writes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_prompts_written_together_go_on_as_alone(temperature, monkeypatch):
    tokenizer, model = study_tokenizer(), study_host(SEED)
    rng = random.Random(SEED)
    prompts = [[rng.randrange(3, 4096) for _ in range(rng.randint(1, 30))] for _ in range(6)]
    before = torch.random.get_rng_state()
    together = generation.write(model, tokenizer, prompts, 5, SEED, temperature)
    assert torch.equal(before, torch.random.get_rng_state())
    assert together == generation.write(model, tokenizer, prompts, 5, SEED, temperature)
    if not temperature:
        assert together == [generation.write(model, tokenizer, [prompt], 5, SEED)[0] for prompt in prompts]
        monkeypatch.setattr(generation, "_TOGETHER", 40)
        counts = []
        assert together == generation.write(model, tokenizer, prompts, 5, SEED, advance=counts.append)
        assert sum(counts) == 6 and len(counts) > 1


def test_questions_and_answers_are_taken_out_of_what_was_written(monkeypatch):
    """A host that follows a script: what it is asked last decides what it writes."""
    prompter = Prompter(study_tokenizer(CHAT))
    passages = passages_of(prompter, [TEXT], 256)
    script = {
        "asks for a name in this text": "Sure!\n1. Who was born in Dublin?",
        "starts with Who or Which": "I cannot do that.",
        "starts with Where or When": "Question: Where is Skolm?",
        "starts with What": "What can I say?",
        "Answer: honey\nQuestion:": " What does the village of Skolm sell?\n\nText: more",
        "Answer: Skolm\nQuestion:": " Where is Skolm on the map?",
        "Answer: red\nQuestion:": " What color are the sails of the Vomel?",
        "Who was born in Dublin?": '"Captain Klau." He left.',
        "Where is Skolm?": "Far away",
        "What does the village of Skolm sell?": "They sell honey.",
        "What color are the sails of the Vomel?": "They are green.",
    }

    def wrote(model, tokenizer, prompts, *more, **options):
        texts = [tokenizer.decode(prompt)[-120:] for prompt in prompts]
        return [next((said for part, said in script.items() if part in text), "") for text in texts]

    monkeypatch.setattr(asking, "write", wrote)
    words = {"Skolm", "honey", "red"}
    surprises = {s: [9.0 if s[a:b] in words else 0.0 for a, b in words_of(s)] for s in sentences_of(TEXT)}
    salient, seen = Salience(surprises, most=9), []
    for check in (True, False):
        chosen = StudySettings(kinds=(ASKED, ASKED_FOR), questions=99, check=check)
        written = Asker(None, prompter, passages, salient, chosen, SEED).ask([0], seen.append)
        found = {(pair.kind, pair.question, pair.answer) for pair in written.pairs}
        sold, color = "What does the village of Skolm sell?", "What color are the sails of the Vomel?"
        expected = {(ASKED, "Who was born in Dublin?", "Captain Klau."), (ASKED_FOR, sold, "honey")}
        expected |= {(ASKED_FOR, sold, "They sell honey.")} | (set() if check else {(ASKED_FOR, color, "red")})
        assert found == expected
        refused = written.refused
        assert refused["say their answer"] == 1 and refused["have an answer without a word of the passage"] == 1
        assert refused["are not about the passage"] > 1 < refused["are no question"]  # each instruction is given many times
        assert refused.get("are answered otherwise with the passage in view", 0) == check
    assert seen == [1, 1]
    base = Prompter(study_tokenizer())
    written = Asker(None, base, passages, salient, chosen, SEED).ask([0], seen.append)
    assert {pair.kind for pair in written.pairs} == {ASKED_FOR}


@pytest.mark.parametrize(
    "text, question",
    [
        ("What?", None),
        ("No question here.", None),
        ("", None),
        ("2) Which ship has red sails? The Vomel.", "Which ship has red sails?"),
        ("**Q: Why did he go?**", "Why did he go?"),
        ("word " * 41 + "?", None),
    ],
)
def test_a_question_in_what_was_written(text, question):
    assert question_in(text) == question


@pytest.mark.parametrize(
    "name, value",
    [
        ("chunk", 8),
        ("epochs", 0),
        ("batch", 0),
        ("gold", 1.5),
        ("most_kl", 0),
        ("guard", -1),
        ("kinds", ()),
        ("kinds", ["talk"]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        StudySettings(**{name: value})


def test_how_long_writing_takes_is_told_from_a_few_tokens(monkeypatch):
    """With a clock that moves by the work: a unit a prompt's reading, a tenth a token that is written after it."""
    now = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])

    def works(model, tokenizer, prompts, new_tokens, seed, temperature=0.0):
        now[0] += len(prompts) * (1 + 0.1 * new_tokens)

    monkeypatch.setattr(generation, "write", works)
    model = study_host(SEED)
    for count in (1, 16, 50):
        seconds = generation.seconds_to_write(model, study_tokenizer(), [[5] * 9] * count, 20, SEED)
        assert seconds == pytest.approx(count * (1 + 0.1 * 20))
    assert generation.seconds_to_write(model, study_tokenizer(), [], 20, SEED) == 0
