"""Closed-form writing against hooks and autograd on a plain float64 host.

The oracle (`PlainWriter`) uses torch and transformers alone.
"""

import itertools

import pytest
import torch
from support.helpers import act_formula, logits_of
from support.hosts import TWO_LAYER, activation_of
from support.writing import (
    IDS,
    SCALE,
    PlainWriter,
    assert_unchanged,
    breaking_gradient,
    everything,
    expected_slots,
    writable,
    written,
)

import locas_ext as locas


# ---- the claim ------------------------------------------------------------------------------------------------
def rises(family, position, epsilons, ids):
    """How much likelier the token at `position` is after its slot was written, for each epsilon; float64."""
    model, memory = writable(family, torch.float64)
    before, result = PlainWriter(model).nll(ids)[position - 1], []
    for epsilon in epsilons:
        memory.reset()
        memory.write(ids, epsilon=epsilon, tokens=[position])
        log_p = logits_of(model, ids[:-1]).log_softmax(-1)[position - 1, ids[position]]
        result.append((log_p + before).item())
    return model, result


@pytest.mark.parametrize("family", [*TWO_LAYER, "llama"])
def test_the_rise_is_the_gradients_prediction_to_first_order(family):
    """Position 0 is the only one before token 1, so the slot fires where it was written and nowhere else."""
    # Llama's norm computes in float32 in a float64 host too, so that smaller steps drown in its rounding.
    epsilons = [2e-2, 1e-2, 5e-3] if family == "llama" else [1e-3, 5e-4, 2.5e-4]
    model, measured = rises(family, 1, epsilons, IDS)
    twin = PlainWriter(model)
    inputs, gradients, _ = twin.ask(IDS, [1])
    fires = act_formula(inputs.norm(dim=-1), twin.activation)[:, 0]
    slope = (SCALE * fires * gradients.square().sum(-1)[:, 0] / gradients.norm()).sum().item()
    residuals = [rise - slope * epsilon for rise, epsilon in zip(measured, epsilons, strict=False)]
    assert slope > 0 and all(rise > 0 for rise in measured)
    assert abs(residuals[-1]) < 0.1 * slope * epsilons[-1]
    for larger, smaller in itertools.pairwise(residuals):
        assert smaller / larger == pytest.approx(1 / 4, rel=0.15)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_further_on_the_slot_fires_at_earlier_positions_too(family):
    """The first order then has a term for each position that the token sees."""
    position, epsilons = 9, [1e-3, 5e-4]
    model, measured = rises(family, position, epsilons, IDS)
    twin = PlainWriter(model)
    nll = twin.nll(IDS)
    everywhere = twin.rows(torch.autograd.grad(-nll[position - 1], twin.outputs))
    inputs = twin.rows(twin.inputs).detach()
    slots, _ = expected_slots(inputs[:, position - 1 : position], everywhere[:, position - 1 : position], 1.0)
    fires = act_formula(inputs @ slots[:, 0].mT, twin.activation)  # [L, T, 1]
    slope = (SCALE * fires * (everywhere * slots[:, 1])).sum().item()
    residuals = [rise - slope * epsilon for rise, epsilon in zip(measured, epsilons, strict=False)]
    assert abs(residuals[1]) < 0.05 * abs(slope) * epsilons[1]
    assert residuals[1] / residuals[0] == pytest.approx(1 / 4, rel=0.2)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_every_layers_change_is_collinear_with_its_gradient_and_of_the_right_length(family):
    model, memory = writable(family)
    inputs, gradients, _ = PlainWriter(model).ask(IDS, [7])
    memory.write(IDS, epsilon=0.03, tokens=[7])
    for ffn, x, g in zip(memory._attachment.ffns, inputs, gradients, strict=False):
        change = ffn._beside(x.float(), None)[0].double()
        expected = SCALE * 0.03 * act_formula(x.norm(), activation_of(model)) * g[0] / gradients.norm()
        assert torch.cosine_similarity(change, g[0], dim=0) > 1 - 1e-6
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5 * expected.norm().item())


