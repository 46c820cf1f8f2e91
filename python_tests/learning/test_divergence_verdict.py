"""What is concluded from comparisons of a run's losses with the host's own."""

import math
import random

import pytest

from locas_ext.learning.divergence import Comparison, DivergenceTest
from locas_ext.state.stream import Chunk


def fed(excesses, tokens=128):
    """A test that was given all chunks that it asked for. -> it, and their numbers"""
    test, asked = DivergenceTest(), []
    for number, excess in enumerate(excesses):
        if test.is_due(number):
            asked.append(number)
            test.add(number, Comparison(tokens, (4 + excess) * tokens, 4.0 * tokens))
    return test, asked


def test_few_chunks_of_a_healthy_run_are_compared():
    test, asked = fed([-0.1] * 1000)
    assert asked == [0, 1, 16, 128, 256, 384, 512, 640, 768, 896] and test.harmed_by is None


@pytest.mark.parametrize("number", [1, 16, 256])
def test_a_great_harm_shows_at_once(number):
    test, asked = fed([0.0] * number + [1.0])
    assert asked[-1] == number and test.harmed_by.excess == pytest.approx(1.0) and test.harms_still()


def test_a_smaller_harm_shows_within_a_few_chunks():
    test, asked = fed([0.0, *[0.2] * 9])
    assert test.harmed_by is not None and asked == [0, 1, 2] and test.harmed_by.tokens == 256


def test_one_hard_chunk_shows_nothing_nor_does_a_harm_within_the_noise():
    test, asked = fed([0.0, 0.4, -0.01, 0, 0, 0.02, 0, 0])
    assert test.harmed_by is None and asked == [0, 1, 2]
    test, asked = fed([0.04] * 100)
    assert test.harmed_by is None and len(asked) < 15


def test_unlike_comparisons_conclude_nothing_but_ask_for_others():
    test = DivergenceTest()
    test.add(1, Comparison(128, 128 * 6.0, 128 * 4.0), like_with_like=False)
    assert test.harmed_by is None and test.is_due(2) and test.wants_like_with_like
    test.add(2, Comparison(128, 128 * 3.9, 128 * 4.0))  # alike it is no harder
    assert not test.is_due(3) and not test.wants_like_with_like
    test.add(16, Comparison(128, 128 * 4.1, 128 * 4.0), like_with_like=False)
    test.add(17, Comparison(128, 128 * 6.0, 128 * 4.0))
    assert test.harmed_by.tokens == 128 and test.wants_like_with_like


def test_noise_alone_never_warns():
    """200 runs of 400 chunks by a memory that does no good and no harm; a token varies by 0.3 nats, as on the shipped one."""
    draw = random.Random(0)
    for tokens in (64, 512):
        spread = 0.3 / math.sqrt(tokens)
        assert not any(fed([draw.gauss(0, spread) for _ in range(400)], tokens)[0].harmed_by for _ in range(200))


def test_nothing_is_concluded_from_few_tokens():
    test, asked = fed([0.0, *[3.0] * 32], tokens=1)
    assert asked == list(range(33)) and test.harmed_by.tokens == 32


def test_a_jump_between_two_chunks_of_the_schedule_is_looked_at():
    test, chunks = fed([-0.1] * 70)[0], [Chunk(8 * n, 8 * n + 8, 8, 32.0, n) for n in range(70)]
    assert test.surprises(70, 8 * 5.1, 8, chunks) and not test.surprises(70, 8 * 4.9, 8, chunks)
    test.add(70, Comparison(8, 8 * 5.1, 8 * 5.1))  # the text was hard, not the memory bad
    assert not test.surprises(72, 8 * 9.0, 8, chunks) and test.surprises(74, 8 * 9.0, 8, chunks)


def test_of_single_tokens_many_are_looked_at_together():
    """A token's loss varies by nats, which is no surprise; a harm to all of them is one, within the tokens that show it."""
    draw = random.Random(0)
    test, chunks, looked_at = DivergenceTest(stride=1), [], []
    for number in range(4000):
        harm = 3.0 * (number >= 3000)
        loss = max(0.0, draw.gauss(4.0, 2.5))
        if test.is_due(number) or test.surprises(number, loss + harm, 1, chunks):
            looked_at.append(number)
            test.add(number, Comparison(1, loss + harm, loss))
        chunks.append(Chunk(number, number + 1, 1, loss + harm, number))
        if test.harmed_by is not None:
            break
    assert 3000 <= number < 3000 + 96 and sum(place < 3000 for place in looked_at) < 40


def test_a_harm_that_goes_away_is_told_from_one_that_stays():
    recovered, asked = fed([0.0, 1.0, *[-0.1] * 60])
    assert asked == [0, 1, 16, 32, 48] and recovered.harmed_by is not None and not recovered.harms_still()
    assert fed([0.0, 1.0, *[0.1] * 60])[0].harms_still()
