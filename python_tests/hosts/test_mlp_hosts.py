"""Locas-MLP beside two-layer FFNs: where it is added, how it begins, what is refused."""

import copy

import pytest
import torch
from support.helpers import TEXT, act_formula, assert_same_host, attached, logits_of, snapshot
from support.hosts import LEARN, TWO_LAYER, activation_of, config_for, projections, tiny

import locas_ext as locas


def hooked_twin(model, memory):
    """A float64 copy of the host to which forward hooks add the memory as docs/method.md has it."""
    twin = copy.deepcopy(model).double()
    for (first, last), slots, tau in zip(projections(twin), memory.slots.double(), memory.scale.tolist(), strict=False):
        seen = {}
        first.register_forward_hook(lambda module, args, y, seen=seen: seen.update(x=args[0]))

        def add(module, args, y, seen=seen, slots=slots, tau=tau):
            key, value = slots
            return y + tau * act_formula(seen["x"] @ key.T, activation_of(twin)) @ value

        last.register_forward_hook(add)
    return twin


@pytest.mark.parametrize("family", TWO_LAYER)
def test_the_output_is_that_of_hooks_on_a_float64_host(family):
    model = tiny(family)
    twin_of = copy.deepcopy(model)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **LEARN)
    twin = hooked_twin(twin_of, memory)
    torch.testing.assert_close(logits_of(model, TEXT).double(), logits_of(twin, TEXT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_topk_clones_the_most_active_neurons(family):
    model = tiny(family)
    twin, inputs = copy.deepcopy(model).double(), []
    for first, _ in projections(twin):
        first.register_forward_hook(lambda module, args, y: inputs.append(y.reshape(-1, y.shape[-1])))
    logits_of(twin, TEXT[:20])
    memory = locas.attach(model, config_for(family))
    memory.initialize(TEXT[:20])
    for (first, _), pre, slots in zip(projections(twin), inputs, memory.slots, strict=False):
        importance = act_formula(pre, activation_of(twin)).abs().mean(0)
        rows = first.weight.T if family == "gpt2" else first.weight
        expected = rows[importance.topk(4).indices]
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(slots[0].double(), expected, rtol=1e-5, atol=1e-6)
        assert not slots[1].any()


@pytest.mark.parametrize("family", TWO_LAYER)
def test_the_scale_is_the_mean_length_of_the_output_columns_over_the_rank(family):
    model = tiny(family)
    memory = locas.attach(model, locas.LocasConfig.paper(rank=3, variant="mlp"))
    for (_, last), tau in zip(projections(model), memory.scale, strict=False):
        columns = last.weight.T if family == "gpt2" else last.weight
        columns = columns.T if columns.shape[0] != 32 else columns
        assert tau.item() == pytest.approx(columns.double().norm(dim=0).mean().item() / 3, rel=1e-6)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_gated_memory_is_refused_with_the_reason(family):
    model = tiny(family)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"variant is 'glu', but the FFN of {family} has two layers.*variant='mlp'"):
        locas.attach(model)
    assert_same_host(model, before)


def test_dropout_is_done_to_host_and_memory_together():
    """In training mode OPT drops the FFN's output; the memory is part of it, so a merged host drops the same."""
    model = tiny("opt", dropout=0.5, attention_dropout=0.0)
    memory = locas.attach(model, config_for("opt"))
    memory.memorize(TEXT, **LEARN)
    model.train()
    torch.manual_seed(3)
    attached_logits = logits_of(model, TEXT)
    model.eval()
    memory.merge_and_unload(pad_to_multiple_of=1).train()
    torch.manual_seed(3)
    torch.testing.assert_close(logits_of(model, TEXT), attached_logits, rtol=1e-4, atol=1e-4)


def test_beside_a_gated_host_with_a_warning():
    with pytest.warns(UserWarning, match="variant is 'mlp', but the FFN of llama is gated"):
        model, memory = attached("llama", variant="mlp", rank=6)
    before = logits_of(model, TEXT)
    report = memory.memorize(TEXT.repeat(3), **LEARN)
    assert report.chunks[-1].nll < report.chunks[0].nll
    twin = copy.deepcopy(model)
    locas.memory_of(twin).detach()
    twin = twin.double()
    for layer, slots, tau in zip(twin.model.layers, memory.slots.double(), memory.scale.tolist(), strict=False):
        layer.mlp.register_forward_hook(
            lambda module, args, y, slots=slots, tau=tau: y + tau * act_formula(args[0] @ slots[0].T, "silu") @ slots[1]
        )
    torch.testing.assert_close(logits_of(model, TEXT).double(), logits_of(twin, TEXT), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot merge: a neuron of the host's gated FFN"):
        memory.merge_and_unload()
    memory.detach()
    assert torch.equal(logits_of(model, TEXT), before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(config=dict(backend="fused")), "backend is 'fused', which computes a gated FFN"),
        (dict(rehome=True), "rehome is True, but the variant is 'mlp'"),
    ],
)
def test_what_only_gated_ffns_have_is_refused(arguments, message):
    model = tiny("opt")
    before = snapshot(model)
    config = locas.LocasConfig(rank=4, variant="mlp", **arguments.get("config", {}))
    with pytest.raises(ValueError, match=message):
        locas.attach(model, config, rehome=arguments.get("rehome", False))
    assert_same_host(model, before)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_compiled_host_gives_the_same(family):
    model = tiny(family)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **LEARN)
    expected = logits_of(model, TEXT)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, TEXT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_life_beneath_accelerates_hooks(family):
    accelerate = pytest.importorskip("accelerate")
    model = tiny(family)
    twin = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    before = snapshot(model)
    memory, plain = (locas.attach(m, config_for(family)) for m in (model, twin))
    for m in (memory, plain):
        m.memorize(TEXT, **LEARN)
    torch.testing.assert_close(memory.slots, plain.slots, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="cannot merge"):
        memory.merge_and_unload()
    memory.detach()
    assert_same_host(model, before, ("attributes", "requires_grad"))


def test_beside_lora_and_with_gradient_checkpointing():
    """A LoRA-wrapped projection keeps its own forward; a layer that runs again in the backward adds the memory again."""
    peft = pytest.importorskip("peft")
    model = tiny("opt", dropout=0.0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False))
    host = logits_of(wrapped, TEXT)
    memory = locas.attach(wrapped, config_for("opt"))
    memory.memorize(TEXT, **LEARN)
    learned = logits_of(wrapped, TEXT)
    assert not torch.allclose(learned, host)

    def gradients():
        for parameter in memory.parameters():
            parameter.grad = None
        wrapped(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.backward()
        return torch.stack([parameter.grad for parameter in memory.parameters()])

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-7)
    model.eval()
    with pytest.raises(ValueError, match="cannot merge: layer 0's fc1 is a peft"):
        memory.merge_and_unload()
    memory.detach()
    assert torch.equal(logits_of(wrapped, TEXT), host)
