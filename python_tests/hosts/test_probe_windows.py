"""How windows are read: the lengths that a config states, and what comparisons decide."""

import pytest
import torch
import transformers

from locas_ext.hosts.lengths import Lengths, lengths_of
from locas_ext.hosts.window_reading import FULL, ONE, SHORT, Verdict, WindowReading

LONG = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)


def config(model_type="llama", **settings):
    return transformers.AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **settings,
    )


@pytest.mark.parametrize(
    "config, lengths",
    [
        (config(), Lengths()),
        (config(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)), Lengths()),
        (config(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), Lengths(growing=(64,))),
        (
            config("phi3", original_max_position_embeddings=16, rope_scaling=dict(type="longrope", **LONG)),
            Lengths(rotary=(16,)),
        ),
        (config("mistral", sliding_window=8), Lengths(reaches=(8,))),
        (config("mistral", sliding_window=None), Lengths()),
        (config("gpt2"), Lengths()),
        (
            config(
                "gemma3_text",
                sliding_window=8,
                rope_parameters={
                    "full_attention": dict(
                        rope_type="longrope", factor=2.0, original_max_position_embeddings=32, rope_theta=1e4, **LONG
                    ),
                    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
                },
            ),
            Lengths(rotary=(32,), reaches=(8,)),
        ),
        (config("llama4_text", attention_chunk_size=16), Lengths(reaches=(16,))),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_lengths_of_a_config(config, lengths):
    assert lengths_of(config) == lengths


def test_a_length_divides_only_the_windows_it_falls_into():
    lengths = Lengths(rotary=(16,))
    assert [lengths.divides(*window) for window in ((8, 16), (16, 17), (0, 40), (16, 16), (17, 40))] == [
        None,
        16,
        16,
        None,
        None,
    ]
    assert [Lengths(growing=(16,)).divides(*window) for window in ((8, 16), (17, 40))] == [None, 16]


class Host:
    """Reads windows; `wrong` says of which number of tokens, and in which ways, not as one forward does."""

    def __init__(self, wrong):
        self.wrong, self.read_ways = wrong, []

    def settle(self, reading, context, inputs, full=63):
        def read(way):
            self.read_ways.append(way)
            logits = torch.randn(inputs, 7, generator=torch.Generator().manual_seed(0))
            problem = way.in_two and self.wrong(way, context + inputs)
            if problem == "is full":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if problem == "raises":
                raise IndexError("list index out of range")
            return logits + 0.01 * torch.randn(inputs, 7) if problem else logits

        self.read_ways.clear()
        return reading.settle(context, torch.arange(inputs) % 7, full, read)


def test_each_kind_of_window_is_compared_once():
    host, reading = Host(lambda way, tokens: False), WindowReading(Lengths(reaches=(20,)))
    compared = [bool(host.settle(reading, tokens - 8, 8) and host.read_ways) for tokens in (8, 16, 20, 21, 40, 63, 63, 16, 40)]
    assert compared == [False, True, False, True, False, True, False, False, False]
    assert reading.describe() == "two forwards per window"
    host.settle(reading, 23, 8, full=31)
    assert host.read_ways == [ONE, SHORT], "full windows of another length"


@pytest.mark.parametrize(
    "wrong, way, why",
    [
        (lambda way, tokens: way.ends_early, SHORT._replace(ends_early=False), "differ"),
        (lambda way, tokens: way.own_attention, SHORT._replace(own_attention=False), "differ"),
        (lambda way, tokens: way != FULL, FULL, "differ"),
        (lambda way, tokens: not way.positions, SHORT._replace(positions=True), "differ"),
        (lambda way, tokens: not way.positions or way.ends_early, SHORT._replace(positions=True, ends_early=False), "differ"),
        (lambda way, tokens: True, ONE, "differ"),
        (lambda way, tokens: "raises", ONE, "raises IndexError: list index out of range"),
        (lambda way, tokens: way.ends_early and "raises", SHORT._replace(ends_early=False), "raises IndexError"),
    ],
)
def test_a_way_that_gives_other_logits_gives_way_to_the_next(wrong, way, why):
    verdict = Host(wrong).settle(WindowReading(), 8, 8)
    assert verdict.way == way and why in verdict.why
    if not way.positions:  # the probe has found out whether they are needed
        assert Host(wrong).settle(WindowReading(verdicts={0: Verdict()}), 8, 8).way == way


def test_a_full_memory_says_nothing_of_the_host():
    reading = WindowReading()
    with pytest.raises(torch.OutOfMemoryError):
        Host(lambda way, tokens: "is full").settle(reading, 8, 8)
    assert Host(lambda way, tokens: False).settle(reading, 8, 8).way == SHORT


def test_what_fails_at_some_length_fails_for_longer_windows_only():
    host, reading = Host(lambda way, tokens: tokens > 20), WindowReading(Lengths(reaches=(20,)))
    assert host.settle(reading, 8, 8).way == SHORT
    assert host.settle(reading, 16, 8).way == ONE
    assert host.settle(reading, 55, 8).way == ONE and host.read_ways == []
    assert host.settle(reading, 8, 8).way == SHORT
    assert reading.describe().startswith("one forward per window of 21 or more tokens: behind a cache")


def test_what_is_not_finite_differs():
    nan = torch.full((3, 5), torch.nan)
    assert WindowReading().settle(4, torch.zeros(3, dtype=torch.long), 63, lambda way: nan).way == ONE


def test_a_changed_host_is_compared_anew():
    model = transformers.AutoModelForCausalLM.from_config(config(vocab_size=17, intermediate_size=8))
    reading = WindowReading(verdicts={0: Verdict()})
    for change in (
        lambda: None,
        lambda: setattr(model.model.layers[0], "forward", model.model.layers[0].forward),
        lambda: setattr(model.model, "norm", torch.nn.Identity()),
        lambda: setattr(model.config, "sliding_window", 8),
    ):
        change()
        reading.begin_run(model)
        assert list(reading.verdicts) == [0]
        reading.verdicts[1] = Verdict(FULL)
        reading.begin_run(model)
        assert list(reading.verdicts) == [0, 1]
    assert reading.lengths == Lengths(reaches=(8,))
