"""Questions put to a model, against plain forwards and generate calls over whole prompts."""

import random

import pytest
import torch
from support.helpers import tiny_model
from support.locomo import plain_answer
from transformers import AutoTokenizer

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
        assert len(found) == 1 + len(question.distractors)
        for text, score in zip((question.answers[0], *question.distractors), found, strict=True):
            spaced = question.kind == CLOZE or not prompter.has_chat
            ids = prompter.tokenizer(f" {text}" if spaced else text, add_special_tokens=False)["input_ids"]
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


def test_a_choice_is_made_with_and_without_what_the_host_thinks_of_the_answers(prompter):
    question = Question(QUESTION, "What do they sell?", ("salt",), ("wool", "honey"))
    for scores, prior, choice, calibrated in (
        ([-3.0, -2.0, -9.0], [-5.0, -1.0, -9.5], False, True),
        ([-1.0, -2.0, -9.0], [-1.0, -8.0, -9.5], True, False),
        ([-1.0, -2.0, -9.0], [-2.0, -2.5, -9.5], True, True),
    ):
        priors = {("question", text): nats for text, nats in zip(("salt", "wool", "honey"), prior, strict=True)}
        found = measuring._choice(prompter, question, scores, priors)
        assert (found["choice"], found["calibrated"], found["options"]) == (choice, calibrated, 3)
        assert found["gold_nats"] == pytest.approx(scores[0] / len(prompter.answer("salt")))
    alone = measuring._choice(prompter, Question(QUESTION, "?", ("salt",)), [-1.0], {("question", "salt"): -2.0})
    assert alone["choice"] is None and alone["calibrated"] is None


def test_what_the_host_thinks_of_an_answer_is_asked_with_an_empty_question(prompter, model):
    asked = [Question(QUESTION, "What?", ("salt",), ("wool",)), Question(CLOZE, "They sell", ("salt",), ("tin",))]
    priors = measuring.priors_of(model, prompter, asked, measuring.Asking())
    assert set(priors) == {("question", "salt"), ("question", "wool"), (CLOZE, "salt"), (CLOZE, "tin")}
    for (form, text), nats in priors.items():
        empty = Question(form, "" if form == QUESTION else "The", (text,))
        ((expected,),) = choice_scores(model, prompter, [empty], View(), 1, lambda count: None)
        assert nats == pytest.approx(expected, abs=1e-4)


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
