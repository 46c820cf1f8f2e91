"""Live memories: snapshots, forks, swaps, and KV caches that outlived the memory that filled them."""

import copy

import pytest
import torch
from support.found_hosts import found_host
from support.helpers import SETTINGS, TEXT, attached, learned, logits_of, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

import locas_ext as locas

OTHER = random_ids(40, seed=7)


def test_a_restored_snapshot_is_the_memory_of_then_and_learns_on_alike():
    model, memory = learned()
    kept, before = memory.snapshot(), logits_of(model, TEXT)
    memory.memorize(OTHER, **SETTINGS)
    once = memory.slots.clone()
    memory.restore(kept)
    assert torch.equal(logits_of(model, TEXT), before) and memory.version == kept.memory_version
    memory.memorize(OTHER, **SETTINGS)
    assert torch.equal(memory.slots, once)


def test_a_snapshot_does_not_change_with_the_memory():
    model, memory = learned()
    kept = memory.snapshot()
    slots = memory.slots.clone()
    memory.memorize(OTHER, **SETTINGS)
    assert torch.equal(kept.tensors["slots"], slots)


def test_a_snapshot_of_another_host_or_shape_is_refused():
    _, memory = learned()
    slots = memory.slots.clone()
    _, other_host = learned(seed=5)
    with pytest.raises(ValueError, match="another host: other weights"):
        memory.restore(other_host.snapshot())
    _, other_rank = learned(rank=5)
    with pytest.raises(ValueError, match=r"slots \[2, 3, 5, 32\]"):
        memory.restore(other_rank.snapshot())
    with pytest.raises(TypeError, match="dict"):
        memory.restore({})
    assert torch.equal(memory.slots, slots)


@pytest.mark.parametrize("family", ["qwen2", "olmo"])
def test_a_host_moved_to_the_meta_device_says_so_and_learns_on_once_it_has_weights(family):
    model = found_host("olmo") if family == "olmo" else tiny_model(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    model.to("meta")
    with pytest.raises(ValueError, match=r"host is on the meta device.*load them first: model.to_empty"):
        memory.memorize(TEXT, **SETTINGS)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    memory.memorize(TEXT, **SETTINGS)
    model.to("meta")
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match=r"host is on the meta device.*inside memory.disabled\(\)"):
        model(ids)
    with memory.disabled():
        assert model(ids).logits.shape == (1, 5, model.config.vocab_size)


def test_a_fork_shares_the_hosts_weights_and_nothing_else():
    model, memory = learned()
    fork = memory.fork()
    assert fork.model is not model
    for mine, theirs in zip(model.parameters(), fork.model.parameters(), strict=False):
        assert mine is theirs
    assert torch.equal(logits_of(fork.model, TEXT), logits_of(model, TEXT))
    before = logits_of(model, TEXT)
    fork.memorize(OTHER, **SETTINGS)
    assert torch.equal(logits_of(model, TEXT), before)
    memory.memorize(OTHER, **SETTINGS)
    assert torch.equal(memory.slots, fork.slots)
    fork.detach()
    assert not torch.equal(logits_of(model, TEXT), logits_of(fork.model, TEXT))


def test_merging_a_fork_leaves_the_first_model_alone():
    model, memory = learned()
    before = logits_of(model, TEXT)
    merged = memory.fork().merge_and_unload(pad_to_multiple_of=8)
    torch.testing.assert_close(logits_of(merged, TEXT), before, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].mlp.up_proj.out_features == 40
    assert torch.equal(logits_of(model, TEXT), before)


def test_load_swaps_memories_in_one_attached_model(tmp_path):
    model, memory = learned()
    first = logits_of(model, TEXT)
    memory.save_pretrained(tmp_path / "first")
    memory.reset()
    memory.memorize(OTHER, **SETTINGS)
    second = logits_of(model, TEXT)
    memory.save_pretrained(tmp_path / "second")
    for name, expected in (("first", first), ("second", second), ("first", first)):
        memory.load(tmp_path / name)
        assert torch.equal(logits_of(model, TEXT), expected)


def generated(model, ids, **settings):
    return model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **settings)


def test_a_cache_from_before_an_update_is_refused():
    model, memory = attached()
    out = generated(model, TEXT[None, :12])
    generated(model, out.sequences, past_key_values=copy.deepcopy(out.past_key_values))  # nothing learned yet: fine
    memory.memorize(OTHER, **SETTINGS)
    with pytest.raises(ValueError, match="allow_stale_cache=True"):
        generated(model, out.sequences, past_key_values=out.past_key_values)
    generated(model, out.sequences, past_key_values=out.past_key_values, allow_stale_cache=True)


