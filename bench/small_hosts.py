"""A small random model of any language-model class of transformers: its default config with every size made small, by key."""

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY, HIDDEN, WIDTH, HEADS, HEAD, POSITIONS = 128, 64, 96, 4, 16, 512
MOST_PARAMETERS = 130_000_000

# A size and the config keys that it is given to, in text, vision and audio configs alike.
_SIZES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    (POSITIONS, "original_max_position_embeddings"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim embed_dim embedding_size dim_model backbone_hidden_size"),
    (HIDDEN, "input_embedding_size output_embedding_size word_embed_proj_dim lm_hidden_size text_dim out_hidden_size"),
    (HIDDEN, "projector_hidden_size projection_hidden_size projection_dim attention_hidden_size mamba_d_ssm"),
    (HIDDEN, "moe_latent_size entity_embedding_size image_text_hidden_size vision_hidden_size encoder_hidden_size"),
    (HIDDEN, "text_hidden_size pronunciation_embed_dim shape_embed_dim hidden_size_global adapter_input_size"),
    (HIDDEN, "adapter_out_dim"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"),
    (2, "num_decoder_layers depth"),
    (2, "aligner_num_add_layers resampler_depth num_encoder_blocks text_num_hidden_layers num_key_value_heads"),
    (2, "num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads num_experts_per_tok"),
    (2, "moe_topk moe_k moe_top_k top_k_experts zero_expert_num mamba_expand split_ngram_parts num_codebooks"),
    (2, "centroid_intermediate_top_k"),
    (HEADS, "num_attention_heads n_head num_heads n_heads attention_heads decoder_attention_heads"),
    (HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (HEADS, "index_n_heads resampler_heads linear_num_value_heads linear_num_heads"),
    (HEAD, "head_dim swa_head_dim kv_channels attention_head_size dim_head linear_key_head_dim linear_value_head_dim"),
    (HEAD, "v_head_dim linear_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim global_head_dim d_kv"),
    (HEAD, "resampler_dim_head mamba_headdim"),
    (HEAD, "mamba_d_head mamba_head_dim query_pre_attn_scalar"),
    (WIDTH, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff moe_intermediate_size"),
    (WIDTH, "intermediate_size_mlp d_ff shared_expert_intermediate_size shared_intermediate_size"),
    (WIDTH, "shared_experts_intermediate_size ffn_hidden_size d_inner"),
    (WIDTH, "expert_ffn_hidden_size dense_intermediate_size feed_forward_size moe_shared_expert_intermediate_size"),
    (WIDTH, "mlp_dim alignment_intermediate_size"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts num_query_tokens latent_query_num"),
    (4, "resampler_num_latents prompt_length"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers"),
    (1, "n_groups mamba_n_groups o_groups"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank router_hidden_size hc_lowrank laurel_rank adapter_rank gated_norm_rank"),
    (16, "hidden_size_per_layer_input state_size mamba_d_state ssm_state_size mamba_chunk_size chunk_size num_centroids"),
    (16, "num_buckets patch_size"),
    (24, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size keep_window_size"),
    (24, "index_topk"),
    (24, "local_attention local_attention_window_len"),
    (8, "rotary_dim mamba_n_heads n_mamba_heads mamba_num_heads block_multiple_of d_rel"),
    (0, "num_kv_shared_layers num_nextn_predict_layers"),
    (32, "image_size pronunciation_vocab_size shape_vocab_size vocab_size_audio moe_hidden_size"),
    (64, "codebook_size max_source_positions rel_extent ngram_vocab_size_base encoder_hash_byte_group_vocab"),
    (0.1, "initializer_range init_std"),  # large enough that random layers do something
]
_SIZE = {key: size for size, keys in _SIZES for key in keys.split()}

# Keys whose None means that the model has no such part.
_MAY_BE_OFF = set(
    "moe_intermediate_size num_experts sliding_window q_lora_rank num_local_experts num_key_value_heads rotary_dim ffn_dim "
    "moe_latent_size global_head_dim num_global_key_value_heads".split()
)
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_LOCAL_FULL = ["sliding_attention", "full_attention"]
_LINEAR_FULL = ["linear_attention", "full_attention"]
_MAMBA_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _mrope(*section: int, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {**_ROPE, "mrope_section": list(section), **more}}


# What a model type needs beside small sizes. A dotted key is one of a part's config; None leaves the key at its default.
_NEEDS: list[tuple[str, dict[str, Any]]] = [
    ("bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert", {"is_decoder": True}),
    ("roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod prophetnet", {"is_decoder": True}),
    ("bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr", {"is_decoder": True}),
    ("whisper reformer", {"is_decoder": True}),
    ("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite", {"num_key_value_heads": 4}),
    ("glm_moe_dsa longcat_flash minicpm3 youtu kimi_linear mistral4 dots3_note_text", {"num_key_value_heads": 4}),
    ("mistral_large4 mistral_large4_text kimi_k25 kimi_k25_text bailing_hybrid", {"num_key_value_heads": 4}),
    ("glm5_next_text deepseek_ocr2_text", {"num_key_value_heads": 4}),
    ("cohere_compass_text", {"layer_types": _LOCAL_FULL, "rope_parameters": {kind: _ROPE for kind in _LOCAL_FULL}}),
    ("gpt_oss", {"layer_types": _LOCAL_FULL}),
    ("step3p5", {"layer_types": _LOCAL_FULL, "sliding_window": 24, "mlp_layer_types": ["dense", "sparse"]}),
    ("qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text kimi_linear", {"layer_types": _LINEAR_FULL}),
    ("qwen4_exp_text", {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32}),
    ("qwen4_exp_text", {"indexer_compress_ratio": 4}),
    ("gemma4_text gemma4_unified_text gemma3n_text", {"num_hidden_layers": 4, "layer_types": _LOCAL_FULL * 2}),
    ("gemma3n_text", {"num_kv_shared_layers": 2, "intermediate_size": [WIDTH] * 4}),
    ("gemma3n_text", {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}),
    ("lfm2 lfm2_moe lfm3", {"layer_types": ["conv", "full_attention"]}),
    ("zamba zamba2", {"num_hidden_layers": 4, "layers_block_type": _MAMBA_HYBRID, "attention_hidden_size": 2 * HIDDEN}),
    ("zamba zamba2", {"attention_head_dim": 2 * HIDDEN // HEADS, "head_dim": None}),
    ("zamba", {"mamba_dt_rank": 4, "n_mamba_heads": 2}),
    ("zamba2", {"mamba_ngroups": 1, "adapter_rank": 8}),
    ("jamba", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    ("jamba", {"expert_layer_period": 2, "expert_layer_offset": 1}),
    ("bamba", {"attn_layer_indices": [1], "mamba_d_head": 16}),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_d_head": 16}),
    ("nemotron_h", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"]}),
    ("nemotron_h_omni", {"vision_config.video_temporal_patch_size": 2}),
    ("falcon_h1", {"mlp_multipliers": [0.9, 0.4], "mamba_d_head": 8, "mamba_d_ssm": HIDDEN}),
    ("mamba2", {"num_heads": 8, "head_dim": 16}),
    ("nemotron", {"num_key_value_heads": 2}),
    ("recurrent_gemma", {"num_hidden_layers": 3}),
    ("bailing_hybrid", {"num_hidden_layers": 3, "layer_group_size": 3}),
    ("muse_spark_audio", {"num_hidden_layers": 4}),
    ("reformer", {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "num_attention_heads": 2}),
    ("reformer", {"attn_layers": ["local", "local"]}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    ("dbrx", {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0}),
    ("dbrx", {"ffn_config.ffn_hidden_size": WIDTH}),
    ("zaya", {"num_experts_per_tok": 1}),
    ("xmod", {"default_language": "en_XX"}),
    ("deepseek_ocr2_text", {"mlp_layer_types": ["dense", "sparse"]}),
    ("glm5_next_text", {"index_kpool": 8, "qk_rope_head_dim": 0}),
    ("glm4v glm4v_text glm46v glmga glm_ocr glm_ocr_text", _mrope(2, 3, 3)),
    ("glm4v_moe_text", _mrope(1, 1, 2, partial_rotary_factor=0.5)),
    ("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text", _mrope(2, 3, 3)),
    ("ernie4_5_vl_moe_text", {**_mrope(3, 3, 2), "moe_intermediate_size": [WIDTH, WIDTH], "moe_num_experts": 4}),
    ("hunyuan_vl_text", _mrope(2, 2, 2, 2)),
    ("granite4_vision", {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"}),
    ("molmo2", {"adapter_config.vision_feature_layer": [1, 0]}),
    ("dots3_note", {"vision_config.adapter_in_dim": HIDDEN, "vision_config.mlp_layer_types": ["dense", "dense"]}),
    ("musicgen_decoder musicgen_melody_decoder", {"num_codebooks": 1}),
    ("inkling_text inkling_mm_model", {"logits_mup_width_multiplier": 1.0}),  # muP: it grows with the hidden size
    ("muse_spark_text", {"output_multiplier": 1.0}),  # muP: it falls with the hidden size
    ("emu3", {"vq_config.base_channels": 32}),
    ("emu3", {"vocabulary_map": {"image": 5, "<image>": 6}}),
    ("chameleon", {"vocabulary_map": {"<image>": 6}}),
]


def _needs(model_type: str) -> dict[str, Any]:
    return {key: value for types, needs in _NEEDS if model_type in types.split() for key, value in needs.items()}


def _value(config: PreTrainedConfig, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except RuntimeError:  # differs from layer to layer
        return config.__dict__.get(key)


def _sizes(config: PreTrainedConfig, keys: list[str]) -> dict[str, Any]:
    """The small size of every key that has one, and token ids inside the vocabulary."""
    sizes: dict[str, Any] = {}
    for key in keys:
        value = _value(config, key)
        if key in _SIZE:
            if not (isinstance(value, bool | list | tuple | dict) or (value is None and key in _MAY_BE_OFF)):
                sizes[key] = _SIZE[key]
        elif key.endswith(("_token_id", "_token_index", "token_ids")) and isinstance(value, int) and value >= VOCABULARY:
            sizes[key] = 3 + sum(map(ord, key)) % (VOCABULARY - 3)  # different keys, mostly different tokens
    return sizes


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters whose sections add up to a small head's, where the config has sections."""
    rope = _value(config, "rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return {}
    head = _value(config, "head_dim") or _value(config, "hidden_size") // _value(config, "num_attention_heads")
    pairs = max(3, sum(rope["mrope_section"]) * HEAD // head)
    third = pairs // 3
    return {"rope_parameters": {**rope, "mrope_section": [pairs - 2 * third, third, third]}}


def _arguments(config: PreTrainedConfig, needs: dict[str, Any], outermost: bool = False) -> dict[str, Any]:
    """What a small config of this one's class is made with."""
    is_dataclass = dataclasses.is_dataclass(config)
    keys = [field.name for field in dataclasses.fields(config)] if is_dataclass else list(config.__dict__)
    arguments = _sizes(config, keys) | {key: token for key, token in _TOKENS.items() if key in keys or outermost}
    if "rope_parameters" not in needs:
        arguments |= _rope(config)
    for key, part in config.__dict__.items():
        if isinstance(part, PreTrainedConfig) and not key.startswith("_"):
            kind = getattr(part, "model_type", "")
            inside = {name.removeprefix(key + "."): value for name, value in needs.items() if name.startswith(key + ".")}
            arguments[key] = _arguments(part, _needs(kind) | inside) | ({"model_type": kind} if kind else {})
    for key, value in needs.items():
        if value is None:
            arguments.pop(key, None)
        elif "." not in key:
            arguments[key] = value
    return arguments


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config of a class, made small."""
    return config_class(**_arguments(config_class(), _needs(config_class.model_type), outermost=True))


def small_host(model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A small random model of a class, float32, in evaluation mode. MemoryError where its config did not become small."""
    config = small_config(model_class.config_class)
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class(config).parameters())
    except Exception:
        count = 0  # a model that reads numbers while it is made has none on the meta device
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f} M parameters: its config did not become small")
    torch.manual_seed(seed)
    model = model_class(config).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # xLSTM begins with gates of zeros, whose FFNs give out nothing
    return model


def language_models() -> dict[str, str]:
    """The language-model classes of the installed transformers, and the mapping each is in: "causal" or "image-text"."""
    classes: dict[str, str] = {}
    for kind, names in (
        ("image-text", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        classes |= dict.fromkeys(names.values(), kind)
    return classes
