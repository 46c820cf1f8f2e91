"""Tiny random hosts that keep other things of a context than keys and values, or read one otherwise, looked at without FFNs."""

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from locas_ext.hosts.probe.probe import probe
from locas_ext.hosts.window_reading import ONE, SHORT, WindowReading

MLA = dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=6)
EXPERTS = dict(num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=8)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
DSA = dict(MLA, **EXPERTS, n_routed_experts=4, n_shared_experts=1, index_topk=12, index_head_dim=8, index_n_heads=2)

# By model type: what it needs beside the common sizes, and how its full windows are read.
HOSTS: dict[str, tuple[dict[str, Any], Any]] = {
    "bailing_hybrid": (dict(MLA, **EXPERTS, num_hidden_layers=3, layer_group_size=3, num_local_experts=4), SHORT),
    "bamba": (dict(MAMBA, attn_layer_indices=[1]), SHORT._replace(positions=True)),
    "deepseek_v3": (dict(MLA, **EXPERTS, n_routed_experts=4, n_shared_experts=1), SHORT),
    "deepseek_v32": (DSA, SHORT),
    "falcon": (dict(num_kv_heads=2, head_dim=None, num_key_value_heads=None), SHORT),
    "falcon_h1": (dict(MAMBA, mamba_d_ssm=64), SHORT),
    "gemma3n_text": (
        dict(
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=12,
            intermediate_size=[48] * 4,
            activation_sparsity_pattern=[0.0] * 4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=61,
            laurel_rank=8,
        ),
        SHORT,
    ),
    "granitemoehybrid": (dict(MAMBA, layer_types=["mamba", "attention"], num_local_experts=0), SHORT),
    "jamba": (
        dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_dt_rank=4, mamba_d_state=8, mamba_expand=2),
        ONE,
    ),
    "kimi_linear": (dict(MLA, **EXPERTS, **HYBRID, num_local_experts=4, linear_head_dim=8, linear_num_heads=4), SHORT),
    "lfm2": (dict(layer_types=["conv", "full_attention"], block_multiple_of=8), SHORT),
    "minicpm3": (MLA, SHORT),
    "minimax": (dict(num_local_experts=2, num_experts_per_tok=1), ONE),
    "nemotron_h": (
        dict(
            EXPERTS,
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=16,
            num_hidden_layers=4,
            layers_block_type=["mamba", "moe", "attention", "mlp"],
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=1,
            chunk_size=8,
        ),
        SHORT,
    ),
    "olmo_hybrid": (LINEAR, SHORT),
    "openai-gpt": (dict(n_layer=2, n_head=4, n_embd=32, n_positions=512), ONE),
    "qwen3_5_text": (dict(LINEAR, **HYBRID), SHORT),
    "qwen3_next": (dict(LINEAR, **HYBRID, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16), SHORT),
    "recurrent_gemma": (dict(num_hidden_layers=3, attention_window_size=12), ONE),
    "zamba2": (
        dict(
            num_hidden_layers=2,
            layers_block_type=["mamba", "hybrid"],
            n_mamba_heads=8,
            mamba_ngroups=1,
            mamba_d_state=8,
            adapter_rank=4,
            attention_hidden_size=64,
            attention_head_dim=16,
            head_dim=None,
        ),
        SHORT,
    ),
}


def context_model(model_type, seed=0, **settings):
    """A random model of a type in HOSTS; the test is skipped where transformers does not know the type yet."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    common = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    chosen = {name: value for name, value in {**common, **HOSTS[model_type][0], **settings}.items() if value is not None}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **chosen)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


class ContextHost:
    """A host as far as reading its windows goes: whatever its FFNs are, a reader takes it."""

    def __init__(self, model):
        self.model, self.reading, self.ffns = model, WindowReading(), {}
        self.config = model.config.get_text_config(decoder=True)
        self.vocab_size = self.config.vocab_size

    def input_device(self):
        return torch.device("cpu")


def probed(model):
    """-> the host, looked at as attach does it and ready for a run"""
    host = ContextHost(model)
    assert probe(host).skipped is None
    host.reading.begin_run(model)
    return host
