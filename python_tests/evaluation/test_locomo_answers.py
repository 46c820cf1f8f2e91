"""Answers on a shared context equal plain `generate` calls, and a prompt that is too long loses its first turns."""

import pytest
import torch
from support.helpers import random_ids, tiny_model
from support.locomo import plain_answer

import locas_ext as locas
from locas_ext.evaluation.locomo import answers
from locas_ext.evaluation.locomo.answers import Prompts, answer, make_prompts
from locas_ext.evaluation.locomo.data import read_dialogues
from locas_ext.evaluation.locomo.prompts import dialogue_text, question_text


class Letters:
    """A tokenizer of single characters, a third of them line breaks or blanks, so that answers end at all places."""

    eos_token_id = 2
    characters = ("", "", "<end>", *("\n" if i % 5 == 0 else " " if i % 7 == 0 else chr(60 + i) for i in range(58)))

    def decode(self, tokens, skip_special_tokens):
        return "".join(self.characters[token] for token in tokens if not (skip_special_tokens and token < 3))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("context", [0, 1, 23])
@pytest.mark.parametrize("with_memory", [False, True])
def test_answers_on_a_shared_context_equal_plain_generate(batch_size, context, with_memory):
    model, tokens = tiny_model("llama", seed=3), Letters()
    if with_memory:
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
        memory.memorize(random_ids(60, 9), window=24, stride=8, learning_rate=1e-2, progress=False)
    start = random_ids(context, seed=5)
    questions = [random_ids(3 + index % 3, seed=10 + index) for index in range(13)]
    counted = []
    answers = answer(model, tokens, Prompts(start, questions, 0), 12, batch_size, lambda *both: counted.append(both))
    expected = [plain_answer(model, tokens, torch.cat([start, question]), 12) for question in questions]
    assert answers == expected
    assert len(set(answers)) > 5 and min(map(len, answers)) < 6, "too uniform to show anything"
    assert sum(count for count, _ in counted) == 13 and max(count for count, _ in counted) <= batch_size
    if batch_size == 1:
        # an answer is no longer than its line: at most the blanks, the break before and the end after it
        assert sum(written for _, written in counted) < 13 * 12


def test_a_context_that_does_not_fit_loses_its_first_turns_only(tokenizer, data):
    dialogue = read_dialogues([data])[1]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = max(len(encode(question_text(dialogue, question))) for question in dialogue.questions)
    texts = [encode(dialogue_text(dialogue, skip)) for skip in range(41)]
    for positions in (longest + 8 + len(texts[0]), longest + 8 + len(texts[0]) - 1, 300, longest + 8 + len(texts[39])):
        prompts = make_prompts(tokenizer, dialogue, True, positions, 8)
        expected = next(text for text in texts if len(text) + longest + 8 <= positions)
        assert prompts.context.tolist() == expected
        assert prompts.cut_tokens == len(texts[0]) - len(expected)
        assert [ids.tolist() for ids in prompts.questions] == [
            encode(question_text(dialogue, question)) for question in dialogue.questions
        ]
    nothing = make_prompts(tokenizer, dialogue, True, longest + 8, 8)
    assert len(nothing.context) == 0 and nothing.cut_tokens == len(texts[0])
    without = make_prompts(tokenizer, dialogue, False, longest + 8, 8)
    assert len(without.context) == 0 and without.cut_tokens == 0
    with pytest.raises(ValueError, match=f"has {longest + 7} positions.*dialogue long.*{longest + 8}"):
        make_prompts(tokenizer, dialogue, False, longest + 7, 8)


def test_a_bos_token_comes_first_where_the_tokenizer_puts_one(tokenizer, data):
    class WithBos:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    dialogue = read_dialogues([data])[0]
    assert make_prompts(WithBos(), dialogue, False, 300, 8).context.tolist() == [7]
    plain, with_bos = (make_prompts(each, dialogue, True, 300, 8).context.tolist() for each in (tokenizer, WithBos()))
    assert with_bos == [7, *plain]
    assert answers.starts_with_bos(WithBos()) and not answers.starts_with_bos(tokenizer)
