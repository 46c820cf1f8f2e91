"""FFNs found by structure and numbers: the life of a memory in families that no table names, and in modules of odd names."""

import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.found_hosts import FOUND, NOT_MERGED, found_host
from support.helpers import TEXT, assert_same_host, logits_of, snapshot, tiny_model
from support.hosts import LEARN
from torch import nn

import locas_ext as locas
from locas_ext import reference
from locas_ext.hosts.discovery.dense import LayerNumbers
from locas_ext.hosts.gated_ffn import FusedGatedFFN, InterleavedFFN, UpFirstFFN
from locas_ext.hosts.registry import HOSTS, inspect_host


def config_for(family):
    return locas.LocasConfig(rank=4, scale=0.5, variant=FOUND[family][0])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", sorted(FOUND))
def test_the_life_of_a_memory(family, tmp_path):
    model = found_host(family)
    assert family not in HOSTS
    before, host = snapshot(model), logits_of(model, TEXT)
    memory = locas.attach(model, config_for(family))
    assert torch.equal(logits_of(model, TEXT), host), model.drawn
    assert memory._attachment.probe.skipped is None
    report = memory.memorize(TEXT.repeat(3), **LEARN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens, model.drawn
    assert {entry.path for entry in memory.status()} == {FOUND[family][1]}
    learned = logits_of(model, TEXT)
    assert not torch.allclose(learned, host)
    with memory.disabled():
        assert torch.equal(logits_of(model, TEXT), host)
    memory.save_pretrained(tmp_path / "memory")
    memory.detach()
    assert torch.equal(logits_of(model, TEXT), host)
    assert_same_host(model, before)
    memory = locas.load(model, tmp_path / "memory")
    assert torch.equal(logits_of(model, TEXT), learned)
    if family in NOT_MERGED:
        with pytest.raises(ValueError, match=f"cannot merge: layer 0's .*{NOT_MERGED[family]}"):
            memory.merge_and_unload()
        assert torch.equal(logits_of(model, TEXT), learned)
        return
    memory.merge_and_unload(pad_to_multiple_of=8)
    close(logits_of(model, TEXT), learned)
    model.save_pretrained(tmp_path / "merged")
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    close(logits_of(again.eval(), TEXT), learned)
    locas.unmerge(again), locas.unmerge(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), (name, model.drawn)
    assert torch.equal(logits_of(model, TEXT), host), model.drawn
    close(logits_of(again, TEXT), host)  # weights from a file may begin at other addresses, and products sum otherwise
    assert_same_host(model, before, ("state", "requires_grad", "training", "attributes"))


# ---- hand-made FFNs with odd names ----------------------------------------------------------------------------
class Odd(nn.Module):
    """A gated FFN whose names say nothing, or the opposite."""

    def __init__(self, d, m, act):
        super().__init__()
        self.down_proj, self.beta, self.gate = nn.Linear(d, m), nn.Linear(d, m, bias=False), nn.Linear(m, d)
        self.act = act

    def forward(self, x):
        return self.gate(self.act(self.down_proj(x)) * self.beta(x))


class Halves(nn.Module):
    """gate and up in one projection, in some order."""

    def __init__(self, d, m, act, order):
        super().__init__()
        self.both, self.out, self.act, self.order = nn.Linear(d, 2 * m), nn.Linear(m, d), act, order

    def forward(self, x):
        y = self.both(x)
        if self.order == "interleaved":
            gate, up = y[..., ::2], y[..., 1::2]
        else:
            gate, up = y.chunk(2, -1) if self.order == "gate first" else y.chunk(2, -1)[::-1]
        return self.out(self.act(gate) * up)


class Residual(Odd):
    """The module does more than the FFN."""

    def forward(self, x):
        return 0.5 * super().forward(F.layer_norm(x, x.shape[-1:])) + 0.1 * x


ACTS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
HAND_MADE = {
    "odd names": Odd,
    **{order: lambda d, m, act, order=order: Halves(d, m, act, order) for order in ("gate first", "up first", "interleaved")},
    "residual": Residual,
}


def with_ffns(make, model_type="unknown to any table"):
    model = tiny_model(num_hidden_layers=3)
    model.config.model_type = model_type
    for layer in model.model.layers:
        layer.mlp = make(32)
    return model


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", HAND_MADE)
def test_hand_made_ffns_are_found_with_their_layout_and_activation(kind, act):
    m = int(torch.randint(5, 70, (1,)))
    model = with_ffns(lambda d: HAND_MADE[kind](d, m, ACTS[act]))
    host = inspect_host(model)
    assert [(ffn.activation, ffn.width, ffn.is_gated) for ffn in host.ffns.values()] == [(act, m, True)] * 3
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    assert {entry.path for entry in memory.status()} == {"sideway" if kind == "residual" else "whole"}
    x, ffn = torch.randn(3, 5, 32), model.model.layers[1].mlp
    with torch.no_grad(), memory.disabled():
        expected = ffn(x)
    z = F.layer_norm(x, (32,)) if kind == "residual" else x
    side = reference.sideway_glu(z, memory.slots[1], memory.scale[1].item(), act).detach()
    with torch.no_grad():
        close(ffn(x), expected + (0.5 * side if kind == "residual" else side))


def test_layers_alike_are_searched_once_and_the_numbers_of_each_decide(monkeypatch):
    searched, search = [], LayerNumbers.ffns
    monkeypatch.setattr(LayerNumbers, "ffns", lambda numbers: searched.append(numbers) or search(numbers))
    inspect_host(with_ffns(lambda d: Halves(d, 40, F.relu, "up first")))
    assert len(searched) == 1
    orders, acts = (
        ["gate first", "up first", "interleaved"],
        random.sample([act for act in ACTS if not isinstance(ACTS[act], nn.Module)], 3),
    )
    ffns = iter([Halves(32, 40, ACTS[act], order) for act, order in zip(acts, orders, strict=True)])
    model = with_ffns(lambda d: next(ffns))
    found = inspect_host(model).ffns.values()
    assert [type(ffn) for ffn in found] == [FusedGatedFFN, UpFirstFFN, InterleavedFFN] and len(searched) == 4
    assert [ffn.activation for ffn in found] == acts


def test_two_layers_in_a_row_are_found_too():
    model = with_ffns(lambda d: nn.Sequential(nn.Linear(d, 50), nn.Tanh(), nn.Linear(50, d)))
    host = inspect_host(model)
    assert all(not ffn.is_gated and ffn.width == 50 for ffn in host.ffns.values())
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, variant="mlp"))
    memory.memorize(TEXT, **LEARN)
    with pytest.raises(ValueError, match="cannot merge: layer 0's FFN has an activation, .*Tanh, that has no kernel"):
        memory.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_told_apart_in_every_dtype(act, dtype):
    modules = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_pytorch_tanh": nn.GELU("tanh")}
    model = with_ffns(lambda d: Odd(d, 40, modules[act])).to(dtype)
    assert {ffn.activation for ffn in inspect_host(model).ffns.values()} == {act}


