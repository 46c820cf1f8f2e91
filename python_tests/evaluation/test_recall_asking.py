"""Questions put to a model, against plain forwards and generate calls over whole prompts."""

import random

import pytest
import torch
from support.helpers import tiny_model
from support.locomo import plain_answer
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.errors import LocasError
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.recall import measuring
from locas_ext.evaluation.recall.asking import View, choice_scores, prompt_lengths, written_answers
from locas_ext.evaluation.recall.documents import CLOZE, QUESTION, Question
from locas_ext.learning.study.prompts import Prompter

CHAT = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
SEED = random.randrange(1000)


@pytest.fixture(params=[None, CHAT], ids=["plain", "chat"])
def prompter(request):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = request.param
    return Prompter(tokenizer)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", seed=SEED, vocab_size=4096, max_position_embeddings=400, num_hidden_layers=1, eos_token_id=0)


def questions():
    rng = random.Random(SEED)
    words = "salt wool honey copper the timber a river of amber".split()
    made = []
    for _number in range(7):
        answers = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.choice([1, 4, 10]))]
        kind = rng.choice([CLOZE, QUESTION])
        made.append(Question(kind, " ".join(rng.choices(words, k=rng.randint(2, 5))), (answers[0],), tuple(answers[1:])))
    return made


VIEWS = {
    "nothing": View(),
    "one text": View(shared="They sold salt and amber, and nothing else."),
    "looked up": View(of=lambda question: f"About {question.text[:6]}: wool."),
}


def plain_prompt(prompter, question, context):
    """The ids of the whole prompt, put together here."""
    encode = lambda text: prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
    if question.kind == CLOZE:
        return encode(f"{context}\n\n" if context else "") + encode(question.text)
    if prompter.has_chat:
        return encode("<u>" + (f"{context}\n\n" if context else "")) + encode(f"{question.text}</u><a>")
    return encode(f"{context}\n\n" if context else "") + encode(f"Question: {question.text}\nAnswer:")


@pytest.mark.parametrize("name", VIEWS)
def test_the_scores_are_those_of_whole_sequences(name, prompter, model):
    view, asked, seen = VIEWS[name], questions(), []
    scores = choice_scores(model, prompter, asked, view, 3, seen.append)
    assert sum(seen) == len(asked)
    lengths = prompt_lengths(prompter, asked, view)
    exact = model.double()
    for question, found, length in zip(asked, scores, lengths, strict=True):
        context = view.shared if view.of is None else view.of(question)
        prompt = plain_prompt(prompter, question, context)
        assert length == len(prompt)
        if question.kind != CLOZE:
            begin = "The answer is" if prompter.has_chat else " The answer is"
            prompt = prompt + prompter.tokenizer(begin, add_special_tokens=False)["input_ids"]
        assert len(found) == 1 + len(question.distractors)
        for text, score in zip((question.answers[0], *question.distractors), found, strict=True):
            ids = prompter.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = exact(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert score == pytest.approx(logits[range(len(ids)), ids].sum().item(), abs=1e-4), (SEED, question)
    model.float()


@pytest.mark.parametrize("name", VIEWS)
def test_the_answers_are_those_of_generate(name, prompter, model):
    view, asked, seen = VIEWS[name], questions(), []
    texts = written_answers(model, prompter, asked, view, 6, 3, seen.append)
    assert sum(seen) == len(asked)
    for question, text in zip(asked, texts, strict=True):
        context = view.shared if view.of is None else view.of(question)
        prompt = torch.tensor(plain_prompt(prompter, question, context))
        assert text == plain_answer(model, prompter.tokenizer, prompt, 6)


def test_a_choice_is_made_with_and_without_what_is_usual_for_an_answer(prompter):
    """Scores of three answers after three questions: a taste for each answer, and 1.5 nats more for each question's own."""
    texts, taste = (
        ("salt", "wool", "honey"),
        {text: random.Random(f"{SEED} {text}").uniform(-9, -3) for text in ("salt", "wool", "honey")},
    )
    questions = [Question(QUESTION, f"{n}?", (gold,), tuple(t for t in texts if t != gold)) for n, gold in enumerate(texts)]
    scores = [[taste[text] + 1.5 * (text == q.answers[0]) for text in (q.answers[0], *q.distractors)] for q in questions]
    usual = measuring.usual_scores(questions, scores)
    assert usual == pytest.approx({(QUESTION, text): taste[text] + 0.5 for text in texts})
    for question, each in zip(questions, scores, strict=True):
        found = measuring._choice(prompter, question, each, usual)
        assert (found["choice"], found["calibrated"], found["options"]) == (each[0] > max(each[1:]), True, 3)
        assert found["gold_nats"] == pytest.approx(each[0] / len(prompter.encode(f" {question.answers[0]}")))
    other = Question(QUESTION, "?", ("salt",), ("tin",))
    found = measuring._choice(prompter, other, [-1.0, -2.0], usual)
    assert found["choice"] is True and found["calibrated"] is None, "nothing is known of tin"
    alone = measuring._choice(prompter, Question(QUESTION, "?", ("salt",)), [-1.0], usual)
    assert alone["choice"] is None and alone["calibrated"] is None


@pytest.mark.parametrize(
    "template, message",
    [("{{ raise_exception('no user here') }}", "cannot be used: no user here"), ("hello", "leaves out what the user says")],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template, message):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    with pytest.raises(LocasError, match=message):
        Prompter(tokenizer)


def test_a_bos_token_begins_plain_prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    plain = Prompter(tokenizer)
    assert plain.ask("Q")[0] != 5  # a tokenizer that does not begin texts with it

    class Begins:
        """The tokenizer as it would be with a BOS token before every text."""

        bos_token_id, eos_token_id, chat_template = 5, 0, None

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [5, *ids] if add_special_tokens else ids}

    begins = Prompter(Begins())
    assert begins.ask("Q", "x").count(5) == 1 and begins.ask("Q", "x")[0] == 5 and begins.passage("x")[0] == 5
    assert 5 not in begins.answer("Q") + begins.end() + begins.question("Q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_host_asked_in_float32_is_the_one_of_its_rounded_weights_and_as_before_afterwards(dtype):
    """With a memory: against a float32 host with the same weights and the same slots."""
    ids, rounded = torch.randint(3, 61, (2, 9)), tiny_model("llama", seed=SEED, dtype=dtype)
    exact = tiny_model("llama", seed=SEED)
    for own, given in zip((*exact.parameters(), *exact.buffers()), (*rounded.parameters(), *rounded.buffers()), strict=True):
        own.data = given.data.float()
    memories = [locas.attach(host, locas.LocasConfig(rank=4, scale=2.0)) for host in (rounded, exact)]
    slots = torch.randn(2, 3, 4, 32)
    for memory in memories:
        memory._attachment.state.set_slots(slots, version=0)
    with torch.no_grad():
        before = rounded(input_ids=ids).logits
        with measuring.in_float32(rounded):
            inside = rounded(input_ids=ids).logits
        after = rounded(input_ids=ids).logits
        expected = exact(input_ids=ids).logits
    assert before.dtype == after.dtype == dtype and inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (before.float() - expected).abs().max() > 1e-3, "rounding is to be seen"
