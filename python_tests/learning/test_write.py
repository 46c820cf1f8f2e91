"""Closed-form writing against hooks and autograd on a plain float64 host; growth; what is refused.

The oracle (`PlainWriter`) uses torch and transformers alone.
"""

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import TEXT, act_formula, assert_same_host, logits_of, random_ids, snapshot, tiny_model
from support.hosts import TWO_LAYER, activation_of, projections, tiny
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
from locas_ext.state import memory_state as slots_module

STEPS = dict(window=24, stride=8, learning_rate=1e-2, progress=False)


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
        change = ffn.memory(x.float())[0].double()
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
    "none": (None, list(range(1, 13))),
    "top": (4, None),
    "threshold": (None, None),
    "more than there are": (99, list(range(1, 13))),
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
        tokens -= 1e-9
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
    report = memory.write(IDS, tokens=1e9)
    assert (report.tokens, report.gradient_norm, report.nll, report.slots_used) == ([], [], 0.0, 0)
    assert_unchanged(memory, before)
    assert memory.write(IDS, tokens=1e9, exact=True).tokens == []


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


# ---- how it is done -------------------------------------------------------------------------------------------
def test_one_forward_one_backward_and_the_host_as_before():
    model, memory = writable(host=tiny("opt", dropout=0.5, attention_dropout=0.5))
    model.train()
    model.model.decoder.layers[0].eval()
    for parameter in memory.parameters():
        parameter.grad.fill_(3.0)
    before, counts = snapshot(model), {"forward": 0, "layer": 0, "backward": 0}

    def count(name, result=None):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [
        model.register_forward_hook(count("forward")),
        model.model.decoder.layers[0].register_forward_hook(count("layer")),
        model.lm_head.register_full_backward_pre_hook(count("backward")),
    ]
    grads = [parameter.grad for parameter in memory.parameters()]
    with torch.no_grad():
        memory.write(IDS)
    assert counts == {"forward": 1, "layer": 1, "backward": 1}
    memory.write(IDS, tokens=[3, 4, 5], exact=True)
    assert counts == {"forward": 2, "layer": 2, "backward": 4}
    for hook in hooks:
        hook.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(ffn.tap is None and ffn.input is None for ffn in memory._attachment.ffns)
    assert len(grads) == len(memory.parameters())
    for parameter in memory.parameters():
        assert (parameter.grad[:, :4] == 3).all() and not parameter.grad[:, 4:].any()
    assert_same_host(model, before)
    # dropout was off: the same slots as of a host that has none
    _, quiet = writable(host=tiny("opt", dropout=0.0))
    quiet.write(IDS)
    torch.testing.assert_close(memory.slots[:, :, :12], quiet.slots[:, :, :12], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(mode):
    _, plain = writable()
    model, memory = writable()
    plain.write(IDS)
    plain.compress(5)
    with mode():
        memory.write(IDS)
        memory.compress(5)
        assert not torch.is_grad_enabled()
    assert torch.equal(memory.slots, plain.slots)
    for m in (plain, memory):
        m.write(IDS)
        m.memorize(TEXT[:16], **STEPS)
    assert torch.equal(memory.slots, plain.slots)


def test_an_exception_inside_the_host_changes_nothing():
    model, memory = writable()
    memory.write(IDS)
    before, state = snapshot(model), everything(memory)

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        memory.write(IDS)
    hook.remove()
    assert_unchanged(memory, state)
    assert_same_host(model, before)
    assert all(ffn.tap is None for ffn in memory._attachment.ffns)


def test_a_compiled_host_is_written_as_an_eager_one():
    _, eager = writable("gpt2")
    model, memory = writable("gpt2")
    model.compile(backend="aot_eager")
    for m in (eager, memory):
        m.write(IDS)
        m.write(IDS[:6])
    assert torch.equal(memory.slots, eager.slots)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(eager.model, IDS), rtol=1e-5, atol=1e-5)


