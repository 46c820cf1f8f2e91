"""Which parts of each family's host run through kernels of ours while memorizing, and variants of these hosts."""

import pytest
import torch
from support.hosts import config_for, tiny

import locas_ext as locas
from locas_ext.hosts.registry import HOSTS

ALL = ("norms", "residuals", "attention", "loss")
SETTINGS = dict(window=32, stride=8, progress=False)
OWN = {"gemma2": {"attention", "loss"}}  # by family, what is the host's own: its scores are capped


def text(n=60):
    return torch.randint(5, 55, (n,), generator=torch.Generator().manual_seed(n))


def memorized(family, monkeypatch, dtype=torch.float32, update=None, kernels=True, **settings):
    """-> the memory, the report of its run."""
    with monkeypatch.context() as changed:
        if not kernels:
            changed.setattr("locas_ext.learning.host_kernels.kernels.host_kernels", lambda *arguments: "off in this test")
        memory = locas.attach(tiny(family, **settings).to(dtype), config_for(family))
        return memory, memory.memorize(text(), **SETTINGS, update=update or locas.Backprop.paper(learning_rate=1e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HOSTS)
def test_what_runs_through_kernels_of_ours(family, dtype, monkeypatch):
    report = memorized(family, monkeypatch, dtype)[1].host_kernels
    own = OWN.get(family, set())
    assert set(report.own) == own
    # Without the attention the whole window's reading is the host's, its loss included.
    assert report.ours == (ALL if not own else ("norms", "residuals"))


VARIANTS = {
    "GPT-NeoX, one after the other": ("gpt_neox", {"use_parallel_residual": False}, ALL),
    "GPT-2, scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, ALL),
    "Granite, a scaled residual": (
        "granite",
        {"residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 4.0, "embedding_multiplier": 6.0},
        ALL,
    ),
    "OPT, norms behind the residuals": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        ("norms", "attention", "loss"),
    ),
    "OPT without biases": ("opt", {"enable_bias": False}, ALL),
    "OPT, norms without weights": ("opt", {"layer_norm_elementwise_affine": False}, ("attention", "loss")),
    "Phi, heads normed": ("phi", {"qk_layernorm": True}, ("norms", "residuals")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_what_the_hosts_own_code_gives(variant, monkeypatch):
    family, settings, ours = VARIANTS[variant]
    (fast, a), (slow, b) = (memorized(family, monkeypatch, kernels=kernels, **settings) for kernels in (True, False))
    assert a.host_kernels.ours == ours and b.host_kernels.ours == ()
    assert [chunk.nll for chunk in a.chunks] == pytest.approx([chunk.nll for chunk in b.chunks], rel=1e-5)
    torch.testing.assert_close(fast.slots, slow.slots, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens", ["all", locas.TopLoss(3)])
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "phi"])
def test_writing_reads_through_them_too(family, tokens, monkeypatch):
    update = locas.Write(epsilon=0.05, tokens=tokens)
    (fast, a), (slow, b) = (memorized(family, monkeypatch, update=update, kernels=kernels) for kernels in (True, False))
    assert a.host_kernels.ours == ALL and b.host_kernels.ours == ()
    assert [chunk.nll for chunk in a.chunks] == pytest.approx([chunk.nll for chunk in b.chunks], rel=1e-5)
    torch.testing.assert_close(fast.slots, slow.slots, rtol=1e-3, atol=1e-5)
