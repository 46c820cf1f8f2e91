"""Merging writes to the merged model and to nothing that another model uses too, and what interrupts it is undone."""

import pytest
import torch
import transformers
from support.helpers import SETTINGS, TEXT, assert_same_host, attached, learned, logits_of, random_ids, snapshot, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

import locas_ext as locas
from locas_ext.transforms import merge

IDS = random_ids(24, seed=5)


def configs_of(model):
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, PreTrainedConfig)]


def test_another_model_of_the_same_config_object_is_left_alone(tmp_path):
    other = tiny_model()
    other.save_pretrained(tmp_path)  # which notes down the architecture in the config
    config, before = other.config, snapshot(other)
    model = type(other)(config).eval()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT, **SETTINGS)
    for change in (memory.merge_and_unload, lambda: locas.unmerge(model)):
        change()
        assert_same_host(other, before)
        assert model.config is not config and all(used is config for used in configs_of(other))
        assert len({id(used) for used in configs_of(model)}) == 1, "every module refers to the model's own"
        other.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(again, IDS), logits_of(other, IDS))


def test_the_parts_of_a_composite_config_stay_parts_of_it():
    text = dict(model_type="llama", hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, vocab_size=61, max_position_embeddings=64)
    vision = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT[:32], **SETTINGS)
    memory.merge_and_unload(pad_to_multiple_of=1)
    assert config.text_config.intermediate_size == 40 and model.config.text_config.intermediate_size == 44
    own = {id(model.config), id(model.config.text_config), id(model.config.vision_config)}
    assert {id(used) for used in configs_of(model)} <= own


def test_tied_embeddings_stay_tied_and_the_generation_config_stays(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    generation, before = model.generation_config, model.generation_config.to_dict()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT, **SETTINGS)
    memory.merge_and_unload()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    for tied in (model, again, locas.unmerge(model)):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert model.generation_config is generation and generation.to_dict() == before


@pytest.mark.parametrize("call", range(1, 3))
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_between_the_layers_is_undone(monkeypatch, verb, call):
    model, memory = learned()
    if verb == "unmerge":
        memory.merge_and_unload()
    before, logits, config = snapshot(model), logits_of(model, IDS), model.config
    real, calls = merge.put_in, []

    def interrupted(packed):
        real(packed)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "put_in", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.merge_and_unload() if verb == "merge" else locas.unmerge(model)
    assert_same_host(model, before)
    assert all(used is config for used in configs_of(model)) and torch.equal(logits_of(model, IDS), logits)


def test_layers_that_share_an_ffn_cannot_hold_the_slots_of_both():
    model, memory = learned()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    memory._attachment.host.ffns[1].module = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="layers 0 and 1 share one FFN"):
        memory.merge_and_unload()


def test_a_memory_that_the_hosts_dtype_cannot_hold_is_refused():
    model, memory = attached(dtype=torch.float16)
    memory.memorize(TEXT, **SETTINGS)
    with torch.no_grad():
        memory.slots[1, 2, 0, 0] = 1e5  # beyond float16
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        memory.merge_and_unload()
    assert_same_host(model, before)


@pytest.mark.parametrize("width", [0, -3, 44, 10**9, "40", 40.0, True, [40]])
def test_a_width_before_the_merge_that_cannot_have_been(width):
    model, memory = learned()
    memory.merge_and_unload(pad_to_multiple_of=1)
    model.config.locas_unmerged_intermediate_size = width
    before = snapshot(model)
    with pytest.raises(ValueError, match="locas_unmerged_intermediate_size is"):
        locas.unmerge(model)
    assert_same_host(model, before)