def test_beneath_accelerates_hooks():
    accelerate = pytest.importorskip("accelerate")
    _, plain = writable("opt")
    host = tiny("opt")
    accelerate.cpu_offload(host, execution_device=torch.device("cpu"))
    _, memory = writable(host=host)
    for m in (plain, memory):
        m.write(IDS)
    torch.testing.assert_close(memory.slots, plain.slots, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[0, 2], [1]]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_arenas_are_written_as_one(groups, dtype, monkeypatch):
    memories = []
    for arenas in (None, groups):
        with monkeypatch.context() as patch:
            if arenas is not None:
                patch.setattr(slots_module, "grouped_by_device", lambda devices: arenas)
            memories.append(writable(host=tiny("gpt_neox", num_hidden_layers=3).to(dtype))[1])
    one, several = memories
    for m in memories:
        m.write(IDS)
        m.write(IDS[:6], capacity=14, when_full="drop_oldest")
        m.compress(9)
        m.write(IDS[:6], tokens=[4], exact=True)
    assert len(several.state.arenas) == len(groups) and several.version == one.version == 4
    torch.testing.assert_close(several.slots, one.slots, rtol=1e-5, atol=1e-6 * one.slots.abs().max().item())
    hook, state = breaking_gradient(several.model), everything(several)
    with pytest.raises(locas.LocasError, match="not finite"):
        several.write(IDS)
    hook.remove()
    assert_unchanged(several, state)


# ---- the life of a grown memory -------------------------------------------------------------------------------
def grown(family="opt", dtype=torch.float32):
    """13 slots of which the capacity is 16: behind a doubling there is room that is not used."""
    model, memory = writable(family, dtype, rank=8)
    memory.write(IDS[:9])
    memory.write(IDS[:6])
    assert (memory.state.used, memory.state.capacity) == (13, 16)
    return model, memory


def test_writing_twice_appends():
    model, memory = writable()
    memory.write(IDS[:6])
    first = written(memory).clone()
    inputs, gradients, _ = PlainWriter(model, first).ask(IDS)
    memory.write(IDS)
    assert torch.equal(memory.slots[:, :, :5], first)
    expected, _ = expected_slots(inputs, gradients, 1e-2)
    torch.testing.assert_close(written(memory, 5).double(), expected, rtol=1e-3, atol=1e-6)


def test_disabled_is_the_host():
    model = tiny("gpt2")
    host = logits_of(model, IDS)
    _, memory = writable(host=model)
    memory.write(IDS, epsilon=1.0)
    changed = logits_of(model, IDS)
    assert not torch.allclose(changed, host)
    with memory.disabled():
        assert torch.equal(logits_of(model, IDS), host)
        with pytest.raises(ValueError, match="disabled here"):
            memory.write(IDS)
    assert torch.equal(logits_of(model, IDS), changed)
    memory.detach()
    assert torch.equal(logits_of(model, IDS), host)


def test_snapshot_restore_fork_and_deepcopy():
    model, memory = grown()
    logits, kept = logits_of(model, IDS), memory.snapshot()
    twins = [memory.fork(), locas.memory_of(copy.deepcopy(model))]
    memory.write(IDS)
    slots = written(memory).clone()
    assert not torch.equal(logits_of(model, IDS), logits)
    for twin in twins:
        assert torch.equal(logits_of(twin.model, IDS), logits) and twin.state.used == 13
        twin.write(IDS)
        assert torch.equal(written(twin), slots)
    memory.restore(kept)
    assert memory.state.used == 13 and torch.equal(logits_of(model, IDS), logits)
    memory.write(IDS)
    assert torch.equal(written(memory), slots)


