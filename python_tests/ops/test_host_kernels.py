"""A host's norms and rotary embedding against float64, autograd and transformers' own code; the loss: test_token_nll.py."""

import random
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICES, DTYPES
from support.helpers import assert_as_exact_as_torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2

from locas_ext.ops.backends import elementwise

EPS = 1e-5
GAPS = (0, 3, 8)  # elements between rows, one of them drawn for each case
NORMS = {0.0: LlamaRMSNorm, 1.0: Gemma3RMSNorm}  # by weight_offset
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def draw(*shape, dtype, device, gap=0):
    """Random numbers whose rows lie `gap` elements apart."""
    return torch.randn(*shape[:-1], shape[-1] + gap).to(device, dtype)[..., : shape[-1]]


def drawn_size(most):
    return int(torch.randint(1, most + 1, ()))


def exact_norm(x, weight, weight_offset):
    return (weight_offset + weight) * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def host_norm(weight, weight_offset):
    norm = NORMS[weight_offset](len(weight), eps=EPS).to(weight).requires_grad_(False)
    norm.weight.copy_(weight)
    return norm


def agrees(names, ours, peer, truth):
    for name, a, b, c in zip(names, ours, peer, truth, strict=True):
        assert_as_exact_as_torch(name, a.cpu(), b.cpu(), c.cpu())


def same_sums(alone, out, gap, device):
    """Equal but on a GPU with gaps: rows that start elsewhere are read in other pieces, added in another order."""
    if device == "cpu" or gap == 0:
        assert torch.equal(alone, out)
    else:
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            alone, out, rtol=2 * torch.finfo(out.dtype).eps, atol=4 * eps * max(1, out.abs().max().item())
        )


# ---- norms -------------------------------------------------------------------------------------------------------
NORM_SHAPES = [(1, 3), (3, 7), (33, 64), (5, 257), (70, 640), (17, 576), (3, 2048), (2, 4096), (2, 8200)]


@pytest.mark.parametrize("weight_offset", NORMS)
@pytest.mark.parametrize("shape", [*NORM_SHAPES, "drawn"], ids=str)
def test_a_norm_and_its_gradient(shape, weight_offset, dtype, device):
    gap = random.choice(GAPS)
    n, d = (drawn_size(50), drawn_size(1500)) if shape == "drawn" else shape
    x, residual, d_out, d_sum = (draw(n, d, dtype=dtype, device=device, gap=gap) for _ in range(4))
    weight = draw(d, dtype=dtype, device=device)

    def run(function, cast, total, *others):
        """The norm of a sum that is also used otherwise, where `others` says so."""
        total = cast(total).detach().requires_grad_()
        out = function(total)
        gradients = [torch.autograd.grad(out, total, cast(d_out))[0]]
        gradients += [gradients[0] + cast(other) for other in others]
        return out.detach(), *gradients

    out, total, inverse_rms = elementwise.rms_norm(x, weight, EPS, True, residual, weight_offset)
    assert torch.equal(total, residual + x)
    dx, dx_of_both = (
        elementwise.rms_norm_backward(d_out, total, weight, inverse_rms, other, weight_offset) for other in (None, d_sum)
    )
    peer = run(host_norm(weight, weight_offset), lambda t: t, total, d_sum)
    truth = run(lambda t: exact_norm(t, weight.double(), weight_offset), lambda t: t.double(), total, d_sum)
    agrees(("out", "dx", "dx with d_sum"), (out, dx, dx_of_both), peer, truth)
    exact_inverse = 1 / (total.double().square().mean(-1) + EPS).sqrt()
    torch.testing.assert_close(inverse_rms.double(), exact_inverse, rtol=1e-6, atol=0)
    alone, none, unsaved = elementwise.rms_norm(total, weight, EPS, False, weight_offset=weight_offset)
    assert none is None and unsaved is None
    same_sums(alone, out, gap, device)


