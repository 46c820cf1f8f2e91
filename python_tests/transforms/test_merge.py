"""Merging: a plain, wider host that computes what the attached one computed, and the way back."""

import pytest
import torch
from support.helpers import (
    FAMILIES,
    SETTINGS,
    TEXT,
    assert_same_host,
    attached,
    learned,
    logits_of,
    random_ids,
    relative_distance,
    snapshot,
    tiny_model,
)

import locas_ext as locas

families = pytest.mark.parametrize("family", FAMILIES)
IDS = random_ids(24, seed=5)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def ffn_weights(model, layer):
    ffn = model.model.layers[layer].mlp
    return {name: getattr(ffn, name).weight.detach().clone() for name in PROJECTIONS}


@families
@pytest.mark.parametrize("pad", [1, 7, 128])
def test_the_merged_model_computes_what_the_attached_one_did(family, pad):
    model, memory = learned(family)
    attached_logits = logits_of(model, IDS)
    with memory.disabled():
        host = logits_of(model, IDS)
    plain = memory.merge_and_unload(pad_to_multiple_of=pad)
    assert plain is model and type(plain) is type(tiny_model(family))
    merged = logits_of(model, IDS)
    assert relative_distance(merged, attached_logits) < 1e-5 < 1e-3 < relative_distance(merged, host)
    assert (merged - attached_logits).abs().max() <= 1e-5 * attached_logits.abs().max()