@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_slot_fires_on_its_own_token_more_than_on_others(family):
    model, memory = writable(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:  # inputs of one length, so that keys differ by direction only
                parameter.fill_(float(name.endswith("weight")))
    ids = torch.arange(3, 16)
    inputs, _, _ = PlainWriter(model).ask(ids)
    memory.write(ids)
    for x, slots in zip(inputs, written(memory), strict=False):
        assert torch.equal((slots[0].double() @ x.T).argmax(1), torch.arange(len(ids) - 1))


# ---- what is written ------------------------------------------------------------------------------------------
CHOICES = {
    "positions": ([9, 2, 5], [2, 5, 9]),
    "tensor": (torch.tensor([4, 12]), [4, 12]),
    "range": (range(3, 6), [3, 4, 5]),
    "all": ("all", list(range(1, 13))),
    "top": (locas.TopLoss(4), None),
    "threshold": (None, None),
    "more than there are": (locas.TopLoss(99), list(range(1, 13))),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_slots_are_those_of_hooks_and_autograd(choice, exact):
    model, memory = writable("gpt2", torch.float64)
    twin = PlainWriter(model)
    tokens, positions = CHOICES[choice]
    nll = twin.nll(IDS).detach()
    if choice == "top":
        positions = sorted((nll.topk(4).indices + 1).tolist())
    if choice == "threshold":
        tokens = nll.median().item()
        positions = ((nll >= tokens).nonzero()[:, 0] + 1).tolist()
        tokens = locas.LossAbove(tokens - 1e-9)
    inputs, gradients, _ = twin.ask(IDS, positions, exact)
    expected, norm = expected_slots(inputs, gradients, 0.02)
    report = memory.write(IDS, epsilon=0.02, tokens=tokens, exact=exact)
    assert report.tokens == positions and report.slots_used == memory.state.used == len(positions)
    assert report.nll == pytest.approx(nll[torch.tensor(positions) - 1].sum().item(), rel=1e-6)
    assert report.gradient_norm == pytest.approx(norm.tolist(), rel=1e-5)
    torch.testing.assert_close(written(memory).double(), expected, rtol=1e-6, atol=1e-8)
    assert memory.version == 1 and torch.equal(memory.state.arenas[0].compute, memory.slots.double())


def test_a_threshold_that_no_token_reaches_writes_nothing():
    model, memory = writable()
    before = everything(memory)
    report = memory.write(IDS, tokens=locas.LossAbove(1e9))
    assert (report.tokens, report.gradient_norm, report.nll, report.slots_used) == ([], [], 0.0, 0)
    assert_unchanged(memory, before)
    assert memory.write(IDS, tokens=locas.LossAbove(1e9), exact=True).tokens == []


def test_exact_differs_where_a_position_affects_later_tokens_and_only_there():
    _, summed = writable("gpt_neox", torch.float64)
    _, exact = writable("gpt_neox", torch.float64)
    summed.write(IDS)
    exact.write(IDS, exact=True)
    difference = (summed.slots - exact.slots)[:, 1].abs().amax((0, 2))
    assert difference[:-1].min() > 1e-6 and difference[-1] <= 1e-9
    assert torch.equal(summed.slots[:, 0], exact.slots[:, 0])


@pytest.mark.parametrize("family", [*TWO_LAYER, "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_host_and_dtype(family, dtype):
    model, memory = writable(family, dtype)
    memory.write(IDS[:5], epsilon=1.0)  # the second text is read with these
    assert memory.slots.isfinite().all()
    inputs, gradients, _ = PlainWriter(model, written(memory)).ask(IDS)
    expected, norm = expected_slots(inputs, gradients, 0.5)
    report = memory.write(IDS, epsilon=0.5)
    assert memory.state.used == 4 + 12 and memory.version == 2
    rounding = 1e-4 if dtype == torch.float32 else 30 * torch.finfo(dtype).eps
    got = written(memory, 4).double()
    for plane in range(2):
        assert (got[:, plane] - expected[:, plane]).norm() <= rounding * expected[:, plane].norm()
    torch.testing.assert_close(torch.tensor(report.gradient_norm).double(), norm, rtol=rounding, atol=0)
    # what the host computes with
    twin = PlainWriter(model, written(memory))
    log_p = logits_of(model, IDS[:-1]).double().log_softmax(-1).gather(1, IDS[1:, None])[:, 0]
    torch.testing.assert_close(-log_p, twin.nll(IDS).detach(), rtol=rounding, atol=10 * rounding)
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.to(dtype))


def test_half_precision_gradients_do_not_vanish():
    """The output projection's gradients are far under float16's smallest number; the loss is scaled."""
    model, memory = writable("gpt2", torch.float16)
    twin = PlainWriter(model)
    hook = breaking_gradient(model, 1e-4)  # of a text that is all but known
    memory.write(IDS, tokens=[12])
    hook.remove()
    inputs, gradients, _ = twin.ask(IDS, [12])
    expected, _ = expected_slots(inputs, gradients, 1e-2)
    assert torch.cosine_similarity(written(memory)[:, 1].flatten().double(), expected[:, 1].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("layers", [(1,), (0,)])
def test_a_memory_of_some_layers(layers):
    model, memory = writable("gpt2", torch.float64, layers=layers)
    inputs, gradients, _ = PlainWriter(model).ask(IDS)
    expected, _ = expected_slots(inputs[list(layers)], gradients[list(layers)], 1e-2)
    memory.write(IDS)
    torch.testing.assert_close(written(memory).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_reference_backend_writes_the_same(family):
    _, memory = writable(family)
    _, other = writable(family, backend="reference")
    for m in (memory, other):
        m.write(IDS)
        m.write(IDS[:7])
    torch.testing.assert_close(other.slots, memory.slots, rtol=1e-4, atol=1e-6)


def test_behind_initialized_slots():
    _, memory = writable()
    memory.initialize(IDS)
    rows = memory.slots.clone()
    memory.write(IDS, tokens=[3])
    assert memory.state.used == 5 and torch.equal(memory.slots[:, :, :4], rows) and memory.version == 1
