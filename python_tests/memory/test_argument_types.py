"""An argument of another type: a TypeError that names it, its value and what was expected; nothing changed."""

import pytest
from support.helpers import TEXT, attached, tiny_model

import locas_ext as locas


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, memory: locas.attach(model, rehome="yes"), "rehome is 'yes'; expected True or False"),
        (lambda model, memory: locas.load(model, 4), "path is 4; expected a str or a Path"),
        (lambda model, memory: memory.load(4), "path is 4; expected a str or a Path"),
        (lambda model, memory: memory.save_pretrained(4), "path is 4; expected a str or a Path"),
        (
            lambda model, memory: memory.save_pretrained("never-made", optimizer="yes"),
            "optimizer is 'yes'; expected True or False",
        ),
        (lambda model, memory: memory.memorize(TEXT, resume=4), "resume is 4; expected a str or a Path"),
        (lambda model, memory: memory.merge_and_unload("8"), "pad_to_multiple_of is '8'; expected an integer >= 1"),
        (lambda model, memory: locas.SlotAdamW(4), "memory is int; expected a locas.Memory"),
        (lambda model, memory: locas.SlotAdamW(memory, betas=0.9), "betas is 0.9; expected two numbers"),
    ],
)
def test_an_argument_of_another_type_is_named_with_what_was_expected(call, message):
    memory = attached()[1]
    with pytest.raises(TypeError, match=message):
        call(tiny_model(), memory)
    assert memory.version == 0