@pytest.mark.parametrize("weight_offset", NORMS)
def test_a_norm_rounds_where_the_host_does(weight_offset, dtype, device):
    """In the half types all but a few elements, where the sum's order decides a rounding, are the host's own."""
    if dtype == torch.float32:
        pytest.skip("float32 shows the order of the sum")
    x, weight = draw(64, 320, dtype=dtype, device=device), draw(320, dtype=dtype, device=device)
    ours = elementwise.rms_norm(x, weight, EPS, False, weight_offset=weight_offset)[0]
    assert (ours != host_norm(weight, weight_offset)(x)).float().mean() < 1e-3


def test_a_gradient_without_contiguous_rows_is_taken(dtype, device):
    x, weight = draw(5, 24, dtype=dtype, device=device), draw(24, dtype=dtype, device=device)
    _, _, inverse_rms = elementwise.rms_norm(x, weight, EPS, True)
    for d_out in (draw(24, 5, dtype=dtype, device=device).t(), torch.ones((), dtype=dtype, device=device).expand(5, 24)):
        expected = elementwise.rms_norm_backward(d_out.contiguous(), x, weight, inverse_rms)
        assert torch.equal(elementwise.rms_norm_backward(d_out, x, weight, inverse_rms), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [*NORM_SHAPES, "drawn"], ids=str)
def test_a_layer_norm_and_its_gradient(shape, with_bias, dtype, device):
    gap = random.choice(GAPS)
    n, d = (drawn_size(50), drawn_size(1500)) if shape == "drawn" else shape
    x, residual, d_out, d_sum = (draw(n, d, dtype=dtype, device=device, gap=gap) for _ in range(4))
    residual += 3  # a mean that counts
    weight, bias = draw(d, dtype=dtype, device=device), draw(d, dtype=dtype, device=device) if with_bias else None
    out, total, statistics = elementwise.layer_norm(x, weight, bias, EPS, True, residual)
    assert torch.equal(total, residual + x)
    ours = [elementwise.layer_norm_backward(d_out, total, weight, statistics, other) for other in (None, d_sum)]

    def run(cast):
        total_ = cast(total).detach().requires_grad_()
        y = F.layer_norm(total_, (d,), cast(weight), None if bias is None else cast(bias), EPS)
        gradient = torch.autograd.grad(y, total_, cast(d_out))[0]
        return y.detach(), gradient, gradient + cast(d_sum)

    agrees(("out", "dx", "dx with d_sum"), (out, *ours), run(lambda t: t), run(lambda t: t.double()))
    alone, none, unsaved = elementwise.layer_norm(total, weight, bias, EPS, False)
    assert none is None and unsaved is None
    same_sums(alone, out, gap, device)


# ---- rotary embedding --------------------------------------------------------------------------------------------
class Rotation(NamedTuple):
    """How a family turns heads; wide: by angles in float32"""

    family: ModuleType
    interleaved: bool = False
    wide: bool = False


LLAMA, OLMO2, GLM4 = Rotation(modeling_llama), Rotation(modeling_olmo2, wide=True), Rotation(modeling_glm4, interleaved=True)
ROTATIONS = {"Llama": LLAMA, "OLMo 2": OLMO2, "GLM 4": GLM4}