def test_the_file_holds_the_slots_used_and_fits_a_memory_of_another_size(tmp_path):
    model, memory = grown()
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    assert load_file(tmp_path / "m/locas_memory.safetensors")["slots"].shape == (2, 2, 13, 32)
    assert json.loads((tmp_path / "m/locas_config.json").read_text())["slots_used"] == 13
    assert {(entry.slots_used, entry.capacity) for entry in memory.status()} == {(13, 16)}
    larger = writable(rank=8)[1]
    larger.write(TEXT[:50])
    for other in (writable(rank=8)[1], larger, locas.load(tiny("opt"), tmp_path / "m")):
        other.load(tmp_path / "m")
        assert (other.state.used, other.version) == (13, 2)
        assert torch.equal(written(other), written(memory))
        assert torch.equal(logits_of(other.model, IDS), logits_of(model, IDS))
    memory.write(IDS)
    larger.write(IDS)
    assert torch.equal(written(larger), written(memory))  # whether there was room or not


@pytest.mark.parametrize("family", TWO_LAYER)
def test_merging_a_grown_memory_gives_the_attached_output(family):
    model, memory = grown(family)
    memory.write(IDS, epsilon=1.0)
    before = logits_of(model, IDS)
    merged = memory.merge_and_unload(pad_to_multiple_of=1)
    torch.testing.assert_close(logits_of(merged, IDS), before, rtol=1e-4, atol=1e-4)
    assert {projection.weight.numel() // 32 for pair in projections(merged) for projection in pair} == {48 + 25}


def test_reset_shrinks_back_to_the_rank():
    model = tiny("opt")
    host = logits_of(model, IDS)
    _, memory = writable(host=model, rank=8)
    memory.write(IDS)
    memory.reset()
    assert memory.slots.shape == (2, 2, 8, 32) and not memory.slots.any()
    assert (memory.state.used, memory.version) == (0, 0) and torch.equal(logits_of(model, IDS), host)
    memory.write(IDS)
    assert memory.state.used == 12


@pytest.mark.parametrize("change", [lambda m: m.write(IDS), lambda m: m.compress(3)], ids=["write", "compress"])
def test_a_cache_from_before_is_refused(change):
    model, memory = writable("gpt2")
    memory.write(IDS)
    out = model.generate(IDS[None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    change(memory)
    with pytest.raises(ValueError, match="allow_stale_cache"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)


# ---- growth ---------------------------------------------------------------------------------------------------
def test_the_capacity_doubles_and_a_longer_text_gets_what_it_needs():
    _, memory = writable(rank=4)
    sizes = []
    for tokens in ([1, 2, 3], [1], [1], [1, 2, 3], [1], "all"):
        memory.write(TEXT[:40], tokens=tokens)
        sizes.append((memory.state.used, memory.state.capacity))
    assert sizes == [(3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (48, 48)]
    assert [len(parameter[0]) for parameter in memory.parameters()] == [48, 48]


def test_a_capacity_is_reserved_at_once():
    _, memory = writable(rank=4)
    memory.write(IDS, capacity=20)
    assert (memory.state.used, memory.state.capacity) == (12, 20)


def test_full_is_an_error_that_names_slots_and_ways_out():
    _, memory = writable()
    memory.write(IDS)
    before = everything(memory)
    for arguments in (dict(), dict(tokens=3), dict(tokens=0.0), dict(tokens=[1, 2, 3])):
        with pytest.raises(ValueError, match=r"12 of 14 slots are used and \d+ more.*drop_oldest.*compress"):
            memory.write(IDS, capacity=14, **arguments)
        assert_unchanged(memory, before)
    memory.write(IDS, capacity=14, tokens=2)
    assert memory.state.used == memory.state.capacity == 14


def test_dropping_the_oldest_keeps_the_order_and_the_optimizers_states():
    model, memory = writable(dtype=torch.bfloat16)
    memory.write(IDS)
    memory.memorize(TEXT[:16], **STEPS)
    kept = {name: tensor.clone() for name, tensor in memory.state.tensors().items()}
    assert kept["exp_avg"][:, :, 5:].any()
    memory.write(IDS, tokens=[2, 4, 6, 8, 10], capacity=14, when_full="drop_oldest")
    assert (memory.state.used, memory.state.capacity, memory.version) == (14, 14, 4)
    for name in ("slots", "exp_avg", "exp_avg_sq"):
        assert torch.equal(memory.state.whole(name)[:, :, :9], kept[name][:, :, 3:]), name
    assert not memory.state.whole("exp_avg")[:, :, 9:].any()
    assert torch.equal(memory.state.arenas[0].compute, memory.slots.bfloat16())
    assert memory.slots[:, :, 9:].norm(dim=-1).min() > 0


def test_all_may_be_dropped_for_a_text_that_just_fits():
    model, memory = writable()
    memory.write(IDS[:9], capacity=12)
    inputs, gradients, _ = PlainWriter(model, written(memory)).ask(IDS)
    memory.write(IDS, capacity=12, when_full="drop_oldest")
    expected, _ = expected_slots(inputs, gradients, 1e-2)
    torch.testing.assert_close(written(memory).double(), expected, rtol=1e-3, atol=1e-6)
    assert memory.state.used == 12


def test_dropping_where_there_is_more_room_than_allowed():
    _, memory = grown()
    slots = memory.slots.clone()
    memory.write(IDS, tokens=[1, 2], capacity=14, when_full="drop_oldest")
    assert memory.state.used == 14 and torch.equal(memory.slots[:, :, :12], slots[:, :, 1:13])
    assert not memory.slots[:, :, 14:].any()


def test_compressing_when_full():
    model, memory = writable("gpt2")
    memory.write(IDS, epsilon=0.5)
    twin = writable("gpt2")[1]
    twin.write(IDS, epsilon=0.5)
    twin.compress(5)
    inputs, gradients, _ = PlainWriter(model, written(memory)).ask(IDS[:6])
    memory.write(IDS[:6], capacity=16, compress_to=5)
    assert (memory.state.used, memory.state.capacity, memory.version) == (10, 12, 3)  # no more room than was needed
    assert torch.equal(memory.slots[:, :, :5], twin.slots)
    expected, _ = expected_slots(inputs, gradients, 1e-2)  # of the memory that read the text
    torch.testing.assert_close(written(memory, 5).double(), expected, rtol=1e-3, atol=1e-6)
    assert not memory.slots[:, :, 10:].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(capacity=12, when_full="drop_oldest"), "up to 13 tokens.*capacity is 12; expected a capacity of at least 13"),
        (dict(capacity=16, compress_to=8), "capacity is 16 and compress_to 8; expected a capacity of at least 21"),
        (dict(capacity=16, when_full="compress", tokens=list(range(1, 10)), compress_to=9), "at least 18"),
    ],
)
def test_more_tokens_than_can_ever_fit(arguments, message):
    _, memory = writable()
    memory.write(IDS)
    before = everything(memory)
    with pytest.raises(ValueError, match=message):
        memory.write(TEXT[:14], **arguments)
    assert_unchanged(memory, before)


def test_backprop_trains_the_slots_used_and_no_others():
    _, memory = grown()
    full = memory.slots.clone()
    memory.memorize(TEXT[:32], **STEPS)
    assert memory.slots[:, :, 13:].count_nonzero() == 0 and memory.state.used == 13
    assert (memory.slots - full)[:, :, :13].norm(dim=-1).gt(0).float().mean() > 0.9
    full = memory.slots.clone()
    optimizer = locas.SlotAdamW(memory, lr=1e-2, weight_decay=0.1)
    memory.model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
    optimizer.step()
    assert memory.slots[:, :, 13:].count_nonzero() == 0 and memory.state.used == 13
    assert not torch.equal(memory.slots, full)
    memory.write(IDS[:3])
    assert memory.state.used == 15


def test_learning_does_not_depend_on_unused_room():
    memories = [grown()[1], grown()[1]]
    memories[1].state.resize(13)
    for memory in memories:
        memory.memorize(TEXT[:32], **STEPS)
    assert torch.equal(*(written(memory) for memory in memories))


def test_an_optimizers_state_goes_round():
    _, memory = grown()
    twin = memory.fork()

    def step(m, optimizer):
        optimizer.zero_grad()
        m.model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()

    optimizer = locas.SlotAdamW(memory, lr=1e-2)
    step(memory, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"]["exp_avg"].shape == (2, 2, 13, 32)
    twin.restore(memory.snapshot())
    twin.state.resize(20)
    twin.state.load_optimizer({name: torch.full_like(t, 7) for name, t in saved["state"].items()})
    other = locas.SlotAdamW(twin, lr=1e-2)
    other.load_state_dict(saved)
    for m, o in ((memory, optimizer), (twin, other)):
        step(m, o)
    assert torch.equal(written(memory), written(twin))
    memory.write(IDS)
    with pytest.raises(ValueError, match=r"exp_avg has shape \[2, 2, 13, 32\]; expected \[2, 2, 25, 32\]"):
        optimizer.load_state_dict(saved)
    step(memory, optimizer)  # the parameters are still the optimizer's
    assert memory.state.used == 25 and memory.version == 6


# ---- what is refused ------------------------------------------------------------------------------------------
POSITIONS = "tokens is .*; expected 'all', a loss threshold"
BAD = [
    (dict(epsilon=0), ValueError, "epsilon is 0; expected a number > 0"),
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
    (dict(tokens=[1.0]), TypeError, POSITIONS),
    (dict(tokens=[True]), TypeError, POSITIONS),
    (dict(tokens=[[1]]), TypeError, POSITIONS),
    (dict(tokens=torch.tensor([1.0])), TypeError, POSITIONS),
    (dict(tokens=torch.tensor([True])), TypeError, POSITIONS),
    (dict(tokens=torch.tensor([[1]])), TypeError, POSITIONS),
    (dict(tokens=torch.tensor(1)), TypeError, POSITIONS),
    (dict(tokens=[]), ValueError, "tokens is empty"),
    (dict(tokens=[0, 1]), ValueError, "tokens holds 0; expected positions from 1 to 12"),
    (dict(tokens=[-1]), ValueError, "tokens holds -1"),
    (dict(tokens=[1, 13]), ValueError, "tokens holds 13; expected positions from 1 to 12"),
    (dict(tokens=[3, 2, 3]), ValueError, "tokens names position 3 twice"),
    (dict(tokens=0), ValueError, "tokens is 0; expected an integer >= 1"),
    (dict(tokens=-3), ValueError, "tokens is -3"),
    (dict(tokens=float("nan")), ValueError, "tokens is nan"),
    (dict(exact=1), TypeError, "exact is 1"),
    (dict(capacity=0), ValueError, "capacity is 0; expected an integer >= 1"),
    (dict(capacity=3.0), TypeError, "capacity is 3.0"),
    (dict(capacity=2), ValueError, "capacity is 2; expected at least 5, the slots used"),
    (dict(when_full="grow", capacity=50), ValueError, "when_full is 'grow'; expected one of error, drop_oldest"),
    (dict(when_full="drop_oldest"), ValueError, "capacity is None"),
    (dict(compress_to=4), ValueError, "capacity is None"),
    (dict(capacity=50, when_full="error", compress_to=4), ValueError, "compress_to is 4, but when_full is 'error'"),
    (dict(capacity=50, compress_to=0), ValueError, "compress_to is 0; expected an integer from 1 to 32"),
    (dict(capacity=50, compress_to=33), ValueError, "compress_to is 33; expected an integer from 1 to 32"),
    (dict(capacity=20, compress_to=20), ValueError, "compress_to is 20; expected an integer from 1 to 19"),
    (dict(capacity=50, compress_to=True), TypeError, "compress_to is True"),
]


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
        ([5], ValueError, "holds 1 tokens; expected at least 2"),
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
@pytest.mark.parametrize("tokens", ["all", [2, 9], 3, 0.5])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_broken_host_is_an_error_whatever_is_chosen(value, tokens, policy):
    model, memory = grown()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] = value
    before = everything(memory)
    with pytest.raises(locas.LocasError, match="version 2"):
        memory.write(IDS, tokens=tokens, **policy)
    assert_unchanged(memory, before)
