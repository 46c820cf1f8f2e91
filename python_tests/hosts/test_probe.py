"""The probe at attach: a host's causality and its layers' order are looked at, and nothing of it is left."""

import types

import pytest
import torch
from support.found_hosts import found_host
from support.helpers import TEXT, assert_same_host, random_ids, snapshot
from support.hosts import config_for, tiny
from torch import nn

import locas_ext as locas
from locas_ext.hosts.experts import ExpertBlock
from locas_ext.hosts.probe.recording import record

RUN = dict(window=24, stride=8, progress=False)
STILL = dict(RUN, learning_rate=0.0)


# ---- a recorded forward ---------------------------------------------------------------------------------------
def test_a_recording_holds_what_went_in_and_came_out_in_the_order_of_the_calls():
    class Inner(nn.Module):
        def forward(self, x, *, bias):
            return x.mul_(2) + bias, "not a tensor"

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.second, self.first = nn.Identity(), Inner(), Inner()

        def forward(self, input_ids, **kwargs):
            x = input_ids.float()
            for module in (self.first, self.second, self.first):
                x = module(x, bias=torch.ones(1))[0]
            return types.SimpleNamespace(logits=x)

    model = Outer()
    recording = record(model, torch.tensor([[3]]))
    assert [call.module for call in recording.calls] == [model, model.first, model.second, model.first]
    assert [call.input.item() for call in recording.of(model.first)] == [3.0, 15.0], "copied before the call changed it"
    assert [call.result.item() for call in recording.of(model.first)] == [7.0, 31.0]
    assert recording.of(model.first)[0].kwargs["bias"].item() == 1 and recording.of(model.unused) == []
    assert recording.logits.item() == 31
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(AttributeError):
        record(model, None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- nothing of it is left ------------------------------------------------------------------------------------
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.inference_mode])
def test_attach_leaves_host_and_generators_as_they_were(grad_mode):
    model = tiny("opt").train()  # with dropout
    model.model.decoder.layers[0].eval()
    before, generator, order = snapshot(model), torch.get_rng_state(), []
    for module in model.modules():
        module.train = lambda mode=True: order.append("train() was called")
    with grad_mode():
        memory = locas.attach(model, config_for("opt"))
    assert torch.equal(torch.get_rng_state(), generator) and order == []
    for module in model.modules():
        del module.train
    assert memory._attachment.probe.skipped is None and 0 < memory._attachment.probe.seconds < 60
    memory.detach()
    assert_same_host(model, before)


def test_a_forward_that_changes_the_host_is_undone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)
            self.longest = 0

        def forward(self, x):
            self.calls += 1
            self.longest, self.seen = max(self.longest, x.shape[1]), True
            self.register_buffer("last", x.sum(), persistent=False)
            return x

    model = tiny("llama")
    model.model.norm = nn.Sequential(Counting(), model.model.norm)
    locas.attach(model, config_for("llama")).detach()
    counting = model.model.norm[0]
    assert counting.calls == 0 and counting.longest == 0 and not hasattr(counting, "seen") and not hasattr(counting, "last")


# ---- when it does not run -------------------------------------------------------------------------------------
def test_the_probe_can_be_turned_off_and_the_status_says_so(monkeypatch):
    monkeypatch.setenv("LOCAS_PROBE", "0")
    model = tiny("llama")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    memory = locas.attach(model, config_for("llama"))
    assert calls == [] and memory._attachment.probe.skipped == "LOCAS_PROBE is 0"
    assert "the host was not probed: LOCAS_PROBE is 0" in memory.status()[0].windows
    report = memory.memorize(TEXT, on_divergence="ignore", **RUN)
    assert len(calls) == 1 + 1 + 2 * (len(report.chunks) - 1), "the first chunk twice, the others in two forwards, no more"


def test_a_host_that_cannot_run_yet_is_attached_with_a_warning():
    model = tiny("llama")
    broken = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("no kernel here")))
    before = snapshot(model)
    with pytest.warns(UserWarning, match="could not be probed.*ValueError: no kernel here"):
        memory = locas.attach(model, config_for("llama"))
    assert "no kernel here" in memory.status()[0].windows
    broken.remove()
    memory.memorize(TEXT, **RUN)
    memory.detach()
    assert_same_host(model, before, ("state", "requires_grad", "training", "config"))


