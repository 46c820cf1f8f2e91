"""What stands in for a host's own norms, residuals, attention and loss while memorizing."""

import pytest
import torch
from support.helpers import assert_as_exact_as_torch
from support.hosts import config_for, tiny
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import locas_ext as locas
from locas_ext.hosts.registry import HOSTS
from locas_ext.learning.backprop import gradient
from locas_ext.learning.chunk import Window, WindowReader
from locas_ext.learning.host_kernels import find, kernels
from locas_ext.learning.host_kernels.kernels import Level, fast_reader

ALL = ("norms", "residuals", "attention", "loss")
SETTINGS = dict(window=32, stride=8, update=locas.Backprop.paper(learning_rate=1e-2), progress=False)


def text(n=60, seed=3):
    return torch.randint(5, 55, (n,), generator=torch.Generator().manual_seed(seed))


def memory_on(family, dtype=torch.float32, **settings):
    return locas.attach(tiny(family, **settings).to(dtype), config_for(family))


def window_gradient(memory, slots, window, kernels, ids):
    """-> the loss, the arena's gradient and the level at which the window was read."""
    attachment = memory._attachment
    state = attachment.state
    state.set_slots(slots.to(state.arenas[0].slots.dtype), version=1)
    state.zero_grad()
    reader = WindowReader(attachment.host)
    attachment.host.reading.begin_run(memory.model)
    level = Level.NONE
    with torch.enable_grad():
        if kernels:
            with fast_reader(reader, ids, len(ids) + 1):
                reader.settle(window, len(ids))
                level = reader._level(window)
                loss = gradient(attachment, window, reader)
        else:
            loss = gradient(attachment, window, reader)
    return loss, state.arenas[0].grad.clone(), level


