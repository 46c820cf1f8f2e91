"""Which host a memory belongs to: one checkpoint in every dtype and with any vocabulary, and no other."""

import copy
import warnings

import pytest
import torch
from support.checkpoints import rewrite
from support.helpers import learned, tiny_model, tiny_opt

import locas_ext as locas
from locas_ext.hosts.fingerprint import _same, differences, fingerprint
from locas_ext.hosts.registry import inspect_host

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def host_of(model):
    return inspect_host(model)


def changed(seed, share, relative):
    """A model whose FFN weights have moved: a share of them, by up to so much of their size."""
    model = tiny_model()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate_proj.weight
            moved = torch.rand(weight.shape, generator=draw) < share
            weight *= 1 + relative * moved * (2 * torch.rand(weight.shape, generator=draw) - 1)
    return model


@pytest.mark.parametrize("here", DTYPES, ids=str)
@pytest.mark.parametrize("there", DTYPES, ids=str)
@pytest.mark.parametrize("host", [tiny_model, tiny_opt], ids=["llama", "opt"])
def test_one_checkpoint_is_one_host_in_every_dtype(host, there, here):
    assert differences(fingerprint(host_of(host().to(there))), host_of(host().to(here))) == []
    # as when a checkpoint was converted on disk and then loaded in float32
    assert differences(fingerprint(host_of(host().to(there).float())), host_of(host().to(here).float())) == []


@pytest.mark.parametrize("here", DTYPES, ids=str)
@pytest.mark.parametrize("there", DTYPES, ids=str)
def test_another_checkpoint_of_the_same_shape_is_another_host(there, here):
    kept = fingerprint(host_of(tiny_model().to(there)))
    for seed in range(1, 6):
        assert "other weights" in differences(kept, host_of(tiny_model(seed=seed).to(here)))[0]


@pytest.mark.parametrize("share, relative, same", [(1, 3e-2, False), (1, 1e-3, False), (0.5, 1e-3, False), (1, 1e-8, True)])
def test_a_fine_tuned_host_is_another_host(share, relative, same):
    """In float32 any change counts: 0.1% of half the weights is refused, what float32 rounds away is not seen."""
    kept = fingerprint(host_of(tiny_model()))
    for seed in range(5):
        assert (differences(kept, host_of(changed(seed, share, relative))) == []) == same


@pytest.mark.parametrize("relative, same", [(3e-2, False), (1e-2, False), (1e-3, True), (1e-4, True)])
def test_a_change_below_bfloat16s_rounding_is_not_seen_by_a_bfloat16_host(relative, same):
    """On purpose: its weights then are the same but for a few. 1% of the weights' size moves most of them, and is seen."""
    kept = fingerprint(host_of(tiny_model().bfloat16()))
    for seed in range(5):
        assert (differences(kept, host_of(changed(seed, 1, relative).bfloat16())) == []) == same


def test_the_margin_between_roundings_and_other_weights():
    """Double rounding moves 1 weight in 16 by a step where 1 in 4 may differ; an unrelated weight agrees by chance alone."""
    weights = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) / 30
    twice, once = weights.half().bfloat16(), weights.bfloat16()
    assert 0.05 < (twice != once).float().mean() < 0.075
    other = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(1))].bfloat16()
    assert (other == once).float().mean() < 0.01
    assert _same(weights.half().float(), once.float()) and not _same(other.float(), once.float())
    one = once.float().clone()
    one[7] *= 1.05  # a single weight by more than a rounding
    assert not _same(one, once.float())


def test_roundings_of_any_size_of_weights_are_explained():
    """Also where float16 is subnormal or zero, and where bfloat16 rounds up to the next power of two."""
    draw = torch.Generator().manual_seed(0)
    for exponent in range(-12, 4):
        weights = torch.randn(4, 64, generator=draw) * 10.0**exponent
        weights[0] = 1 - 2.0**-12
        for there in DTYPES:
            for here in DTYPES:
                if exponent > -5 or torch.float16 not in (there, here) or there == here:
                    assert _same(weights.to(there).float(), weights.to(here).float()), (exponent, there, here)


def test_the_vocabulary_may_grow(tmp_path):
    model, memory = learned()
    memory.save_pretrained(tmp_path / "m")
    larger = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        larger.resize_token_embeddings(70)
    assert torch.equal(locas.load(larger, tmp_path / "m").slots, memory.slots)


def test_a_memory_goes_from_a_float16_host_to_a_float32_one_and_back(tmp_path):
    _, memory = learned(dtype=torch.float16)
    memory.save_pretrained(tmp_path / "m")
    loaded = locas.load(tiny_model(), tmp_path / "m")
    assert torch.equal(loaded.slots, memory.slots)
    loaded.save_pretrained(tmp_path / "m")
    for dtype in DTYPES:
        assert torch.equal(locas.load(tiny_model(dtype=dtype), tmp_path / "m").slots, memory.slots)


def test_sizes_and_types_are_named(folder):
    kept = fingerprint(host_of(tiny_model()))
    assert differences(kept, host_of(tiny_model("mistral"))) == ["model_type 'llama' there, 'mistral' here"]
    assert differences(kept, host_of(tiny_model(num_hidden_layers=3))) == ["num_hidden_layers 2 there, 3 here"]
    rewrite(folder, lambda record: record["host"].update(hidden_size=31))
    with pytest.raises(locas.LocasError):
        locas.load(tiny_model(), folder)


def test_a_layer_anywhere_counts():
    model = tiny_model(num_hidden_layers=4)
    kept, other = fingerprint(host_of(model)), copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[3].mlp.gate_proj.weight.neg_()
    assert differences(kept, host_of(model)) == [] and differences(kept, host_of(other))
