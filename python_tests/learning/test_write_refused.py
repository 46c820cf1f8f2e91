"""Closed-form writing: what is refused, and that nothing is changed then."""

import pytest
import torch
from support.helpers import logits_of, random_ids, tiny_model
from support.writing import (
    IDS,
    assert_unchanged,
    breaking_gradient,
    everything,
    writable,
)
from support.written import grown

import locas_ext as locas

POSITIONS = r"tokens is .*; expected 'all', locas.TopLoss\(n\) or locas.LossAbove\(nats\), or a sequence of positions"
BAD = [
    (dict(epsilon=0), ValueError, "epsilon is 0; expected a finite number > 0"),
    (dict(epsilon=-1e-2), ValueError, "epsilon is -0.01"),
    (dict(epsilon=float("nan")), ValueError, "epsilon is nan"),
    (dict(epsilon=float("inf")), ValueError, "epsilon is inf"),
    (dict(epsilon=1e39), ValueError, "epsilon is 1e[+]39.*float32"),
    (dict(epsilon=True), TypeError, "epsilon is True"),
    (dict(epsilon="0.1"), TypeError, "epsilon is '0.1'"),
    (dict(epsilon=None), TypeError, "epsilon is None"),
    (dict(tokens="some"), TypeError, POSITIONS),
    (dict(tokens=b"\x01"), TypeError, POSITIONS),
    (dict(tokens=True), TypeError, POSITIONS),
    (dict(tokens={1}), TypeError, POSITIONS),
    (dict(tokens=1j), TypeError, POSITIONS),
    (dict(tokens=None), TypeError, POSITIONS),
    (dict(tokens=[1.0]), TypeError, r"tokens\[0\] is 1.0; expected an integer"),
    (dict(tokens=[True]), TypeError, r"tokens\[0\] is True"),
    (dict(tokens=[[1]]), TypeError, r"tokens\[0\] is \[1\]"),
    (dict(tokens=torch.tensor([1.0])), TypeError, r"tokens\[0\] is 1.0"),
    (dict(tokens=torch.tensor([True])), TypeError, r"tokens\[0\] is True"),
    (dict(tokens=torch.tensor([[1]])), TypeError, "expected a sequence of integers"),
    (dict(tokens=torch.tensor(1)), TypeError, r"tokens is 1; write locas.TopLoss\(1\)"),
    (dict(tokens=2), TypeError, r"tokens is 2; write locas.TopLoss\(2\) .*locas.LossAbove\(2.0\)"),
    (dict(tokens=2.5), TypeError, r"tokens is 2.5; write locas.LossAbove\(2.5\)"),
    (dict(tokens=[]), ValueError, "tokens is empty"),
    (dict(tokens=[0, 1]), ValueError, "tokens holds 0; expected positions from 1 to 12"),
    (dict(tokens=[-1]), ValueError, "tokens holds -1"),
    (dict(tokens=[1, 13]), ValueError, "tokens holds 13; expected positions from 1 to 12"),
    (dict(tokens=[3, 2, 3]), ValueError, "tokens names position 3 twice"),
    (dict(exact=1), TypeError, "exact is 1"),
    (dict(capacity=0), ValueError, "capacity is 0; expected an integer >= 1"),
    (dict(capacity=3.0), TypeError, "capacity is 3.0"),
    (dict(capacity=2), ValueError, "capacity is 2; expected at least 5, the slots used"),
    (dict(when_full="grow", capacity=50), ValueError, "when_full is 'grow'; expected one of error, drop_oldest"),
    (dict(when_full="drop_oldest"), ValueError, "capacity is None"),
    (dict(compress_to=4), ValueError, "capacity is None"),
    (dict(capacity=50, when_full="error", compress_to=4), ValueError, "compress_to is 4, but when_full is 'error'"),
    (dict(capacity=50, compress_to=0), ValueError, "compress_to is 0; expected an integer >= 1"),
    (dict(capacity=50, compress_to=33), ValueError, "compress_to is 33; expected an integer from 1 to 32"),
    (dict(capacity=20, compress_to=20), ValueError, "compress_to is 20; expected an integer from 1 to 19"),
    (dict(capacity=50, compress_to=True), TypeError, "compress_to is True"),
]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: locas.TopLoss(0), ValueError, "n is 0; expected an integer >= 1"),
        (lambda: locas.TopLoss(2.0), TypeError, "n is 2.0"),
        (lambda: locas.LossAbove(float("nan")), ValueError, "nats is nan"),
        (lambda: locas.LossAbove("2"), TypeError, "nats is '2'"),
    ],
)
def test_selectors_of_nothing(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture(scope="module")
def five():
    model, memory = writable()
    memory.write(IDS[:6])
    return memory


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[str(case[0]) for case in BAD])
def test_bad_arguments(five, arguments, error, message):
    before = everything(five)
    with pytest.raises(error, match=message):
        five.write(IDS, **arguments)
    assert_unchanged(five, before)


def test_a_capacity_of_one_cannot_be_compressed():
    with pytest.raises(ValueError, match="capacity is 1; expected at least 2 with when_full='compress'"):
        writable()[1].write(IDS, capacity=1, when_full="compress")


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([5], ValueError, "holds 1 token; expected at least 2"),
        (random_ids(65), ValueError, "holds 65 tokens; expected at most 64, the host's positions"),
        ([3, 61], ValueError, "token 61"),
        (torch.rand(4), TypeError, "expected integers"),
    ],
)
def test_bad_ids(five, ids, error, message):
    with pytest.raises(error, match=message):
        five.write(ids)


def test_a_gated_or_detached_memory_is_refused():
    model = tiny_model()
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match="write: the variant is 'glu'"):
        memory.write(IDS)
    memory.detach()
    _, memory = writable()
    memory.detach()
    with pytest.raises(ValueError, match="no longer attached"):
        memory.write(IDS)


POLICIES = [dict(), dict(capacity=16, when_full="drop_oldest"), dict(capacity=20, compress_to=6)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("room", [16, 64])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gradient_that_is_not_finite_writes_drops_and_compresses_nothing(policy, room, exact, dtype):
    model, memory = grown(dtype=dtype)
    memory.state.resize(room)
    before = everything(memory)
    for factor in (float("nan"), float("inf")):
        hook = breaking_gradient(model, factor)
        with pytest.raises(locas.LocasError, match="not finite.*nothing was written.*version 2"):
            memory.write(IDS, exact=exact, **policy)
        assert_unchanged(memory, before)
        hook.remove()
    memory.write(IDS, **policy)
    assert memory.version in (3, 4)


def test_a_first_write_that_fails_leaves_a_memory_without_slots():
    model, memory = writable(rank=16)
    host, hook = logits_of(model, IDS), breaking_gradient(model)
    with pytest.raises(locas.LocasError):
        memory.write(IDS)
    hook.remove()
    assert (memory.version, memory.state.used) == (0, 0) and not memory.slots.any()
    assert torch.equal(logits_of(model, IDS), host)
    assert memory.write(IDS).slots_used == 12


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("tokens", ["all", [2, 9], locas.TopLoss(3), locas.LossAbove(0.5)])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_broken_host_is_an_error_whatever_is_chosen(value, tokens, policy):
    model, memory = grown()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] = value
    before = everything(memory)
    with pytest.raises(locas.LocasError, match="version 2"):
        memory.write(IDS, tokens=tokens, **policy)
    assert_unchanged(memory, before)