def slots_for(memory, seed=5):
    memory.memorize(text(20), **SETTINGS)
    slots = memory._attachment.state.arenas[0].slots.detach()
    noise = torch.randn(slots.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (slots.double() + 0.05 * noise).to(torch.float32).double()


# ---- what they compute ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", HOSTS)
def test_loss_and_gradient_against_float64(family, dtype):
    ids = text(40)
    exact = memory_on(family, torch.float64)
    slots = slots_for(exact)
    peer, ours = memory_on(family, dtype), memory_on(family, dtype)
    for context in (0, 1, 21):
        window = Window(ids[:context], ids[context:-1], ids[context + 1 :])
        truth = window_gradient(exact, slots, window, False, ids)
        own = window_gradient(peer, slots, window, False, ids)
        fast = window_gradient(ours, slots, window, True, ids)
        assert fast[2] == (Level.PIECES if family == "gemma2" else Level.ALL)
        for name, a, b, c in zip(("loss", "gradient"), fast, own, truth, strict=False):
            what = f"{name} behind {context} tokens"
            assert_as_exact_as_torch(what, a.float(), b.float(), c.double(), rounding=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", HOSTS)
def test_a_run_gives_what_the_hosts_own_code_gives(family, monkeypatch):
    fast, slow = memory_on(family), memory_on(family)
    ours = fast.memorize(text(), **SETTINGS)
    monkeypatch.setattr("locas_ext.learning.host_kernels.kernels.host_kernels", lambda *arguments: "off in this test")
    own = slow.memorize(text(), **SETTINGS)
    assert own.host_kernels.ours == () and own.host_kernels.own == {"host": "off in this test"}
    assert [chunk.nll for chunk in ours.chunks] == pytest.approx([chunk.nll for chunk in own.chunks], rel=1e-5)
    torch.testing.assert_close(fast.slots, slow.slots, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("context_gradient", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_every_length(bos, context_gradient):
    """A stride as long as the window, one that does not divide the text, and a text of a single chunk."""
    for n, window, stride in ((50, 16, 16 - bos), (43, 17, 5), (9, 32, 8), (2, 32, 8)):
        settings = dict(window=window, stride=stride, bos=bos, context_gradient=context_gradient, progress=False)
        fast, slow = memory_on("qwen3"), memory_on("qwen3", attn_implementation="eager")
        a, b = fast.memorize(text(n), **settings), slow.memorize(text(n), **settings)
        assert "norms" in a.host_kernels.ours
        assert [chunk.nll for chunk in a.chunks] == pytest.approx([chunk.nll for chunk in b.chunks], rel=1e-5)


# ---- where they run -------------------------------------------------------------------------------------------
def test_which_pieces_run_is_reported():
    memory = memory_on("llama")
    assert memory.memorize(text(), **SETTINGS).host_kernels.ours == ALL
    report = memory.memorize(text(), context_gradient=True, **SETTINGS).host_kernels
    assert report.ours == ("norms", "residuals") and list(report.own) == ["windows read otherwise"]
    report = memory_on("gemma2").memorize(text(), **SETTINGS).host_kernels
    assert report.ours == ("norms", "residuals") and list(report.own) == ["attention", "loss"]


class Packed(nn.Module):
    """A linear layer or an embedding as quantization libraries make them: its first parameter holds bytes."""

    def __init__(self, module):
        super().__init__()
        weight = module.weight.detach()
        self.dtype, (self.out_features, self.in_features) = weight.dtype, weight.shape
        self.is_embedding = isinstance(module, nn.Embedding)
        self.weight = nn.Parameter((weight * 100 + 128).round().to(torch.uint8), requires_grad=False)

    def forward(self, x):
        weight = (self.weight.to(self.dtype) - 128) / 100
        return nn.functional.embedding(x, weight) if self.is_embedding else nn.functional.linear(x, weight)


@pytest.mark.parametrize("head", [False, True])
def test_a_host_of_packed_weights(head, monkeypatch):
    asked = []
    monkeypatch.setattr(find, "obstacle", lambda heads, like: asked.append(like.dtype))
    model = tiny("llama").to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and (head or name != "lm_head"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Packed(module))
    memory = locas.attach(model, config_for("llama"))
    assert memory._attachment.state.arenas[0].compute.dtype == torch.bfloat16
    report = memory.memorize(text(), **SETTINGS).host_kernels
    assert set(asked) == {torch.bfloat16}, "flash attention takes no bytes"
    assert report.ours == (ALL[:-1] if head else ALL)
    assert list(report.own) == ["loss"] * head and all("Packed, not a plain Linear" in why for why in report.own.values())


def test_nothing_of_the_host_stays_replaced():
    memory = memory_on("llama")
    own = {module: module.__dict__.get("forward") for module in memory.model.modules()}
    seen = []

    def callback(chunk):
        seen.append({module: module.__dict__.get("forward") for module in memory.model.modules()} == own)
        if len(seen) == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        memory.memorize(text(), callback=callback, **SETTINGS)
    assert seen == [True] * 3
    assert {module: module.__dict__.get("forward") for module in memory.model.modules()} == own
    config = memory.model.config
    assert all(module.config is config for module in memory.model.modules() if isinstance(module, LlamaAttention))
    assert memory.model.model.config is config


def test_a_full_memory_says_nothing_of_the_kernels(monkeypatch):
    memory = memory_on("llama")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_error_of_all", full)
        with pytest.raises(torch.OutOfMemoryError):
            memory.memorize(text(), **SETTINGS)
    assert memory.memorize(text(), **SETTINGS).host_kernels.ours == ALL


class CappedNorm(nn.Module):
    """Another formula under a name and with the attributes of a plain norm."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)).clamp(-1, 1)


CappedRMSNorm = type("CappedRMSNorm", (CappedNorm,), {})


class ScaledResidual(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 0.1 * hidden_states


class Forgetful(LlamaAttention):
    """Attends otherwise, but only in full windows."""

    def forward(self, hidden_states, *args, **kwargs):
        out, weights = super().forward(hidden_states, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        seen = hidden_states.shape[1] if cache is None else cache.get_seq_length(self.layer_idx)
        return (out * 0.5 if seen >= 31 else out), weights


def with_capped_norm(model):
    model.model.layers[1].input_layernorm = CappedRMSNorm(model.model.layers[1].input_layernorm)


def with_scaled_residual(model):
    model.model.layers[1].__class__ = ScaledResidual


def with_forgetful_attention(model):
    model.model.layers[1].self_attn.__class__ = Forgetful


def with_hooked_norm(model):
    model.model.layers[1].input_layernorm.register_forward_hook(lambda module, args, out: out * 1.25)


def with_own_head(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out.clamp(-1, 1))


@pytest.mark.parametrize(
    "change, ours",
    [
        (with_capped_norm, ("norms", "residuals", "attention", "loss")),
        (with_scaled_residual, ("norms", "residuals", "attention", "loss")),
        (with_forgetful_attention, None),
        (with_hooked_norm, ("norms", "residuals", "attention", "loss")),
        (with_own_head, ("norms", "residuals", "attention")),
    ],
)
def test_a_host_that_computes_otherwise_keeps_its_own_code_there(change, ours, monkeypatch):
    def run():
        model = tiny("llama")
        change(model)
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
        return memory, memory.memorize(text(), **SETTINGS)

    fast, a = run()
    monkeypatch.setattr("locas_ext.learning.host_kernels.kernels.host_kernels", lambda *arguments: "off in this test")
    slow, b = run()
    assert a.host_kernels.own, "what was left to the host is said"
    if ours is not None:
        assert a.host_kernels.ours == ours
    assert [chunk.nll for chunk in a.chunks] == pytest.approx([chunk.nll for chunk in b.chunks], rel=1e-5)
    torch.testing.assert_close(fast.slots, slow.slots, rtol=1e-3, atol=1e-5)


def test_a_host_changed_between_runs_is_looked_at_again():
    memory = memory_on("llama")
    assert memory.memorize(text(), **SETTINGS).host_kernels.ours == ALL
    norm = memory.model.model.layers[0].input_layernorm
    norm.weight.requires_grad_(True)
    report = memory.memorize(text(), **SETTINGS).host_kernels
    assert "input_layernorm is not a plain norm" in report.own["residuals"]
    norm.weight.requires_grad_(False)
    assert memory.memorize(text(), **SETTINGS).host_kernels.ours == ALL


def test_the_pieces_read_the_weights_as_they_are():
    fast, slow = memory_on("llama"), memory_on("llama", attn_implementation="eager")
    reports = []
    for memory in (fast, slow):
        memory.memorize(text(), **SETTINGS)
        with torch.no_grad():
            memory.model.model.layers[0].input_layernorm.weight.mul_(1.5)
        memory.model.model.norm.weight.data = torch.full_like(memory.model.model.norm.weight, 0.5)
        reports.append(memory.memorize(text(), **SETTINGS))
    assert reports[0].host_kernels.ours == ALL
    assert [c.nll for c in reports[0].chunks] == pytest.approx([c.nll for c in reports[1].chunks], rel=1e-5)


@pytest.mark.parametrize("why", ["LOCAS_PROBE", "autocast", "hooks"])
def test_where_none_runs(why, monkeypatch):
    memory, ids = memory_on("llama"), text()
    if why == "LOCAS_PROBE":
        monkeypatch.setenv("LOCAS_PROBE", "0")
        memory = memory_on("llama")
    elif why == "hooks":
        memory.model.model.layers[0]._hf_hook = object()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        report = memory.memorize(ids, **SETTINGS)
    assert report.host_kernels.ours == () and why in report.host_kernels.own["host"]