class Heads:
    """Query, key and value as slices of one product, and random angles whose halves differ."""

    def __init__(self, n, size, rotated, queries, keys, dtype, device, gap=0, rotation=LLAMA):
        self.n, self.size, self.rotated, self.rotation = n, size, rotated, rotation
        like = dict(dtype=dtype, device=device)
        widths = [queries * size, keys * size, keys * size]
        self.query, self.key, self.value = draw(n, sum(widths), **like, gap=gap).split(widths, -1)
        self.d_query, self.d_key, _ = draw(n, sum(widths), **like, gap=gap).split(widths, -1)
        angles = torch.randn(n, rotated, device=device)
        self.cos, self.sin = (t if rotation.wide else t.to(dtype) for t in (angles.cos(), angles.sin()))
        self.angles, self.how = (self.cos, self.sin, size), {"interleaved": rotation.interleaved}
        self.weights = draw(size, **like), draw(size, **like)
        room = torch.full((n, sum(widths) + 5), float("nan"), **like)
        *self.outputs, self.unused = room.split([*widths, 5], -1)

    def turned(self, x, cast, norm=None):
        """transformers' formula, in the dtype that `cast` makes of everything."""
        heads = cast(x).reshape(self.n, -1, self.size)
        heads = heads if norm is None else norm(heads)
        heads = heads.transpose(0, 1)[None]
        turning, rest = heads[..., : self.rotated], heads[..., self.rotated :]
        turning, _ = self.rotation.family.apply_rotary_pos_emb(turning, turning, cast(self.cos)[None], cast(self.sin)[None])
        return torch.cat((turning, rest), -1)[0].transpose(0, 1).reshape(self.n, -1)

    def run(self, cast, norms=(None, None)):
        """-> query_out, key_out and the gradients of query and key"""
        inputs = [cast(t).detach().requires_grad_() for t in (self.query, self.key)]
        outputs = [self.turned(t, cast, norm) for t, norm in zip(inputs, norms, strict=True)]
        gradients = torch.autograd.grad(outputs, inputs, [cast(t) for t in (self.d_query, self.d_key)])
        return *(t.detach() for t in outputs), *gradients


SIZES = [(64, 64), (128, 128), (128, 64), (256, 256), (512, 512), (80, 32), (96, 96), (80, 20), (6, 2), (5, 4), "drawn"]