def test_an_ffn_whose_forward_changes_later_runs_beside():
    model = with_ffns(lambda d: Odd(d, 40, nn.SiLU()))
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    assert {entry.path for entry in memory.status()} == {"whole"}
    model.model.layers[0].mlp.act = nn.ReLU()
    model.model.layers[1].mlp.__class__ = Residual
    first, second, third = memory.status()
    assert first.path == second.path == "sideway" and third.path == "whole"
    assert "not the one that was probed" in first.reason and "not the one that was probed" in second.reason


class Clamped(Odd):
    """Differs from a gated FFN only where no short text reaches."""

    def forward(self, x):
        return self.gate(self.act(self.down_proj(x).clamp(max=7)) * self.beta(x).clamp(-7, 7))


def test_an_ffn_that_clamps_large_numbers_runs_beside():
    model = with_ffns(lambda d: Clamped(d, 40, nn.SiLU()))
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    assert all(entry.path == "sideway" and "it may clamp them" in entry.reason for entry in memory.status())


# ---- layers without, and FFNs in several layers ---------------------------------------------------------------
class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_a_layer_without_an_ffn_gets_no_memory(tmp_path):
    model = with_ffns(lambda d: Odd(d, 40, nn.SiLU()))
    model.model.layers[1].mlp = Nothing()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    assert memory.layers == (0, 2) and memory.slots.shape[0] == 2
    memory.memorize(TEXT, **LEARN)
    learned = logits_of(model, TEXT)
    memory.save_pretrained(tmp_path)
    memory.detach()
    locas.load(model, tmp_path)
    assert torch.equal(logits_of(model, TEXT), learned)
    locas.memory_of(model).detach()
    with pytest.raises(ValueError, match="layers names layer 1, which has no FFN of its own in LlamaForCausalLM.* are 0, 2"):
        locas.attach(model, locas.LocasConfig(rank=4, layers=[0, 1]))


def test_an_ffn_of_several_layers_has_one_memory():
    model = with_ffns(lambda d: Odd(d, 40, nn.SiLU()))
    model.model.layers[2].mlp = model.model.layers[0].mlp
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    assert memory.layers == (0, 1)
    report = memory.memorize(TEXT.repeat(3), **LEARN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens


# ---- refusals -------------------------------------------------------------------------------------------------
def no_ffn():
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8)
    return transformers.MambaForCausalLM(config)


def fails_inside():
    model = with_ffns(lambda d: Odd(d, 40, nn.SiLU()))
    model.model.layers[1].mlp.act = nn.Linear(7, 7)
    return model


def two_layers():
    return found_host("starcoder2")


def sees_all():
    small = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    return transformers.BertForMaskedLM(transformers.BertConfig(**small))


REFUSED = {
    no_ffn: r"no FFN was found in its 2 layers \(backbone.layers\), which hold MambaMixer, MambaRMSNorm",
    fails_inside: r"found by one forward over 12 tokens, which raised RuntimeError in model.layers.1.mlp",
    two_layers: "the FFN of starcoder2 has two layers and no gate projection",
    sees_all: "variant is 'glu', but the FFN of bert has two layers",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_has_no_place_for_a_memory_is_refused_with_what_was_found(make):
    model = make().eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=REFUSED[make]):
        locas.attach(model)
    assert_same_host(model, before)


def test_a_masked_model_is_refused_as_not_causal():
    model = sees_all().eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="BertForMaskedLM is not causal"):
        locas.attach(model, locas.LocasConfig(rank=4, variant="mlp"))
    assert_same_host(model, before)


def test_a_host_without_weights_is_refused():
    model = found_host("olmo")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="the host is on the meta device, where it has no weights"):
        locas.attach(empty)