def test_a_full_memory_ends_attaching(monkeypatch):
    model, full = tiny("llama"), torch.OutOfMemoryError("CUDA out of memory")
    before = snapshot(model)

    def refuses(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[1].mlp), "forward", refuses)
        with pytest.raises(torch.OutOfMemoryError):
            locas.attach(model, config_for("llama"))
    assert_same_host(model, before)
    locas.attach(model, config_for("llama"))


@pytest.mark.parametrize("model_type", ["bitnet", "qwen3_moe"])
@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_full_memory_while_an_ffn_is_looked_for_ends_attaching(model_type, call, monkeypatch):
    """The first call is the recorded one; in the others a block is tried."""
    model = found_host(model_type)
    block, calls = type(model.model.layers[0].mlp), []
    forward = block.forward

    def fills(self, *args, **kwargs):
        calls.append(self)
        if calls.count(self) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", fills)
    with pytest.raises(torch.OutOfMemoryError):
        locas.attach(model, locas.LocasConfig(rank=4))


def test_a_full_memory_while_routing_is_read_ends_initializing(monkeypatch):
    model = found_host("qwen3_moe")
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    monkeypatch.setattr(ExpertBlock, "_routing", fills_the_memory)
    with pytest.raises(torch.OutOfMemoryError):
        memory.initialize(TEXT)
    assert not memory.state.initialized


def fills_the_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


# ---- a gradient -------------------------------------------------------------------------------------------------
def test_a_host_through_whose_packed_weights_no_gradient_comes_back_is_refused():
    """Torch itself only warns of an operation without a backward, whose gradient it takes for zero."""

    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.out_features, self.in_features = linear.weight.shape
            self.weight = nn.Parameter((linear.weight.detach() * 100 + 128).round().to(torch.uint8), requires_grad=False)

        def forward(self, x):
            return torch.ops.locas_test.packed_linear(x, self.weight)

    library = torch.library.Library("locas_test", "FRAGMENT")
    library.define("packed_linear(Tensor x, Tensor weight) -> Tensor")
    library.impl("packed_linear", lambda x, weight: nn.functional.linear(x, (weight.float() - 128) / 100), "CPU")
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj = Packed(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(ValueError, match="no gradient comes back.*locas_test::packed_linear: an autograd kernel was not"):
        locas.attach(model, config_for("llama"))


# ---- causality ------------------------------------------------------------------------------------------------
def bidirectional(family):
    model = tiny(family)
    model.config.is_causal = False
    for layer in model.get_decoder().layers:
        layer.self_attn.is_causal = False
    return model


def sees_the_next_token():
    model = tiny("llama")
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + 0.1 * args[0].roll(-1, dims=1), *args[1:]))
    return model


def averages_the_text():
    model = tiny("gpt2")
    model.transformer.ln_f.register_forward_hook(lambda module, args, y: y + 0.5 * y.mean(1, keepdim=True))
    return model


NOT_CAUSAL = {
    "gemma3_text": lambda: tiny("gemma3_text", use_bidirectional_attention=True),
    "llama": lambda: bidirectional("llama"),
    "the next token": sees_the_next_token,
    "the mean": averages_the_text,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_host_whose_tokens_see_later_ones_is_refused(name, dtype):
    model = NOT_CAUSAL[name]().to(dtype)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is not causal"):
        locas.attach(model, config_for(model.config.model_type))
    assert_same_host(model, before)


def test_a_host_whose_sums_depend_on_chance_or_on_the_row_is_not_refused():
    """Only what follows the later tokens speaks against a host."""
    for noise in (lambda y: torch.randn_like(y), lambda y: torch.linspace(0, 1, len(y))[:, None, None] * torch.ones_like(y)):
        model = tiny("llama")
        model.model.norm.register_forward_hook(lambda module, args, y, noise=noise: y + 1e-5 * noise(y))
        assert locas.attach(model, config_for("llama"))._attachment.probe.skipped is None


# ---- the order of the layers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family, name", [("llama", "layers"), ("gemma2", "layers"), ("gpt2", "h"), ("opt", "layers")])
def test_a_contexts_forward_ends_at_the_layer_that_runs_last(family, name):
    model = tiny(family, num_hidden_layers=3)
    decoder = model.get_decoder()
    setattr(decoder, name, nn.ModuleList(reversed(getattr(decoder, name))))
    memory = locas.attach(model, config_for(family))
    assert memory._attachment.host.reading.writes == 3
    ran = []
    layers = getattr(decoder, name)
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: ran.append(module))
    report = memory.memorize(random_ids(40), **STILL)
    assert report.one_forward == []
    assert ran.count(layers[0]) > ran.count(layers[2]), "no context's forward ended early"