def drawn_heads(sizes, dtype, device, gap=0, rotation=LLAMA):
    n, keys = drawn_size(20), drawn_size(3)
    size = drawn_size(140) + 1
    size, rotated = (size, 2 * drawn_size(size // 2)) if sizes == "drawn" else sizes
    return Heads(n, size, rotated, keys * drawn_size(3), keys, dtype, device, gap, rotation)


NAMES = ("query", "key", "d_query", "d_key")


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_heads_turn_as_in_transformers(sizes, rotation, dtype, device):
    heads = drawn_heads(sizes, dtype, device, random.choice(GAPS), rotation)
    expected = heads.run(lambda t: t)
    query_out, key_out, value_out = heads.outputs
    elementwise.rotary_forward(heads.query, heads.key, *heads.angles, query_out, key_out, heads.value, value_out, **heads.how)
    ours = query_out, key_out, *elementwise.rotary_backward(heads.d_query, heads.d_key, *heads.angles, None, None, **heads.how)
    # The products of gradients with angles in float32 are not rounded to the heads' type, as those of autograd are.
    same = 2 if rotation.wide and dtype != torch.float32 else 4
    for name, mine, theirs in zip(NAMES[:same], ours, expected, strict=False):
        assert torch.equal(mine, theirs), name
    agrees(NAMES, ours, expected, heads.run(lambda t: t.double()))
    assert torch.equal(value_out, heads.value) and heads.unused.isnan().all()
    elementwise.rotary_forward(heads.query, heads.key, *heads.angles, heads.query, heads.key, **heads.how)
    assert torch.equal(heads.query, query_out) and torch.equal(heads.key, key_out)


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("weight_offset", NORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_heads_are_normed_first(sizes, weight_offset, rotation, dtype, device):
    heads = drawn_heads(sizes, dtype, device, drawn_size(16), rotation)
    peer = heads.run(lambda t: t, [host_norm(weight, weight_offset) for weight in heads.weights])
    exact = [lambda x, weight=weight: exact_norm(x, weight.double(), weight_offset) for weight in heads.weights]
    truth = heads.run(lambda t: t.double(), exact)
    angles, norms = heads.angles, (heads.weights, weight_offset, EPS, rotation.interleaved)
    query_out, key_out, value_out = heads.outputs
    elementwise.rotary_forward(heads.query, heads.key, *angles, query_out, key_out, heads.value, value_out, *norms)
    gradients = elementwise.rotary_backward(heads.d_query, heads.d_key, *angles, heads.query, heads.key, *norms)
    agrees(NAMES, (query_out, key_out, *gradients), peer, truth)
    assert torch.equal(value_out, heads.value) and heads.unused.isnan().all()


def test_what_the_rotary_embedding_refuses(dtype, device):
    heads = Heads(3, 8, 8, 2, 1, dtype, device)
    query_out, key_out, value_out = heads.outputs

    def refuses(text, query=heads.query, key=heads.key, cos=heads.cos, size=8, out=query_out, value=None, weights=None):
        with pytest.raises(ValueError, match=rf"^rotary_forward: {text}"):
            elementwise.rotary_forward(query, key, cos, heads.sin, size, out, key_out, value, None, weights)

    refuses(r"head_size is 0; expected 1 to 512", size=0)
    refuses(r"head_size is 513; expected 1 to 512", size=513)
    refuses(r"query has shape \[3, 16\]; expected \[3, heads \* 5\]", size=5, cos=heads.cos[:, :4])
    refuses(r"key has shape \[2, 8\]; expected \[3, 8\]", key=heads.key[:2])
    refuses(r"cos has shape \[3, 8\]; expected \[rows, an even number up to 4, the head size\]", size=4)
    refuses(r"cos has shape \[3, 3\]; expected", cos=heads.cos[:, :3])
    refuses(r"sin has shape \[3, 8\]; expected \[3, 6\]", cos=heads.cos[:, :6])
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        refuses(rf"sin has dtype {name}; expected float32, the dtype of cos", cos=heads.cos.float())
    refuses(r"cos has dtype float64; expected", cos=heads.cos.double())
    refuses(r"query_out has shape \[3, 8\]; expected \[3, 16\]", out=key_out)
    refuses(r"value_out is None, but value is given; expected both or none", value=heads.value)
    refuses(r"query_weight has shape \[7\]; expected \[8\]", weights=(heads.weights[0][:7], heads.weights[1]))
    refuses(r"query_out or key_out is the memory of query or key", out=heads.query, weights=heads.weights)
    with pytest.raises(ValueError, match=r"^rotary_backward: query is None, but query_weight is given"):
        elementwise.rotary_backward(heads.d_query, heads.d_key, heads.cos, heads.sin, 8, None, heads.key, heads.weights)
    assert torch.cat((query_out, key_out, value_out), -1).isnan().all()


# ---- threads and graphs ------------------------------------------------------------------------------------------
def all_of_them(heads, logits):
    """Every kernel once; -> everything that they computed."""
    query_out, key_out, value_out = heads.outputs
    weight, targets = heads.d_query[0].clone(), torch.arange(len(logits), device=logits.device)
    angles, norms = (heads.cos, heads.sin, heads.size), (heads.weights, 1.0, EPS)
    out, total, inverse_rms = elementwise.rms_norm(heads.query, weight, EPS, True, heads.d_query)
    dx = elementwise.rms_norm_backward(out, total, weight, inverse_rms, heads.d_query)
    layer_norm, _, statistics = elementwise.layer_norm(heads.query, weight, weight, EPS, True)
    layer_dx = elementwise.layer_norm_backward(out, heads.query, weight, statistics)
    elementwise.rotary_forward(heads.query, heads.key, *angles, query_out, key_out, heads.value, value_out, *norms)
    gradients = elementwise.rotary_backward(heads.d_query, heads.d_key, *angles, heads.query, heads.key, *norms)
    loss = elementwise.token_nll(logits, targets, True, 3.0, 0.5)
    return [t.clone() for t in (out, total, inverse_rms, dx, layer_norm, layer_dx, *heads.outputs, *gradients, *loss)]


def test_two_threads_compute_the_same(dtype, device):
    heads, logits = Heads(96, 64, 64, 6, 2, dtype, device), draw(96, 400, dtype=dtype, device=device)
    expected = all_of_them(heads, logits)
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(all_of_them(heads, logits), expected, strict=True))
    finally:
        torch.set_num_threads(1)


def test_all_of_them_in_a_cuda_graph(dtype, device):
    if device == "cpu":
        pytest.skip("graphs are of a GPU")
    heads, logits = Heads(4, 64, 64, 3, 1, dtype, device), draw(4, 300, dtype=dtype, device=device)
    all_of_them(heads, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_of_them(heads, logits)
    heads.query.mul_(2.0)
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, all_of_them(heads, logits), strict=True))
