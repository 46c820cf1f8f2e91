"""Models that read images too: their memory is one of their language part, and serves the text-only class as well."""

import pytest
import torch
import transformers
from support.helpers import random_ids
from transformers import AutoModelForCausalLM

import locas_ext as locas

RUN = dict(window=24, stride=8, learning_rate=1e-2, progress=False)
TEXT_PART = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CLIP = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, projection_dim=32, num_hidden_layers=1)
CLIP |= dict(num_attention_heads=2, image_size=28, patch_size=14)
SIGLIP = dict(CLIP, model_type="siglip_vision_model")


def llava(model_type):
    config = transformers.LlavaConfig(
        text_config=dict(TEXT_PART, model_type=model_type), vision_config=CLIP, image_token_index=63
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config=dict(TEXT_PART, sliding_window=12), vision_config=SIGLIP, mm_tokens_per_image=1, image_token_index=63
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5():
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    text = dict(TEXT_PART, **linear, layer_types=["linear_attention", "full_attention"])
    vision = dict(hidden_size=32, intermediate_size=48, depth=1, num_heads=2, out_hidden_size=32, patch_size=14)
    if not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen3.5")
    return transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(text_config=text, vision_config=vision))


WRAPPERS = {
    "llama": lambda: llava("llama"),
    "mistral": lambda: llava("mistral"),
    "qwen2": lambda: llava("qwen2"),
    "gemma3_text": gemma3,
    "qwen3_5_text": qwen3_5,
}


def both(name):
    """-> the model that reads images, and the text-only one of the same weights"""
    torch.manual_seed(3)
    wrapper = WRAPPERS[name]().float().eval()
    text = AutoModelForCausalLM.from_config(wrapper.config.get_text_config(decoder=True)).float().eval()
    text.get_decoder().load_state_dict(wrapper.get_decoder().state_dict())
    text.get_output_embeddings().load_state_dict(wrapper.get_output_embeddings().state_dict())
    return wrapper, text


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", WRAPPERS)
def test_one_file_serves_the_wrapper_and_the_text_only_class(name, tmp_path):
    models, ids = both(name), random_ids(48)
    alone = logits(models[0], ids)
    torch.testing.assert_close(logits(models[1], ids), alone)
    for first, second in (models, models[::-1]):
        memory = locas.attach(first, locas.LocasConfig(rank=4, scale=0.5))
        report = memory.memorize(ids, **RUN)
        assert report.one_forward == []
        memory.save_pretrained(tmp_path / "memory")
        learned = logits(first, ids)
        loaded = locas.load(second, tmp_path / "memory")
        assert torch.equal(loaded.slots, memory.slots) and not torch.allclose(learned, alone)
        torch.testing.assert_close(logits(second, ids), learned)
        scores = [each.memorize(ids, **{**RUN, "learning_rate": 0.0}).nll for each in (memory, loaded)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        memory.detach()
        loaded.detach()
        assert torch.equal(logits(first, ids), alone)


def test_a_prefix_language_model_is_refused():
    text = dict(TEXT_PART, model_type="gemma", num_key_value_heads=1)
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=SIGLIP, image_token_index=63, projection_dim=32)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration is not causal as it is: other last tokens"):
        locas.attach(model, locas.LocasConfig(rank=4))
    assert not hasattr(model, "_locas_memory")