def test_a_cache_of_the_present_memory_is_taken():
    model, memory = learned()
    out = generated(model, TEXT[None, :12])
    whole = generated(model, out.sequences)
    continued = generated(model, out.sequences, past_key_values=out.past_key_values)
    assert torch.equal(whole.sequences, continued.sequences)


def test_caches_filled_by_hand_or_by_the_host_alone_are_watched_too():
    model, memory = learned()
    by_hand, by_host = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TEXT[None, :8], past_key_values=by_hand)
        with memory.disabled():
            model(input_ids=TEXT[None, :8], past_key_values=by_host)
    with pytest.raises(ValueError, match="past_key_values"):
        generated(model, TEXT[None, :10], past_key_values=by_host)
    generated(model, TEXT[None, :10], past_key_values=copy.deepcopy(by_hand))
    memory.reset()
    with pytest.raises(ValueError, match="past_key_values"):
        generated(model, TEXT[None, :10], past_key_values=by_hand)


def test_detach_gives_generate_back():
    model, memory = learned()
    out = generated(model, TEXT[None, :12])
    memory.detach()
    assert "generate" not in model.__dict__ and not model._forward_hooks
    generated(model, out.sequences, past_key_values=out.past_key_values)


def test_a_cache_that_was_reset_belongs_to_whoever_fills_it_anew():
    model, memory = learned()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=TEXT[None, :8], past_key_values=cache)
        memory.memorize(OTHER, **SETTINGS)
        with pytest.raises(ValueError, match="past_key_values"):
            generated(model, TEXT[None, :10], past_key_values=cache)
        cache.reset()
        model(input_ids=TEXT[None, :8], past_key_values=cache)
    continued = generated(model, TEXT[None, :10], past_key_values=cache)
    assert torch.equal(continued.sequences, generated(model, TEXT[None, :10]).sequences)


@pytest.mark.parametrize("disabled_first", [True, False])
def test_a_cache_filled_by_host_and_memory_in_turn_is_refused(disabled_first):
    model, memory = learned()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part, off in ((TEXT[None, :8], disabled_first), (TEXT[None, 8:12], not disabled_first)):
            if off:
                with memory.disabled():
                    model(input_ids=part, past_key_values=cache)
            else:
                model(input_ids=part, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        generated(model, TEXT[None, :14], past_key_values=cache)
    with memory.disabled(), pytest.raises(ValueError, match="past_key_values"):
        generated(model, TEXT[None, :14], past_key_values=cache)


# ---- ways to generate -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def beside_merged():
    """A model with its memory, and the plain model that it is once they are merged."""
    (model, memory), (_, twin) = learned(), learned()
    twin.restore(memory.snapshot())
    return model, twin.merge_and_unload(pad_to_multiple_of=1)


@pytest.mark.parametrize(
    "way",
    [
        dict(num_beams=3, num_return_sequences=3),
        dict(do_sample=True, num_return_sequences=4),
        dict(cache_implementation="static"),
        dict(prompt_lookup_num_tokens=3),
        dict(assistant=True),
    ],
    ids=lambda way: " ".join(way),
)
def test_generate_is_that_of_the_merged_model(beside_merged, way):
    written, way, prompt = [], dict(way), torch.cat([OTHER[:9], OTHER[:5]])[None]
    if way.pop("assistant", False):
        way["assistant_model"] = tiny_model(seed=3)
    for model in beside_merged:
        torch.manual_seed(0)
        written.append(model.generate(prompt, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **way))
    assert torch.equal(*written)


def test_a_memory_in_the_assistant_changes_nothing(beside_merged):
    plain = tiny_model(seed=3)
    options = dict(max_new_tokens=8, min_new_tokens=8, pad_token_id=0, do_sample=False)
    alone = plain.generate(OTHER[None, :9], **options)
    assert torch.equal(plain.generate(OTHER[None, :9], assistant_model=beside_merged[0], **options), alone)


def test_masks_of_four_dimensions(beside_merged):
    model, merged = beside_merged
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[5:, :3] = False  # two texts in one row
    for mask in (seen[None, None], torch.zeros(9, 9).masked_fill(~seen, float("-inf"))[None, None]):
        with torch.no_grad():
            ours, theirs = (each(OTHER[None, :9], attention_mask=mask, use_cache=False).logits for each in (model, merged))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
