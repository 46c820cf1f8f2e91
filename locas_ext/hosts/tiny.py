"""A host for examples: random, and as small as a language model can be."""

import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM


def tiny_host(gated: bool = True, seed: int = 0) -> PreTrainedModel:
    """A random causal language model in evaluation mode: 64 tokens, 64 positions, two layers, hidden size 16.

    Args:
        gated: True for a Qwen2, whose FFNs are gated; False for an OPT, whose FFNs have two layers
        seed: of its weights; torch's own random state stays as it was

    >>> from locas_ext.hosts.tiny import tiny_host
    >>> tiny_host().config.model_type, tiny_host(gated=False).config.model_type
    ('qwen2', 'opt')
    """
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if gated:
            return Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=32, num_key_value_heads=1)).eval()
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16)).eval()