@pytest.mark.parametrize(
    "rank, pad, width",
    [
        (4, 1, 44),
        (4, 4, 44),
        (4, 8, 48),
        (5, 8, 48),
        (8, 8, 48),
        (9, 8, 56),
        (4, 128, 128),
        (40, 16, 80),
    ],
)
def test_widths_are_rounded_up_and_every_attribute_follows(rank, pad, width):
    model, memory = attached(rank=rank)
    memory.merge_and_unload(pad_to_multiple_of=pad)
    assert model.config.intermediate_size == width and model.config.locas_unmerged_intermediate_size == 40
    for layer in model.model.layers:
        ffn = layer.mlp
        assert ffn.gate_proj.weight.shape == ffn.up_proj.weight.shape == (width, 32)
        assert ffn.down_proj.weight.shape == (32, width)
        assert ffn.gate_proj.out_features == ffn.up_proj.out_features == ffn.down_proj.in_features == width
        assert ffn.gate_proj.in_features == ffn.down_proj.out_features == 32 and ffn.intermediate_size == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hosts_weights_stay_where_they_were_and_the_memory_stands_behind(dtype):
    model, memory = learned(dtype=dtype, model_settings=dict(num_hidden_layers=3), layers=[0, 2])
    before = [ffn_weights(model, layer) for layer in range(3)]
    others = {n: t.clone() for n, t in model.state_dict().items() if ".mlp." not in n}
    slots, scale = memory.slots.clone(), memory.scale.clone()
    memory.merge_and_unload(pad_to_multiple_of=16)
    for layer in range(3):
        now = ffn_weights(model, layer)
        for name, old in before[layer].items():
            new = now[name].T if name == "down_proj" else now[name]
            old = old.T if name == "down_proj" else old
            assert new.dtype == dtype and torch.equal(new[:40], old)
            if layer == 1:  # it has no memory: neurons of zeros
                assert not new[40:].any()
                continue
            gate, key, value = slots[layer // 2]
            rows = {"gate_proj": gate, "up_proj": key, "down_proj": scale[layer // 2] * value}[name]
            torch.testing.assert_close(new[40:44], rows.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
            assert not new[44:].any()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())


def test_biases_get_zeros():
    def biased():
        return tiny_model("llama", mlp_bias=True)

    model = biased()
    for layer in model.model.layers:
        for name in PROJECTIONS:
            torch.nn.init.normal_(getattr(layer.mlp, name).bias)
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT, **SETTINGS)
    attached_logits = logits_of(model, IDS)
    memory.merge_and_unload(pad_to_multiple_of=16)
    assert relative_distance(logits_of(model, IDS), attached_logits) < 1e-5
    ffn = model.model.layers[0].mlp
    assert torch.equal(ffn.up_proj.bias[:40], before["state"]["model.layers.0.mlp.up_proj.bias"])
    assert not ffn.up_proj.bias[40:].any() and not ffn.gate_proj.bias[40:].any() and ffn.down_proj.bias.shape == (32,)
    locas.unmerge(model)
    assert_same_host(model, before)


@families
def test_merge_detaches_and_gives_back_what_attach_took(family):
    model = tiny_model(family)
    model.model.layers[1].mlp.up_proj.requires_grad_(False)
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.memorize(TEXT, **SETTINGS)
    memory.merge_and_unload()
    assert_same_host(model, before, what=("requires_grad", "training", "attributes"))
    with pytest.raises(ValueError, match="no memory attached"):
        locas.memory_of(model)
    with pytest.raises(ValueError, match="no longer attached"):
        memory.merge_and_unload()
    memory.detach()


@families
def test_unmerge_is_bitwise_the_host(family):
    model = tiny_model(family)
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT, **SETTINGS)
    memory.merge_and_unload()
    assert locas.unmerge(model) is model
    assert_same_host(model, before)
    assert all(getattr(model.model.layers[0].mlp, n).weight.is_contiguous() for n in PROJECTIONS)
    with pytest.raises(ValueError, match="not a merged one"):
        locas.unmerge(model)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerge_after_a_reload_is_bitwise_the_host(family, dtype, tmp_path):
    model, memory = learned(family, dtype=dtype)
    memory.merge_and_unload().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    locas.unmerge(again)
    tiny_model(family, dtype=dtype).save_pretrained(tmp_path / "host")
    host = type(model).from_pretrained(tmp_path / "host")
    assert_same_host(again, snapshot(host), what=("state",))
    assert torch.equal(logits_of(again, IDS), logits_of(host, IDS))
    assert again.config.intermediate_size == 40 and not hasattr(again.config, "locas_unmerged_intermediate_size")


def test_a_merged_model_can_learn_and_be_merged_again():
    model, memory = learned()
    memory.merge_and_unload(pad_to_multiple_of=1)
    merged = logits_of(model, IDS)
    second = locas.attach(model, locas.LocasConfig(rank=6, scale="host"))
    assert torch.equal(logits_of(model, IDS), merged)
    second.memorize(random_ids(64), **SETTINGS)
    attached_logits = logits_of(model, IDS)
    second.merge_and_unload(pad_to_multiple_of=1)
    assert model.config.intermediate_size == 50 and relative_distance(logits_of(model, IDS), attached_logits) < 1e-5
    locas.unmerge(model)
    assert torch.equal(logits_of(model, IDS), logits_of(tiny_model(), IDS))


def test_an_untaught_memory_merges_into_neurons_that_add_nothing():
    model, memory = attached()
    host = logits_of(model, IDS)
    memory.initialize(TEXT[:20])
    memory.merge_and_unload()
    torch.testing.assert_close(logits_of(model, IDS), host)


def test_a_merged_model_can_be_trained_like_any_other():
    model, memory = learned()
    memory.merge_and_unload()
    model(input_ids=IDS[None], labels=IDS[None]).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.requires_grad and weight.grad.shape == weight.shape == (256, 32)


def test_merging_under_inference_mode_makes_normal_weights():
    model, memory = learned()
    with torch.inference_mode():
        memory.merge_and_unload()
    assert not any(p.is_inference() for p in model.parameters())
    model(input_ids=IDS[None], labels=IDS[None]).loss.backward()


# ---- failures -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("allocation", range(1, 7))
@pytest.mark.parametrize("owner, function", [(torch.Tensor, "new_zeros"), (torch.nn.Parameter, "__new__")])
def test_a_failing_allocation_leaves_the_model_attached(monkeypatch, allocation, owner, function):
    """Memory runs out at any of the allocations: all or nothing."""
    model, memory = learned()
    before, logits, slots = snapshot(model), logits_of(model, IDS), memory.slots.clone()
    parameters = [id(p) for p in model.parameters()]
    real, calls = getattr(owner, function), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == allocation:
            raise RuntimeError("not enough memory")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, failing)
        with pytest.raises(RuntimeError, match="not enough memory"):
            memory.merge_and_unload()
    assert_same_host(model, before)
    assert [id(p) for p in model.parameters()] == parameters
    assert locas.memory_of(model) is memory and torch.equal(logits_of(model, IDS), logits)
    assert torch.equal(memory.slots, slots)
    memory.memorize(TEXT, **SETTINGS)
    memory.merge_and_unload()


def test_a_host_that_cannot_be_widened_is_refused_by_layer():
    model, memory = learned()
    before, logits = snapshot(model), logits_of(model, IDS)
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer 1's up_proj has hooks"):
        memory.merge_and_unload()
    hook.remove()
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, IDS), logits) and locas.memory_of(model) is memory


@pytest.mark.parametrize("pad", [0, -8, 1.5, True, "128", None])
def test_bad_padding(pad):
    model, memory = learned()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match="pad_to_multiple_of"):
        memory.merge_and_unload(pad_to_multiple_of=pad)
    assert_same_host(model, before)


def test_unmerge_of_something_else():
    for model in (tiny_model(), torch.nn.Linear(2, 2), None):
        with pytest.raises(ValueError, match="not a merged one"):
            locas.unmerge(model)


def test_unmerge_with_a_memory_attached_is_refused():
    model, memory = learned()
    memory.merge_and_unload()
    second = locas.attach(model, locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match="detach"):
        locas.unmerge(model)
    second.detach()
    locas.unmerge(model)
    assert torch.equal(logits_of(model, IDS), logits_of(tiny_model(), IDS))
