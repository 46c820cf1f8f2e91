"""A tiny random host of every supported family, through its real transformers class."""

import torch
import transformers

import locas_ext as locas

# Settings beyond the common ones that a family needs, or that make it harder.
HOST_SETTINGS = {
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "glm4": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "granite": {"mlp_bias": True},
    "llama": {"mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "phi": {"hidden_act": "gelu_new"},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"mlp_bias": True},
}
TWO_LAYER = ("gpt2", "gpt_neox", "opt", "phi")
LEARN = dict(window=32, stride=16, learning_rate=2e-2, progress=False)
PROJECTION_NAMES = {
    "gpt2": ("c_fc", "c_proj"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("fc1", "fc2"),
    "phi": ("fc1", "fc2"),
}


def tiny(model_type, seed=0, **settings):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"num_hidden_layers": 2, **HOST_SETTINGS.get(model_type, {}), **settings},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def config_for(family):
    return locas.LocasConfig(rank=4, scale=0.5, variant="mlp" if family in TWO_LAYER else "glu")


def projections(model):
    """(first, last) of each layer, found by their names alone."""
    first, last = PROJECTION_NAMES[model.config.model_type]
    modules = dict(model.named_modules())
    return [(modules[name], modules[name[: -len(first)] + last]) for name in modules if name.split(".")[-1] == first]


def activation_of(model):
    config = model.config
    return config.activation_function if hasattr(config, "activation_function") else config.hidden_act
