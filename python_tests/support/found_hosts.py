"""Tiny random hosts of families that no table names: their FFNs are found."""

import random

import torch
import transformers

# By model type: the variant that fits, how the memory runs, and settings beyond the common ones.
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
DEEPSEEK = dict(
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
FOUND = {
    "olmo": ("glu", "whole", {}),
    "glm": ("glu", "whole", {}),
    "cohere": ("glu", "whole", {}),
    "stablelm": ("glu", "whole", {}),
    "starcoder2": ("mlp", "sideway", {}),
    "gptj": ("mlp", "sideway", dict(rotary_dim=4)),
    "gpt_neo": ("mlp", "sideway", dict(attention_types=[[["global", "local"], 1]], num_layers=2)),
    "bert": ("mlp", "sideway", dict(is_decoder=True)),
    "nemotron": ("mlp", "sideway", {}),
    "arcee": ("mlp", "sideway", {}),
    "apertus": ("mlp", "sideway", {}),
    "granitemoeshared": ("glu", "whole", dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40)),
    "qwen2_moe": ("glu", "whole", dict(**MOE, shared_expert_intermediate_size=40)),
    "deepseek_v3": ("glu", "whole", DEEPSEEK),
    "qwen3_moe": ("glu", "sideway", MOE),
    "mixtral": ("glu", "sideway", dict(num_local_experts=4)),
    "gpt_oss": ("glu", "sideway", dict(num_local_experts=4, num_experts_per_tok=2)),
    "bitnet": ("glu", "sideway", dict(hidden_size=32)),
}
# Whose slots have no place in the host's own weights.
NOT_MERGED = {
    "qwen3_moe": "block of experts",
    "mixtral": "block of experts",
    "gpt_oss": "block of experts",
    "bitnet": "BitNetMLP",
}


def sizes(seed):
    """Sizes of a host, drawn."""
    draw = random.Random(seed)
    return dict(hidden_size=draw.choice((24, 32, 40)), intermediate_size=8 * draw.randint(4, 9))


def found_host(model_type, seed=None, **settings):
    """A host with weights large enough that its FFNs matter."""
    seed = random.randrange(10**6) if seed is None else seed
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 61,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **sizes(seed),
            **FOUND.get(model_type, ("", "", {}))[2],
            **settings,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1 and "embed" not in name:
            parameter.data.mul_(3)
    model.drawn = seed  # for the message of a test that fails
    return model
