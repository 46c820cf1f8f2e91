"""Which host a memory belongs to."""

import hashlib

import torch

from .registry import Host


def fingerprint(host: Host) -> dict:
    """What a memory's host must be: type, sizes, and a hash over weights sampled from every FFN.

    The samples are rounded to bfloat16 first, so one checkpoint has one fingerprint whether it is loaded in float32
    or bfloat16.
    """
    digest, like = hashlib.sha256(), host.hidden_state_like()
    for ffn in host.ffns:
        weight = ffn.input_rows(like)[0].detach().reshape(-1)
        samples = weight[:: max(1, weight.numel() // 64)].to("cpu", torch.bfloat16)
        digest.update(samples.view(torch.int16).numpy().tobytes())
    return {
        "model_type": host.config.model_type,
        "hidden_size": host.hidden_size,
        "intermediate_size": host.intermediate_size,
        "num_hidden_layers": len(host.ffns),
        "vocab_size": host.vocab_size,
        "weights_sha256": digest.hexdigest(),
    }
