"""Blocks of experts: their pool of neurons weighted by routing, the layouts of their weights, gradients."""

import pytest
import torch
import torch.nn.functional as F
from support.found_hosts import found_host
from support.helpers import TEXT, logits_of, tiny_model
from support.hosts import LEARN
from torch import nn

import locas_ext as locas
from locas_ext import reference
from locas_ext.hosts.registry import inspect_host


class Experts(nn.Module):
    """Four gated experts, stacked, in one of the layouts that models have; two for every token."""

    def __init__(self, d, m, layout):
        super().__init__()
        self.gate, self.up, self.down = (torch.randn(4, m, d) for _ in range(3))
        self.layout = layout
        self.is_transposed, self.is_concatenated = "transposed" in layout, "interleaved" not in layout
        both = (
            torch.cat([self.gate, self.up], 1) if self.is_concatenated else torch.stack([self.gate, self.up], 2).flatten(1, 2)
        )
        down = self.down.mT
        if self.is_transposed:
            both, down = both.mT, down.mT
        self.gate_up_proj, self.down_proj = nn.Parameter(both.contiguous()), nn.Parameter(down.contiguous())

    def forward(self, x, index, weight):
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, share in zip(index[token].tolist(), weight[token], strict=True):
                hidden = F.silu(self.gate[expert].to(x) @ x[token]) * (self.up[expert].to(x) @ x[token])
                y[token] = y[token] + share * (hidden @ self.down[expert].to(x))
        return y


class Block(nn.Module):
    """A router and its experts, which gives out its logits too."""

    def __init__(self, d, m=24, layout="plain"):
        super().__init__()
        self.router, self.experts = nn.Linear(d, 4, bias=False), Experts(d, m, layout)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(x)
        weight, index = logits.softmax(-1).topk(2)
        return self.experts(x, index, weight).view_as(hidden_states), logits


class OnlyHidden(nn.Module):
    """What a layer that takes one tensor calls."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)[0]


def with_blocks(layout="plain", m=24):
    model = tiny_model()
    model.config.model_type = "unknown to any table"
    for layer in model.model.layers:
        layer.mlp = OnlyHidden(Block(32, m, layout))
    return model


@pytest.mark.parametrize("layout", ["plain", "transposed", "interleaved", "transposed interleaved"])
@pytest.mark.parametrize("m", [24, 32])  # of as many neurons as the stream is wide, shapes say nothing
def test_the_pool_is_weighted_by_routing(layout, m):
    model = with_blocks(layout, m)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    ffn = memory._attachment.ffns[1]
    block = model.model.layers[1].mlp.block
    x = torch.randn(9, 32)
    weight, index = block.router(x).softmax(-1).topk(2)
    expected = torch.zeros(4, m)
    for token in range(9):
        for expert, share in zip(index[token].tolist(), weight[token], strict=True):
            own = block.experts
            hidden = F.silu(own.gate[expert] @ x[token]) * (own.up[expert] @ x[token])
            expected[expert] += share.detach() * hidden.abs() / 9
    torch.testing.assert_close(ffn.importance(x), expected.flatten(), rtol=1e-4, atol=1e-5)
    gate, up = ffn.host_rows(x)
    chosen = torch.tensor([0, m, 3 * m + 5])
    for rows, own in ((gate, block.experts.gate), (up, block.experts.up)):
        assert rows.shape == (4 * m, 32) and torch.equal(rows[chosen], own.flatten(0, 1)[chosen])
    assert ffn.ffn.mean_value_norm(x) == pytest.approx(block.experts.down.norm(dim=-1).mean().item(), rel=1e-5)


def test_a_memory_is_added_to_the_first_output_of_a_block():
    model = with_blocks()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    outer = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        side = reference.sideway_glu(x, memory.slots[0], memory.scale[0].item(), "silu")
        with memory.disabled():
            alone = outer(x)
        torch.testing.assert_close(outer(x), alone + side, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_slots_beside_experts_get_the_gradient_of_the_whole(family):
    """Against a finite difference along a random direction."""
    model = found_host(family)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    ids, slots = TEXT[None, :24], memory.slots

    def loss():
        return F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), ids[0, 1:])

    for parameter in memory.parameters():
        parameter.grad = None
    middle = loss()
    middle.backward()
    for attempt in range(15):
        direction, length = torch.randn_like(slots) / slots.numel() ** 0.5, 3e-3 / 4 ** (attempt // 5)
        got = sum((parameter.grad * along).sum() for parameter, along in zip(memory.parameters(), direction, strict=True))
        ends = []
        for step in (length, -length):
            with torch.no_grad():
                slots.add_(step * direction)
                ends.append(loss().item())
                slots.sub_(step * direction)
        if abs(ends[0] + ends[1] - 2 * middle.item()) < 1e-5:  # else a router chose other experts on the way
            break
    assert got.item() == pytest.approx((ends[0] - ends[1]) / (2 * length), rel=0.05, abs=2e-4), model.drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_half_precision_learns(family, dtype):
    model = found_host(family).to(dtype)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    report = memory.memorize(TEXT.repeat(3), **LEARN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens, model.drawn


def test_experts_without_a_gradient_are_refused_with_the_way_out():
    model = with_blocks()
    own = Experts.forward
    for layer in model.model.layers:
        experts = layer.mlp.block.experts
        experts.forward = lambda x, index, weight, experts=experts: own(experts, x, index, weight).detach()
    with pytest.raises(ValueError, match=r"layer 0's mlp, a OnlyHidden, gives no gradient.*Mxfp4Config\(dequantize=True\)"):
        locas.attach(model)


class Pair(nn.Module):
    """A list of experts, and an FFN that every token goes through."""

    def __init__(self, d, shared):
        super().__init__()
        make = lambda m: nn.ModuleDict({"a": nn.Linear(d, m), "b": nn.Linear(d, m), "c": nn.Linear(m, d)})
        self.parts, self.shared = nn.ModuleList(make(12) for _ in range(3)), make(20) if shared else None

    def run(self, part, x):
        return part["c"](F.silu(part["a"](x)) * part["b"](x))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        which = flat.sum(-1).mul(1e3).long() % 3
        y = torch.zeros_like(flat)
        for number, part in enumerate(self.parts):
            here = (which == number).nonzero()[:, 0]
            y = y.index_add(0, here, self.run(part, flat[here]))
        return (y if self.shared is None else y + self.run(self.shared, flat)).view_as(x)


def test_a_shared_expert_is_an_ffn_and_the_others_are_none():
    model = tiny_model()
    model.config.model_type = "unknown to any table"
    for layer in model.model.layers:
        layer.mlp = Pair(32, shared=True)
    host = inspect_host(model)
    assert [(ffn.width, len(ffn.names)) for ffn in host.ffns.values()] == [(20, 3)] * 2
    assert [ffn.module for ffn in host.ffns.values()] == [layer.mlp for layer in model.model.layers]
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    host_logits = logits_of(model, TEXT)
    memory.memorize(TEXT, **LEARN)
    assert not torch.equal(logits_of(model, TEXT), host_logits)
