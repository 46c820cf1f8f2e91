"""The parts of a host that run faster while memorizing on the CPU: norms and the attention over a cached context."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.helpers import TEXT, assert_as_exact_as_torch, attached
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import locas_ext as locas
from locas_ext.learning.chunk_attention import _AS_SDPA, NAME, ChunkAttentionFunction, chunk_attention
from locas_ext.learning.host_kernels.norms import FastLayerNorm, FastRMSNorm, NormFunction, fast_norm


def norm_of(kind, width, dtype):
    norm = Qwen3RMSNorm(width, eps=1e-5) if kind == "rms" else nn.LayerNorm(width, eps=1e-5, bias=kind == "layer")
    for parameter in norm.to(dtype).requires_grad_(False).parameters():
        parameter.copy_(torch.rand(width) + 0.5)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "plain layer"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 5, 4, 33), (1, 3, 257), (70, 640)])
def test_norms_against_float64(kind, shape, adds, dtype):
    x, residual, d_out, d_sum = (torch.randn(shape).add(1).to(dtype) for _ in range(4))
    norm = norm_of(kind, shape[-1], dtype)
    fast = FastLayerNorm(norm) if "layer" in kind else FastRMSNorm(norm, 0.0)

    def run(function, cast):
        inputs = [cast(t).detach().requires_grad_() for t in ((x, residual) if adds else (x,))]
        out, total = function(*inputs)
        gradients = torch.autograd.grad((out, total) if adds else (out,), inputs, tuple(map(cast, (d_out, d_sum)[: 1 + adds])))
        return out.detach(), total.detach(), *gradients

    def added(norm_, cast):
        return run(lambda x_, *others: (norm_(sum(others, x_)), sum(others, x_)), cast)

    ours = run(lambda x_, other=None: NormFunction.apply(x_, other, fast, norm.weight), lambda t: t)
    exact = copy.deepcopy(norm).double() if "layer" in kind else exact_rms(norm)
    peer, truth = added(norm, lambda t: t), added(exact, torch.Tensor.double)
    for name, a, b, c in zip(("y", "sum", "dx", "d_residual"), ours, peer, truth, strict=False):
        assert_as_exact_as_torch(name, a, b, c)


def exact_rms(norm):
    return lambda x: norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_only_norms_of_a_known_formula_are_computed():
    norm, gemma, layer = Qwen3RMSNorm(33), Gemma2RMSNorm(33), nn.LayerNorm(33)
    for module in (norm, gemma, layer):
        torch.nn.init.normal_(module.weight)
        assert fast_norm(module) is None, "a weight that learns keeps its own forward"
        module.requires_grad_(False)
    assert fast_norm(norm).weight_offset == 0 and fast_norm(gemma).weight_offset == 1
    assert isinstance(fast_norm(layer), FastLayerNorm)
    assert fast_norm(nn.LayerNorm(33, elementwise_affine=False)) is None
    assert fast_norm(nn.LayerNorm((3, 33)).requires_grad_(False)) is None
    layer.bias.requires_grad_(True)
    assert fast_norm(layer) is None
    norm.forward = lambda x: x
    assert fast_norm(norm) is None
    gemma.register_forward_hook(lambda module, inputs, out: out)
    assert fast_norm(gemma) is None


@pytest.mark.parametrize(
    "heads, groups, n, k, size, value_size",
    [
        (1, 1, 1, 2, 4, 4),
        (4, 2, 5, 19, 8, 8),
        (6, 3, 16, 16, 5, 5),
        (8, 1, 9, 40, 16, 16),
        (4, 4, 7, 21, 12, 8),
        (4, 2, 3, 9, 5, 7),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_chunk_attention_against_autograd_in_float64(heads, groups, n, k, size, value_size, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr("locas_ext.learning.chunk_attention._KEPT", 0)
    monkeypatch.setattr("locas_ext.learning.chunk_attention._PIECE", 1)  # a group of heads at a time, as in large hosts
    query, d_out = torch.randn(1, heads, n, size), torch.randn(1, heads, n, value_size)
    key, value = torch.randn(1, groups, k, size), torch.randn(1, groups, k, value_size)
    mask = torch.zeros(n, k).masked_fill(torch.ones(n, k).tril(k - n) == 0, -torch.inf)[None, None]

    def run(function, cast):
        inputs = [cast(t).detach().requires_grad_() for t in (query, key, value)]
        out = function(*inputs, cast(mask), 0.3)
        return out.detach(), *torch.autograd.grad(out, inputs, cast(d_out))

    def plain(q, k_, v, m, scaling):
        k_, v = (t.repeat_interleave(heads // groups, 1) for t in (k_, v))
        return F.scaled_dot_product_attention(q, k_, v, attn_mask=m, scale=scaling)

    ours = run(ChunkAttentionFunction.apply, lambda t: t)
    peer, exact = run(plain, lambda t: t), run(plain, lambda t: t.double())
    own = slice(k - n, None)
    assert_as_exact_as_torch("out", ours[0], peer[0], exact[0])
    assert_as_exact_as_torch("d_query", ours[1], peer[1], exact[1])
    for name, i in (("d_key", 2), ("d_value", 3)):
        assert_as_exact_as_torch(name, ours[i][:, :, own], peer[i][:, :, own], exact[i][:, :, own])
        assert not ours[i][:, :, : k - n].any()


def test_a_host_that_asks_takes_its_attention_for_sdpa():
    for name in (_AS_SDPA, copy.copy(_AS_SDPA)):
        assert name == "sdpa" and "sdpa" == name and name in ("eager", "sdpa") and not name != "sdpa"
        assert name == NAME and name != "eager" and name not in ("eager", "flash_attention_2") and name is not None
        assert AttentionInterface()[name] is AttentionInterface()[NAME] is not AttentionInterface()["sdpa"]
        assert AttentionMaskInterface()[name] is AttentionMaskInterface()["sdpa"]


def test_the_hosts_attention_setting_is_given_back():
    _, memory = attached()
    host = memory._attachment.host
    with pytest.raises(RuntimeError):
        with chunk_attention(host):
            names = [layer.self_attn.config._attn_implementation for layer in host.model.model.layers]
            assert set(names) == {NAME} and host.model.config._attn_implementation == "sdpa"
            raise RuntimeError
    assert all(layer.self_attn.config is host.model.config for layer in host.model.model.layers)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_memorizing_agrees_with_the_hosts_own_attention_and_norms(family):
    """The same run with an eager-attention host, which takes neither shortcut of the attention."""
    settings = dict(window=24, stride=8, update=locas.Backprop.paper(learning_rate=1e-2), progress=False)
    _, fast = attached(family)
    _, slow = attached(family, model_settings={"attn_implementation": "eager"})
    a, b = fast.memorize(TEXT, **settings), slow.memorize(TEXT, **settings)
    torch.testing.assert_close(fast.slots, slow.slots, rtol=1e-3, atol=1e-5)
    assert [c.nll for c in a.chunks] == pytest.approx([c.nll for c in b.chunks], rel=1e-5)
