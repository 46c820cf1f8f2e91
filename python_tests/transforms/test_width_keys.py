"""Which entries of a config state the width of FFNs: found by trying, never by value."""

import pytest
import torch
from support.found_hosts import found_host
from support.helpers import TEXT, assert_same_host, logits_of, snapshot
from support.hosts import LEARN

import locas_ext as locas
from locas_ext.hosts.registry import inspect_host
from locas_ext.transforms import merge, width_keys


def taught(model, **settings):
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, **settings))
    memory.memorize(TEXT, **LEARN)
    return memory


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def keys_of(model):
    host = inspect_host(model.requires_grad_(False))
    return {key.name: (key.layers, key.counts) for key in width_keys.width_keys(host, {})}


def test_of_two_entries_of_the_same_value_the_right_one_is_taken():
    model = found_host("granitemoeshared", intermediate_size=40, shared_intermediate_size=40)
    assert keys_of(model) == {"shared_intermediate_size": ((0, 1), False)}
    memory = taught(model)
    logits = logits_of(model, TEXT)
    memory.merge_and_unload(pad_to_multiple_of=8)
    assert (model.config.intermediate_size, model.config.shared_intermediate_size) == (40, 48)
    close(logits_of(model, TEXT), logits)


def test_dense_layers_and_shared_experts_have_keys_of_their_own(tmp_path):
    model = found_host("deepseek_v3", num_hidden_layers=3, intermediate_size=56)
    assert keys_of(model) == {"intermediate_size": ((0,), False), "n_shared_experts": ((1, 2), True)}
    before, host = snapshot(model), logits_of(model, TEXT)
    memory = taught(model)
    logits = logits_of(model, TEXT)
    memory.merge_and_unload(pad_to_multiple_of=16)
    assert (model.config.intermediate_size, model.config.n_shared_experts) == (64, 2)
    assert model.config.locas_unmerged_intermediate_size == {"intermediate_size": 56, "n_shared_experts": 1}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    close(logits_of(again, TEXT), logits)
    for merged in (again, model):
        assert locas.unmerge(merged).config.n_shared_experts == 1
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, TEXT), host)
    close(logits_of(again, TEXT), host)  # weights from a file may begin at other addresses, and products sum otherwise
    assert_same_host(model, before, ("state", "requires_grad", "attributes"))


def test_layers_that_have_no_memory_follow_where_one_key_states_them():
    model = found_host("olmo", intermediate_size=40)
    memory = taught(model, layers=[1])
    logits = logits_of(model, TEXT)
    memory.merge_and_unload(pad_to_multiple_of=8)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [48, 48]
    assert [layer.mlp.intermediate_size for layer in model.model.layers] == [48, 48]
    close(logits_of(model, TEXT), logits)


def test_a_rank_beyond_one_expert_takes_several():
    model = found_host("deepseek_v3", first_k_dense_replace=0)
    memory = locas.attach(model, locas.LocasConfig(rank=30, scale=0.5, init="gaussian"))
    memory.memorize(TEXT, **LEARN)
    logits = logits_of(model, TEXT)
    memory.merge_and_unload()
    assert model.config.n_shared_experts == 3  # 30 slots need two more experts of 24
    close(logits_of(model, TEXT), logits)


def test_an_embedding_that_was_resized_is_no_concern():
    model = found_host("olmo")
    model.resize_token_embeddings(70)
    model.config.vocab_size = 61  # as some tools leave it
    taught(model).merge_and_unload(pad_to_multiple_of=8)


def test_an_entry_that_states_more_than_ffns_is_none():
    """A Bloom's width follows its hidden size: nothing states it alone."""
    model = found_host("bloom", n_layer=2, n_head=4)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, variant="mlp"))
    memory.memorize(TEXT, **LEARN)
    before, logits = snapshot(model), logits_of(model, TEXT)
    with pytest.raises(ValueError, match="cannot merge: no key of the config states the width of layer 0's FFN"):
        memory.merge_and_unload()
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), logits)


@pytest.mark.parametrize("problem", ["other shapes", "other numbers"])
def test_a_merge_that_does_not_compare_is_put_back(monkeypatch, problem):
    model = found_host("stablelm")
    memory = taught(model)
    before, logits = snapshot(model), logits_of(model, TEXT)
    if problem == "other shapes":
        real = merge.widening
        monkeypatch.setattr(merge, "widening", lambda *a: real(*a).__class__(real(*a).widths, {"num_key_value_heads": 2}, {}))
        message = "in a model of the merged config .*k_proj"
    else:
        monkeypatch.setattr(merge, "_grown", lambda weight, rows, width, dim: 1.5 * real_grown(weight, rows, width, dim))
        message = "layer 0's FFN is off by"
    with pytest.raises(ValueError, match=f"cannot merge: .*{message}"):
        memory.merge_and_unload()
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), logits) and locas.memory_of(model) is memory


real_grown = merge._grown


@pytest.mark.parametrize(
    "note", [{}, {"no_such_entry": 3}, {"intermediate_size": 10**6}, {"intermediate_size": -8}, 40, "40", [40]]
)
def test_a_note_that_cannot_have_been(note):
    model = found_host("olmo", intermediate_size=40)
    taught(model).merge_and_unload(pad_to_multiple_of=8)
    model.config.locas_unmerged_intermediate_size = note
    before = snapshot(model)
    with pytest.raises(ValueError, match="locas_unmerged_intermediate_size is .*expected the entries"):
        locas.unmerge(model)
    assert_same_host(model, before)


def filled(model, variant="glu"):
    """A memory with values, whatever the host's context needs."""
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, variant=variant))
    memory.initialize(TEXT[:16])
    with torch.no_grad():
        memory.slots[:, -1] = 0.1 * torch.randn_like(memory.slots[:, -1])
    return memory


LFM2 = dict(layer_types=["conv", "full_attention"], block_multiple_of=8, num_key_value_heads=2)
UNITS = {
    "gpt_neox_japanese": (
        "mlp",
        dict(hidden_size=32),
        "intermediate_multiple_size",
    ),  # 32 neurons each
    "recurrent_gemma": ("glu", dict(hidden_size=32, num_hidden_layers=3), "intermediate_size"),  # halved
    "lfm2": ("glu", LFM2, "intermediate_size"),  # two thirds, rounded up
}


@pytest.mark.parametrize("family", UNITS)
def test_a_unit_of_an_entry_may_be_several_neurons_or_a_part_of_one(family, tmp_path):
    variant, settings, name = UNITS[family]
    model = found_host(family, **settings)
    before, host = snapshot(model), logits_of(model, TEXT)
    memory = filled(model, variant)
    logits = logits_of(model, TEXT)
    assert not torch.allclose(logits, host)
    memory.merge_and_unload(pad_to_multiple_of=8)
    assert name in model.config.locas_unmerged_intermediate_size
    close(logits_of(model, TEXT), logits)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    close(logits_of(again.eval(), TEXT), logits)
    assert torch.equal(logits_of(locas.unmerge(model), TEXT), host)
    assert_same_host(model, before, ("state", "requires_grad", "attributes"))
